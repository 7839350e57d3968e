"""How a live cluster is doing, for a screen while it runs and for the tables at its end. Chapter 13; paper 3.4.3."""

from collections.abc import Collection, Sequence
from statistics import fmean, quantiles

from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.journey import TTFT_PARTS, Journey
from minprfaas.cluster.messages import NodeFigures
from minprfaas.config import Role
from minprfaas.observe.board import bar
from minprfaas.observe.tables import human_bytes, table
from minprfaas.scheduling.control import Action, NewThreshold
from minprfaas.scheduling.roles import RoleChange

NODE_HEADERS = ("node", "role", "computes", "load", "prefill tok/s", "decode tok/s", "free", "cached", "in use")
PART_NAMES = ("route", "queue", "prefill", "exposed transfer", "admission, first token", "TTFT")
NOTHING_YET = NodeFigures(0.0, 0.0, 0, 0, 0, 0, 0)


class Watch:
    """Follows one front end. `journeys` are those of this run, ended or not."""

    def __init__(self, front: FrontEnd, journeys: Collection[Journey], now_s: float):
        self.moves: list[str] = []  # of the threshold, with their reasons
        self.role_changes: list[str] = []
        self._front, self._journeys, self._began_at_s = front, journeys, now_s
        self._at_first = dict(front.figures)
        self._looks: dict[str, tuple[NodeFigures, NodeFigures]] = {}  # the last two that differ, by node
        self._at_last: dict[str, tuple[str, float | None]] = {}  # role and load of each node that was there at the end

    def take(self, actions: list[Action], now_s: float) -> list[str]:
        """What the control plane's loops have done; returns what is worth a line."""
        lines = []
        for action in actions:
            after = f"after {now_s - self._began_at_s:.1f} s"
            if isinstance(action, NewThreshold):
                self.moves.append(f"{after}: {action.threshold:,.0f} tokens: {action.reason}")
                lines.append(f"threshold     {self.moves[-1]}")
            elif isinstance(action, RoleChange):
                self.role_changes.append(f"{after}: {action.node} becomes {action.role.value}: {action.reason}")
                lines.append(f"role change   {self.role_changes[-1]}")
        return lines

    # While it runs

    def screenful(self, now_s: float) -> list[str]:
        """All of it, one screen."""
        rows = [self._node_row(name, *self._last_two(name)) for name in sorted(self._front.ready)]
        lines = ["", *table(NODE_HEADERS, rows).splitlines(), "", f"  line      {self._line(now_s)}",
                 f"  threshold {self._front.plane.threshold:,.0f} tokens; " + (self.moves or ["it has not moved"])[-1]]
        if self.role_changes:
            lines.append(f"  roles     {self.role_changes[-1]}")
        return [*lines, f"  requests  {self._requests()}"]

    def plain(self, now_s: float) -> str:
        """The same in a line."""
        utilizations = []
        for name in sorted(self._front.ready):
            before, newest = self._last_two(name)
            utilizations.append(f"{name} {self._front.ready[name].role} {_share(before, newest)}")
        return (f"{now_s - self._began_at_s:.0f} s: {self._requests()}; {', '.join(utilizations)}; "
                f"line {self._line(now_s)}; threshold {self._front.plane.threshold:,.0f}")

    def bars(self, now_s: float, prompt_tokens: int, answer_tokens: int) -> list[str]:
        """Instead of a screenful, where so much is to do: a bar a phase, and the end of the text that is written."""
        elapsed_s, journeys = now_s - self._began_at_s, [*self._journeys]
        prefilled = sum(journey.prefilled_tokens for journey in journeys)
        received_bytes = sum(journey.received_bytes for journey in journeys)
        expected_bytes = sum(journey.expected_bytes for journey in journeys)
        drawn = sum(len(journey.output_ids) for journey in journeys)
        writing = [journey.text for journey in journeys if journey.text and not journey.is_finished]
        text = writing[-1][-40:].replace("\n", " ") if writing else ""
        return [bar("prefill   ", prefilled, prompt_tokens, "tok", elapsed_s),
                bar("KV stream ", received_bytes, expected_bytes, "B", elapsed_s),
                bar("decode    ", drawn, answer_tokens, "tok", elapsed_s, text)]

    def _last_two(self, name: str) -> tuple[NodeFigures, NodeFigures]:
        newest = self._front.figures.get(name, NOTHING_YET)
        before, last = self._looks.get(name, (NOTHING_YET, NOTHING_YET))
        if newest is not last:
            before, last = (last, newest) if newest.up_s > last.up_s else (NOTHING_YET, newest)
            self._looks[name] = before, last
        return before, last

    def _node_row(self, name: str, before: NodeFigures, after: NodeFigures) -> list:
        elapsed_s = max(after.up_s - before.up_s, 1e-9)
        role, load = self._at_last.get(name) or self._now(name)
        return [name, role, _share(before, after), "drains" if load is None else round(load),
                round((after.prefilled_tokens - before.prefilled_tokens) / elapsed_s),
                round((after.decoded_tokens - before.decoded_tokens) / elapsed_s),
                after.free_blocks, after.cached_blocks, after.in_use_blocks]

    def _now(self, name: str) -> tuple[str, float | None]:
        return self._front.ready[name].role, self._front.plane.loads().get(name)

    def _line(self, now_s: float) -> str:
        plane = self._front.plane
        if not plane.nodes(Role.PRFAAS):
            return "no PrfaaS node"
        egress = plane.egress
        return (f"{egress.gbps * egress.utilization * 1000:,.1f} of {egress.gbps * 1000:,.0f} Mbit/s, "
                f"{human_bytes(egress.queued_bytes)} queued, {plane.regime(now_s)}")

    def _requests(self) -> str:
        ended = [journey for journey in self._journeys if journey.is_finished]
        failed = sum(journey.error is not None for journey in ended)
        begun = [journey.ttft_s for journey in self._journeys if journey.first_token_at_s]
        decoding = sum(journey.first_token_at_s > 0 for journey in self._journeys if not journey.is_finished)
        waiting = len(self._journeys) - len(ended) - decoding
        so_far = f"; TTFT mean {fmean(begun):.2f} s, P90 {p90(begun):.2f} s" if begun else ""
        return f"{waiting} waiting, {decoding} decoding, {len(ended) - failed} done, {failed} failed{so_far}"

    # At the end

    def end(self) -> None:
        """The nodes that are there now are those of the tables: when they are dismissed they are lost one by one."""
        self._at_last = {name: self._now(name) for name in self._front.ready}

    def tables(self, elapsed_s: float) -> str:
        """Where the time of the first tokens went, and what each stage did."""
        answered = [journey for journey in self._journeys if journey.is_finished and journey.error is None]
        before = {name: self._at_first.get(name, NOTHING_YET) for name in self._front.figures}
        rows = []
        for name, figures in sorted(self._front.figures.items()):
            if name in self._at_last:
                began = before[name] if figures.up_s > before[name].up_s else NOTHING_YET  # it is a new process
                rows.append(self._node_row(name, began, figures))
        tokens = sum(len(journey.output_ids) for journey in answered)
        crossed = sum(journey.kv_bytes for journey in self._journeys)
        lines = [ttft_table(answered), "", table(NODE_HEADERS, rows), "",
                 f"{len(answered) / elapsed_s:.2f} answers/s, {tokens / elapsed_s:.1f} answer tokens/s; "
                 f"{human_bytes(crossed)} of KVCache left the PrfaaS cluster, {crossed * 8e-6 / elapsed_s:.2f} Mbit/s"]
        for what, found in (("threshold moves", self.moves), ("role changes", self.role_changes)):
            lines.append(f"{what}: {len(found) or 'none'}")
            lines += [f"  {one}" for one in found]
        return "\n".join(lines)


def ttft_table(journeys: Sequence[Journey]) -> str:
    """Mean and P90 of each part; the means add up to the mean TTFT."""
    if not journeys:
        return "  no request has an answer"
    rows = []
    for name, part in zip(PART_NAMES, TTFT_PARTS, strict=True):
        values = [getattr(journey, part) for journey in journeys]
        rows.append([name, f"{fmean(values):.3f}", f"{p90(values):.3f}"])
    return table(("part of TTFT", "mean s", "P90 s"), rows)


def p90(values: Sequence[float]) -> float:
    """The value that nine in ten do not exceed."""
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def _share(before: NodeFigures, after: NodeFigures) -> str:
    elapsed_s = after.up_s - before.up_s
    return f"{(after.computed_s - before.computed_s) / elapsed_s:.0%}" if elapsed_s > 0 else "–"
