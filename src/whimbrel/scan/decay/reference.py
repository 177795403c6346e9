"""Scan with a scalar decay as a recurrence, token by token in fp64.

Vectors are rows and a state is [K, V]: S k is k @ S here, v k^T is k.mT @ v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.scan.base import Out
from whimbrel.scan.common import by_sequence, compute_dtype, in_rows


def decay_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Out:
    """As `whimbrel.scan.decay.decay_scan` with checked arguments; autograd differentiates it."""
    heads, dtype = v.shape[2], compute_dtype(q, log_decay, beta, state)
    gates = (x[..., None, None] for x in (log_decay.double().exp(), beta.double()))
    if state is None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = q.new_zeros(sequences, heads, q.shape[3], v.shape[3])
    tensors = (*in_rows(heads, q.double() * scale, k, v), *gates)
    y, final = by_sequence(_recur, tensors, [state.double()], cu_seqlens)
    return Out(y.to(v.dtype), final.to(dtype))


def _recur(
    q_BTH1K: Tensor, k_BTH1K: Tensor, v_BTH1V: Tensor, alpha_BTH11: Tensor, beta_BTH11: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    y_BTHV = [v_BTH1V[:, :0, :, 0]]
    for q, k, v, a, b in zip(*(x.unbind(1) for x in (q_BTH1K, k_BTH1K, v_BTH1V, alpha_BTH11, beta_BTH11))):
        S = a * S + b * k.mT @ v
        y_BTHV.append((q @ S).transpose(1, 2))
    return torch.cat(y_BTHV, 1), S
