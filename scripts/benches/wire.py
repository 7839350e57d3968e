"""What fewer bytes on the wire save, and what they cost in answers. Chapter 15; the paper names it in section 6.

    python scripts/bench.py wire                       the embedded model's documents, on the CPU
    python scripts/bench.py wire --model DIR           another checkpoint: changed answers and logits on the same texts

Each document is prefilled once. Then its rows go through each encoding and back into fresh blocks, and the answer is
decoded from there. Logits are compared along the exact answer, so that every encoding is asked the same.
"""

import argparse
import time
from dataclasses import dataclass, field, replace
from statistics import fmean, median

import torch

from benches import at_least_one
from minprfaas import load
from minprfaas.config import Encoding, SamplingParams
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.engine.engine import Engine
from minprfaas.engine.reference import pool_for
from minprfaas.engine.request import Request
from minprfaas.errors import ArgumentParser, UserError
from minprfaas.observe.tables import table
from minprfaas.scheduling.throughput import kv_throughput_gbps
from minprfaas.transport.encoding import Wire, codec_of

PARAMS = SamplingParams(max_tokens=16)
HEADERS = ["wire", "bytes a token", "KV, MiB", "Gbps", "encode ms", "decode ms", "right", "changed",
           "first changed token", "mean |Δ logit|", "largest"]
WIRES = [*(Wire(encoding) for encoding in Encoding), Wire(Encoding.BF16, state=Encoding.BF16)]


@dataclass
class Tally:
    """What one encoding did to the documents of one length."""

    nbytes: list[int] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    right: int = 0
    first_changed: list[int] = field(default_factory=list)
    mean_gap: list[float] = field(default_factory=list)
    largest_gap: float = 0.0


class Bench:
    """Two engines over one model: one prefills, the other decodes what crossed."""

    def __init__(self, model, tokenizer, tokens: int):
        self.model, self.tokenizer = model, tokenizer
        cache = replace(pool_for(model, [tokens + 2 * PARAMS.max_tokens]), prefix_cache=False)
        self.sender, self.receiver = (Engine(model, tokenizer, cache) for _ in range(2))

    def prefill(self, prompt: str) -> Request:
        """The whole prompt's state, held in the sender's blocks."""
        request = self.sender.add(self.sender.request("sent", self.tokenizer.encode(prompt), PARAMS, prefill_only=True))
        while self.sender.prefilling or self.sender.waiting:
            self.sender.step()
        return request

    @torch.inference_mode()
    def cross(self, sent: Request, wire: Wire, tally: Tally,
              wanted: list[int]) -> tuple[list[int], torch.Tensor]:
        """The answer after the wire, and the logits along `wanted` (without any: along the answer)."""
        prompt, arrived, specs = sent.token_ids[:sent.prompt_tokens], [], self.sender.layout.specs
        tally.nbytes.append(0)
        tally.encode_s.append(0.0)
        tally.decode_s.append(0.0)
        for layer, spec in enumerate(specs):
            data = self._read(sent, layer, len(prompt))
            entry = wire.entry(layer, 0, spec, len(prompt))
            if entry.encoding != Encoding.EXACT:
                codec = codec_of(spec, entry.encoding)
                encoded, seconds = timed(lambda: codec.encode(data), self.model.device)
                tally.encode_s[-1] += seconds
                data, seconds = timed(lambda: codec.decode(encoded), self.model.device)
                tally.decode_s[-1] += seconds
                tally.nbytes[-1] += encoded.numel()
            else:
                tally.nbytes[-1] += data.numel()
            arrived.append(data)

        answer = self._answer(prompt, sent.token_ids[-1], arrived)
        return answer, self._logits(prompt, wanted or answer, arrived)

    def _answer(self, prompt: list[int], first: int, arrived: list[torch.Tensor]) -> list[int]:
        request = self._receive(prompt, arrived)
        self.receiver.admit_remote(request, first)
        while self.receiver.has_work:
            self.receiver.step()
        return request.output_ids

    def _logits(self, prompt: list[int], answer: list[int], arrived: list[torch.Tensor]) -> torch.Tensor:
        """`[answer tokens - 1, vocab]`: what the model would say after each of them."""
        request = self._receive(prompt, arrived)
        kvcache = self.receiver.kvcache
        kvcache.advance(request.cache, prompt)
        if not kvcache.reserve(request.cache, len(prompt) + len(answer)):
            raise UserError("no room for the answer in the pool")
        token_ids = torch.tensor([answer[:-1] or answer], device=self.model.device)
        logits = self.model(token_ids, kvcache.state([request.cache]))[0].float()
        self.receiver.abort(request)
        return logits

    def _receive(self, prompt: list[int], arrived: list[torch.Tensor]) -> Request:
        request = self.receiver.request("arrived", prompt, PARAMS)
        if not self.receiver.reserve_remote(request):
            raise UserError("no room for the prompt in the pool")
        for layer, data in enumerate(arrived):
            blocks = request.cache.block_tables[self.receiver.layout.group_of_layer[layer].index]
            self.receiver.kvcache.pool.write_bytes(layer, blocks, 0, len(prompt), data)
        return request

    def _read(self, sent: Request, layer: int, end: int) -> torch.Tensor:
        blocks = sent.cache.block_tables[self.sender.layout.group_of_layer[layer].index]
        return self.sender.kvcache.pool.read_bytes(layer, blocks, 0, end).reshape(-1)


def timed(work, device: torch.device) -> tuple[torch.Tensor, float]:
    """What `work` returns, and its seconds."""
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    settle()
    began = time.perf_counter()
    result = work()
    settle()
    return result, time.perf_counter() - began


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory (default: the embedded model)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--documents", type=at_least_one, default=4, help="of each length (4)")
    parser.add_argument("--lengths", type=at_least_one, nargs="+", default=[1024, 4096, 8192],
                        help="tokens of a document")
    args = parser.parse_args(argv)
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.device)
    for length in args.lengths:
        print_length(Bench(model, tokenizer, length + 64), length, args)
    print("Gbps: what one such prefill needs (eq. 1) at the rate measured in this run. first changed token: of the "
          "earliest change, from 0.")
    return 0


def print_length(bench: Bench, length: int, args: argparse.Namespace) -> None:
    """Prefill the documents of one length, send each through every encoding, print the table."""
    tallies, prefill_s, leads = {wire: Tally() for wire in WIRES}, [], []
    for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + args.documents):
        document = make_document(seed, length, bench.tokenizer.encode)
        question = document.questions[0]
        sent = bench.prefill(document.prompt(question))
        prefill_s.append(sent.prefill_ended_at_s - sent.prefill_started_at_s)
        exact, exact_logits = [], None
        for wire, tally in tallies.items():
            answer, logits = bench.cross(sent, wire, tally, exact)
            if wire == Wire():
                exact, exact_logits = answer, logits
                best, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
                leads += (best - second).tolist()
            gap = (logits - exact_logits).abs()
            tally.mean_gap.append(float(gap.mean()))
            tally.largest_gap = max(tally.largest_gap, float(gap.max()))
            tally.right += bench.tokenizer.decode(answer[:-1]).strip() == question.answer
            if answer != exact:
                shorter = min(len(answer), len(exact))
                tally.first_changed.append(next((at for at in range(shorter) if answer[at] != exact[at]), shorter))
        bench.sender.release(sent)
    print(f"{args.documents} documents of {length:,} tokens, {args.dtype}, prefill {median(prefill_s):.2f} s each; the "
          f"drawn token leads the next by {median(leads):.2g} logits (median)\n")
    print(table(HEADERS, [row(wire, tally, length, prefill_s) for wire, tally in tallies.items()]))
    if not tallies[Wire()].right:
        print("  right: none even where nothing is encoded, so that only what changed says anything of this model")
    print()


def row(wire: Wire, tally: Tally, length: int, prefill_s: list[float]) -> list[str]:
    """One line of the table."""
    nbytes, documents = fmean(tally.nbytes), len(tally.nbytes)
    is_coded = wire != Wire()
    return [wire.name, f"{nbytes / length:,.0f}", f"{nbytes / 2**20:.2f}",
            f"{kv_throughput_gbps(nbytes, median(prefill_s)):.4f}",
            f"{median(tally.encode_s) * 1e3:.1f}" if is_coded else "–",
            f"{median(tally.decode_s) * 1e3:.1f}" if is_coded else "–", f"{tally.right} of {documents}",
            f"{len(tally.first_changed)} of {documents}", str(min(tally.first_changed)) if tally.first_changed else "–",
            f"{fmean(tally.mean_gap):.2g}", f"{tally.largest_gap:.2g}"]
