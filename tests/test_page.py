"""The page of a run holds what the run wrote, loads nothing, and says one line of files that are none of ours.

Chapter 13.
"""

import json

import pytest

from minprfaas.__main__ import main
from minprfaas.errors import UserError
from minprfaas.observe.page import page
from minprfaas.observe.timeline import Timeline, timeline_json


def row(id="doc-1", **changes):
    whole = {"id": id, "route": "prfaas", "reason": "2,000 uncached > t=1,024", "text": "An answer",
             "prompt_tokens": 2000, "cached_tokens": 0, "kv_bytes": 4096, "arrived_at_s": 100.0, "finished_at_s": 103.5,
             "route_s": 0.1, "queue_s": 0.2, "prefill_s": 1.5, "transfer_exposed_s": 0.2, "admit_s": 0.0, "ttft_s": 2.0,
             "hidden": 0.9, "transfer_s": 1.0, "link": "emulated", "error": None}
    return {**whole, **changes}


def data_of(text):
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def events():
    timeline = Timeline("A: PrfaaS")
    timeline.span("prefill", "layer 0", 100.5, 101.0, request="doc-1#1", tokens="0-1024")
    timeline.span("prefill", "layer 0", 101.5, 101.8, request="doc-1#1", tokens="1024-2000")
    timeline.instant("streams", "stream opened", 100.9, stream=7, request="doc-1#1")
    timeline.span("lane 0", "stream 7 layer 0 tokens 0-600", 101.0, 101.2)
    timeline.span("lane 1", "stream 7 layer 0 tokens 600-1024", 101.1, 101.4)
    timeline.span("lane 1", "stream 8 layer 0 tokens 0-600", 101.1, 101.4)  # nobody said whose it is
    timeline.counter("a:b", {"egress Gbps": 0.5, "queued MB": 1.0}, 101.0)
    return json.loads(timeline_json(timeline.events()))["traceEvents"]


def test_times_begin_with_the_first_arrival_and_layers_carry_what_was_computed_and_sent():
    data = data_of(page([row(), row("doc-2", arrived_at_s=99.0)], events(), "Run <one>"))
    first, second = data["requests"]
    assert (first["arrived_at_s"], first["finished_at_s"], second["arrived_at_s"]) == (1.0, 4.5, 0.0)
    assert first["layers"] == [{"layer": 0, "computed": [[1.5, 2.0], [2.5, 2.8]], "sent": [[2.0, 2.4]]}]
    assert second["layers"] == []
    assert data["lines"] == [{"name": "out of A: PrfaaS, over the link a:b", "points": [[2.0, 0.5, 1.0]]}]


def test_the_page_is_whole_in_itself_and_what_a_model_says_cannot_break_out_of_it():
    text = page([row(text="</script><script>alert(1)</script>", id='"><b>')], [], "Run <one>")
    assert "<title>Run &lt;one&gt;" in text and text.count("</script>") == 2
    assert data_of(text)["requests"][0]["text"] == "</script><script>alert(1)</script>"
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_command_writes_it_and_names_what_is_wrong(tmp_path, capsys):
    rows, timeline, out = tmp_path / "run.jsonl", tmp_path / "timeline.json", tmp_path / "new" / "page.html"
    rows.write_text(json.dumps(row()) + "\n\n" + json.dumps(row("b", ttft_s=None, error="deadline: passed")) + "\n")
    timeline.write_text(json.dumps({"traceEvents": events()}))
    assert main(["report", "--json", str(rows), "--timeline", str(timeline), "--out", str(out)]) == 0
    assert "deadline: passed" in out.read_text() and str(out) in capsys.readouterr().out
    for content, said in (("", "no request to report"), ("[1]", "is a JSON list"), ('{"id": 1}', "has no 'route'"),
                          ("{", "cannot be read"), (json.dumps(row(kv_bytes="x")), "kv_bytes"),
                          (json.dumps(row(hidden=float("nan"))), "is not finite"),
                          (json.dumps(row(["a"])), "id is ['a']")):
        rows.write_text(content)
        with pytest.raises(SystemExit) as stop:
            main(["report", "--json", str(rows), "--out", str(out)])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    rows.write_text(json.dumps(row()))
    for event in ({"ph": "X", "name": "layer norm", "ts": 1, "dur": 2, "args": {"request": "a#1"}},
                  {"ph": "X", "name": "layer 1"}, {"ph": "i", "name": "stream opened", "args": [7]},
                  {"ph": "C", "name": "x", "args": {"egress Gbps": "much"}, "pid": 1, "ts": None},
                  {"name": "process_name", "pid": [1], "args": {"name": "a"}}):
        timeline.write_text(json.dumps({"traceEvents": [event]}))
        with pytest.raises(SystemExit) as stop:
            main(["report", "--json", str(rows), "--timeline", str(timeline), "--out", str(out)])
        assert stop.value.code == 2 and "timeline" in capsys.readouterr().err, event
    with pytest.raises(SystemExit) as stop:
        main(["report", "--json", str(rows), "--out", str(rows / "below" / "page.html")])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: {rows / 'below'} cannot be made: ")
    with pytest.raises(UserError, match="no request"):
        page([], [], "Run")
