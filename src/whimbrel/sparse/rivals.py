"""Other people's sparse prefill: what selectors are timed against. Nothing but benchmarks imports this.

Each function takes q [1, T, H, D], k and v [1, T, Hkv, D] and gives y. Its code is loaded at the first call from a
checkout that PYTHONPATH names; UnsupportedError is raised where there is none.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from whimbrel.attend.op import attend
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
    y = torch.empty_like(q)
    _flashprefill().flash_prefill(q, k, v, y, 128, 2, 4, threshold, 2, 0)
    return y


def flashprefill_plan(q: Tensor, k: Tensor, v: Tensor, *, threshold: float) -> Plan:
    """The blocks that it attends to in `flashprefill_v1`, which runs for it."""
    module, chosen = _flashprefill(), []
    select = module.deal_output_score

    def keep(*given: Any) -> Any:
        chosen.append(select(*given))
        return chosen[-1]

    with patch.object(module, "deal_output_score", keep):
        flashprefill_v1(q, k, v, threshold=threshold)
    # [B, query blocks, key blocks, H]; places behind a row's blocks hold the number of key blocks.
    places = chosen[0][0].long()
    blocks = places.shape[2]
    mask = places.new_zeros(*places.shape[:2], blocks + 1, places.shape[3], dtype=torch.bool).scatter_(2, places, True)
    mask = mask[:, :, :blocks].permute(0, 3, 1, 2)
    return Plan.from_mask(mask, block_size=128, q_len=q.shape[1], k_len=k.shape[1])


def _flashprefill() -> Any:
    module = _load("ops.flashprefill_native_forward", "github.com/qhfan/FlashPrefill")
    # What it compiles is compiled for every length and threshold anew, so that none is slowed by the ones before.
    torch._dynamo.config.automatic_dynamic_shapes = False  # pyrefly: ignore
    torch._dynamo.config.specialize_float = True  # pyrefly: ignore
    torch._dynamo.config.recompile_limit = 256  # pyrefly: ignore
    return module


def xattention(q: Tensor, k: Tensor, v: Tensor, *, coverage: float) -> Tensor:
    """XAttention's selection by its authors' code, and attention over it by the kernel here: theirs is a CUDA extension
    of its own (block_sparse_attn)."""
    return attend(q, k, v, xattention_plan(q, k, coverage=coverage), impl="triton").y


def xattention_plan(q: Tensor, k: Tensor, *, coverage: float) -> Plan:
    """Blocks that hold `coverage` of the antidiagonal scores (its threshold), at the stride 16 of its README.

    Its Triton kernels run on devices with "100" in their name, unless that line of the checkout is changed; elsewhere
    it takes PyTorch.
    """
    kernel = ModuleType("block_sparse_attn")  # is imported, and not called for a selection
    kernel.block_sparse_attn_func = None  # pyrefly: ignore
    with patch.dict(sys.modules, {"block_sparse_attn": sys.modules.get("block_sparse_attn", kernel)}):
        module = _load("xattn.src.Xattention", "github.com/mit-han-lab/x-attention")
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    # The chunk that its `Xattention_prefill` takes.
    span = 1 << (k.shape[1] - 1).bit_length()
    chunk = max(2048, min(max(2048, span), 128 * 1024 * 2048 // span))
    _, mask = module.xattn_estimate(
        q.transpose(1, 2), k.transpose(1, 2), block_size=128, stride=16, threshold=coverage, chunk_size=chunk
    )
    grid = Grid(128, q.shape[1], k.shape[1])
    mask = mask[:, :, : grid.query_blocks, : grid.key_blocks].contiguous()
    return Plan.from_mask(mask, block_size=128, q_len=grid.q_len, k_len=grid.k_len)


def _load(module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{error.name} is not found; put a checkout of {source} on PYTHONPATH") from error
