"""`python -m minprfaas plan`: what it prints, what it refuses, and that it needs no torch. Chapter 10."""

import json
import subprocess
import sys

import pytest
import torch

from minprfaas.__main__ import main
from minprfaas.scheduling.paper_case import h20_profile, h200_profile
from minprfaas.scheduling.profiles import Profile

KEYS = ["threshold", "n_prfaas", "n_p", "n_d", "theta_prfaas", "theta_pdp", "theta_pdd", "lambda_max", "ratio",
        "ttft_mean_s", "ttft_p90_s", "offloaded_fraction", "mean_offloaded_tokens", "egress_gbps"]


@pytest.fixture
def profiles(tmp_path):
    paths = [tmp_path / "h200.json", tmp_path / "h20.json"]
    for path, profile in zip(paths, (h200_profile(), h20_profile())):
        path.write_text(json.dumps(profile.to_json()))
    return [str(path) for path in paths]


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    output = capsys.readouterr()
    assert stop.value.code == 2 and not output.out
    return output.err


def test_the_papers_case_as_json_holds_table_6(capsys):
    result = planned(capsys, "--case", "paper")
    for deployment in ("prfaas_pd", "homogeneous", "naive", "least_loaded"):
        assert list(result[deployment]) == KEYS
    ours = result["prfaas_pd"]
    assert abs(ours["threshold"] - 19_400) <= 200 and (ours["n_prfaas"], ours["n_p"], ours["n_d"]) == (4, 3, 5)
    assert ours["offloaded_fraction"] == pytest.approx(0.496, abs=0.005)
    assert ours["egress_gbps"] == pytest.approx(13, abs=1.5)
    assert ours["mean_offloaded_tokens"] == pytest.approx(44_000, rel=0.03)
    assert (result["homogeneous"]["n_p"], result["homogeneous"]["n_d"]) == (9, 3)
    for deployment, ratio in (("prfaas_pd", 1.54), ("homogeneous", 1.00), ("naive", 1.16)):
        assert result[deployment]["ratio"] == pytest.approx(ratio, abs=0.02)
    assert result["homogeneous"]["theta_prfaas"] is None and result["naive"]["theta_pdp"] is None


def test_the_table_says_what_is_modelled_calibrated_and_not_the_papers(capsys):
    main(["plan", "--case", "paper"])
    screen = capsys.readouterr().out
    theta_pdp = next(line for line in screen.splitlines() if "Θ_pdp" in line)
    assert theta_pdp.count("calibrated") == 2 and screen.count("paper") > 3
    for words in ("modelled:", "calibrated:", "not in the paper", "one more PD instance", "twice the link"):
        assert words in screen


def test_equation_2_is_worked_from_table_3(capsys):
    cases = {(case["model"], case["tokens"], case["gpus"]): case["egress_gbps"] for case in planned(capsys, "--egress")}
    assert cases["MiniMax-M2.5", 32_768, 512] == pytest.approx(64 * 59.93)
    assert cases["Ring-2.5-1T", 131_072, 512] < 100 and cases["Ring-2.5-1T", 131_072, 10_000] == pytest.approx(1825)
    for arguments in (["--egress"], ["--case", "paper", "--egress"]):
        main(["plan", *arguments])
        assert "about 1.8 Tbps" in capsys.readouterr().out
    assert len(planned(capsys, "--case", "paper", "--egress")["egress"]) == 5


def test_ones_own_profiles_plan_ones_own_fleet(capsys, profiles):
    same = planned(capsys, "--profile", profiles[0], "--pd-profile", profiles[1])
    assert (same["plan"]["threshold"], same["plan"]["n_p"], same["binding_stage"]) == (19_400, 3, "prfaas compute")
    assert set(same["bounds"]) == {"prfaas compute", "prfaas egress", "pdp", "pdd"}
    thin = planned(capsys, "--profile", profiles[0], "--pd-profile", profiles[1], "--link-gbps", "4", "--n-p", "3")
    assert thin["plan"]["threshold"] > 19_400 and thin["plan"]["n_p"] == 3 and thin["plan"]["egress_gbps"] <= 4.001
    assert thin["sensitivity"]["twice the link"] > thin["plan"]["lambda_max"]
    larger = planned(capsys, "--profile", profiles[0], "--prfaas-instances", "8", "--pd-instances", "16")
    assert larger["plan"]["n_prfaas"] == 8 and larger["plan"]["n_p"] + larger["plan"]["n_d"] == 16


def test_without_prfaas_instances_nothing_is_said_of_what_they_would_be_worth(capsys, profiles):
    main(["plan", "--profile", profiles[0], "--prfaas-instances", "0"])
    assert "0 PrfaaS instances" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--prfaas-instances 2000", "--link-gbps 1000000"])
def test_the_largest_fleet_is_planned_though_it_could_not_be_one_larger(capsys, profiles, option):
    main(["plan", "--profile", profiles[0], "--threshold", "1000", "--n-p", "1", *option.split()])
    assert ("one more PrfaaS" not in capsys.readouterr().out) == ("prfaas" in option)


def test_lengths_come_from_a_formula_or_a_trace(capsys, profiles, tmp_path):
    short = planned(capsys, "--profile", profiles[0], "--lognormal", "7", "0.5", "128", "4096")
    assert short["plan"]["threshold"] <= 4096
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": i, "input_length": 700 + i, "output_length": 10, "hash_ids": [0, i + 1]} for i in range(50)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert 0 <= planned(capsys, "--profile", profiles[0], "--trace", str(trace))["plan"]["threshold"] <= 750


def test_a_plan_beyond_the_measured_points_says_that_it_extrapolates(capsys, profiles):
    main(["plan", "--profile", profiles[0], "--lognormal", "12", "1", "128", "1000000"])
    assert "extrapolated" in capsys.readouterr().out


def test_figures_2_5a_and_5b_are_drawn_and_nothing_half_written_stays(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the `plots` extra is not installed")
    planned(capsys, "--case", "paper", "--plots", str(tmp_path / "new" / "plots"))
    drawn = sorted(path.name for path in (tmp_path / "new" / "plots").iterdir())
    assert drawn == ["figure_2.png", "figure_5a.png", "figure_5b.png"]
    assert all((tmp_path / "new" / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(capsys, "--case", "paper", "--plots", str(tmp_path / "file"))


def test_without_matplotlib_plots_names_the_extra_to_install(capsys, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "python -m pip install matplotlib" in refused(capsys, "--case", "paper", "--plots", str(tmp_path))


@pytest.mark.parametrize("arguments, named", [
    (["--threshold", "200000"], "threshold 200000 is outside the lengths"),
    (["--threshold", "-1"], "threshold -1 is outside the lengths"),
    (["--n-p", "8"], "at least 0 and of at most 7"),
    (["--link-gbps", "-1"], "link bandwidth in Gbps is -1.0"),
    (["--prfaas-instances", "-2"], "number of PrfaaS instances is -2"),
    (["--pd-instances", "0"], "number of PD instances is 0"),
    (["--output-tokens", "nan"], "output tokens is nan"),
    (["--lognormal", "9", "-1", "1", "10"], "sigma is -1.0"),
    (["--lognormal", "9", "1", "1", "10", "--trace", "x"], "--trace and --lognormal"),
    (["--trace", "/nowhere/trace.jsonl"], "/nowhere/trace.jsonl"),
    (["--pd-profile", "/nowhere.json"], "/nowhere.json is missing"),
])
def test_a_mistake_gets_one_line_and_exit_status_2(capsys, profiles, arguments, named):
    error = refused(capsys, "--profile", profiles[0], *arguments)
    assert named in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_broken_profile_is_named_with_its_fault(capsys, tmp_path):
    path = tmp_path / "profile.json"
    for content, named in (("{", "cannot be read as JSON"), ("[]", "not an object"), ('{"points": []}', "missing key"),
                           (json.dumps({**h200_profile().to_json(), "gpu": 1}), "unknown key 'gpu'")):
        path.write_text(content)
        error = refused(capsys, "--profile", str(path))
        assert named in error and error.count("\n") == 1


def test_a_command_line_that_plans_nothing_says_what_to_give(capsys):
    for arguments in ([], ["--json"], ["--egress", "--plots", "out"]):
        error = refused(capsys, *arguments)
        assert "--case paper or --profile FILE" in error and error.count("\n") == 1


def test_the_papers_case_takes_no_fleet_of_ones_own(capsys):
    assert "--link-gbps goes with --profile" in refused(capsys, "--case", "paper", "--link-gbps", "10")


def test_planning_needs_no_torch():
    program = "import sys; from minprfaas.__main__ import main; main(['plan', '--case', 'paper']); " \
              "raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, timeout=60).returncode == 0


def test_somebody_elses_measurements_say_who_can_cross_a_thin_line(capsys):
    """On the 14.7 Gbps between their two sites most of what four instances add in the building crosses for the hybrid,
    and little of it for the dense model."""
    kept = {}
    for name in ("kimi-linear-48b-8xh100", "nemotron-nano-9b-4xh100", "qwen2.5-72b-8xh100"):
        result = planned(capsys, "--profile", name, "--link-gbps", "14.7")
        alone, near = result["without_prfaas"]["alone"], result["without_prfaas"]["in_the_building"]
        kept[name] = (result["plan"]["lambda_max"] - alone) / (near - alone)
    hybrid, small, dense = kept.values()
    assert hybrid > 0.6 and small > 0.5 and dense < 0.25
    main(["plan", "--profile", "qwen2.5-72b-8xh100", "--link-gbps", "14.7"])
    screen = capsys.readouterr().out
    assert "HarshavardhanK/Mooncake" in screen and "the line carries 0.3 of 4 such instances" in screen
    assert "kimi-linear-48b-8xh100" in refused(capsys, "--profile", "nope"), "what is shipped is named"


def test_what_inspect_says_of_a_token_is_what_others_have_measured():
    """Their KVCache counts attention rows only, so the state of fixed size is what `S_kv` has beyond it."""
    from minprfaas.config import StateKind
    from minprfaas.model.families import read_published
    from minprfaas.model.spec import kv_bytes, model_state_specs
    specs = model_state_specs(read_published("kimi-linear-48b"), "bfloat16")
    fixed = sum(spec.nbytes for spec in specs if spec.kind is StateKind.REQUEST)
    for point in Profile.read("kimi-linear-48b-8xh100").points:
        assert kv_bytes(specs, point.tokens) - fixed == point.kv_bytes


def test_fewer_bytes_of_a_row_leave_less_egress_and_state_of_one_size_as_it_was():
    from minprfaas.commands.plan import WIRE_SHARES
    from minprfaas.config import Encoding
    from minprfaas.scheduling import paper_case
    from minprfaas.transport.encoding import RowCodec
    shares = {name: RowCodec(Encoding(name), 576, torch.bfloat16).row_bytes / 1152
              for name in ("bf16", "fp8", "int8", "int4")}
    assert {one: share for names, share in WIRE_SHARES.items() for one in names.split(", ") if one != "exact"} == shares
    exact, half = paper_case.h200_profile(), paper_case.h200_profile().encoded(0.5)
    assert exact.encoded(1.0) == exact
    assert half.kv_bytes(0) == pytest.approx(exact.kv_bytes(0))
    saved = [exact.kv_bytes(tokens) - half.kv_bytes(tokens) for tokens in (8192, 16_384)]
    assert saved[1] == pytest.approx(2 * saved[0]) and 0 < saved[0] < exact.kv_bytes(8192) / 2
