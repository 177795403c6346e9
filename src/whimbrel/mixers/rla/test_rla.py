"""`rla` against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from whimbrel.mixers.base import State
from whimbrel.mixers.rla import rla


def column(*values: float) -> torch.Tensor:
    """[1, T, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_two_tokens_by_hand(impl):
    """K = V = 1, so every quantity is a number; k = 1, alpha = 1/2, beta = 1/4, gamma = 1/2, S_0 = 2, R_0 = 1.

    t=1, v=4, q=1: p = 2, r = clip(4 - 2) = 1;
         S_1 = 1/2 * 2 + 1/4 * 4 = 2;  R_1 = 1/2 * 1 + 1/2 * 1 = 1;  y = 1/2 * 2 + 1/2 * 1 = 1.5.
    t=2, v=1.5, q=3: p = 2, r = -0.5;
         S_2 = 1/2 * 2 + 1/4 * 1.5 = 1.375;  R_2 = 1/2 * 1 - 1/4 = 0.25;  y = 1/2 * 2 * 3 + 1/2 * 0.25 * 3 = 3.375.
    """
    k, gate = column(1, 1), column(1, 1)[..., 0]
    out = rla(
        column(1, 3),
        k,
        column(4, 1.5),
        (gate / 2).log(),
        gate / 4,
        gate / 2,
        state=State(column(2), column(1)),
        impl=impl,
    )
    torch.testing.assert_close(out.y, column(1.5, 3.375))
    torch.testing.assert_close(out.state.base, column(1.375))
    torch.testing.assert_close(out.state.residual, column(0.25))


def test_options_by_hand():
    """The first token above: summed, y = 2 + 1; unclipped r = 2, R_1 = 1.5; decayed and unclipped r = 3, R_1 = 2."""
    one = column(1)
    gate = one[..., 0]
    arguments = (one, one, column(4), (gate / 2).log(), gate / 4, gate / 2)
    state = State(column(2), one)
    assert rla(*arguments, state=state, combine="sum").y.item() == pytest.approx(3)
    assert rla(*arguments, state=state, clip=None).state.residual.item() == pytest.approx(1.5)
    assert rla(*arguments, state=state, clip=None, residual="decayed").state.residual.item() == pytest.approx(2)
