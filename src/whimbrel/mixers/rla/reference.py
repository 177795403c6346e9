"""Residual Linear Attention as the recurrence of the paper (arXiv 2509.25223), token by token in fp64.

Vectors are rows and a state is [K, V], the transpose of the paper's: S k there is k @ S here, v k^T is k.mT @ v.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from whimbrel.mixers.two_state import Rule, both_states
from whimbrel.scan.base import Out, State
from whimbrel.scan.common import by_sequence, compute_dtype, in_rows


def rla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    rule: Rule,
    state: State | None,
    cu_seqlens: Tensor | None,
) -> Out:
    """As `whimbrel.mixers.rla.rla` with checked arguments; autograd differentiates it."""
    heads, dtype = v.shape[2], compute_dtype(q, log_decay, beta, gamma, *(state or ()))
    gates = (x[..., None, None] for x in (log_decay.double().exp(), beta.double(), gamma.double()))
    y, base, residual = by_sequence(
        partial(_recur, rule),
        (*in_rows(heads, q.double() * rule.scale, k, v), *gates),
        both_states(state, q, v, cu_seqlens, torch.float64),
        cu_seqlens,
    )
    return Out(y.to(v.dtype), State(base.to(dtype), residual.to(dtype)))


def _recur(
    rule: Rule,
    q_BTH1K: Tensor,
    k_BTH1K: Tensor,
    v_BTH1V: Tensor,
    alpha_BTH11: Tensor,
    beta_BTH11: Tensor,
    gamma_BTH11: Tensor,
    S: Tensor,
    R: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    y_BTHV = [v_BTH1V[:, :0, :, 0]]
    for q, k, v, a, b, c in zip(
        *(x.unbind(1) for x in (q_BTH1K, k_BTH1K, v_BTH1V, alpha_BTH11, beta_BTH11, gamma_BTH11))
    ):
        base = q @ S
        p = k @ S
        r = v - a * p if rule.decayed else v - p
        if rule.clip is not None:
            r = r.clamp(-rule.clip, rule.clip)
        S = a * S + b * k.mT @ v
        R = a * R + c * k.mT @ r
        y = a * base + c * (q @ R) if rule.gated else base + q @ R
        y_BTHV.append(y.transpose(1, 2))
    return torch.cat(y_BTHV, 1), S, R
