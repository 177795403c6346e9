"""Every causal block."""

from __future__ import annotations

from torch import Tensor

from whimbrel.attend.plan import Plan
from whimbrel.attend.shapes import check_qkv


def select(q: Tensor, k: Tensor, *, block_size: int, scale: float | None = None) -> Plan:
    """The plan that selects every causal block of q [B, Tq, H, D] and k [B, Tk, Hkv, D].

    Looks at shapes only, so `scale` changes nothing. Raises ConfigError where q and k do not fit together.
    """
    shape = check_qkv(q, k)
    return Plan.dense(
        batch=shape.batch,
        num_heads=shape.heads,
        block_size=block_size,
        q_len=shape.q_len,
        k_len=shape.k_len,
        device=q.device,
    )
