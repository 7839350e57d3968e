"""Other libraries on the cases of `bench.py gpu` and `bench.py cpu`, each in a process of its own.

A process holds one library and one model of random weights. It is told a case a line and answers with milliseconds, so
that ours and theirs can take turns and neither meets the other's settings, memory or crash. A library is taken as it is
installed, or as its checkout lies in the folder of `--peers`; nothing of it is part of this project.
"""

import importlib.util
import inspect
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 300.0  # for one answer, a model's compilation included
STEPS = 24
MODULES = {  # each library's module, and where it lies in a checkout
    "Transformers": ("transformers", "transformers/src"),
    "gpt-fast": ("model", "gpt-fast"),
    "flash-linear-attention": ("fla", "flash-linear-attention"),
    "nano-vllm": ("nanovllm", "nano-vllm"),
}
OF_FAMILY = {"llama": ("gpt-fast", "Transformers"), "qwen3": ("nano-vllm", "Transformers"),
             "kimi_linear": ("Transformers",)}


AS_STARTED = dict(os.environ)  # the benchmark was; what it sets for itself is not for them


class Peer:
    """One library with one model, in a process of its own until `close`. A failure is its last, and said once."""

    _said: set[str] = set()

    def __init__(self, name: str, shape: dict, device: str, directory: str | None):
        self.name = name
        setup = json.dumps({"shape": shape, "device": device, "directory": directory})
        self._process = subprocess.Popen([sys.executable, __file__, name, setup], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=AS_STARTED)

    def ms(self, case: dict) -> float | None:
        """Milliseconds of one case; None once the peer has failed."""
        if self._process.poll() is not None:
            return None
        reply = self._ask(case)
        if "ms" in reply:
            return reply["ms"]
        line = f"  {self.name} {reply['error']}"
        if line not in self._said:
            print(line, flush=True)
            self._said.add(line)
        self.close()
        return None

    def _ask(self, case: dict) -> dict:
        try:
            print(json.dumps(case), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], DEADLINE_S)[0]:
                return {"error": f"failed: no answer in {DEADLINE_S:g} s"}
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": f"failed: its process ended with {self._process.wait()}"}

    def close(self) -> None:
        """End its process, and with it whatever it holds of the device."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def answer() -> None:
    """The peer's process: a case a line on standard input, an answer a line on what was standard output."""
    name, setup = sys.argv[1], json.loads(sys.argv[2])
    del sys.path[0]  # this folder, whose modules have names that a library might have, too
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    module, folder = MODULES[name]
    if setup["directory"]:  # all of them: Transformers uses flash-linear-attention's kernels where they are
        sys.path[:0] = [str(Path(setup["directory"]).resolve() / folder) for _, folder in MODULES.values()]
    time_case = None
    for line in sys.stdin:
        if importlib.util.find_spec(module) is None:
            reply = {"error": "is absent: it is neither installed nor in the folder of --peers"}
        else:
            try:
                time_case = time_case or DRIVERS[name](setup["shape"], setup["device"])
                reply = {"ms": time_case(**json.loads(line))}
            except BaseException as error:  # whatever it is: the benchmark goes on without this peer
                reply = {"error": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(reply), file=answers, flush=True)


def transformers(shape: dict, device: str) -> Callable[..., float]:
    """Eager, with its dynamic cache; a context's requests are alike, and one is prefilled for all where that goes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"pad_token_id": None, **shape})  # its own may be beyond a small vocabulary
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()

    @torch.inference_mode()
    def prefill(tokens: int) -> float:
        prompt = torch.ones(1, tokens, dtype=torch.int64, device=device)
        return timed(lambda: model(prompt, use_cache=True, logits_to_keep=1), 3 if device == "cuda" else 1, device)

    @torch.inference_mode()
    def decode(batch: int, context: int) -> float:
        prompt = torch.ones(1, context, dtype=torch.int64, device=device)
        out = model(prompt, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        if batch > 1 and all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
            cache.batch_repeat_interleave(batch)
        elif batch > 1:
            cache = model(prompt.expand(batch, -1), use_cache=True, logits_to_keep=1).past_key_values
        token = torch.ones(batch, 1, dtype=torch.int64, device=device)

        def step() -> None:
            token.copy_(model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1))

        return timed(step, 12, device)

    return by_phase(prefill=prefill, decode=decode)


def gpt_fast(shape: dict, device: str) -> Callable[..., float]:
    """Compiled and captured as its generate.py does; the steps follow each other without waiting for their tokens."""
    import model as theirs
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask

    torch._inductor.config.coordinate_descent_tuning = True
    args = theirs.ModelArgs(
        block_size=8192, vocab_size=shape["vocab_size"], n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"], n_local_heads=shape["num_key_value_heads"], dim=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"], rope_base=shape["rope_theta"])
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = theirs.Transformer(args).eval().requires_grad_(False)

    def logits(token, position, blocks):
        if blocks is None:  # before it had FlexAttention, at the end of 2024
            return model(token, position)
        mask = blocks[:, :, position // blocks.BLOCK_SIZE[0]]
        mask.mask_mod, mask.seq_lengths = blocks.mask_mod, (1, model.max_seq_length)
        return model(mask, token, position)

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def next_token(token, position, blocks):
        return logits(token, position, blocks)[:, -1].argmax(dim=-1, keepdim=True)

    @torch.no_grad()
    def decode(batch: int, context: int) -> float:
        with torch.device(device), sdpa_kernel(SDPBackend.MATH):  # as theirs: the compiler writes the attention
            model.setup_caches(batch, context + 2 * STEPS)
            token, position = torch.ones(batch, 1, dtype=torch.int64), torch.tensor([context])
            blocks = None
            if "mask" in inspect.signature(model.forward).parameters:
                length = model.max_seq_length
                blocks = create_block_mask(lambda b, h, query, key: query >= key, 1, 1, length, length, device)

            def steps() -> None:
                nonlocal token
                for _ in range(STEPS):
                    token = next_token(token, position, blocks).clone()
                    position.add_(1)

            steps()
            return timed(steps, 1, device, warm_up=0) / STEPS

    return by_phase(decode=decode)


def flash_linear_attention(shape: dict, device: str) -> Callable[..., float]:
    """Its Triton kernel for KDA's core, in its own number formats: bfloat16, with decays in float32."""
    import torch
    from fla.ops.kda import chunk_kda
    from torch.nn.functional import normalize

    def kda(tokens: int) -> float:
        heads, dim = shape["num_heads"], shape["head_dim"]
        q, k, v, g = (torch.randn(1, tokens, heads, dim, device=device) for _ in range(4))
        q, k, v = normalize(q, dim=-1).bfloat16(), normalize(k, dim=-1).bfloat16(), v.bfloat16()
        beta = torch.rand(1, tokens, heads, device=device).bfloat16()
        memory = torch.zeros(1, heads, dim, dim, device=device)
        with torch.inference_mode():
            return timed(lambda: chunk_kda(q, k, v, -g.abs(), beta, scale=1.0, initial_state=memory,
                                           output_final_state=True), 10, device)

    return by_phase(kda=kda)


def nano_vllm(shape: dict, device: str) -> Callable[..., float]:
    """Its model runner: prepared inputs, captured graphs and sampling, without its scheduler."""
    import torch
    from nanovllm.config import Config
    from nanovllm.engine.model_runner import ModelRunner
    from nanovllm.engine.sequence import Sequence

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps({**shape, "dtype": "bfloat16"}))
        config = Config(directory, max_num_batched_tokens=32768, max_model_len=32768 + 256, max_num_seqs=64,
                        gpu_memory_utilization=0.8)
    runner = ModelRunner(config, 0, [])
    for parameter in runner.model.parameters():
        parameter.requires_grad_(False).normal_(0, 0.02)

    def requests(batch: int, tokens: int) -> list:
        blocks, found = -(-(tokens + 2 * STEPS) // config.kvcache_block_size), []
        for number in range(batch):
            found.append(Sequence([1] * tokens))
            found[-1].block_table = list(range(number * blocks, (number + 1) * blocks))
            found[-1].num_scheduled_tokens = tokens
        return found

    def prefill(tokens: int) -> float:
        (request,) = requests(1, tokens)
        return timed(lambda: runner.run([request], True), 3, device)

    def decode(batch: int, context: int) -> float:
        running = requests(batch, context)
        for request in running:  # it looks for the newest token in the last block of the table
            request.block_table = request.block_table[:request.num_blocks]
        return timed(lambda: runner.run(running, False), 12, device)

    return by_phase(prefill=prefill, decode=decode)


def by_phase(**phases: Callable[..., float]) -> Callable[..., float]:
    """One function of a case, whose `phase` chooses among these."""
    return lambda phase, **sizes: phases[phase](**sizes)


def timed(work: Callable[[], object], repeats: int, device: str, warm_up: int = 2) -> float:
    """Median milliseconds of `work` until the device is done with it. A CPU's first turn is as good as its third."""
    import torch

    times, warm_up = [], warm_up if device == "cuda" else 0
    for _ in range(warm_up + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[warm_up:])


DRIVERS = {"Transformers": transformers, "gpt-fast": gpt_fast, "flash-linear-attention": flash_linear_attention,
           "nano-vllm": nano_vllm}

if __name__ == "__main__":
    answer()
