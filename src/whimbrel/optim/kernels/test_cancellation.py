"""The residual's norm where hardly anything is left of it: the kernels' difference of sums must not become NaN."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whimbrel.optim import Fira

pytest.importorskip("triton")


@pytest.mark.parametrize("shape", [(33, 18), (18, 33)])
@pytest.mark.parametrize("inside", ["rank", "basis"])
def test_a_gradient_inside_the_basis_leaves_no_residual(shape, inside):
    """Gradients of a low rank that the basis holds, or of any kind where the basis holds everything."""
    generator = torch.Generator().manual_seed(0)
    rank = 4 if inside == "rank" else min(shape)
    factors = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    moved, norms = [], []
    for impl in ("triton", "eager"):
        weight = nn.Parameter(torch.zeros(shape))
        group = {"params": [weight], "rank": rank}
        optimizer = Fira([group], lr=0.1, residual_mode="paper", refresh="exact", impl=impl)
        for step in range(3):
            weight.grad = (1 + step) * factors[0] @ factors[1]
            optimizer.step()
        moved.append(weight.detach().clone())
        norms.append(float(optimizer.state[weight]["limiter_norm"]))
    assert torch.isfinite(moved[0]).all()
    whole = float(moved[1].norm()) / 0.1
    assert max(norms) < 1e-2 * whole
    assert (moved[0] - moved[1]).norm() < 1e-2 * moved[1].norm()
