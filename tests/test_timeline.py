"""A timeline is a file that Perfetto opens: Chrome trace events, one track a name, processes merged on one clock.

Chapter 08.
"""

import errno
import json
import os
import threading
import time

import pytest
from test_transport_outbox import CHUNK, open_outbox, send
from transport_support import DEADLINE_S, Cargo, connected, wait_until

from minprfaas.config import LineConfig, LinkConfig
from minprfaas.errors import UserError
from minprfaas.files import OutputFile, write_whole, written_whole
from minprfaas.observe.timeline import Timeline, timeline_json
from minprfaas.transport.wan.frames import Kind, StreamRecord
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.line import EmulatedLine


def test_spans_instants_and_counters_become_trace_events_with_named_tracks(tmp_path):
    timeline = Timeline("datacenter A")
    timeline.span("lane 0 send", "layer 3", 1.5, 1.75, tokens=64)
    timeline.instant("lane 0 send", "acknowledged", 2.0)
    timeline.counter("link", {"egress_gbps": 0.9}, 2.5)
    write_whole(tmp_path / "out.json", timeline_json(timeline.events(), Timeline("datacenter B").events()))
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    names = {(event["tid"], event["args"]["name"]) for event in events if event["ph"] == "M"}
    assert names == {(0, "datacenter A"), (0, "datacenter B"), (1, "lane 0 send"), (2, "link")}
    span, instant, counter = (event for event in events if event["ph"] != "M")
    assert (span["ph"], span["tid"], span["ts"], span["dur"], span["args"]) == ("X", 1, 1.5e6, 0.25e6, {"tokens": 64})
    assert (instant["ph"], instant["tid"], instant["ts"]) == ("i", 1, 2e6)
    assert (counter["ph"], counter["args"]) == ("C", {"egress_gbps": 0.9})
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "no temporary file stays behind"


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    output = OutputFile(path)  # opened when a run begins
    assert path.read_text() == "old"
    output.close()  # the run ended without anything to write
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("out.json", "old")]
    with pytest.raises(UnicodeEncodeError):  # a write that breaks off, as on a full disk
        write_whole(path, "x" * 100_000 + "\ud800")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("out.json", "old")]
    write_whole(path, "new")
    assert path.read_text() == "new"


class Turns(Lane):
    """Lane 0 sends its chunks only when lane 1 has sent one, so that both have some. Notes which lane sent what."""

    sent: set[tuple[str, str]]
    lane_1_has_sent: threading.Event

    def post(self, frame):
        if frame.header.kind == Kind.CHUNK:
            if self.index == 0:
                assert self.lane_1_has_sent.wait(DEADLINE_S)
            else:
                self.lane_1_has_sent.set()
            self.sent.add((f"a-b lane {self.index} send", frame.header.label))
        return super().post(frame)


def test_what_a_library_writes_takes_its_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "figure.png"
    with written_whole(path) as partial:
        partial.write_text("old")
    with pytest.raises(UserError, match="figure.png cannot be written: No space left"), written_whole(path) as partial:
        partial.write_text("half of the n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_chunk_is_drawn_on_the_lane_that_sent_it():
    Turns.sent, Turns.lane_1_has_sent = set(), threading.Event()
    timeline, there, cargo = Timeline("a"), Timeline("b"), Cargo()
    with connected(LinkConfig(lanes=2, chunk_bytes=4096), sender_lanes=Turns, timeline=timeline,
                   receiver_timeline=there) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        stream.finish(DEADLINE_S)

    def drawn(timeline):
        events = timeline.events()
        tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        return {(tracks[event["tid"]], event["name"]) for event in events if event["ph"] == "X"}

    assert drawn(timeline) <= Turns.sent
    wait_until(lambda: {track for track, _ in drawn(timeline)} == {"a-b lane 0 send", "a-b lane 1 send"})
    wait_until(lambda: drawn(there) == {(track.replace("send", "receive"), name) for track, name in Turns.sent})


def test_a_sample_is_drawn_beside_the_spans():
    timeline, stream = Timeline("a"), StreamRecord(1)
    outbox = open_outbox(timeline=timeline)
    send(outbox, stream)
    send(outbox, stream)
    outbox.next_frame(1)
    outbox.settle([1])
    later_s = time.monotonic() + 1000.0
    outbox.tick(later_s)
    outbox.tick(later_s)  # none is due
    (sample,) = outbox.stats().samples
    (counter,) = (event for event in timeline.events() if event["ph"] == "C")
    assert counter["args"] == {"egress Gbps": sample.gbps, "queued MB": CHUNK / 1e6,
                               "acknowledged after ms": sample.ack_delay_s * 1e3}
    assert sample.gbps == pytest.approx(CHUNK * 8 / 1000 / 1e9, rel=0.02) and sample.ack_delay_s > 0


def test_what_the_emulated_line_carries_is_drawn_as_long_as_it_occupies_it():
    timeline, line, stream = Timeline("a"), EmulatedLine(LineConfig(gbps=0.008)), StreamRecord(1)  # 1 MB/s
    line.begin(0.0)
    outbox = open_outbox(line=line, timeline=timeline)
    send(outbox, stream)
    frame = outbox.next_frame(1)
    outbox.settle([frame.header.seq])
    span, instant = (event for event in timeline.events() if event["ph"] in "Xi")
    assert (span["name"], span["args"].keys()) == ("CHUNK", {"waited_ms"}) and 0 < span["dur"] <= 1001
    assert instant["name"] == frame.header.label
