"""Residual Linear Attention as the recurrence of the paper (arXiv 2509.25223), token by token in fp64.

Vectors are rows and a state is [K, V], the transpose of the paper's: S k there is k @ S here, v k^T is k.mT @ v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.mixers.two_state.rule import Rule


def recur(
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
    """y [B, T, HV, V] and both states after the last token; `two_state.op.reference` gives the arguments."""
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
