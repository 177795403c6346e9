"""`decay_scan` against numbers worked out by hand, and against attention with a decay mask."""

from __future__ import annotations

import pytest
import torch

from whimbrel.scan.decay import decay_scan
from whimbrel.testing.budget import assert_close
from whimbrel.testing.recurrence import FP64, RECURRENCES, Shape, make_inputs


def column(*values: float) -> torch.Tensor:
    """[1, T, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_two_tokens_by_hand(impl):
    """K = V = 1, alpha = 1/2, beta = 1/4, S_0 = 2; the read comes after the write.

    t=1, k=1, v=4, q=1: S_1 = 1/2 * 2 + 1/4 * 4 = 2 = y.   t=2, k=2, v=3, q=2: S_2 = 1 + 1/4 * 3 * 2 = 2.5;  y = 5.
    """
    gate = column(1, 1)[..., 0]
    y, state = decay_scan(
        column(1, 2), column(1, 2), column(4, 3), (gate / 2).log(), gate / 4, state=column(2), impl=impl
    )
    torch.testing.assert_close(y, column(2, 5))
    torch.testing.assert_close(state, column(2.5))


def test_equals_attention_with_a_decay_mask():
    q, k, v, log_decay, beta = make_inputs(RECURRENCES["decay"], Shape()).tensors
    total = log_decay.cumsum(1).transpose(1, 2)
    mask = (total[..., :, None] - total[..., None, :]).exp().tril()
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * mask * q.shape[-1] ** -0.5
    want = torch.einsum("bhij,bjhv->bihv", scores, v * beta[..., None])
    assert_close("y", want, decay_scan(q, k, v, log_decay, beta).y, FP64)
