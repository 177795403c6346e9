"""The block around the recurrences against its formulas written out with elementary operations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from whimbrel.errors import ConfigError
from whimbrel.mixers import GDN, kernels
from whimbrel.mixers.base import LayerState, Out, State
from whimbrel.mixers.gdn.config import GDNConfig
from whimbrel.mixers.linear import LinearMixer, ShortConv
from whimbrel.mixers.rdn.config import RDNConfig
from whimbrel.mixers.rla.config import RLAConfig
from whimbrel.mixers.sgla.config import SGLAConfig
from whimbrel.testing.budget import assert_close
from whimbrel.testing.mixers import state_tensors

CONFIGS = [RLAConfig, RDNConfig, GDNConfig, SGLAConfig]
WIDTH = 12


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv_written_out(x, weight, state=None):
    """x [B, T, C], weight [C, 1, size], state [B, C, size - 1] through PyTorch's grouped convolution."""
    size = weight.shape[2]
    past = x.new_zeros(x.shape[0], x.shape[2], size - 1) if state is None else state
    padded = torch.cat((past, x.transpose(1, 2)), 2)
    return F.silu(F.conv1d(padded, weight, groups=x.shape[2])).transpose(1, 2), padded[:, :, x.shape[1] :]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 2, 3, 9])
@pytest.mark.parametrize("with_state", [False, True])
def test_short_conv(size, time, with_state):
    torch.manual_seed(0)
    conv = ShortConv((5, 2), size).double()
    x = randn(3, time, 7).requires_grad_()
    state = randn(3, 7, size - 1, seed=1).requires_grad_() if with_state else None
    inputs = [x, conv.weight, *([state] if with_state else [])]
    probe = randn(3, time, 7, seed=2)
    expected, want_after = conv_written_out(x, conv.weight, state)
    want = torch.autograd.grad((expected * probe).sum() + want_after.sin().sum(), inputs)
    streams, after = conv(x.split((5, 2), -1), state)
    got = torch.autograd.grad((torch.cat(streams, -1) * probe).sum() + after.sin().sum(), inputs)
    assert [s.shape[-1] for s in streams] == [5, 2]
    results = ((expected, torch.cat(streams, -1)), (want_after, after), *zip(want, got, strict=True))
    for name, (a, b) in zip(("y", "state", "dx", "dweight", "dstate"), results, strict=False):
        assert_close(name, a, b, 1e-12)


@pytest.mark.parametrize("with_state", [False, True])
def test_short_conv_keeps_packed_sequences_apart(with_state):
    torch.manual_seed(0)
    conv = ShortConv((5, 2), 4).double()
    x, lengths = randn(1, 11, 7), (2, 0, 1, 8)
    state = randn(4, 7, 3, seed=1) if with_state else None
    streams, after = conv(x.split((5, 2), -1), state, cu_seqlens=torch.tensor([0, 2, 2, 3, 11], dtype=torch.int32))
    for i, piece in enumerate(x.split(lengths, 1)):
        past = None if state is None else state[i : i + 1]
        if piece.shape[1] == 0:
            assert_close("untouched state", randn(1, 7, 3) * 0 if past is None else past, after[i : i + 1], 0.0)
            continue
        y, last = conv_written_out(piece, conv.weight, past)
        start = sum(lengths[:i])
        assert_close(f"y {i}", y, torch.cat(streams, -1)[:, start : start + lengths[i]], 1e-12)
        assert_close(f"state {i}", last, after[i : i + 1], 1e-12)


def test_the_recurrence_gets_what_the_formulas_say():
    torch.manual_seed(0)
    seen = {}

    def recurrence(q, k, v, log_decay, beta, gamma, *, state, cu_seqlens):
        seen.update(q=q, k=k, v=v, log_decay=log_decay, beta=beta, gamma=gamma)
        return Out(v + 1, State(v[:, 0, :, :, None], None))

    layer = LinearMixer(
        WIDTH, recurrence, num_gates=3, num_heads=2, head_dim=4, num_value_heads=4, value_head_dim=3, norm_eps=1e-2
    ).double()
    x = randn(2, 5, WIDTH)
    y = layer(x).y

    def projected(linear, channels):
        return conv_written_out(linear(x), layer.conv.weight[channels])[0]

    q = projected(layer.q_proj, slice(0, 8)).view(2, 5, 2, 4)
    k = projected(layer.k_proj, slice(8, 16)).view(2, 5, 2, 4)
    v = projected(layer.v_proj, slice(16, 28)).view(2, 5, 4, 3)
    a, b, g = layer.gates(x).split(4, -1)
    expected = {
        "q": q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
        "k": k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
        "v": v,
        "log_decay": -layer.A_log.exp() * torch.log1p((a + layer.dt_bias).exp()),
        "beta": 1 / (1 + (-b).exp()),
        "gamma": 1 / (1 + (-g).exp()),
    }
    for name, value in expected.items():
        assert_close(name, value, seen[name], 1e-9)
    normed = (v + 1) / ((v + 1).square().mean(-1, keepdim=True) + 1e-2).sqrt() * layer.norm.weight
    gate = layer.gate_proj(x)
    assert_close("y", layer.o_proj(normed.flatten(2) * gate * gate.sigmoid()), y, 1e-12)


def test_gates_are_fp32_in_a_bf16_layer():
    seen = []

    def recurrence(q, k, v, *gates, state, cu_seqlens):
        seen.extend(gate.dtype for gate in gates)
        return Out(v, State(v, None))

    layer = LinearMixer(WIDTH, recurrence, num_gates=2, num_heads=2, head_dim=4).bfloat16()
    layer(randn(1, 3, WIDTH).bfloat16())
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize("config", CONFIGS)
def test_decay_starts_in_its_range_and_is_marked(config):
    torch.manual_seed(0)
    layer = config(num_heads=64, head_dim=2).build(WIDTH, 1e-5)
    assert 0 <= layer.A_log.min().item() < 0.8
    assert 2.6 < layer.A_log.max().item() <= torch.tensor(16.0).log()
    step = F.softplus(layer.dt_bias.detach())
    assert 0.99e-3 <= float(step.min()) < 3e-3
    assert 0.03 < float(step.max()) <= 0.101
    assert {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)} == {
        "A_log",
        "dt_bias",
    }


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_named_impl_gives_the_same_in_every_shape_of_heads(config, impl):
    options = {"num_heads": 2, "head_dim": 4, "num_value_heads": 6, "value_head_dim": 5, "conv_size": 3}
    layers = []
    for chosen in ("auto", impl):
        torch.manual_seed(0)
        layers.append(config(**options, impl=chosen).build(WIDTH, 1e-5).double())
    x = randn(2, 9, WIDTH)
    (y, state), (other, other_state) = (layer(x) for layer in layers)
    assert_close("y", y, other, 1e-9)
    assert_close("state", state.recurrent.base, other_state.recurrent.base, 1e-9)
    assert state.conv.shape == (2, 2 * 8 + 30, 2)
    assert state.recurrent.base.shape == (2, 6, 4, 5)
    assert (state.recurrent.residual is None) == (config in (GDNConfig, SGLAConfig))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, r"mixer.num_heads = 0 is not allowed; use a positive number"),
        ({"head_dim": -1}, r"mixer.head_dim = -1 is not allowed; use a positive number"),
        ({"conv_size": 0}, r"mixer.conv_size = 0 is not allowed; use a positive number"),
        (
            {"num_heads": 4, "num_value_heads": 6},
            r"mixer.num_value_heads = 6 is not allowed; use 0 or a multiple of mixer.num_heads = 4",
        ),
        ({"num_value_heads": -3}, r"mixer.num_value_heads = -3 is not allowed; use 0 or a multiple"),
        ({"value_head_dim": -2}, r"mixer.value_head_dim = -2 is not allowed; use 0 or a positive number"),
        ({"impl": "chunkd"}, r"mixer.impl = 'chunkd' is not allowed; did you mean 'chunked'\?; use one of 'auto', "),
    ],
)
def test_config_says_what_is_wrong(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_layer_says_what_is_wrong():
    with pytest.raises(ConfigError, match="num_value_heads = 3 is not allowed; use a multiple of num_heads = 2"):
        LinearMixer(WIDTH, print, num_gates=2, num_heads=2, head_dim=4, num_value_heads=3)  # pyrefly: ignore
    layer = GDNConfig().build(WIDTH, 1e-5)
    with pytest.raises(ConfigError, match="GDN: cu_seqlens runs from 0 to 4; it must rise from 0 to the time length"):
        layer(torch.zeros(1, 5, WIDTH), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ConfigError, match=r"num_heads = 0 is not allowed; use a positive number"):
        LinearMixer(WIDTH, print, num_gates=2, num_heads=0, head_dim=4)  # pyrefly: ignore
    with pytest.raises(ConfigError, match=r"GDN: impl = 'eager' is unknown; choose one of auto, reference, chunked, t"):
        GDN(WIDTH, num_heads=2, head_dim=4, impl="eager")  # pyrefly: ignore
    for shape in ((5, WIDTH), (1, 5, WIDTH - 1)):
        with pytest.raises(ConfigError, match=rf"GDN: x has shape .*; give \[batch, time, hidden_size\], .* = {WIDTH}"):
            layer(torch.zeros(shape))
    with pytest.raises(ConfigError, match=r"GDN: x has dtype torch.float16, the layer torch.float32; use x.to\("):
        layer(torch.zeros(1, 5, WIDTH).half())


def use_kernels(patch):
    """Kernels for all but fp64, in short runs, which are quick in the interpreter."""
    patch.setattr(kernels, "usable", lambda x: x.dtype != torch.float64)
    patch.setattr(kernels.ops, "RUN", 8)


@pytest.fixture(params=["plain", "kernels"])
def form(request, monkeypatch):
    """Both forms of everything around the recurrence; kernels run in Triton's interpreter where there is no CUDA."""
    if request.param == "kernels":
        use_kernels(monkeypatch)
    return request.param


def rebuild(tensors):
    """The state of a layer from the tensors in it."""
    conv, *recurrent = tensors
    return LayerState(conv, State(*recurrent, *[None] * (2 - len(recurrent))))


def run_layer(layer, x, state, edges):
    """Output, state and the gradients of the input, of a given state and of all parameters, by name."""
    x = x.detach().requires_grad_()
    held = [] if state is None else [t.detach().requires_grad_() for t in state_tensors(state)]
    state = state and rebuild(held)
    y, after = layer(x, state, cu_seqlens=edges)
    after = list(state_tensors(after))
    (sum((t * randn(*t.shape, seed=i).to(t)).sum() for i, t in enumerate([y, *after]))).backward()
    tensors = {"x": x, **{f"state {i}": t for i, t in enumerate(held)}, **dict(layer.named_parameters())}
    return {"y": y, **{f"after {i}": t for i, t in enumerate(after)}, **{f"d {n}": t.grad for n, t in tensors.items()}}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(("time", "edges"), [(1, None), (2, None), (19, None), (21, [0, 2, 2, 21])])
def test_kernels_give_what_the_plain_form_gives(monkeypatch, time, edges, size):
    torch.manual_seed(0)
    options = {"num_heads": 2, "head_dim": 4, "num_value_heads": 4, "value_head_dim": 3, "conv_size": size}
    layer = RDNConfig(**options).build(WIDTH, 1e-5).double()
    low = copy.deepcopy(layer).float()
    edges = None if edges is None else torch.tensor(edges)
    batch = 2 if edges is None else 1
    x, (_, state) = randn(batch, time, WIDTH), layer(randn(batch if edges is None else 3, 6, WIDTH, seed=1))
    for given in (None, state):
        layer.zero_grad()
        low.zero_grad()
        want = run_layer(layer, x, given, edges)
        with monkeypatch.context() as patch:
            use_kernels(patch)
            given = given and rebuild([t.float() for t in state_tensors(given)])
            got = run_layer(low, x.float(), given, edges)
        assert want.keys() == got.keys()
        for name, expected in want.items():
            assert_close(name, expected, got[name], 2e-5, floor=1e-6)


def test_checkpointing_gives_equal_gradients(form):
    torch.manual_seed(0)
    layer = RDNConfig(num_heads=2, head_dim=4).build(WIDTH, 1e-5)
    results = []
    for keep in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        layer.zero_grad()
        x = randn(2, 9, WIDTH).float().requires_grad_()
        y = keep(lambda x: layer(x).y, x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_without_a_graph_break(form):
    def recurrence(q, k, v, log_decay, beta, *, state, cu_seqlens):
        return Out(v * (q * k).sum(-1, keepdim=True) * (log_decay.exp() * beta)[..., None], state)

    torch.manual_seed(0)
    layer = LinearMixer(WIDTH, recurrence, num_gates=2, num_heads=2, head_dim=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    _, state = layer(randn(2, 5, WIDTH).float())
    x = randn(2, 9, WIDTH).float()
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        y, after = run(x)
        y.square().sum().backward()
        step = run(x[:, :1], state)
        results.append([y, after.conv, *(p.grad for p in layer.parameters()), step.y, step.state.conv])
    for a, b in zip(*results, strict=True):
        assert_close("compiled", a, b, 1e-6)


def test_autocast_leaves_gates_in_fp32():
    seen = []

    def recurrence(*tensors, state, cu_seqlens):
        seen.extend(x.dtype for x in tensors)
        q, k, v, log_decay, beta = tensors
        return Out(v * (q * k).sum(-1, keepdim=True) * (log_decay * beta)[..., None].to(v), state)

    layer = LinearMixer(WIDTH, recurrence, num_gates=2, num_heads=2, head_dim=4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(randn(1, 3, WIDTH).float()).y
    assert seen == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


# On a card, with the kernels of the recurrence.


def card_layer(config, dtype=torch.bfloat16):
    torch.manual_seed(0)
    options = {"num_heads": 2, "head_dim": 64, "num_value_heads": 4, "value_head_dim": 32}
    return config(**options).build(128, 1e-5).to("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("edges", [None, [0, 3, 3, 200, 300]])
@pytest.mark.parametrize("config", CONFIGS)
def test_layer_on_the_card_is_that_of_fp64(config, edges):
    layer, x = card_layer(config), randn(2 if edges is None else 1, 300, 128)
    edges = None if edges is None else torch.tensor(edges, device="cuda")
    wide, second = copy.deepcopy(layer).cpu().double(), copy.deepcopy(layer)
    got, again = (run_layer(each, x.cuda().bfloat16(), None, edges) for each in (layer, second))
    want = run_layer(wide, x.bfloat16().double(), None, None if edges is None else edges.cpu())
    for name, expected in want.items():
        assert_close(name, expected, got[name], 0.04)
        assert torch.equal(got[name], again[name]), f"{name}: two runs differ"


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_layer_on_the_card_compiles_without_a_graph_break(config):
    layer = card_layer(config)
    compiled = torch.compile(layer, fullgraph=True)
    x = randn(2, 300, 128).cuda().bfloat16()
    for edges in (None, torch.tensor([0, 3, 3, 200, 300], device="cuda")):
        x = x if edges is None else x[:1]
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            y = run(x, cu_seqlens=edges).y
            y.float().square().sum().backward()
            results.append({"y": y, **{f"d {n}": p.grad for n, p in layer.named_parameters()}})
        for name, expected in results[0].items():
            assert_close(name, expected, results[1][name], 0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_decoding_runs_in_a_cuda_graph(config):
    layer, x = card_layer(config), randn(3, 20, 128).cuda().bfloat16()
    with torch.no_grad():
        _, state = layer(x[:, :10])
        token, held = x[:, 10:11].clone(), [t.clone() for t in state_tensors(state)]
        given = rebuild(held)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(token, given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, after = layer(token, given)
        for i in range(10, 20):
            want, state = layer(x[:, i : i + 1], state)
            token.copy_(x[:, i : i + 1])
            graph.replay()
            assert_close(f"token {i}", want, y, 1e-6)
            for old, new in zip(held, state_tensors(after), strict=True):
                old.copy_(new)
