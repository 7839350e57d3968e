"""What can happen to a frame, a node or a peer in the middle of a request: faults of `fault_support`. Chapter 14."""

import contextlib
import os
import signal
from dataclasses import replace

from test_transport_recovery import FaultyLane

from minprfaas.cluster import messages
from minprfaas.cluster.envelope import Envelope, encode
from minprfaas.transport.wan.frames import HEADER_BYTES, Codec, Header, Kind, Slot
from minprfaas.transport.wan.handshake import NONCE_BYTES
from minprfaas.transport.wan.lanes import Lane

PREFILL, DECODE = 0, 1  # ranks: datacenter A, datacenter B
HELLO_TERMS = len(b"minprfaas link") + 8 + NONCE_BYTES  # where the terms begin in a hello
FOREIGN = 0xEE


class _Sent:
    """Stands for a send that never happens."""

    def wait(self, _):
        return True

    def is_completed(self):
        return True


class NodeLane(FaultyLane):
    """One lane of a node: everything that can happen to a frame below, and what can happen to a node, at that frame."""

    def __init__(self, site, *arguments):
        """`site` is a `fault_support.Site`."""
        self.site, self.muted = site, False
        super().__init__(*arguments)

    @property
    def fault(self):
        return self.site.fault if self.rank == self.site.side else None

    def exchange(self, data):
        self.site.words[self.index].append(data)
        return super().exchange(data)

    def transmit(self, tensor):
        if self.muted:
            return _Sent()
        is_chunk = tensor.numel() > HEADER_BYTES and tensor[5] == Kind.CHUNK
        if is_chunk and self.rank == PREFILL:
            self.site.chunks.append(tensor.clone())
        if self.fault is not None and self.fault.kind == "absurd" and not is_chunk:
            return Lane.transmit(self, tensor)
        return super().transmit(tensor)

    def _flip_payload(self, frame, draw):
        frame[draw.randrange(HEADER_BYTES, len(frame))] ^= 1 << draw.randrange(8)
        return self.keep(frame)

    def _flip_header(self, frame, draw):
        frame[draw.randrange(HEADER_BYTES)] ^= 1 << draw.randrange(8)
        return self.keep(frame)

    def _silence(self, frame, draw):
        for lane in self.site.links[self.rank]._supervisor._lanes if draw.random() < 0.5 else [self]:
            lane.muted = True
        return _Sent()

    def _cut_for_good(self, frame, _):
        self.site.line_is_cut = True
        self.cut()
        return _Sent()

    def _client_gone(self, frame, _):
        self.site.client_gone.set()
        return self.keep(frame)

    def _absurd_messages(self, frame, _):
        for message in ABSURD_MESSAGES[self.rank]:
            self.site.links[self.rank].send_message(message)
        return self.keep(frame)

    def _node_dies(self, frame, _):
        self.site.kill_prefill_node()
        return _Sent()

    def _node_restarts(self, frame, _):
        self.site.kill_prefill_node()
        self.site.start_prefill_node()
        return _Sent()

    def _wrong_secret(self, frame, _):
        return self._impostor(replace(self.site.identity, secret=b"a guess"))

    def _wrong_model(self, frame, _):
        return self._impostor(replace(self.site.identity, fingerprint=b"another model"))

    def _replayed_handshake(self, frame, _):
        words = {index: list(words) for index, words in self.site.words.items()}
        return self._impostor(self.site.identity, words=words)

    def _impostor(self, identity, words=None):
        self.site.start_impostor(identity, words)
        self.site.kill_prefill_node()
        return _Sent()

    def _killed(self, frame, _):
        os.kill(self.site.victim.pid, signal.SIGKILL)
        return self.keep(frame)


class ImpostorLane(Lane):
    """Shakes hands as whoever it says it is, or in recorded words, and sends chunks whatever the verdict."""

    def __init__(self, site, words, *arguments):
        self.site, self.recorded, self.said = site, words, 0
        super().__init__(*arguments)

    def exchange(self, data):
        if self.recorded is not None:
            word = self.recorded[self.index][self.said]
            data = word[:HELLO_TERMS] + data[HELLO_TERMS:] if self.said == 0 else word
        self.said += 1
        heard = super().exchange(data)
        if self.said == 4:
            self.site.writes_before_impostor = self.site.writes
            header = Header(Kind.CHUNK, seq=10_000, stream=self.site.stream_id, layer=0, start=0, end=1, nbytes=64)
            slot = Slot(64)
            slot.payload.fill_(FOREIGN)
            Codec(64).seal(header, slot.view)
            with contextlib.suppress(RuntimeError):  # who refuses hangs up, and may be quicker
                for frame in (slot.tensor, *self.site.chunks[-2:]):
                    FaultyLane.kept.append((self.transmit(frame), frame))
        return heard


ABSURD_ORDERS = [dict(stream_id=-1), dict(stream_id=2**64 - 1), dict(token_ids=[]), dict(token_ids=[10**9]),
                 dict(token_ids=[1] * 5000), dict(start=-1), dict(start=10**9), dict(snapshot_at=-16),
                 dict(snapshot_at=2**40), dict(snapshot_at=17), dict(snapshot_stream_id=-1),
                 dict(prefix_source="nobody", prefix_tokens=32), dict(prefix_tokens=-4), dict(prefix_tokens=2**40),
                 dict(sampling={"x": 1}), dict(id=""), dict(id="0"),
                 dict(sampling={"temperature": "hot"}), dict(sampling={"max_tokens": -1}), dict(stream_id="7")]


def _said(message, to="pd-0/pdd", sender="prfaas-0"):
    return encode(Envelope(to, sender, message))


def _ordered(**change):
    order = dict(id="absurd", stream_id=2**40, token_ids=list(range(1, 60)), start=0, snapshot_stream_id=2**41,
                 snapshot_at=48, prefix_source="", prefix_tokens=0, answered_tokens=0, sampling={},
                 deadline_s=60.0)
    return _said(messages.PrefillOrder(**{**order, **change}), "prfaas-0", "pd-0/pdd")


ABSURD_MESSAGES = {
    PREFILL: [_said(message) for message in (
        messages.PrefillProgress("0", tokens=-5), messages.PrefillProgress("0", tokens=2**63),
        messages.Failed("nobody", "", "lost"), messages.PrefixOrder(-1, [], -1),
        messages.PrefixOrder(1, [2**63 - 1], 0), messages.PrefixAbort(7), messages.Abort("0"),
        messages.Serve("1", [1], 0, {}, "x", 1.0, "", 0), messages.Shutdown(),
        messages.PrefillDone("0", first_token=10**6, cached_tokens=0, prefill_s=0.0, prefix_bytes=0,
                              sends_snapshot=False))]
    + [_said(message, "front") for message in (
        messages.Started("0", -1, -1, -1.0, -1.0, 9e99, -1.0, transfer_s=-1.0, hidden_s=9e99),
        messages.Started(["0"], 0, 0, 0, 0, 0, 0),
        messages.CacheNews(sequence=-7, keys=["no hex"], tokens=[10**9], inventory=True),
        messages.CacheNews(sequence=2**60, keys=["a", "b"], tokens=[1], inventory=False),
        messages.NodeReady("king", "abacus", num_blocks=-1), messages.Failed("0", "says who", "lost"),
        messages.TokenDrawn("0", 1, "x", "eos", ""), messages.Failed("0", "x", "y"))]
    + [_said(messages.TokenDrawn("0", 1, "x", "eos", ""), "front", "pd-0/pdd"), _said(messages.Shutdown(), "nobody"),
       dict(type="Surprise"), {"to": "front", "from": "prfaas-0", "type": "PrefillOrder", "fields": {"id": "0"}}, {}],
    DECODE: [_ordered(**{"id": f"absurd {number}", "stream_id": 2**40 + 2 * number, **change})
             for number, change in enumerate(ABSURD_ORDERS)]
    + [_said(message, "prfaas-0", "pd-0/pdd") for message in (
        messages.Abort("nobody"), messages.Goodbye(-1, ""), messages.PrefixOrder(3, [], 0))]
    + [dict(type="PrefillDone"), {}]}
