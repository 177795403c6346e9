"""Other people's sparse prefill: what selectors are timed against. Nothing but benchmarks imports this.

Each function takes q [1, T, H, D], k and v [1, T, Hkv, D] and gives y. Its code is loaded at the first call from a
checkout that PYTHONPATH names; UnsupportedError is raised where there is none.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from whimbrel.errors import UnsupportedError


def flexprefill_official(q: Tensor, k: Tensor, v: Tensor, *, coverage: float) -> Tensor:
    """The authors' FlexPrefill, with tau and budget of their experiments, which are not their code's defaults."""
    module = _load("flex_prefill.ops.flex_prefill_attention", "github.com/ByteDance-Seed/FlexPrefill")
    return module.flex_prefill_attention(q, k, v, gamma=coverage, tau=0.1, min_budget=1024)


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
