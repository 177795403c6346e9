"""Scan with the gated delta rule in the chunkwise parallel form: plain PyTorch with its own backward, on any device."""

from __future__ import annotations

from torch import Tensor

from whimbrel.scan import one_state
from whimbrel.scan.base import Out
from whimbrel.scan.chunks import DEFAULT_CHUNK


def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int = DEFAULT_CHUNK,
) -> Out:
    """As `whimbrel.scan.delta.delta_scan` with checked arguments, in fp32 (fp64 for fp64 inputs)."""
    return one_state.chunked(
        q,
        k,
        v,
        log_decay,
        beta,
        scale=scale,
        delta=True,
        state=state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )
