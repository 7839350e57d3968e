"""Mixers whose state has one size (GDN, Lightning, Ling's KDA): two forms, one function; and MLA's options.

Chapter 02.
"""

import pytest
import torch
import torch.nn.functional as F

from minprfaas.config import RopeConfig
from minprfaas.model.delta import delta_rule_chunked, delta_rule_recurrent
from minprfaas.model.gdn import GDNConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import Positions
from minprfaas.model.lightning import LightningConfig, lightning_chunked, lightning_recurrent
from minprfaas.model.mla import MLAConfig
from minprfaas.model.state import ContiguousLayerState

CLOSE = dict(atol=1e-4, rtol=1e-4)
HIDDEN = 32
MIXERS = {
    "gdn": GDNConfig(num_k_heads=2, num_v_heads=6, k_dim=8, v_dim=12),
    "gdn by key head": GDNConfig(num_k_heads=2, num_v_heads=2, k_dim=8, v_dim=12, conv_kernel=3, by_key_head=True),
    "lightning": LightningConfig(head_dim=8, slopes=(0.9, 0.1, 0.0), silu=True, by_head=True),
    "lightning, norms and rope": LightningConfig(head_dim=8, slopes=(0.9, 0.01), qk_norm=True, rope=RopeConfig(100.0),
                                                 scale=8**-0.5, norm_groups=4),
    "kda, bounded": KDAConfig(num_heads=3, head_dim=8, one_step_gates=True, lower_bound=-5.0),
    "mla": MLAConfig(3, 16, 8, 4, 12, rope=RopeConfig(100.0), q_lora_rank=20, head_gate=True, bias=True),
}


def random_heads(tokens, heads=3, k_dim=16, v_dim=16):
    """q, k, v and a memory, 2 requests."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, tokens, heads, dim, generator=generator) for dim in (k_dim, k_dim, v_dim))
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, torch.randn(2, heads, k_dim, v_dim, generator=generator)


def built(name):
    """The mixer with weights that matter, and 200 tokens for 2 requests."""
    torch.manual_seed(0)
    mixer = MIXERS[name].build(HIDDEN, 1e-6)
    for place, parameter in mixer.named_parameters():  # norms near 1, and slow decays: what came before matters
        mean = 1.0 if "norm" in place else -2.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, mean, parameter.shape[-1] ** -0.5)
    return mixer.requires_grad_(False), torch.randn(2, 200, HIDDEN)


def passes(mixer, x, lengths, snapshots_in_first=()):
    """The outputs of passes of these lengths, and the state they leave."""
    state, outputs, start = ContiguousLayerState(mixer.config.state_spec("float32"), 2, "cpu"), [], 0
    for number, new in enumerate(lengths):
        state.snapshot_offsets = snapshots_in_first if number == 0 else ()
        positions = Positions(torch.full((2,), start), new)
        outputs.append(mixer(x[:, start : start + new], positions, state))
        start += new
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("tokens", [2, 63, 64, 65, 130])
def test_the_delta_rule_with_one_decay_a_head_is_the_same_in_both_forms(tokens, strength):
    q, k, v, memory = random_heads(tokens, v_dim=24)
    generator = torch.Generator().manual_seed(1)
    g = -strength * torch.rand(2, tokens, 3, 1, generator=generator)
    beta = torch.rand(2, tokens, 3, generator=generator)
    expected, expected_memory = delta_rule_recurrent(q, k, v, g, beta, memory)
    out, after, _ = delta_rule_chunked(q, k, v, g, beta, memory)
    torch.testing.assert_close((out, after), (expected, expected_memory), **CLOSE)
    every_channel = delta_rule_chunked(q, k, v, g.expand_as(k), beta, memory)
    torch.testing.assert_close((out, after), every_channel[:2], **CLOSE)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 130])
def test_lightning_attention_is_the_same_in_both_forms(tokens):
    q, k, v, memory = random_heads(tokens)
    slopes = torch.tensor([0.0, 0.05, 0.92])
    expected, expected_memory = lightning_recurrent(q, k, v, slopes, memory)
    out, after, before = lightning_chunked(q, k, v, slopes, memory)
    torch.testing.assert_close((out, after), (expected, expected_memory), **CLOSE)
    assert len(before) == -(-tokens // 64) and torch.equal(before[0], memory)


@pytest.mark.parametrize("name", MIXERS)
def test_passes_of_any_length_give_what_one_pass_gives(name):
    mixer, x = built(name)
    whole = mixer(x, Positions(torch.zeros(2, dtype=torch.int64), 200), None)
    out, state = passes(mixer, x, [1, 1, 70, 1, 127])
    torch.testing.assert_close(out, whole, **CLOSE)
    for tensor, expected in zip(state.tensors, passes(mixer, x, [200])[1].tensors):
        torch.testing.assert_close(tensor, expected, **CLOSE)
    changed = x.clone()
    changed[:, 120] += 1
    moved = mixer(changed, Positions(torch.zeros(2, dtype=torch.int64), 200), None) - whole
    assert moved[:, :120].abs().max() < 1e-5 and moved[:, 129].abs().max() > 1e-6  # causal, and it remembers


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "mla"])
def test_a_snapshot_inside_a_pass_is_the_state_of_a_pass_that_ends_there(name):
    mixer, x = built(name)
    state = passes(mixer, x, [200], snapshots_in_first=(64, 192, 200))[1]
    assert sorted(state.snapshots) == [64, 192, 200]
    for offset, snapshot in state.snapshots.items():
        for tensor, expected in zip(snapshot, passes(mixer, x, [offset])[1].tensors, strict=True):
            torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)


def test_lings_decay_is_bounded():
    mixer, x = built("kda, bounded")
    decay = mixer._log_decay(100 * mixer.get_submodule(mixer.JOINED[3])(x))
    assert decay.min() >= -5.0 and decay.min() < -4.9 and decay.max() <= 0
