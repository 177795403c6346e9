"""What RLA and RDN have in common: their options, their messages, their single step."""

from __future__ import annotations

import pytest
import torch

from whimbrel.errors import ConfigError
from whimbrel.mixers.base import State
from whimbrel.mixers.rdn import rdn, rdn_step
from whimbrel.mixers.rla import rla, rla_step
from whimbrel.mixers.two_state.rule import checked_rule
from whimbrel.testing.budget import assert_close
from whimbrel.testing.recurrence import FP64, RECURRENCES, Inputs, Shape, make_inputs, outputs_and_gradients

BOTH = {"rla": (rla, rla_step), "rdn": (rdn, rdn_step)}
both = pytest.mark.parametrize("name", BOTH)


def inputs_of(name: str, **sizes: int) -> tuple[list[torch.Tensor], State]:
    inputs = make_inputs(RECURRENCES[name], Shape(**sizes))
    return inputs.tensors, State(*inputs.states)


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "gate"}, "combine = 'gate' is unknown; choose one of gated, sum; did you mean 'gated'?"),
        (
            {"residual": "decay"},
            "residual = 'decay' is unknown; choose one of undecayed, decayed; did you mean 'decayed'?",
        ),
        ({"clip": 0.0}, "clip = 0.0 is not allowed; give a number above 0, or None for no clipping"),
        ({"clip": float("nan")}, "clip = nan is not allowed; give a number above 0, or None for no clipping"),
    ],
)
def test_bad_options_are_named(name, options, message):
    tensors, state = inputs_of(name)
    op, step = BOTH[name]
    with pytest.raises(ConfigError) as error:
        op(*tensors, state=state, **options)
    assert str(error.value) == f"{name}: {message}"
    with pytest.raises(ConfigError) as error:
        step(*(x[:, 0] for x in tensors), state=state, **options)
    assert str(error.value) == f"{name}_step: {message}"


@both
def test_half_a_state_is_refused(name):
    tensors, state = inputs_of(name)
    for half in (State(state.base, None), state.base, (state.base,)):
        with pytest.raises(ConfigError) as error:
            BOTH[name][0](*tensors, state=half)  # pyrefly: ignore
        assert (
            str(error.value) == f"{name}: state lacks one of its two parts; give State(base, residual) of two tensors"
        )


OPTIONS = {"clip": 1.0, "scale": None, "combine": "gated", "residual": "undecayed", "cu_seqlens": None}


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.base, "out lacks one of its two parts; give State(base, residual) of two tensors"),
        (
            lambda s: s._replace(residual=s.residual.float()),
            "out.residual has dtype torch.float32 and strides [96, 48, 6, 1]; "
            "give a contiguous tensor of torch.float64",
        ),
        (
            lambda s: s._replace(base=s.base.mT.contiguous().mT),
            "out.base has dtype torch.float64 and strides [96, 48, 1, 8]; give a contiguous tensor of torch.float64",
        ),
        (
            lambda s: s._replace(base=s.base[:1]),
            "out.base has shape [1, 2, 8, 6]; give [sequences, value heads, K, V] = [2, 2, 8, 6]",
        ),
        (
            lambda s: s._replace(base=s.base.requires_grad_()),
            "out is written to, which autograd cannot record; call under torch.no_grad()",
        ),
    ],
)
def test_bad_places_for_the_states_are_named(name, change, message):
    tensors, state = inputs_of(name, time=1)
    checked_rule(name, *tensors, state=state, out=state, **OPTIONS)
    with pytest.raises(ConfigError) as error:
        checked_rule(name, *tensors, state=None, out=change(state), **OPTIONS)
    assert str(error.value) == f"{name}: {message}"


@both
@pytest.mark.parametrize("with_state", [True, False])
def test_step_function_is_the_operation_at_one_token(name, with_state):
    tensors, state = inputs_of(name, time=1, value_heads=4)
    op, step = BOTH[name]
    options = {"clip": 0.5, "combine": "sum", "residual": "decayed", "scale": 0.7}
    want = op(*tensors, state=state if with_state else None, impl="reference", **options)
    got = step(*(x[:, 0] for x in tensors), state=state if with_state else None, **options)
    assert_close("y", want.y[:, 0], got.y, FP64)
    assert_close("base", want.state.base, got.state.base, FP64)
    assert_close("residual", want.state.residual, got.state.residual, FP64)


@both
def test_without_gamma_only_the_base_is_read(name):
    """gamma = 0: the second state stays empty, and y is alpha S_(t-1) q, the read before the token's own write."""
    (q, k, v, log_decay, beta, gamma), _ = inputs_of(name)
    scan = RECURRENCES["delta" if name == "rdn" else "decay"]
    out = BOTH[name][0](q, k, v, log_decay, beta, torch.zeros_like(gamma))
    y, (state,) = scan([q, k, v, log_decay, beta], None)
    assert not out.state.residual.any()
    assert_close("base", state, out.state.base, FP64)
    own = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    _, (before,) = scan([x[:, :-1] for x in (q, k, v, log_decay, beta)], None)
    seen = torch.einsum("bhkv,bhk->bhv", before, k[:, -1])
    alpha, rate = log_decay[:, -1].exp()[..., None], beta[:, -1][..., None]
    write = rate * (v[:, -1] - alpha * seen) if name == "rdn" else rate * v[:, -1]
    assert_close("y", y[:, -1] - own[:, -1] * write, out.y[:, -1], FP64)


@both
def test_scale_multiplies_q_only(name):
    (q, k, *others), state = inputs_of(name)
    want = BOTH[name][0](0.3 * q, k, *others, scale=1.0, state=state)
    got = BOTH[name][0](q, k, *others, scale=0.3, state=state)
    assert_close("y", want.y, got.y, FP64)
    assert torch.equal(want.state.base, got.state.base)
    default = BOTH[name][0](q, k, *others, state=state)
    assert_close("y", BOTH[name][0](q, k, *others, scale=8**-0.5, state=state).y, default.y, FP64)


@both
def test_clip_bounds_the_residual_and_not_the_base(name):
    tensors, state = inputs_of(name)
    clipped, free = (BOTH[name][0](*tensors, state=state, clip=clip) for clip in (0.2, None))
    assert torch.equal(clipped.state.base, free.state.base)
    assert not torch.isclose(clipped.state.residual, free.state.residual, rtol=1e-2).all()
    wide = BOTH[name][0](*tensors, state=state, clip=1e6)
    assert torch.equal(wide.y, free.y)


def with_and_without(name: str, inputs: Inputs, budget, floor: float = 1e-13, **options) -> None:
    """In parts that run again, against the reference at once: outputs and all gradients."""
    exact = type(inputs)(*([x.double() for x in part] for part in inputs))
    edges = {key: options[key] for key in ("cu_seqlens",) if key in options}
    wanted = outputs_and_gradients(RECURRENCES[name], exact, impl="reference", **edges)
    found = outputs_and_gradients(RECURRENCES[name], inputs, **options)
    for kind, want, got in zip(("", "gradient of "), wanted, found):
        for part in want:
            limit = budget.get(kind + part, budget.get(part, budget[""]))
            assert_close(kind + part, want[part], got[part], limit, floor=floor)


@both
@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("batch", "time", "parts"), [(1, 150, 1), (1, 150, 2), (1, 150, 100), (3, 20, 2), (3, 20, 9)], ids=str
)
def test_parts_that_run_again_change_nothing(name, impl, batch, time, parts):
    inputs = make_inputs(RECURRENCES[name], Shape(batch, time, value_heads=4))
    with_and_without(name, inputs, {"": FP64}, impl=impl, recompute=parts)


@both
def test_parts_of_packed_sequences(name):
    """Edges lie within parts, at their ends, and far from them; two sequences are empty."""
    edges = torch.tensor([0, 10, 64, 64, 190, 200, 200], dtype=torch.int32)
    inputs = make_inputs(RECURRENCES[name], Shape(1, 200), sequences=6)
    with_and_without(name, inputs, {"": FP64}, impl="chunked", recompute=3, cu_seqlens=edges)


@both
def test_parts_in_kernels(name):
    pytest.importorskip("triton")
    inputs = make_inputs(RECURRENCES[name], Shape(1, 70, 1, 1, 16, 16), dtype=torch.float32)
    with_and_without(name, inputs, {"": 5e-6}, 5e-6, impl="triton", recompute=2)


@both
def test_parts_keep_only_what_they_were_given(name):
    """Bytes that autograd holds between forward and backward, the inputs not counted."""
    tensors, _ = inputs_of(name, batch=1, time=256)
    inputs = {x.data_ptr() for x in tensors}
    states = 2 * 2 * 8 * 6  # both of them, of two heads

    def held(**options) -> int:
        kept: dict[int, int] = {}
        leaves = [x.requires_grad_() for x in tensors]

        def keep(x: torch.Tensor) -> torch.Tensor:
            place = x.untyped_storage()
            if place.data_ptr() not in inputs:
                kept[place.data_ptr()] = place.nbytes() // x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = BOTH[name][0](*leaves, impl="chunked", **options)
        del out
        return sum(kept.values())

    assert held() > 256 * 100
    assert held(recompute=4) <= 3 * states


@both
@pytest.mark.parametrize("parts", [-1, 1.5])
def test_bad_numbers_of_parts_are_named(name, parts):
    tensors, _ = inputs_of(name)
    with pytest.raises(ConfigError) as error:
        BOTH[name][0](*tensors, recompute=parts)
    assert str(error.value) == f"{name}: recompute = {parts} is not allowed; give 0 (off) or a number of parts"


@pytest.mark.gpu
@both
@pytest.mark.parametrize("shape", [Shape(1, 4103, 1, 2, 128, 64), Shape(2, 1003, 2, 4, 128, 128)], ids=str)
def test_parts_on_the_card(name, shape):
    """fp64 is met as without parts, twice with equal bits."""
    from whimbrel.scan.kernels.test_launch import HALF

    inputs = make_inputs(RECURRENCES[name], shape, seed=7, dtype=torch.bfloat16, strongest_decay=0.3)
    inputs = type(inputs)(*([x.cuda() for x in part] for part in inputs))
    with_and_without(name, inputs, HALF, 1e-6, impl="triton", recompute=3)
    runs = [outputs_and_gradients(RECURRENCES[name], inputs, impl="triton", recompute=3) for _ in range(2)]
    for one, other in zip(*runs):
        for part in one:
            assert torch.equal(one[part], other[part]), part


@pytest.mark.gpu
@both
@pytest.mark.parametrize("shape", [Shape(1, 4096, 4, 4, 128, 128), Shape(4, 1024, 4, 4, 128, 128)], ids=str)
def test_parts_lower_the_peak(name, shape):
    inputs = make_inputs(RECURRENCES[name], shape, dtype=torch.bfloat16)
    leaves = [x.cuda().requires_grad_() for x in inputs.tensors]
    peaks = {}
    for parts in (0, 4):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y, _ = RECURRENCES[name](leaves, None, impl="triton", recompute=parts)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        peaks[parts] = torch.cuda.max_memory_allocated() - before
        del y, gradients
    assert peaks[4] < 0.85 * peaks[0], peaks
