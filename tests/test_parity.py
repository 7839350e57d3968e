"""Every family against the logits that Hugging Face Transformers computes from the same small checkpoints.

Chapters 01 and 02. `scripts/make_parity_fixtures.py` made the fixtures, with the library; it is not needed here.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.families import FAMILIES, read_config
from minprfaas.model.state import ContiguousState

PARITY = Path(__file__).parent / "fixtures" / "parity"
FIXTURES = sorted(path.parent.name for path in PARITY.glob("*/config.json"))
WITHIN = dict(atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_and_greedy_tokens_are_those_of_hugging_face_transformers(name):
    """The whole prompt at once, then ten tokens decoded one by one from the state that the prompt left."""
    directory, expected = PARITY / name, load_file(PARITY / f"{name}.expected.safetensors")
    model = load_checkpoint(directory, read_config(directory), torch.float32, "cpu")
    prompt, tokens = expected["prompt"][None], expected["tokens"]
    torch.testing.assert_close(model(prompt)[0], expected["logits"], **WITHIN)

    state = ContiguousState(model.config, "float32")
    drawn = [model(prompt, state, last_only=True)[0, -1].argmax()]
    state.advance(prompt.shape[1])
    for token, logits in zip(tokens, expected["decode_logits"]):
        ours = model(token.view(1, 1), state)[0, -1]
        torch.testing.assert_close(ours, logits, **WITHIN)
        drawn.append(ours.argmax())
        state.advance(1)
    assert torch.stack(drawn).tolist() == tokens.tolist()


def test_every_family_has_a_fixture():
    assert {read_config(PARITY / name).family for name in FIXTURES} == set(FAMILIES)
