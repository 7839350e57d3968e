"""No number on the command line of `simulate` or `plan` hangs it or ends in a traceback: it runs, or is one line.

Chapters 10 and 12.
"""

import json

import pytest

from minprfaas.__main__ import main
from minprfaas.scheduling.paper_case import h20_profile
from minprfaas.simulator.arrivals import write_conversations

VALUES = ("0", "-1", "1", "5000", "1e-308", "1e-9", "0.5", "1e308", "inf", "-inf", "nan", "1000000", "1000000000",
          "1000000000000000", "1" + "0" * 400, "x", "")
FEW = "simulate --requests 50"
SIMULATE = {  # what is asked for beside the option
    "prfaas-instances": FEW, "pd-instances": FEW, "link-gbps": FEW, "output-tokens": FEW, "n-p": FEW, "threshold": FEW,
    "rate": FEW, "load": FEW, "seed": FEW, "requests": "simulate", "day-s": f"{FEW} --arrivals diurnal",
    "cache-blocks": "simulate --arrivals trace --trace TRACE", "speed": "simulate --arrivals trace --trace TRACE"}
OTHER_WAYS = ("--least-loaded --link-gbps", "--fixed-threshold --link-gbps", "--least-loaded --output-tokens",
              "--arrivals mmpp --rate", "--arrivals diurnal --rate", "--convert-roles --output-tokens")
PLAN = ("prfaas-instances", "pd-instances", "link-gbps", "output-tokens", "threshold", "n-p")
LOGNORMAL = ("9.9", "1", "128", "131072")
LONG_BUT_SOUND = {("simulate --requests", "1000000")}  # a minute, with a bar


def command_lines():
    for option, beside in SIMULATE.items():
        yield f"{beside} --{option}"
    for way in OTHER_WAYS:
        yield f"{FEW} {way}"
    for option in PLAN:
        yield f"plan --profile PROFILE --{option}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Words of the tables above that stand for files."""
    folder = tmp_path_factory.mktemp("extremes")
    write_conversations(folder / "trace.jsonl", 100, 3.0, seed=1)
    (folder / "h20.json").write_text(json.dumps(h20_profile().to_json()))
    return {"TRACE": str(folder / "trace.jsonl"), "PROFILE": str(folder / "h20.json")}


def runs_or_is_refused(capsys, files, words: list[str]) -> bool:
    """Whether it ran; asserts that it is one line and status 2 if not."""
    try:
        main([files.get(word, word) for word in words])
        output = capsys.readouterr()
        assert output.out and not output.err
        return True
    except SystemExit as stop:
        output = capsys.readouterr()
        assert stop.code == 2 and not output.out, words
        assert output.err.startswith("error: ") and output.err.count("\n") == 1 and len(output.err) < 600, words
        return False


@pytest.mark.parametrize("command_line", list(command_lines()))
def test_any_value_of_a_numeric_option_runs_or_is_refused_in_one_line(capsys, files, command_line):
    *beside, option = command_line.split()
    ran = [runs_or_is_refused(capsys, files, [*beside, f"{option}={value}"])
           for value in VALUES if (command_line, value) not in LONG_BUT_SOUND]
    assert any(ran) and not all(ran)


@pytest.mark.parametrize("place", range(4))
def test_any_value_of_a_length_distribution_runs_or_is_refused_in_one_line(capsys, files, place):
    for value in VALUES:
        numbers = [*LOGNORMAL[:place], value, *LOGNORMAL[place + 1:]]
        runs_or_is_refused(capsys, files, ["plan", "--profile", "PROFILE", "--lognormal", *numbers])


@pytest.mark.parametrize("value", VALUES)
def test_any_time_of_a_failure_runs_or_is_refused_in_one_line(capsys, files, value):
    for times in (f"{value}:100", f"1:{value}"):
        runs_or_is_refused(capsys, files, [*FEW.split(), f"--fail=prfaas0:{times}"])
