"""Residual Delta Net in the chunkwise parallel form: plain PyTorch with its own backward, on any device."""

from __future__ import annotations

from torch import Tensor

from whimbrel.mixers import two_state
from whimbrel.scan.base import Out, State
from whimbrel.scan.chunks import DEFAULT_CHUNK


def rdn_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    rule: two_state.Rule,
    state: State | None,
    cu_seqlens: Tensor | None,
    chunk_size: int = DEFAULT_CHUNK,
) -> Out:
    """As `whimbrel.mixers.rdn.rdn` with checked arguments, in fp32 (fp64 for fp64 inputs)."""
    return two_state.chunked(
        q,
        k,
        v,
        log_decay,
        beta,
        gamma,
        rule=rule,
        delta=True,
        state=state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )
