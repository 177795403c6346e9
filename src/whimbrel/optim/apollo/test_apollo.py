"""APOLLO against its algorithm in fp64, and the bases that it draws."""

from __future__ import annotations

import math

import pytest
import torch

from whimbrel.errors import ConfigError
from whimbrel.optim import Apollo, ApolloConfig, counter, lowrank
from whimbrel.optim.fira.fixtures.problem import Problem
from whimbrel.testing.budget import assert_close


@pytest.mark.parametrize(("shape", "side"), [((15, 15), "right"), ((22, 13), "right"), ((13, 22), "left")])
@pytest.mark.parametrize(("rank", "alpha", "scaling"), [(4, 1.0, "column"), (1, 128.0, "matrix")])
def test_equals_the_paper_in_fp64(shape, side, rank, alpha, scaling):
    """arXiv 2412.05270, algorithm 1, with the limiter on the scaled gradient and the root of alpha after it."""
    problem = Problem(shape)
    weight = torch.nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": rank, "update_proj_gap": 7, "scale": alpha}
    optimizer = Apollo([group], lr=0.01, scaling=scaling, seed=3)
    m = v = norm = 0.0
    for step in range(20):
        grad = torch.from_numpy(problem.grad(problem.start, step))
        with torch.no_grad():
            weight.zero_()
        weight.grad = grad
        optimizer.step()
        key = torch.tensor([counter.drawn_basis_key(counter.base(3, 0), step // 7)])
        basis = lowrank.drawn(key, min(shape), rank)[0].double()
        g = grad.double().T if side == "left" else grad.double()
        low = g @ basis
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        n = m / (v.sqrt() + 1e-6)
        dims = (0, 1) if scaling == "matrix" else (1,)
        scaled = g * n.norm(dim=dims, keepdim=True) / (low.norm(dim=dims, keepdim=True) + 1e-8)
        scaled = scaled * min(1.0, 1.01 * (norm + 1e-8) / float(scaled.norm())) if norm else scaled
        norm = float(scaled.norm())
        correction = math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        change = 0.01 * math.sqrt(alpha) * correction * scaled
        assert_close(f"update of step {step}", -(change.T if side == "left" else change), weight, 1e-4)
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq", "limiter_norm"}


def test_bases_keep_norms_in_the_mean():
    keys = torch.tensor([counter.drawn_basis_key(counter.base(0, i), 0) for i in range(200)])
    basis = lowrank.drawn(keys, 30, 10)
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    ratios = (x @ basis).norm(dim=-1).square() / x.norm().square()
    assert ratios.mean().item() == pytest.approx(1.0, abs=0.1)
    assert ratios.std() > 0.2


def test_no_basis_is_stored():
    shapes = {"blocks.0": (40, 64)}
    assert ApolloConfig(rank=8).state_bytes(shapes) == 4 * (2 * 8 * 64 + 2)
    assert ApolloConfig(rank=8, refresh="power").state_bytes(shapes) == 4 * (2 * 8 * 64 + 40 * 8 + 2)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("on_refresh", "rotate", "one of keep"), ("lazy_overlap", 0.5, "0 with random bases")],
)
def test_nothing_is_carried_from_one_drawn_basis_to_the_next(name, value, allowed):
    with pytest.raises(ConfigError) as error:
        ApolloConfig(**{name: value})
    assert str(error.value) == f"optim.{name} = {value!r} is not allowed; use {allowed}"
    with pytest.raises(ConfigError, match=f"^{name} = "):
        Apollo([{"params": [torch.nn.Parameter(torch.zeros(9, 9))], "rank": 2, name: value}])
    ApolloConfig(refresh="power", **{name: value})
