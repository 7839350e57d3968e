"""A timeline is a file that Perfetto opens: Chrome trace events, one track a name, processes merged on one clock.

Chapter 08.
"""

import json

from minprfaas.files import write_whole
from minprfaas.observe.timeline import Timeline, timeline_json


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


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    try:
        write_whole(path, timeline_json([{"not": {1, 2}}]))
    except TypeError:
        pass
    assert path.read_text() == "old"
