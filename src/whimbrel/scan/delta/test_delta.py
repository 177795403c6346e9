"""`delta_scan` against numbers worked out by hand, and as the associative memory it is meant to be."""

from __future__ import annotations

import pytest
import torch

from whimbrel.scan.delta import delta_scan


def column(*values: float) -> torch.Tensor:
    """[1, T, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_two_tokens_by_hand(impl):
    """K = V = 1, alpha = 1/2, beta = 1/4, S_0 = 2: the prediction that is corrected is decayed, the read is after.

    t=1, k=1, v=4, q=1: S_1 = 1/2 * 2 * (1 - 1/4) + 1/4 * 4 = 1.75 = y.
    t=2, k=2, v=3, q=2: S_2 = 1/2 * 1.75 * (1 - 1/4 * 4) + 1/4 * 3 * 2 = 1.5;  y = 3.
    """
    gate = column(1, 1)[..., 0]
    y, state = delta_scan(
        column(1, 2), column(1, 2), column(4, 3), (gate / 2).log(), gate / 4, state=column(2), impl=impl
    )
    torch.testing.assert_close(y, column(1.75, 3))
    torch.testing.assert_close(state, column(1.5))


def test_a_key_written_at_rate_1_reads_back_its_last_value():
    random = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, 80, 2, 8, generator=random), dim=-1)
    v = torch.randn(1, 80, 2, 4, generator=random)
    one = torch.ones(1, 80, 2)
    y, _ = delta_scan(k, k, v, 0 * one, one, scale=1.0)
    torch.testing.assert_close(y, v, atol=1e-5, rtol=0)
