"""`rdn` against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from whimbrel.mixers.base import State
from whimbrel.mixers.rdn import rdn


def column(*values: float) -> torch.Tensor:
    """[1, T, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_two_tokens_by_hand(impl):
    """K = V = 1, so every quantity is a number; k = 1, alpha = 1/2, beta = 1/4, gamma = 1/2, S_0 = 2, R_0 = 1.

    t=1, v=4, q=1: p = 2, r = clip(4 - 2) = 1;
         S_1 = 1/2 * 2 * (1 - 1/4) + 1/4 * 4 = 1.75;  R_1 = 1/2 * 1 * (1 - 1/2) + 1/2 * 1 = 0.75;
         y = 1/2 * 2 + 1/2 * 0.75 = 1.375.
    t=2, v=2, q=3: p = 1.75, r = 0.25;
         S_2 = 1/2 * 1.75 * 3/4 + 1/2 = 1.15625;  R_2 = 1/2 * 0.75 * 1/2 + 1/8 = 0.3125;
         y = 1/2 * 1.75 * 3 + 1/2 * 0.3125 * 3 = 3.09375.
    """
    k, gate = column(1, 1), column(1, 1)[..., 0]
    out = rdn(
        column(1, 3),
        k,
        column(4, 2),
        (gate / 2).log(),
        gate / 4,
        gate / 2,
        state=State(column(2), column(1)),
        impl=impl,
    )
    torch.testing.assert_close(out.y, column(1.375, 3.09375))
    torch.testing.assert_close(out.state.base, column(1.15625))
    torch.testing.assert_close(out.state.residual, column(0.3125))


def test_options_by_hand():
    """The first token above: summed, y = 2 + 0.75; decayed, r = clip(4 - 1) = 1; unclipped r = 2, R_1 = 1.25."""
    one = column(1)
    gate = one[..., 0]
    arguments = (one, one, column(4), (gate / 2).log(), gate / 4, gate / 2)
    state = State(column(2), one)
    assert rdn(*arguments, state=state, combine="sum").y.item() == pytest.approx(2.75)
    assert rdn(*arguments, state=state, clip=None).state.residual.item() == pytest.approx(1.25)
    decayed = rdn(*arguments, state=state, clip=None, residual="decayed")
    assert decayed.state.residual.item() == pytest.approx(0.25 + 0.5 * 3)
