"""Two summed GDNs are what their name says."""

from __future__ import annotations

import torch

from whimbrel.mixers.gdn_sum.layer import summed
from whimbrel.scan.delta.op import delta_scan
from whimbrel.testing.budget import assert_close


def test_two_states_of_a_head_are_two_scans_over_the_same_values():
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(2, 19, 2, 5, dtype=torch.float64), dim=-1) for _ in range(2))
    v = torch.randn(2, 19, 4, 3, dtype=torch.float64)  # two value heads for a key head
    decay, beta = -torch.rand(2, 19, 8, dtype=torch.float64), torch.rand(2, 19, 8, dtype=torch.float64)
    got = summed(q, k, v, decay, beta, state=None, cu_seqlens=None, impl="chunked")
    each = [delta_scan(q, k, v, decay[..., i::2], beta[..., i::2], impl="reference") for i in (0, 1)]
    assert_close("y", each[0].y + each[1].y, got.y, 1e-10)
    for i in (0, 1):
        assert_close(f"state {i}", each[i].state, got.state.base[:, i::2], 1e-10)
