"""What a run of the cluster shows and keeps: answers as they come, the table, the JSON lines, the check. Chapter 13."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from minprfaas.cluster.journey import TTFT_PARTS, Journey
from minprfaas.cluster.topology import PD_SITE, PRFAAS_SITE
from minprfaas.commands.machines import machine_at
from minprfaas.config import Encoding, Role, StateKind
from minprfaas.engine.prompts import Prompt
from minprfaas.engine.reference import answer_prompts, logit_gap
from minprfaas.kvcache.layout import Layout
from minprfaas.model.spec import kv_bytes
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer
from minprfaas.observe.tables import human_bytes, table
from minprfaas.transport.encoding import Wire, row_codec

HEADERS = ("request", "tokens", "cached", "route", "KV crossed", "prefill s", "transfer s*", "hidden*", "TTFT s*",
           "tokens/s")
JOURNEY_FIELDS = ("id", "text", "route", "reason", "fallback", "finish_reason", "prompt_tokens", "cached_tokens",
                  "held_tokens", "kv_bytes", "prefix_bytes", "transfer_s", "hidden", "arrived_at_s", "finished_at_s",
                  "attempts", "recoveries")
TIE_GAP = 1e-3  # logits: two tokens this close may change places when sums are made in another order (float32)


def answer_lines(journey: Journey, prompt: Prompt) -> str:
    """One answer with its question, and whether it is right if the prompt knows."""
    if journey.error is not None:
        return f"[{journey.id}] no answer: {journey.error}"
    mark = ""
    if prompt.expected is not None:
        mark = "  ✓" if is_right(journey, prompt) else f"  ✗ expected {prompt.expected}"
    lines = prompt.text.rstrip().splitlines() or [prompt.text]
    questions = [line for line in lines if line.startswith("Question:")]
    asked = questions[-1] if questions else lines[-1]
    return f"[{journey.id}] {asked[:90]}\n    {journey.text.strip()}{mark}"


def is_right(journey: Journey, prompt: Prompt) -> bool:
    """Whether the answer is the expected one; one that had to go on need only begin with it."""
    text = journey.text.strip()
    return text.startswith(prompt.expected) if prompt.params.ignore_eos else text == prompt.expected


def json_row(journey: Journey, layout: Layout, link: str) -> dict:
    """One line of `--json`; times in seconds, and the parts of `ttft_s` add up to it. `link` says what is emulated."""
    row = {name: getattr(journey, name) for name in JOURNEY_FIELDS}
    row |= {"token_ids": journey.output_ids, "error": str(journey.error) if journey.error else None, "link": link,
            "kv_bytes_without_cache": kv_bytes(layout.specs, journey.prompt_tokens),
            "prefill_node": journey.decision.node if journey.decision else None,
            "decode_node": journey.decision.decode_node if journey.decision else None}
    for part in TTFT_PARTS:
        row[part] = getattr(journey, part) if journey.error is None else None
    row["tokens_per_s"] = _tokens_per_s(journey)
    return row


def answer_table(journeys: Sequence[Journey]) -> str:
    """The table of a run, a row a request."""
    rows = []
    for journey in journeys:
        away = journey.route == Role.PRFAAS.value
        rows.append([
            journey.id, journey.prompt_tokens, journey.cached_tokens, journey.route or "–",
            human_bytes(journey.kv_bytes) if away else "–", f"{journey.prefill_s:.2f}",
            f"{journey.transfer_s:.2f}" if away else "–", f"{journey.hidden:.0%}" if away else "–",
            f"{journey.ttft_s:.2f}" if journey.error is None else "–", f"{_tokens_per_s(journey):.1f}"])
    return table(HEADERS, rows)


def notes(journeys: Sequence[Journey], layout: Layout) -> list[str]:
    """What the table cannot say: requests that came back, increments, prefixes that were shipped."""
    lines = []
    for journey in journeys:
        if journey.fallback is not None:
            lines.append(f"{journey.id} was offloaded and came back: {journey.fallback}")
        if journey.route == Role.PRFAAS.value and journey.held_tokens:
            whole = kv_bytes(layout.specs, journey.prompt_tokens)
            lines.append(f"{journey.id}: B held {journey.held_tokens:,} of its tokens, so "
                         f"{human_bytes(journey.kv_bytes)} crossed instead of {human_bytes(whole)}")
        if journey.prefix_bytes:
            lines.append(f"{journey.id} began with a cached prefix from {journey.decision.shipment.source} "
                         f"({human_bytes(journey.prefix_bytes)})")
    return lines


def wire_between(args: argparse.Namespace) -> Wire:
    """How KVCache crosses from the PrfaaS datacenter to the PD one."""
    away, here = machine_at(args, PRFAAS_SITE), machine_at(args, PD_SITE)
    formats = f"{away.dtype} in datacenter A and {here.dtype} in B" if away.dtype != here.dtype else ""
    return Wire(Encoding(args.wire), formats, away.block_tokens == here.block_tokens, Encoding(args.wire_state))


def wire_share(layout: Layout, wire: Wire) -> float:
    """The share of their bytes in which the rows of token state cross."""
    specs = [spec for spec in layout.specs if spec.kind is not StateKind.REQUEST]
    exact, encoded = (sum(row_codec(spec, one).row_bytes for spec in specs) for one in (Encoding.EXACT, wire.rows))
    return encoded / exact if specs else 1.0


def lossy_wire(layout: Layout, wire: Wire) -> str | None:
    """What a wire does to what crosses, in words; None where all of it arrives to the last bit."""
    rows = [row_codec(spec, wire.rows) for spec in layout.specs if spec.kind is not StateKind.REQUEST]
    is_state_kept = wire.state is Encoding.EXACT
    if not wire.recast and is_state_kept and all(row.is_exact for row in rows):
        return None
    crossing = []
    if wire.recast or not is_state_kept:
        crossing.append(f"request-level state crosses in {'float32' if is_state_kept else wire.state.value}")
    if wire.rows is not Encoding.EXACT:
        share = wire_share(layout, wire)
        crossing.append(f"rows of attention state cross in {wire.rows.value}, {share:.0%} of their bytes")
    caches = f"caches are {wire.recast}: " if wire.recast else ""
    return f"{caches}{', '.join(crossing)}; numbers arrive rounded: offloaded answers may differ from exact ones"


def check(journeys: Sequence[Journey], prompts: Sequence[Prompt], model: Transformer, tokenizer: Tokenizer,
          prefill_chunk: int, is_lossy: bool = False) -> tuple[list[str], bool]:
    """Recompute every answer in this process alone and compare token by token. Returns lines to print, and whether all
    is well.

    A request that was offloaded and whose KVCache did not cross has failed, however right its answer is (rule 8). An
    answer that departs from the reference where two tokens are as good as equally likely is no damage, but it is said.
    Behind a lossy wire an offloaded answer may change, and those that continue it with it; the others may not.
    """
    reference = answer_prompts(model, tokenizer, prompts, prefill_chunk=prefill_chunk, progress=True)
    verdicts: dict[str, Verdict] = {}
    for journey, prompt, output in zip(journeys, prompts, reference, strict=True):
        verdict = _verdict(journey, output.token_ids, model)
        if verdict is None:
            continue
        history = verdicts.get(prompt.after)
        was_rounded = journey.route == Role.PRFAAS.value or (history is not None and history.kind is Departure.CHANGED)
        if is_lossy and verdict.kind in (Departure.DIFFERENT, Departure.TIE) and was_rounded:
            verdict = replace(verdict, kind=Departure.CHANGED)
        verdicts[journey.id] = verdict
    same = len(reference) - len(verdicts)
    lines = [f"{same} of {len(reference)} answers are identical, token by token, to the single-process reference."]
    for kind in Departure:
        found = [verdict for verdict in verdicts.values() if verdict.kind is kind]
        if found:
            lines.append(f"{kind.value}: " + "; ".join(verdict.words for verdict in found))
    changed = [verdict for verdict in verdicts.values() if verdict.kind is Departure.CHANGED]
    gaps = [verdict.gap for verdict in changed if verdict.gap is not None]
    if gaps:
        lines.append(f"The largest gap where one changed: {max(gaps):.2g} between the reference's logits of the two "
                     "tokens.")
    return lines, all(verdict.kind in (Departure.TIE, Departure.CHANGED) for verdict in verdicts.values())


class Departure(Enum):
    """How an answer departs from the reference, in the words of the screen; only the last two are damage."""

    TIE = "Ties of two tokens, which another order of the same sums decides"
    CHANGED = "Changed by the rounding on the wire"
    DIFFERENT = "Different"
    FAILED = "Failed"


@dataclass(frozen=True)
class Verdict:
    """Why an answer is not the reference's, in words."""

    words: str
    kind: Departure
    gap: float | None = None  # of the reference's logits where the answers part


def _verdict(journey: Journey, wanted: list[int], model: Transformer) -> Verdict | None:
    """None for an answer that is the reference's, and came the way that it says."""
    if journey.error is not None:
        return Verdict(f"{journey.id}: {journey.error}", Departure.FAILED)
    if journey.route == Role.PRFAAS.value and journey.kv_bytes == 0:
        return Verdict(f"{journey.id}: its route was prfaas, and no KVCache crossed", Departure.FAILED)
    if journey.output_ids == wanted:
        return None
    if journey.length_limit == "pool" and wanted[:len(journey.output_ids)] == journey.output_ids:
        return Verdict(f"{journey.id}: right as far as it goes, and cut short by a pool too small for the whole answer",
                       Departure.FAILED)
    gap = _gap_where_they_part(model, journey, wanted)
    if gap is not None and gap < TIE_GAP:
        return Verdict(f"{journey.id}: logits {gap:.1e} apart", Departure.TIE, gap)
    words = f"{journey.id}: another answer" + (f", logits {gap:.2g} apart" if gap is not None else "")
    return Verdict(words, Departure.DIFFERENT, gap)


def _gap_where_they_part(model: Transformer, journey: Journey, wanted: list[int]) -> float | None:
    """How far apart the reference's logits of the two tokens are where the answers part. None where one only ends
    before the other (a pool too small for the whole answer ends it early)."""
    for position, (drawn, right) in enumerate(zip(journey.output_ids, wanted)):
        if drawn != right:
            before = journey.token_ids[:journey.prompt_tokens + position]
            return logit_gap(model, before, drawn, right)
    return None


def _tokens_per_s(journey: Journey) -> float:
    """Of the answer after its first token."""
    decode_s = journey.finished_at_s - journey.first_token_at_s
    return (len(journey.output_ids) - 1) / decode_s if decode_s > 0 and journey.output_ids else 0.0
