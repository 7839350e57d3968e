"""`python -m minprfaas profile`: a profile that `plan` can read, or one line before any work is done. Chapter 10."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from minprfaas import UserError, load
from minprfaas.__main__ import main
from minprfaas.commands.profile import rising
from minprfaas.engine.measure import measure_decode
from minprfaas.model.spec import kv_bytes, model_state_specs
from minprfaas.scheduling.profiles import Profile, ProfilePoint

ROOT = Path(__file__).resolve().parent.parent
# 1 pass against 32, medians of 3: the longer prompt takes longer on the most loaded machine too, as a profile must say.
QUICK = "--lengths 16 500 --prefill-chunk 16 --repeats 3 --batch 2 --context 8".split()


def command(checkpoints, *arguments):
    return ["profile", "--model", str(checkpoints["kimi_linear"]), *QUICK, *map(str, arguments)]


def test_a_profile_is_printed_and_written_as_it_is_printed(checkpoints, tmp_path, capsys):
    out = tmp_path / "profile.json"
    main(command(checkpoints, "--out", out, "--json"))
    written = json.loads(out.read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert [point.tokens for point in Profile.from_json(written).points] == [16, 500]
    specs = model_state_specs(load(checkpoints["kimi_linear"])[0].config, "float32")
    assert [point["kv_bytes"] for point in written["points"]] == [kv_bytes(specs, 16), kv_bytes(specs, 500)]
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize("option, said", [("--lengths 8 1000000000", "the longest of --lengths is 1000000000"),
                                          ("--context 1000000000", "--context is 1000000000")])
def test_more_than_the_model_holds_is_said_before_anything_is_measured(checkpoints, capsys, option, said):
    with pytest.raises(SystemExit) as stop:
        main(command(checkpoints, *option.split()))
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "file/out.json", "nowhere/out.json"])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(checkpoints, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    out = tmp_path / place if place else tmp_path
    with pytest.raises(SystemExit) as stop:
        main(command(checkpoints, "--out", out))
    screen, error = capsys.readouterr()
    assert stop.value.code == 2 and screen == "" and error.count("\n") == 1
    assert error.startswith(f"error: {out} cannot be written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_at_the_end_keeps_the_profile_on_the_screen(checkpoints, tmp_path):
    """The limit on a file's size stands for the disk's end."""
    done = subprocess.run(
        [sys.executable, "-m", "minprfaas", *command(checkpoints, "--out", tmp_path / "out.json")], capture_output=True,
        text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)))
    assert done.returncode == 2 and "KVCache S_kv" in done.stdout, done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path}/out.json cannot be written: File too large"
    assert list(tmp_path.iterdir()) == []


def test_answers_that_end_before_a_step_could_be_timed_are_said_so(hybrid):
    with pytest.raises(UserError, match="decode of 2 requests ended before a step could be timed"):
        measure_decode(*hybrid, batch=2, context=511, steps=1)
    assert measure_decode(*hybrid, batch=2, context=500, steps=3) > 0


def test_a_failed_measurement_leaves_no_file_behind(checkpoints, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["profile", "--model", str(checkpoints["kimi_linear"]), "--lengths", "16", "600", "--out",
              str(tmp_path / "out.json")])
    assert "is 600; it must be a number of at most 511" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_points_that_a_busy_machine_made_cross_are_left_out_and_the_rest_is_a_profile():
    points = [ProfilePoint(tokens, tokens * 10.0, seconds)
              for tokens, seconds in ((512, 0.1), (1024, 0.9), (2048, 0.4), (3072, 0.8), (4096, 0.8))]
    assert [point.tokens for point in rising(points)] == [512, 2048, 4096]
    assert Profile("quiet enough", tuple(rising(points)), 0.1, 8).prefill_s(512) > 0
    assert rising(points[:1]) == points[:1]


@pytest.mark.parametrize("option", ["--repeats", "--batch", "--context", "--prefill-chunk"])
def test_an_option_out_of_range_is_named(checkpoints, capsys, option):
    with pytest.raises(SystemExit) as stop:
        main(command(checkpoints, option, "0"))
    assert stop.value.code == 2 and f"error: {option} is 0; it must be a whole number" in capsys.readouterr().err
