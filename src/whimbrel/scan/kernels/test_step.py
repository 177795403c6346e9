"""The step kernel against the recurrences in fp64: compiled where CUDA is, else interpreted (see conftest.py)."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from whimbrel.mixers.two_state.rule import COMBINE, RESIDUAL, Rule
from whimbrel.mixers.two_state.step import step as two_state_step
from whimbrel.scan import one_state
from whimbrel.scan.base import State
from whimbrel.scan.common import checked_scale
from whimbrel.scan.kernels import step as kernels
from whimbrel.testing.budget import assert_close
from whimbrel.testing.gpu import need_memory
from whimbrel.testing.recurrence import RECURRENCES, Inputs, Shape, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = Shape(batch=2, time=1, heads=2, value_heads=4, key_dim=24, value_dim=40)
FP32 = 1e-6
every = pytest.mark.parametrize("name", RECURRENCES)
TWO = ("rla", "rdn")
two = pytest.mark.parametrize("name", TWO)


def inputs_of(name: str, shape: Shape = SHAPE, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Inputs:
    inputs = make_inputs(RECURRENCES[name], shape, dtype=dtype, **kwargs)
    return Inputs(*([x.to(DEVICE) for x in part] for part in inputs))


def step(
    name: str,
    tensors: list[Tensor],
    states: list[Tensor] | None,
    *,
    kernel: bool | None = True,
    out: State | None = None,
    clip: float | None = 1.0,
    combine: str = "gated",
    residual: str = "undecayed",
) -> tuple[Tensor, ...]:
    """y and the states after one token."""
    delta, scale = name in ("delta", "rdn"), checked_scale(name, None, tensors[0].shape[3])
    if name in TWO:
        rule = Rule(clip, scale, combine == "gated", residual == "decayed")
        state = None if states is None else State(*states)
        y, after = two_state_step(*tensors, rule=rule, delta=delta, state=state, out=out, kernel=kernel)
        return y, *after
    state = None if states is None else states[0]
    return one_state.step(*tensors, scale=scale, delta=delta, state=state, kernel=kernel)


def reference(name: str, inputs: Inputs, *, with_states: bool = True, **options: Any) -> tuple[Tensor, ...]:
    tensors, states = ([x.double() for x in part] for part in inputs)
    y, after = RECURRENCES[name](tensors, states if with_states else None, impl="reference", **options)
    return y, *after


def assert_step(name: str, inputs: Inputs, budget: float = FP32, *, with_states: bool = True, **options: Any) -> None:
    """The kernel's outputs lie within `budget` of the fp64 recurrence's."""
    want = reference(name, inputs, with_states=with_states, **options)
    got = step(name, inputs.tensors, inputs.states if with_states else None, **options)
    assert got[0].dtype == inputs.tensors[2].dtype
    assert len(got) == len(want)
    for what, a, b in zip(("y", "base", "residual"), want, got):
        assert b.dtype == torch.float32 or what == "y"
        assert_close(what, a, b, budget if what == "y" else FP32)


@two
@pytest.mark.parametrize("clip", [0.5, None])
@pytest.mark.parametrize(("combine", "residual"), [*product(COMBINE, RESIDUAL)])
@pytest.mark.parametrize("with_states", [True, False])
def test_every_option_of_two_states(name, clip, combine, residual, with_states):
    options = {"clip": clip, "combine": combine, "residual": residual}
    assert_step(name, inputs_of(name), with_states=with_states, **options)


@pytest.mark.parametrize("name", ["decay", "delta"])
@pytest.mark.parametrize("with_states", [True, False])
def test_one_state(name, with_states):
    assert_step(name, inputs_of(name), with_states=with_states)


@every
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(7, 5), (16, 64), (64, 16), (1, 1), (33, 31), (256, 48), (48, 256), (1500, 24)]
)
def test_any_dimensions(name, key_dim, value_dim):
    shape = Shape(batch=1, time=1, heads=1, value_heads=2, key_dim=key_dim, value_dim=value_dim)
    assert_step(name, inputs_of(name, shape, seed=1))


@every
@pytest.mark.parametrize(("heads", "value_heads"), [(1, 1), (3, 3), (1, 5), (2, 6)])
def test_value_head_reads_its_groups_keys(name, heads, value_heads):
    shape = Shape(batch=3, time=1, heads=heads, value_heads=value_heads, key_dim=8, value_dim=8)
    assert_step(name, inputs_of(name, shape, seed=2))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_y_is_the_fp64_result_rounded_once(name, dtype):
    assert_step(name, inputs_of(name, dtype=dtype, seed=3), budget=torch.finfo(dtype).eps / 2)


@every
def test_gates_and_states_of_low_precision(name):
    inputs = inputs_of(name, seed=4)
    narrow = Inputs(
        [*inputs.tensors[:3], *(x.bfloat16() for x in inputs.tensors[3:])], [x.half() for x in inputs.states]
    )
    assert_step(name, narrow)


@every
@pytest.mark.parametrize(("log_decay", "rate"), [(0.0, 1.0), (-float("inf"), 0.5), (-100.0, 0.0), (-1e-4, 1e-4)])
def test_gates_at_the_ends_of_their_ranges(name, log_decay, rate):
    inputs = inputs_of(name, seed=5)
    inputs.tensors[3].fill_(log_decay)
    for x in inputs.tensors[4:]:
        x.fill_(rate)
    assert_step(name, inputs)


@two
def test_clip_lets_nan_through(name):
    inputs = inputs_of(name, seed=6)
    inputs.tensors[2][0, 0, 0, 0] = torch.nan
    y, _, residual = step(name, inputs.tensors, inputs.states, clip=0.5)
    assert y[0, 0, 0, 0].isnan()
    assert residual[0, 0, :, 0].isnan().all()
    assert residual.isnan().sum() == SHAPE.key_dim


@every
def test_parts_of_projections_are_read_in_place(name):
    """Slices in time and of a wider projection give the same bits as copies, and are not copied."""
    inputs = inputs_of(name, SHAPE._replace(time=3), seed=7)
    parts = [torch.cat((x, x + 1), 2)[:, 1:2, : x.shape[2]] for x in inputs.tensors]
    assert all(kernels._close(x) is x for x in parts)
    copies = [x.contiguous() for x in parts]
    for a, b in zip(step(name, copies, inputs.states), step(name, parts, inputs.states)):
        assert torch.equal(a, b)


@every
def test_scattered_rows_are_copied(name):
    inputs = inputs_of(name, seed=8)
    scattered = [torch.stack((x, x), -1)[..., 0] for x in inputs.tensors]
    states = [s.transpose(-1, -2).contiguous().transpose(-1, -2) for s in inputs.states]
    assert not any(x.is_contiguous() for x in (*scattered, *states))
    for a, b in zip(step(name, inputs.tensors, inputs.states), step(name, scattered, states)):
        assert torch.equal(a, b)


@every
def test_inputs_are_kept(name):
    inputs = inputs_of(name, seed=9)
    given = [*inputs.tensors, *inputs.states]
    copies = [x.clone() for x in given]
    for x in step(name, inputs.tensors, inputs.states):
        x.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(copies, given))


@two
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("place", ["itself", "elsewhere", "from zeros"])
def test_states_are_written_where_asked(name, kernel, place):
    inputs = inputs_of(name, seed=10)
    states = None if place == "from zeros" else inputs.states
    want = step(name, inputs.tensors, states, kernel=kernel)
    out = State(*(inputs.states if place == "itself" else [torch.full_like(s, torch.nan) for s in inputs.states]))
    y, *after = step(name, inputs.tensors, states, kernel=kernel, out=out)
    assert torch.equal(y, want[0])
    for a, b, c in zip(want[1:], after, out):
        assert torch.equal(a, b)
        assert b.data_ptr() == c.data_ptr()


@two
def test_autograd_notices_what_is_written(name):
    inputs = inputs_of(name, seed=11)
    weight = torch.ones((), device=DEVICE, requires_grad=True)
    loss = (weight * inputs.states[0]).sum()
    with torch.no_grad():
        step(name, inputs.tensors, inputs.states, out=State(*inputs.states))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every
def test_empty_batch(name):
    inputs = inputs_of(name, SHAPE._replace(batch=0))
    y, *states = step(name, inputs.tensors, inputs.states)
    assert y.shape == inputs.tensors[2].shape
    assert all(a.shape == b.shape for a, b in zip(states, inputs.states))


@every
def test_token_by_token(name):
    """Errors do not grow over a sequence decoded with the states handed on."""
    inputs = inputs_of(name, Shape(batch=1, time=20, heads=1, value_heads=2, key_dim=16, value_dim=16), seed=12)
    want = reference(name, inputs)
    states, outputs = inputs.states, []
    for t in range(20):
        y, *states = step(name, [x[:, t : t + 1] for x in inputs.tensors], states)
        outputs.append(y)
    for what, a, b in zip(("y", "base", "residual"), want, (torch.cat(outputs, 1), *states)):
        assert_close(what, a, b, 2 * FP32)


def test_operator_is_registered_as_pytorch_asks():
    (q, k, v, *gates), states = inputs_of("rdn", Shape(1, 1, 1, 1, 8, 8))
    y, new = torch.empty_like(v), [torch.empty_like(s) for s in states]
    args = (q, k, v, *gates, *states, 0.3, 1.0, True, False, True, y, *new)
    torch.library.opcheck(torch.ops.whimbrel.scan_step.default, args)


@pytest.mark.parametrize(
    ("name", "in_place", "backend"),
    [
        *((name, False, "aot_eager") for name in RECURRENCES),
        *((name, True, "aot_eager") for name in TWO),
        pytest.param("rdn", True, "inductor", marks=pytest.mark.gpu),
    ],
)
def test_step_compiles_without_a_graph_break(name, in_place, backend):
    inputs = inputs_of(name, Shape(1, 1, 1, 2, 8, 8), seed=13)
    want = step(name, inputs.tensors, inputs.states)
    out = State(*inputs.states) if in_place else None
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    got = compiled(name, inputs.tensors, inputs.states, out=out)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    if in_place:
        assert all(torch.equal(a, b) for a, b in zip(want[1:], inputs.states))


@every
def test_the_kernel_is_left_out_where_it_cannot_serve(name):
    """On the CPU and in fp64 the PyTorch code runs; so it does where autograd records."""
    narrow, wide = inputs_of(name), inputs_of(name, dtype=torch.float64)
    cuda = DEVICE == "cuda"
    assert one_state.step_in_kernel(None, *narrow.tensors, *narrow.states, None) == cuda
    assert not one_state.step_in_kernel(None, *narrow.tensors, *wide.states)
    narrow.states[0].requires_grad_()
    assert not one_state.step_in_kernel(None, *narrow.tensors, *narrow.states)
    with torch.no_grad():
        assert one_state.step_in_kernel(None, *narrow.tensors, *narrow.states) == cuda
    assert one_state.step_in_kernel(True, *wide.tensors)
    assert not one_state.step_in_kernel(False, *narrow.tensors)


BIG = Shape(batch=64, time=1, heads=16, value_heads=16, key_dim=128, value_dim=128)
"""A batch of decoding, at which the speed of the kernel is stated."""


@pytest.mark.gpu
@every
def test_cuda_takes_the_kernel_in_one_launch(name):
    inputs = inputs_of(name, SHAPE, torch.bfloat16)
    want = step(name, inputs.tensors, inputs.states, kernel=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        got = step(name, inputs.tensors, inputs.states, kernel=None)
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    on_device = [e.key for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert [key for key in on_device if "sync" not in key.lower()] == ["_step"]


@pytest.mark.gpu
@every
def test_two_runs_give_equal_bits(name):
    inputs = inputs_of(name, BIG._replace(value_heads=32), torch.bfloat16)
    once, again = (step(name, inputs.tensors, inputs.states) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.gpu
@every
def test_many_steps_in_bf16(name):
    """300 tokens written in place or handed on: y stays the fp64 result rounded to bf16."""
    shape = BIG._replace(batch=2, time=300, value_heads=32)
    inputs = inputs_of(name, shape, torch.bfloat16, strongest_decay=0.02)
    want = reference(name, inputs)
    states, outputs = [x.clone() for x in inputs.states], []
    for t in range(shape.time):
        out = State(*states) if name in TWO else None
        y, *states = step(name, [x[:, t : t + 1] for x in inputs.tensors], states, out=out)
        outputs.append(y)
    assert_close("y", want[0], torch.cat(outputs, 1), 1.1 * torch.finfo(torch.bfloat16).eps / 2)
    for what, a, b in zip(("base", "residual"), want[1:], states):
        assert_close(what, a, b, 1e-5)


@pytest.mark.gpu
@two
def test_graph_replay_equals_eager(name):
    """A captured step that updates its states in place decodes the same bits as steps one by one."""
    shape = BIG._replace(batch=4, time=6)
    inputs = inputs_of(name, shape, torch.bfloat16)
    tokens = [[x[:, t : t + 1].contiguous() for x in inputs.tensors] for t in range(shape.time)]
    want, states = [], inputs.states
    for token in tokens:
        y, *states = step(name, token, states)
        want.append(y)
    static, held = [x.clone() for x in tokens[0]], State(*(s.clone() for s in inputs.states))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, *_ = step(name, static, [*held], out=held)
    for token, expected in zip(tokens, want):
        for a, b in zip(static, token):
            a.copy_(b)
        graph.replay()
        assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(held, states))


@pytest.mark.gpu
def test_states_beyond_two_to_the_31_elements():
    need_memory(24 * 2**30)
    heads, dim = 16, 256
    batch = 2**31 // (heads * dim * dim) + 1
    inputs = inputs_of("rdn", Shape(1, 1, heads, heads, dim, dim), torch.bfloat16)
    tensors = [x.expand(batch, *x.shape[1:]).contiguous() for x in inputs.tensors]
    states = [x.expand(batch, *x.shape[1:]).contiguous() for x in inputs.states]
    assert states[0].numel() > 2**31
    want = step("rdn", inputs.tensors, inputs.states)
    got = step("rdn", tensors, states, out=State(*states))
    for a, b in zip(want, got):
        assert all(torch.equal(a[0], b[row]) for row in (0, batch // 2, batch - 1))


@pytest.mark.gpu
@two
def test_gradients_on_cuda_come_from_pytorch(name):
    inputs = inputs_of(name)
    leaves = [x.requires_grad_() for x in inputs.tensors]
    y, *states = step(name, leaves, inputs.states, kernel=None)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum() + sum(s.sum() for s in states), leaves))
