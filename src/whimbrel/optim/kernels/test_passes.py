"""The kernels against the step in fp64 and against the eager step: interpreted at small sizes, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whimbrel.optim import Fira, GaLore, lowrank, storage
from whimbrel.optim.fira.fixtures.problem import Problem
from whimbrel.testing.budget import rms_ratio

pytest.importorskip("triton")

SHAPES = [(37, 21), (21, 37), (17, 17)]
BITS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int4")]


def run(cls, impl, shapes, *, steps=6, dtype=torch.float32, device="cpu", change=None, **options):
    """Steps under seeded gradients; returns the optimizer and how far each weight has moved, in fp64."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    start = [param.detach().double() for param in params]
    optimizer = cls([{"params": params, "rank": 5, **options.pop("group", {})}], lr=0.05, impl=impl, **options)
    for step in range(steps):
        for i, (param, shape) in enumerate(zip(params, shapes, strict=True)):
            g = torch.randn(shape, generator=generator)
            param.grad = (g if change is None else change(step, i, g)).to(device, dtype)
        optimizer.step()
    return optimizer, [param.detach().double() - s for param, s in zip(params, start, strict=True)]


def compare(cls, budget, shapes=SHAPES, **options):
    ours, moved = run(cls, "triton", shapes, **options)
    theirs, wanted = run(cls, "eager", shapes, **options)
    for got, want in zip(moved, wanted, strict=True):
        assert want.abs().max() > 0
        assert rms_ratio(want, got) <= budget
    return ours, theirs


def states(optimizer):
    return [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]


@pytest.mark.parametrize("cls", [Fira, GaLore])
@pytest.mark.parametrize("side", ["std", "reverse_std"])
def test_equals_the_eager_step(cls, side):
    ours, theirs = compare(cls, 1e-5, side=side, weight_decay=0.1, refresh_steps=3, on_refresh="rotate")
    for mine, other in zip(states(ours), states(theirs), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step", *cls.scalars):
            assert rms_ratio(other[key], mine[key]) <= 1e-4, key


@pytest.mark.parametrize("mode", ["official", "paper"])
@pytest.mark.parametrize("scaling", ["column", "matrix"])
def test_modes_of_fira(mode, scaling):
    compare(Fira, 1e-5, residual_mode=mode, scaling=scaling, alpha=0.3)


@pytest.mark.parametrize(("state_dtype", "basis_dtype"), BITS)
@pytest.mark.parametrize("rank", [5, 13])
def test_formats_of_the_state(state_dtype, basis_dtype, rank):
    """Both round by the same words, so codes agree but for a few that lie on an edge."""
    ours, theirs = compare(
        Fira, 2e-2, group={"rank": rank}, state_dtype=state_dtype, basis_dtype=basis_dtype, refresh_steps=3
    )
    for mine, other in zip(states(ours), states(theirs), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert (mine[key] != other[key]).float().mean() < 0.03 or state_dtype == "float32", key
            want, got = (storage.read_moment([x], key) for x in (other, mine))
            assert rms_ratio(want, got) <= 1e-2


def test_blocks_of_a_wide_rank():
    """Above 256 columns a slice has several scales."""
    ours, _ = compare(
        Fira, 2e-2, [(258, 257)], steps=1, group={"rank": 257}, state_dtype="int8", basis_dtype="int4", alpha=0.3
    )
    assert states(ours)[0]["exp_avg_scale"].shape == (258, 2)


def test_equals_fp64():
    """One step from given moments against the formulas in fp64, in which the residual is formed."""
    problem = Problem((33, 18))
    weight = nn.Parameter(torch.from_numpy(problem.start.copy()))
    optimizer = Fira([{"params": [weight], "rank": 4}], lr=0.1, impl="triton", alpha=0.25, weight_decay=0.2)
    for step in range(3):
        weight.grad = torch.from_numpy(problem.grad(problem.start, step))
        optimizer.step()
    state = {key: value.double().clone() for key, value in optimizer.state[weight].items()}
    before = weight.detach().double()
    weight.grad = torch.from_numpy(problem.grad(problem.start, 3))
    optimizer.step()
    g, p = weight.grad.double(), state["basis"]
    low = g @ p
    m, v = 0.9 * state["exp_avg"] + 0.1 * low, 0.999 * state["exp_avg_sq"] + 0.001 * low**2
    n = m / (v.sqrt() + 1e-6)
    residual = (g - 0.25 * low @ p.T) * (n.norm(dim=1) / (low.norm(dim=1) + 1e-8))[:, None]
    residual *= min(1.0, 1.01 * (float(state["limiter_norm"]) + 1e-8) / float(residual.norm()))
    size = 0.1 * float(lowrank.bias_correction(torch.tensor(4.0), (0.9, 0.999)))
    after = before - size * (0.25 * n @ p.T + residual)
    after = after - 0.1 * 0.2 * after
    assert rms_ratio(after - before, weight.detach().double() - before) <= 1e-5
    assert float(optimizer.state[weight]["limiter_norm"]) == pytest.approx(float(residual.norm()), rel=1e-5)


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_bad_and_empty_gradients_leave_a_matrix_alone(state_dtype):
    def change(step, i, grad):
        if step == 4 and i < 2:
            return grad * float("nan") if i else grad * 0
        return grad

    options = {"state_dtype": state_dtype, "weight_decay": 0.1, "group": {"rank": 5, "refresh_steps": 50}}
    before, _ = run(Fira, "triton", SHAPES, steps=4, **options)
    after, _ = run(Fira, "triton", SHAPES, steps=5, change=change, **options)
    for i, (a, b) in enumerate(zip(states(before), states(after), strict=True)):
        assert all(torch.equal(a[key], b[key]) for key in a) == (i < 2)
    old, new = (x.param_groups[0]["params"] for x in (before, after))
    assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [True, True, False]


def test_a_gradient_scaler_is_honoured():
    def scaled(factor, found):
        param = nn.Parameter(torch.zeros(20, 30))
        optimizer = Fira([{"params": [param], "rank": 4}], impl="triton")
        for seed in range(3):
            param.grad = factor * torch.randn(20, 30, generator=torch.Generator().manual_seed(seed))
            optimizer.grad_scale, optimizer.found_inf = (
                torch.tensor([factor]),
                torch.tensor([float(found and seed == 2)]),
            )
            optimizer.step()
        return optimizer, param.detach()

    _, plain = scaled(1.0, False)
    _, large = scaled(512.0, False)
    stopped, _ = scaled(512.0, True)
    assert rms_ratio(plain, large) < 1e-6
    assert states(stopped)[0]["step"].item() == 2


def test_layouts_of_weights_and_gradients():
    """Transposed in memory, weights, gradients or both; and gradients that move from step to step."""
    want = run(Fira, "eager", [(12, 20)] * 4)[1]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(12, 20, generator=generator) for _ in range(4)]
    params = [nn.Parameter(x.T.contiguous().T if i % 2 else x.clone()) for i, x in enumerate(start)]
    optimizer = Fira([{"params": params, "rank": 5}], lr=0.05, impl="triton")
    for _ in range(6):
        for i, param in enumerate(params):
            grad = torch.randn(12, 20, generator=generator)
            param.grad = grad.T.contiguous().T if i > 1 else grad
        optimizer.step()
    for param, s, w in zip(params, start, want, strict=True):
        assert rms_ratio(w, param.detach().double() - s.double()) <= 1e-5


def test_batches_of_any_size_give_the_same_step(monkeypatch):
    from whimbrel.optim.kernels import launch

    whole = run(Fira, "triton", [(20, 30)] * 3, state_dtype="bfloat16")[1]
    monkeypatch.setattr(launch, "SCRATCH_ELEMENTS", 1)
    for a, b in zip(whole, run(Fira, "triton", [(20, 30)] * 3, state_dtype="bfloat16")[1], strict=True):
        assert torch.equal(a, b)
