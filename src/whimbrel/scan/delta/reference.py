"""Scan with the gated delta rule as a recurrence, token by token in fp64.

Vectors are rows and a state is [K, V]: S k is k @ S here, v k^T is k.mT @ v.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recur(
    q_BTH1K: Tensor, k_BTH1K: Tensor, v_BTH1V: Tensor, alpha_BTH11: Tensor, beta_BTH11: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, T, HV, V] and the state after the last token; `one_state.reference` gives the arguments."""
    y_BTHV = [v_BTH1V[:, :0, :, 0]]
    for q, k, v, a, b in zip(*(x.unbind(1) for x in (q_BTH1K, k_BTH1K, v_BTH1V, alpha_BTH11, beta_BTH11))):
        S = a * (S - b * k.mT @ (k @ S)) + b * k.mT @ v
        y_BTHV.append((q @ S).transpose(1, 2))
    return torch.cat(y_BTHV, 1), S
