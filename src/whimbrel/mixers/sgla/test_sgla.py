"""The SGLA layer runs linear attention with a scalar decay, written out here as a sum over pairs of tokens."""

from __future__ import annotations

import torch

from whimbrel.mixers import SGLA
from whimbrel.testing.budget import assert_close


def written_out(q, k, v, log_decay, beta):
    """y_t = sum over s <= t of exp(sum of log_decay after s up to t) * beta_s * (q_t . k_s) / sqrt(K) * v_s."""
    total = log_decay.cumsum(1)
    decay = (total[:, :, None] - total[:, None]).exp()
    scores = torch.einsum("bthk,bshk->btsh", q, k) / q.shape[3] ** 0.5 * decay * beta[:, None]
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    return torch.einsum("btsh,bshv->bthv", scores * seen[:, :, None], v)


def test_layer_runs_decaying_linear_attention_and_goes_on_from_its_state():
    torch.manual_seed(0)
    layer, calls = SGLA(10, num_heads=2, head_dim=4, value_head_dim=3).double(), []
    inner = layer.recurrence
    layer.recurrence = lambda *tensors, **options: calls.append((tensors, inner(*tensors, **options))) or calls[-1][1]
    x = torch.randn(2, 17, 10, dtype=torch.float64)
    _, state = layer(x[:, :11])
    layer(x[:, 11:], state)
    tensors = [torch.cat(pair, 1) for pair in zip(*(call[0] for call in calls), strict=True)]
    assert_close("y", written_out(*tensors), torch.cat([got.y for _, got in calls], 1), 1e-9)
    assert calls[0][1].state.residual is None
