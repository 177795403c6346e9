"""The kernels around the recurrence against formulas in fp64, and inside of the layer against its plain form.

Without CUDA they run in Triton's interpreter.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from whimbrel.mixers.kernels import ops
from whimbrel.testing.budget import assert_close
from whimbrel.testing.gpu import need_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LOW = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
EPS = 1e-2
EDGES = (0, 2, 2, 3, 40, 41)
"""Packed sequences: one shorter than the convolution, an empty one, one of several runs, single tokens."""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(function, inputs, seed=9):
    """[result, gradients of all inputs], the result weighted at random."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    probe = randn(*y.shape, seed=seed).to(y)
    return [y, *torch.autograd.grad((y * probe).sum(), inputs)]


def compare(names, formula, kernel, inputs, dtype, *, wide=()):
    """`kernel` in `dtype` (inputs numbered in `wide` in fp32) against `formula` in fp64 at the same rounded inputs."""
    low = [x.to(DEVICE, torch.float32 if i in wide else dtype) for i, x in enumerate(inputs)]
    want = gradients(formula, [x.double().cpu() for x in low])
    got = gradients(kernel, low)
    for name, a, b, x in zip(("y", *names), want, got, [got[0], *low], strict=True):
        assert b.dtype == x.dtype, f"{name} is {b.dtype}"
        assert_close(name, a, b, BUDGET[dtype])
    return got


def conv_formula(x, weight, state, edges, unit):
    """Through PyTorch's grouped convolution, one sequence after the other; `state` has a row for each, or is None."""
    rows = x.split(1) if edges is None else [x[:, a:b] for a, b in pairwise(edges)]
    done = []
    for n, row in enumerate(rows):
        past = x.new_zeros(1, x.shape[2], weight.shape[2] - 1) if state is None else state[n : n + 1]
        padded = torch.cat((past, row.transpose(1, 2)), 2)
        if row.shape[1]:
            done.append(F.silu(F.conv1d(padded, weight, groups=x.shape[2])).transpose(1, 2))
    y = torch.cat(done, 0 if edges is None else 1)
    if unit:
        heads = y.unflatten(-1, (-1, unit))
        y = (heads / (heads.square().sum(-1, keepdim=True) + EPS).sqrt()).flatten(-2)
    return y


def compare_conv(batch, time, channels, size, *, unit=0, edges=None, with_state=False, dtype=torch.float32, run=8):
    sequences = batch if edges is None else len(edges) - 1
    inputs = [randn(batch, time, channels), randn(channels, 1, size, seed=1)]
    if with_state:
        inputs.append(randn(sequences, channels, size - 1, seed=2))
    table = None if edges is None else ops.cut(torch.tensor(edges, dtype=torch.int32, device=DEVICE), time, run)

    def kernel(x, weight, state=None):
        return ops.short_conv(x, weight, state, table, run, unit, EPS)

    def formula(x, weight, state=None):
        return conv_formula(x, weight, state, edges, unit)

    return compare(("dx", "dweight", "dstate")[: len(inputs)], formula, kernel, inputs, dtype, wide=(1,))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("unit", [0, 3])
@pytest.mark.parametrize("with_state", [False, True])
def test_short_conv(size, unit, with_state):
    compare_conv(3, 19, 6, size, unit=unit, with_state=with_state)


@LOW
@pytest.mark.parametrize("time", [1, 2, 7, 8, 9])
def test_short_conv_of_short_sequences(time, dtype):
    compare_conv(2, time, 5, 4, unit=5, with_state=True, dtype=dtype, run=1 if time == 1 else 8)


@LOW
@pytest.mark.parametrize("unit", [0, 6])
@pytest.mark.parametrize("with_state", [False, True])
def test_short_conv_of_packed_sequences(unit, with_state, dtype):
    compare_conv(1, EDGES[-1], 12, 4, unit=unit, edges=EDGES, with_state=with_state, dtype=dtype)


def test_short_conv_of_several_tiles_and_blocks():
    compare_conv(1, 150, 130, 4, run=8)


def test_short_conv_takes_what_is_not_contiguous():
    x, weight = randn(2, 5, 2, 6).float().to(DEVICE)[:, :, 1], randn(6, 1, 3).float().to(DEVICE)
    state = randn(2, 8, 2).float().to(DEVICE)[:, 2:]
    expected = conv_formula(x.double().cpu(), weight.double().cpu(), state.double().cpu(), None, 0)
    assert_close("y", expected, ops.short_conv(x, weight, state, None, 8, 0, EPS), 1e-6)


def test_runs_hold_every_token_once():
    for edges in (EDGES, (0, 41), (0, 0, 41, 41), (0, *range(1, 42))):
        table = ops.cut(torch.tensor(edges), 41, 8).tolist()
        assert len(table[0]) == 6 + len(edges) - 1
        seen = []
        for start, begin, end, sequence in zip(*table):
            if sequence < 0:
                continue
            assert [begin, end] == list(edges[sequence : sequence + 2])
            assert (start - begin) % 8 == 0
            seen.extend(range(start, min(start + 8, end)))
        assert seen == list(range(41))
        assert {s for s in table[3] if s >= 0} == set(range(len(edges) - 1))


@LOW
@pytest.mark.parametrize(("shape", "heads"), [((2, 3, 6), 2), ((1, 300, 15), 5), ((3, 1, 4), 4)])
def test_gates(shape, heads, dtype):
    def formula(x, a_log, dt_bias):
        decay, *rates = x.split(heads, -1)
        return torch.stack([-a_log.exp() * F.softplus(decay + dt_bias), *(rate.sigmoid() for rate in rates)])

    inputs = [4 * randn(*shape), randn(heads, seed=1), randn(heads, seed=2)]
    names = ("dx", "dA_log", "ddt_bias")
    low = [inputs[0].to(DEVICE, dtype), *(x.float().to(DEVICE) for x in inputs[1:])]
    want, got = gradients(formula, [x.double().cpu() for x in low]), gradients(ops.gates, low)
    assert got[0].dtype == torch.float32
    for name, a, b in zip(("gates", *names), want, got, strict=True):
        assert_close(name, a, b, BUDGET[dtype] if name == "dx" else 2e-6)


def test_small_decays_keep_their_relative_precision():
    x = torch.linspace(-60, 30, 64, dtype=torch.float64)[:, None, None]
    zero = torch.zeros(1, dtype=torch.float64)
    got = ops.gates(x.float().to(DEVICE), zero.float().to(DEVICE), zero.float().to(DEVICE))
    expected = -torch.log1p(x.exp())
    assert ((got[0].double().cpu() - expected) / expected).abs().max() < 2e-6


@LOW
@pytest.mark.parametrize("shape", [(2, 5, 3, 6), (1, 70, 2, 33), (1, 1, 1, 2)])
def test_gated_norm(shape, dtype):
    def formula(y, gate, weight):
        return F.rms_norm(y, shape[-1:], weight, EPS) * F.silu(gate.view_as(y))

    inputs = [randn(*shape), randn(*shape[:2], shape[2] * shape[3], seed=1), randn(shape[-1], seed=2)]
    compare(("dy", "dgate", "dweight"), formula, lambda *x: ops.gated_norm(*x, EPS), inputs, dtype, wide=(2,))


def operator_calls():
    x, y, gate = randn(1, 9, 6), randn(2, 3, 2, 6, seed=1), randn(2, 3, 12, seed=2)
    weight, state, heads, scale = randn(6, 1, 4, seed=3), randn(2, 6, 3, seed=4), randn(2, seed=5), randn(6, seed=6)
    table = ops.cut(torch.tensor([0, 4, 9]), 9, 8)
    return {
        "dense": (ops.short_conv, x, weight, None, None, 8, 3, EPS),
        "packed": (ops.short_conv, x, weight, state, table, 8, 0, EPS),
        "gates": (ops.gates, x, heads, heads + 1),
        "norm": (ops.gated_norm, y, gate, scale, EPS),
    }


@pytest.mark.parametrize("name", ["dense", "packed", "gates", "norm"])
def test_operators_are_what_torch_compile_expects(name):
    """Schema, fake result, registered gradient and traced backward, by PyTorch's own checks."""

    def prepare(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.float().to(DEVICE).requires_grad_() if x.is_floating_point() else x.to(DEVICE)

    op, *args = operator_calls()[name]
    torch.library.opcheck(op, tuple(prepare(x) for x in args))


# On a card, in the sizes and types of training.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "unit"), [(512, 128), (384, 96), (256, 64), (512, 256), (320, 0)])
def test_short_conv_on_the_card(channels, unit, dtype):
    compare_conv(2, 1000, channels, 4, unit=unit, dtype=dtype, run=ops.RUN)
    edges = (0, 1, 1, 130, 1000)
    compare_conv(1, 1000, channels, 4, unit=unit, edges=edges, with_state=True, dtype=dtype, run=ops.RUN)


@pytest.mark.gpu
def test_two_runs_on_the_card_give_equal_bits():
    def all_of_them(x, weight, heads, scale, gate):
        y = ops.short_conv(x, weight, None, None, ops.RUN, 128, EPS)
        y = ops.gated_norm(y.unflatten(-1, (-1, 128)), gate, scale, EPS).flatten(2)
        return torch.cat((y.float(), ops.gates(x, heads, heads).sum(0)), -1)

    x, gate = randn(2, 3001, 512), randn(2, 3001, 512, seed=1)
    inputs = [x.cuda().bfloat16(), randn(512, 1, 4).cuda().float(), randn(256).cuda().float()]
    inputs += [randn(128).cuda().float(), gate.cuda().bfloat16()]
    first = gradients(all_of_them, inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(all_of_them, inputs), strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """2^31 elements and more: the last rows are those of a small call."""
    need_memory(20 * 2**30)
    x = torch.empty(1, 2**20 + 40, 2048, device="cuda", dtype=torch.bfloat16).normal_()
    weight, scale = randn(2048, 1, 4).cuda().float(), randn(128).cuda().float()
    tail = x[:, -40:].clone()
    y = ops.short_conv(x, weight, None, None, ops.RUN, 128, EPS)[:, -32:].clone()
    assert torch.equal(ops.short_conv(tail, weight, None, None, ops.RUN, 128, EPS)[:, -32:], y)
    z = ops.gated_norm(x.view(1, -1, 16, 128), x, scale, EPS)[:, -40:]
    assert torch.equal(ops.gated_norm(tail.view(1, -1, 16, 128), tail, scale, EPS), z)
