"""`python -m minprfaas simulate`: what it prints and writes, and what it refuses. Chapter 12."""

import json
import subprocess
import sys

import pytest

from minprfaas.__main__ import main
from minprfaas.scheduling.paper_case import h20_profile
from minprfaas.simulator import simulation
from minprfaas.simulator.arrivals import write_conversations


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "made_up.jsonl"
    write_conversations(path, 300, 3.0, seed=1)
    return str(path)


def simulated(capsys, *arguments: str) -> dict:
    assert main(["simulate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["simulate", *arguments])
    output = capsys.readouterr()
    assert stop.value.code == 2 and not output.out and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("arrivals", ["poisson", "mmpp", "diurnal"])
def test_each_kind_of_arrivals_serves_every_request(capsys, arrivals):
    result = simulated(capsys, "--arrivals", arrivals, "--requests", "300", "--day-s", "200")
    assert result["requests"] == 300 and result["failed"] == 0
    assert 0 < result["ttft_s"]["p50"] <= result["ttft_s"]["p90"] and result["inter_token_s"]["mean"] > 0.01
    assert set(result["utilization"]) == {"egress", "prfaas", "pdp", "pdd"}


def test_the_same_seed_repeats_and_another_differs(capsys):
    first, again, other = (simulated(capsys, "--requests", "200", "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_a_table_says_that_it_is_simulated(capsys):
    main(["simulate", "--requests", "100"])
    shown = capsys.readouterr().out
    assert "simulated" in shown and "TTFT p90, s" in shown and "t = 19,400 tokens" in shown
    for option in ("--least-loaded", "--prfaas-instances=0"):
        main(["simulate", "--requests", "100", option])
        assert ", no threshold. All" in capsys.readouterr().out


def test_policies_change_what_happens(capsys, trace):
    heavy = ("--requests", "1500", "--rate", "3.0")
    fixed, adaptive = simulated(capsys, *heavy, "--fixed-threshold"), simulated(capsys, *heavy)
    assert fixed["threshold_moves"] == 0 < adaptive["threshold_moves"]
    assert simulated(capsys, *heavy, "--least-loaded")["offloaded_fraction"] > fixed["offloaded_fraction"] + 0.1
    from_trace = ("--arrivals", "trace", "--trace", trace, "--cache-blocks", "500")
    aware, blind = simulated(capsys, *from_trace), simulated(capsys, *from_trace, "--cache-blind")
    assert aware["cached_fraction"] > 1.5 * blind["cached_fraction"] > 0


def test_weather_and_failures_are_applied(capsys, tmp_path):
    weather, traffic = tmp_path / "weather.json", ("--requests", "300", "--rate", "1.5")
    weather.write_text('[{"at_s": 20, "stall_s": 60}, {"at_s": 200, "gbps": 50}]')
    calm = simulated(capsys, *traffic)
    bad = simulated(capsys, *traffic, "--weather", str(weather), "--fail", "pd5:30:60")
    assert bad["ttft_s"]["p99"] > calm["ttft_s"]["p99"] + 20 and bad["routed_again"] > 0 and bad["requests"] == 300


def test_a_cluster_of_which_one_decode_node_is_left_goes_on_when_the_others_return(capsys):
    fleet = ("--requests", "300", "--rate", "1", "--prfaas-instances", "1", "--pd-instances", "2", "--convert-roles")
    result = simulated(capsys, *fleet, "--fail", "prfaas0:150:200", "--fail", "pd0:150:200")
    assert result["failed"] > 0 and result["requests"] + result["failed"] == 300


def test_requests_cut_a_trace_short(capsys, trace):
    assert simulated(capsys, "--arrivals", "trace", "--trace", trace)["requests"] == 300
    assert simulated(capsys, "--arrivals", "trace", "--trace", trace, "--requests", "50")["requests"] == 50
    assert simulated(capsys, "--cache-only", "--trace", trace, "--requests", "50")[0]["requests"] == 50


def test_ones_own_profile_fleet_and_threshold_are_used(capsys, tmp_path):
    (tmp_path / "h20.json").write_text(json.dumps(h20_profile().to_json()))
    fleet = f"--profile {tmp_path / 'h20.json'} --prfaas-instances 2 --pd-instances 4 --link-gbps 10 --output-tokens 64"
    policy = "--threshold 30000 --n-p 3 --requests 100 --fixed-threshold"
    result = simulated(capsys, *fleet.split(), *policy.split())
    assert result["final_threshold"] == 30_000 and result["requests"] == 100


def test_the_decision_log_and_the_pictures_are_written_whole(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    log, plots = tmp_path / "log.jsonl", tmp_path / "plots"
    main(["simulate", "--requests", "50", "--log", str(log), "--plots", str(plots)])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 50 and all(line["reason"] and line["route"] in ("prfaas", "pdp") for line in lines)
    names = ["simulation_link.png", "simulation_policy.png", "simulation_queue.png"]
    assert sorted(path.name for path in plots.iterdir()) == names
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_the_decision_log_is_json_where_nothing_can_be_offloaded(capsys, tmp_path):
    main(["simulate", "--requests", "5", "--prfaas-instances", "0", "--log", str(tmp_path / "log.jsonl")])
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["threshold"] is None


def test_a_log_that_cannot_be_written_is_found_first_and_a_failed_run_leaves_none(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "MAX_SIMULATED_S", 10.0)
    assert "/nowhere/log.jsonl cannot be written" in refused(capsys, "--log", "/nowhere/log.jsonl")
    assert "it is a directory" in refused(capsys, "--log", str(tmp_path))
    assert "after 10 simulated seconds" in refused(capsys, "--log", str(tmp_path / "log.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_cache_only_replays_the_trace_against_the_real_index(capsys, trace, tmp_path):
    rows = simulated(capsys, "--cache-only", "--trace", trace)
    requests = [json.loads(line)["hash_ids"] for line in open(trace)]
    seen, hits = set(), 0
    for hashes in requests:
        hits += len(seen.intersection(hashes))
        seen.update(hashes)
    assert rows[-1]["capacity_blocks"] is None and rows[-1]["hit_blocks"] == hits
    assert [row["hit_ratio"] for row in rows] == sorted(row["hit_ratio"] for row in rows)
    main(["simulate", "--cache-only", "--trace", trace])
    assert "unlimited" in capsys.readouterr().out


MISTAKES = {
    "--rate -1": "arrival rate is -1.0", "--load nan": "arrival rate is nan", "--requests 0": "--requests is 0",
    "--threshold 1e9": "--threshold 1e+09", "--threshold -5": "--threshold -5",
    "--n-p 9": "instances is 9; it must be a number of at least 0 and of at most 7",
    "--link-gbps -2": "bandwidth", "--fail pd1": "NODE:FROM:TO", "--fail pd77:1:2": "'pd77'",
    "--site prfaas-a=1:9 --fail prfaas0:1:2": "nodes are prfaas-a-0 to pd7",
    "--day-s 0": "--day-s is 0.0",
    "--arrivals trace": "--trace FILE", "--cache-only": "--trace FILE", "--trace x": "--trace FILE",
    "--weather /nowhere.json": "/nowhere.json is missing",
    "--cache-blocks -1": "--cache-blocks is -1",
    "--requests 3 --log /nowhere/log.jsonl": "/nowhere/log.jsonl", "--profile /nowhere.json": "/nowhere.json"}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2(capsys, arguments):
    assert MISTAKES[arguments] in refused(capsys, *arguments.split())


def test_a_broken_trace_names_its_line(capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert "bad.jsonl, line 1" in refused(capsys, "--arrivals", "trace", "--trace", str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty" in refused(capsys, "--cache-only", "--trace", str(tmp_path / "empty.jsonl"))


def test_simulating_needs_no_torch():
    code = ("import sys; from minprfaas.__main__ import main; main(['simulate', '--requests', '20']); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
