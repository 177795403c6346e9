"""Other people's sparse prefill: what selectors are timed against. Nothing but benchmarks imports this.

Each function takes q [1, T, H, D], k and v [1, T, Hkv, D] and gives y. Its code is loaded at the first call from a
checkout that PYTHONPATH names; UnsupportedError is raised where there is none.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from whimbrel.attend.plan import Grid, Plan
from whimbrel.errors import UnsupportedError


def flexprefill_official(q: Tensor, k: Tensor, v: Tensor, *, coverage: float) -> Tensor:
    """The authors' FlexPrefill, with tau and budget of their experiments, which are not their code's defaults."""
    return _flexprefill().flex_prefill_attention(q, k, v, gamma=coverage, tau=0.1, min_budget=1024)


def flexprefill_plan(q: Tensor, k: Tensor, v: Tensor, *, coverage: float) -> Plan:
    """The blocks that it attends to in `flexprefill_official`, which costs as much again."""
    grid = Grid(128, q.shape[1], k.shape[1])
    chosen = _flexprefill().get_active_blocks(q, k, v, 128, coverage, 8, 1 << 24, 0.1, False)
    mask = torch.zeros(1, q.shape[2], grid.query_blocks * grid.key_blocks, dtype=torch.bool, device=q.device)
    for head, places in enumerate(chosen[0]):
        mask[0, head, places.long()] = True
    mask = mask.unflatten(-1, (grid.query_blocks, grid.key_blocks))
    return Plan.from_mask(mask, block_size=128, q_len=grid.q_len, k_len=grid.k_len)


def _flexprefill() -> Any:
    return _load("flex_prefill.ops.flex_prefill_attention", "github.com/ByteDance-Seed/FlexPrefill")


def flashprefill_v1(q: Tensor, k: Tensor, v: Tensor, *, threshold: float = 0.18) -> Tensor:
    """FlashPrefill V1: blocks whose estimated energy is at least `threshold` of the row's largest, two sink blocks,
    four near ones, and the last two rows whole. These are its authors' numbers for Llama."""
    module = _load("ops.flashprefill_native_forward", "github.com/qhfan/FlashPrefill")
    y = torch.empty_like(q)
    module.flash_prefill(q, k, v, y, 128, 2, 4, threshold, 2, 0)
    return y


def _load(module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{error.name} is not found; put a checkout of {source} on PYTHONPATH") from error
