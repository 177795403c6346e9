"""The GDN layer runs the gated delta rule, written out here token by token."""

from __future__ import annotations

import torch

from whimbrel.mixers import GDN
from whimbrel.testing.budget import assert_close


def written_out(q, k, v, log_decay, beta, state):
    """Equation 10 of arXiv 2412.06464 with S stored as [K, V]; q scaled by 1 / sqrt(K)."""
    outputs = []
    for t in range(q.shape[1]):
        k_t, a, b = k[:, t, :, :, None], log_decay[:, t, :, None, None].exp(), beta[:, t, :, None, None]
        forget = torch.eye(k.shape[3], dtype=k.dtype) - b * k_t @ k_t.mT
        state = a * forget @ state + b * k_t @ v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0] / q.shape[3] ** 0.5)
    return torch.stack(outputs, 1), state


def test_layer_runs_the_gated_delta_rule_and_goes_on_from_its_state():
    torch.manual_seed(0)
    layer, calls = GDN(10, num_heads=2, head_dim=4, value_head_dim=3).double(), []
    inner = layer.recurrence
    layer.recurrence = lambda *tensors, **options: calls.append((tensors, inner(*tensors, **options))) or calls[-1][1]
    x = torch.randn(2, 17, 10, dtype=torch.float64)
    _, state = layer(x[:, :11])
    layer(x[:, 11:], state)
    memory = torch.zeros(2, 2, 4, 3, dtype=torch.float64)
    for tensors, got in calls:
        expected, memory = written_out(*tensors, memory)
        assert_close("y", expected, got.y, 1e-9)
        assert_close("state", memory, got.state.base, 1e-9)
        assert got.state.residual is None
