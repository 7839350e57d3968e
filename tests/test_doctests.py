"""The examples in docstrings are true: every module that has one is run by doctest. Chapters 00 to 15."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITH_EXAMPLES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts)
                       for path in (ROOT / "minprfaas").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0 and found.failed == 0


def test_layouts_keys_frames_streams_and_the_throughput_model_are_explained_by_examples():
    assert {"minprfaas.kvcache.layout", "minprfaas.kvcache.ledger", "minprfaas.transport.wan.frames",
            "minprfaas.transport.streams", "minprfaas.scheduling.throughput"} <= {*WITH_EXAMPLES}
