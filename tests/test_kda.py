"""KDA's two forms are one function: the recurrence, token by token, and the chunked form that prefill uses.

Chapter 02.
"""

from collections import defaultdict
from copy import deepcopy
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minprfaas.engine import prefill_graphs
from minprfaas.engine.prefill_graphs import (
    DeltaGraph, GraphedDeltaRule, GraphedMixer, compiled_segments, graph_delta_rules)
from minprfaas.model import delta_segments
from minprfaas.model.delta import delta_rule_chunked, delta_rule_recurrent, delta_rule_step
from minprfaas.model.delta_segments import CHUNK, by_tokens, delta_rule_in_segments, for_segments
from minprfaas.model.kda import KDA, KDAConfig
from minprfaas.model.layers import Positions
from minprfaas.model.state import ContiguousLayerState

CLOSE = dict(atol=1e-4, rtol=1e-4)


def inputs(tokens, decay, batch=2, heads=3, key_dim=16, value_dim=24, device="cpu"):
    """Random arguments with an initial memory. `decay`: mean log decay a token, or a function of the shape of g."""
    torch.manual_seed(tokens)
    q = F.normalize(torch.randn(batch, tokens, heads, key_dim), dim=-1)
    k = F.normalize(torch.randn(batch, tokens, heads, key_dim), dim=-1)
    v = torch.randn(batch, tokens, heads, value_dim)
    g = decay(q.shape) if callable(decay) else -2 * decay * torch.rand(q.shape)
    beta, memory = torch.rand(batch, tokens, heads), torch.randn(batch, heads, key_dim, value_dim)
    return tuple(x.to(device) for x in (q, k, v, g, beta, memory))


def by_chunks(q, k, v, g, beta, memory):
    """What `delta_rule_in_segments` takes; padding neither writes nor decays."""
    padding = (0, 0, 0, 0, 0, -q.shape[1] % CHUNK)
    q, k, v, g, beta = (F.pad(x, padding) for x in (q, k, v, g.to(q.dtype), beta[..., None]))
    return *for_segments(q, k, v, g, beta[..., 0]), memory


def in_segments(*arguments):
    """`delta_rule_in_segments` of what the other forms take, with its outputs as they give them."""
    outputs, memory, before = delta_rule_in_segments(*by_chunks(*arguments))
    return by_tokens(outputs, before.scale, arguments[0].shape[1]), memory, before


def from_faint_to_total(shape):
    """Decays of every strength side by side: from exp(-0.0003) to exp(-3000) a token and channel."""
    return -(torch.rand(shape) * 16 - 8).exp()


def memories_wiped_now_and_then(shape):
    """No decay at all, and -1000 in every channel at one token in ten."""
    return torch.where(torch.rand(shape[:3])[..., None] < 0.1, -1000.0, 0.0).expand(shape)


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.3, 3.0, 30.0, 500.0, from_faint_to_total, memories_wiped_now_and_then])
@pytest.mark.parametrize("tokens", [1, 15, 64, 65, 200])
def test_the_chunked_form_equals_the_recurrence_however_strong_the_decay(tokens, decay):
    arguments = inputs(tokens, decay)
    expected, memory = delta_rule_recurrent(*arguments)
    out, memory_after, _ = delta_rule_chunked(*arguments)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(memory_after, memory, **CLOSE)


@pytest.mark.parametrize("decay", [0.0, 0.3, 30.0, 500.0, from_faint_to_total, memories_wiped_now_and_then])
@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_in_segments_the_rule_is_the_same_in_float32_and_nearly_in_float16(monkeypatch, tokens, decay):
    monkeypatch.setattr(delta_segments, "SEGMENT_TOKENS", 256)
    q, k, v, *others = inputs(tokens, decay, batch=1)
    exact = delta_rule_recurrent(*(x.double() for x in (q, k, v, *others)))
    torch.testing.assert_close(in_segments(q, k, v, *others)[:2], [x.float() for x in exact], **CLOSE)
    for ours, expected in zip(in_segments(q.half(), k.half(), v, *others), exact):
        assert ((ours - expected).norm() / expected.norm()).item() < 3e-3


def test_every_segment_of_every_pass_looks_alike_to_a_compiler(monkeypatch):
    """What is compiled for one pass must serve all: after a warm-up nothing is compiled any more."""
    monkeypatch.setattr(delta_segments, "SEGMENT_TOKENS", 256)
    seen = defaultdict(set)

    def watched(piece):
        def watching(*tensors):
            seen[piece.__name__].add(tuple((x.shape, x.stride(), x.dtype) for x in tensors))
            return piece(*tensors)
        return watching

    watching = partial(delta_rule_in_segments, compiled=watched)
    watching(*by_chunks(*inputs(256, 0.3, batch=1)))
    first = {name: set(forms) for name, forms in seen.items()}
    for tokens in (512, 768):
        watching(*by_chunks(*inputs(tokens, 0.3, batch=1)))
    assert [len(seen[name]) for name in ("of_tokens", "inverse_inside")] == [1, 1] and seen == first


def test_matrices_that_one_pass_has_filled_serve_the_next(monkeypatch):
    monkeypatch.setattr(delta_segments, "SEGMENT_TOKENS", 256)
    kept = partial(delta_rule_in_segments, matrices_of=cache(delta_segments.zero_matrices))
    q, k, *others = inputs(400, 0.3, batch=1)
    kept(*by_chunks(q, torch.full_like(k, torch.nan), *others))  # nor does a broken prompt leave anything
    for decay in (0.0, 30.0, 0.3):
        given = by_chunks(*inputs(400, decay, batch=1))
        assert all(map(torch.equal, kept(*given)[:2], delta_rule_in_segments(*given)[:2]))


def test_a_models_graphs_keep_matrices_for_each_segment_and_share_them_with_no_other_model():
    ours, others = (compiled_segments().keywords["matrices_of"] for _ in range(2))
    of_a_segment = [2, torch.float16, torch.device("cpu")]
    assert ours(0, *of_a_segment) is ours(0, *of_a_segment)
    assert len({matrix.data_ptr() for matrices_of, first in ((ours, 0), (ours, 16), (others, 0))
                for matrix in matrices_of(first, *of_a_segment)}) == 6


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-17, 2.0**17, 2.0**60])
def test_in_float16_no_value_is_too_large_or_too_small(scale):
    """The rule is linear in values and memory together: a power of two changes no digit of what comes out."""
    q, k, v, g, beta, memory = inputs(200, from_faint_to_total, batch=1)
    expected = in_segments(q.half(), k.half(), v, g, beta, memory)
    assert (torch.frexp(expected[2].scale)[0] == 0.5).all(), "powers of two"
    found = in_segments(q.half(), k.half(), v * scale, g, beta, memory * scale)
    for ours, other in zip([*found[:2], found[2][1]], [*expected[:2], expected[2][1]]):
        assert torch.isfinite(ours).all() and torch.equal(ours, other * scale)


@pytest.mark.parametrize("of_values, of_memory", [(2.0**20, 1.0), (1.0, 2.0**20)])
def test_in_float16_neither_values_nor_a_memory_overflow_beside_small_ones_of_the_other(of_values, of_memory):
    q, k, v, g, beta, memory = inputs(20, 0.3, batch=1)
    v, memory = v * of_values, memory * of_memory
    exact = delta_rule_recurrent(*(x.double() for x in (q, k, v, g, beta, memory)))
    for ours, expected in zip(in_segments(q.half(), k.half(), v, g, beta, memory), exact):
        assert ((ours - expected).norm() / expected.norm()).item() < 3e-3


@pytest.mark.parametrize("of_channels", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3, 30.0, from_faint_to_total, memories_wiped_now_and_then])
def test_the_decode_form_equals_the_recurrence_of_one_token(decay, of_channels):
    q, k, v, g, beta, memory = inputs(1, decay)
    arguments = q, k, v, g if of_channels else g[..., :1], beta, memory
    steps = delta_rule_step(*arguments[:-1], arguments[-1].clone())  # which puts the new memory in the old one's place
    for step, recurrence in zip(steps, delta_rule_recurrent(*arguments)):
        torch.testing.assert_close(step, recurrence, **CLOSE)


CPU_AND_CUDA = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@CPU_AND_CUDA
def test_a_graph_gives_the_delta_rule_of_every_pass_that_fits_into_it(monkeypatch, device):
    """A shorter pass comes after a longer one in the same graph, whose tokens must be gone from it."""
    monkeypatch.setattr(prefill_graphs, "STEP_TOKENS", 128)
    graphs, memory = {}, torch.cuda.graph_pool_handle() if device == "cuda" else None
    rule, memories = GraphedDeltaRule(delta_rule_chunked, graphs, memory), []
    for tokens in (128, 65, 100, 200, 64):
        arguments = inputs(tokens, 0.3, batch=1, device=device)
        begun = arguments[-1].clone()
        outputs, after, before = delta_rule_chunked(*arguments)
        with torch.inference_mode():
            given = rule(*arguments)
        torch.testing.assert_close(given[0], outputs, **CLOSE)
        memories += [(given[1], after), (arguments[-1], begun)]
        for number, expected in enumerate(before):
            torch.testing.assert_close(given[2][number], expected, **CLOSE)
    assert [room for _, room, *_ in graphs] == [128, 256]
    torch.testing.assert_close(*zip(*memories), **CLOSE)  # each remains its pass's own
    graphs.clear()
    with torch.inference_mode():
        rule(*inputs(63, 0.3, batch=1)), rule(*inputs(128, 0.3, batch=2))
    rule(*inputs(128, 0.3, batch=1))
    assert not graphs, "short and shared passes, and those outside inference, go as they were"


@CPU_AND_CUDA
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("options", [{}, dict(one_step_gates=True, lower_bound=-5.0, conv_kernel=2)])
def test_a_layer_around_a_graph_gives_what_it_gives_without(monkeypatch, device, options):
    """Two layers share the graph: what one was given is compared when the other has run. A shorter pass follows a
    longer one, whose tokens must be gone. Nothing is compiled, which would take a minute."""
    monkeypatch.setattr(prefill_graphs, "STEP_TOKENS", 128)
    monkeypatch.setattr(delta_segments, "SEGMENT_TOKENS", 128)
    torch.manual_seed(0)
    graphs, memory = {}, torch.cuda.graph_pool_handle() if device == "cuda" else None
    config = KDAConfig(num_heads=2, head_dim=16, **options)
    layers = [KDA(config, 32, 1e-6).to(device).requires_grad_(False) for _ in range(2)]
    plain = deepcopy(layers)
    for layer in layers:
        layer.join()
        layer.mixed = GraphedMixer(layer, delta_rule_in_segments, graphs, memory)

    def of_a_pass(layer, x, *given, new=None):
        state = ContiguousLayerState(config.state_spec("float32"), 1, device)
        state.store(*(tensor.clone() for tensor in given))
        state.snapshot_offsets = tuple(offset for offset in (64, 128, 192) if offset < x.shape[1])
        positions = Positions(torch.zeros(1, dtype=torch.int64, device=device), x.shape[1], new)
        with torch.inference_mode():
            out = layer(x, positions, state)
        return out, *state.load(), state.snapshots

    for tokens in (1, 3, 128, 65, 64, 256, 130, 200):
        shapes = (1, tokens, 32), (1, 2, 16, 16), (1, 96, config.conv_kernel - 1)
        given = [[torch.randn(shape, device=device) for shape in shapes] for _ in layers]
        found = [[of_a_pass(layer, *each) for layer, each in zip(pair, given)] for pair in (layers, plain)]
        torch.testing.assert_close(*found, **CLOSE)
    assert [room for *_, room in graphs] == [128, 256]
    (graphed, _), (eager, _), pass_of_200 = layers, plain, given[0]
    padded = [of_a_pass(layer, *pass_of_200, new=torch.tensor([150], device=device)) for layer in (graphed, eager)]
    torch.testing.assert_close(*padded, **CLOSE)
    for joined in (graphed.joined.to("meta"), None):  # the layer has left its device since; it was never joined
        graphed.joined = joined
        torch.testing.assert_close(*(of_a_pass(layer, *pass_of_200) for layer in (graphed, eager)), **CLOSE)


def test_a_layer_whose_pieces_are_compiled_goes_in_segments_unless_its_heads_are_too_small():
    eager, compiled, small = (KDA(KDAConfig(num_heads=2, head_dim=dim), 16, 1e-6) for dim in (16, 16, 8))
    for mixer in (compiled, small):
        mixer.project = mixer.project  # as `compile_pieces` puts another in its place
    for mixer, is_graphed in ((eager, False), (compiled, True), (small, False)):
        graph_delta_rules(mixer)
        assert isinstance(mixer.mixed, GraphedMixer) == is_graphed


def test_the_channels_of_a_convolutions_tap_lie_together():
    weight = KDA(KDAConfig(num_heads=2, head_dim=8), 16, 1e-6).to(torch.bfloat16).conv1d.weight
    assert weight.shape == (48, 1, 4) and weight[:, 0, 0].is_contiguous()


def test_a_decay_of_minus_1000_a_token_forgets_everything_but_the_token_itself():
    q, k, v, _, beta, memory = inputs(100, 0.0)
    out, after, _ = delta_rule_chunked(q, k, v, torch.full_like(q, -1000.0), beta, memory)
    own = (q * k).sum(-1, keepdim=True) * beta[..., None] * v
    torch.testing.assert_close(out, own, **CLOSE)
    torch.testing.assert_close(after, k[:, -1, :, :, None] * (beta[:, -1, :, None] * v[:, -1])[:, :, None], **CLOSE)


@pytest.mark.parametrize("chunk, sub_chunk", [(8, 8), (32, 8), (64, 4), (128, 8)])
def test_the_chunk_size_does_not_change_the_result(chunk, sub_chunk):
    arguments = inputs(150, 1.0)
    other = delta_rule_chunked(*arguments, chunk=chunk, sub_chunk=sub_chunk)
    torch.testing.assert_close(other[:2], delta_rule_chunked(*arguments)[:2], **CLOSE)


def test_the_memory_carries_a_sequence_over_any_cut():
    *tokens, memory = inputs(150, 0.05)
    whole, whole_after, _ = delta_rule_chunked(*tokens, memory)
    pieces = []
    for start, end in [(0, 1), (1, 70), (70, 71), (71, 150)]:
        out, memory, _ = delta_rule_chunked(*(x[:, start:end] for x in tokens), memory)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)
    torch.testing.assert_close(memory, whole_after, **CLOSE)


@pytest.mark.parametrize("tokens", [1, 64, 130])
def test_without_gradients_the_same_products_land_in_their_places(tokens):
    *arguments, memory = inputs(tokens, 0.3)
    with_gradients = delta_rule_chunked(*arguments, memory.clone().requires_grad_())
    for ours, expected in zip(delta_rule_chunked(*arguments, memory), with_gradients):
        assert not ours.requires_grad and torch.equal(ours, expected)


@pytest.mark.parametrize("decay", [0.01, 30.0, 500.0, from_faint_to_total])
def test_gradients_are_finite_and_those_of_the_recurrence(decay):
    def gradients(rule):
        arguments = [x.requires_grad_() for x in inputs(80, decay)]
        out, memory = rule(*arguments)[:2]
        return torch.autograd.grad(out.square().sum() + memory.square().sum(), arguments)

    names = ("q", "k", "v", "g", "beta", "memory")
    for name, chunked, recurrent in zip(names, gradients(delta_rule_chunked), gradients(delta_rule_recurrent)):
        assert torch.isfinite(chunked).all(), name
        torch.testing.assert_close(chunked, recurrent, atol=2e-3, rtol=2e-3, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("rule, most", [(delta_rule_chunked, 80.01), (in_segments, 0.0)])  # sums round
def test_every_exponent_in_the_chunked_forms_is_bounded(rule, most):
    """Watch every power that is taken: with strong decay none may come near float32's limit, exp(88)."""
    arguments, largest = inputs(200, 500.0, batch=1), []

    class WatchExponents(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.exp, torch.ops.aten.exp2) and args[0].numel():
                largest.append(args[0].max().item())
            return func(*args, **(kwargs or {}))

    with WatchExponents():
        rule(*arguments)
    assert largest and max(largest) <= most


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 63, 64, 65, 130])
def test_keys_that_resemble_each_other_cost_no_digits(tokens):
    """Cosine 0.9 between any two keys and gates of 0.95: the powers of a whole chunk's system would overflow here."""
    q, k, v, _, _, memory = inputs(tokens, 0.0)
    k = F.normalize(0.1**0.5 * k + 0.9**0.5 * F.normalize(torch.randn(2, 1, 3, 16), dim=-1), dim=-1)
    beta = torch.full(q.shape[:3], 0.95)
    for g in (torch.zeros_like(q), -0.01 * torch.rand_like(q), from_faint_to_total(q.shape)):
        arguments = (q, k, v, g, beta, memory)
        expected = delta_rule_recurrent(*(argument.double() for argument in arguments))
        for ours, exact in zip(delta_rule_chunked(*arguments), expected):
            assert ((ours - exact).norm() / exact.norm()).item() < 2e-5
        q1, k1, *others = (x[:1] for x in arguments)
        for cast, most in ((torch.float32, 5e-5), (torch.float16, 3e-3)):
            for ours, exact in zip(in_segments(q1.to(cast), k1.to(cast), *others), expected):
                assert ((ours - exact[:1]).norm() / exact[:1].norm()).item() < most


def test_prefill_runs_no_operation_once_a_token():
    """Count what a prefill launches: 512 more tokens are 8 more chunks, and may cost a few operations a chunk."""
    torch.manual_seed(0)
    mixer = KDA(KDAConfig(num_heads=2, head_dim=8), hidden_size=16, norm_eps=1e-6)

    class CountOperations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    def operations(tokens):
        with torch.no_grad(), CountOperations() as counter:
            mixer(torch.randn(1, tokens, 16), Positions(torch.zeros(1, dtype=torch.int64), tokens), None)
        return counter.count

    assert operations(1024) - operations(512) <= 8 * 4


@pytest.mark.parametrize("chunk", [1, 2, 3, 40])
def test_the_mixer_in_chunks_equals_the_mixer_at_once(chunk):
    """Chunks shorter than the convolution's kernel too: its tail then reaches over several chunks."""
    torch.manual_seed(0)
    config = KDAConfig(num_heads=2, head_dim=8, conv_kernel=4)
    mixer, x, start = KDA(config, 16, 1e-6), torch.randn(2, 90, 16), torch.zeros(2, dtype=torch.int64)
    state, pieces, done = ContiguousLayerState(config.state_spec("float32"), 2, "cpu"), [], 0
    with torch.no_grad():
        whole = mixer(x, Positions(start, 90), None)
        for piece in x.split(chunk, dim=1):
            pieces.append(mixer(piece, Positions(start + done, piece.shape[1]), state))
            done += piece.shape[1]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)


def test_a_fresh_mixer_has_heads_that_forget_slowly_and_fast():
    torch.manual_seed(0)
    mixer = KDA(KDAConfig(num_heads=16, head_dim=16), 32, 1e-6)
    per_token = mixer.A_log.exp().flatten()[:, None] * F.softplus(mixer.dt_bias).view(16, 16)
    assert per_token.min() < 0.02 and per_token.max() > 0.5 and torch.isfinite(per_token).all()


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [0.01, 3.0, 500.0, from_faint_to_total])
def test_the_chunked_form_equals_the_recurrence_on_cuda(decay):
    arguments = inputs(200, decay, device="cuda")
    for chunked, recurrent in zip(delta_rule_chunked(*arguments), delta_rule_recurrent(*arguments)):
        torch.testing.assert_close(chunked, recurrent, **CLOSE)


@pytest.mark.gpu
def test_compiled_segments_beside_each_other_give_the_recurrence_each_time():
    """The loop of a segment runs beside the next segment's maps: a missing order would show as answers that differ."""
    q, k, v, *others = inputs(5000, from_faint_to_total, batch=1, key_dim=64, value_dim=64, device="cuda")
    exact = delta_rule_recurrent(*(x.double() for x in (q, k, v, *others)))
    given = by_chunks(q.half(), k.half(), v, *others)
    with torch.inference_mode():
        held = [x.new_zeros(6144 // CHUNK, *x.shape[1:]) for x in given[:-1]]
        graph = DeltaGraph(compiled_segments(), held, given[-1], torch.cuda.graph_pool_handle())
        for place, tensor in zip(graph.places(len(given[0])), given):
            place.copy_(tensor)
        answers = []
        for _ in range(5):
            outputs, after, before = graph(given[-1])
            answers.append([by_tokens(outputs, before.scale, 5000), after.clone()])
    for ours, expected in zip(answers[0], exact):
        assert ((ours - expected).norm() / expected.norm()).item() < 3e-3
    for again in answers[1:]:
        assert all(map(torch.equal, again, answers[0]))


@pytest.mark.gpu
def test_what_is_made_of_tokens_is_at_most_four_kernels():
    """The last decays, the values, everything else that q and k are in, and blocks put in their places: a part that
    the compiler does not join to its kernel reads q, k and decays again."""
    arguments = inputs(2048, 0.3, batch=1, heads=16, key_dim=128, value_dim=128, device="cuda")
    q, k, v, g, beta, *_ = by_chunks(*(x.half() for x in arguments[:3]), *arguments[3:])
    given = q, k, v, delta_segments.decays_through(g), beta.float(), torch.ones(16, 1, 1, device="cuda")
    inside = torch.zeros(4096, 8, 2, 8, dtype=torch.half, device="cuda")
    with torch.inference_mode():
        made = torch.compile(delta_segments.of_tokens, dynamic=False)
        made(*given, inside)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            made(*given, inside)
            torch.cuda.synchronize()
    assert len([event for event in profile.events() if "triton" in event.name]) <= 4
