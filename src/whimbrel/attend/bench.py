"""Benchmark cases of `attend`: work skipped against the dense attention that torch ships."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from whimbrel.attend.op import attend
from whimbrel.attend.plan import Grid, Plan
from whimbrel.bench.case import Case
from whimbrel.testing.budget import assert_close

HEADS, KEY_HEADS, DIM, BLOCK = 8, 2, 64, 64


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """Plans that keep all causal blocks, and the first block with a band of a quarter, an eighth of the blocks.

    `sdpa` always computes all causal pairs, so on a sparse plan it is what skipping is measured against, and
    not equal in its result.
    """
    found = []
    for length in (512,) if quick else (2048, 4096):
        tensors = partial(_inputs, length, device)
        for band in (None, 4, 8):
            plan = _plan(length, band, device)
            density = float(plan.density().mean())
            pairs = density * HEADS * length * (length + 1) / 2
            found.append(
                Case(
                    name="attend",
                    params={"T": length, "H": HEADS, "Hkv": KEY_HEADS, "D": DIM, "block": BLOCK}
                    | {"density": round(density, 3), "dtype": "float32"},
                    impls={"sdpa": partial(_sdpa, tensors), "blocks": partial(_blocks, tensors, plan)},
                    check=partial(_check, tensors, plan, is_dense=band is None),
                    flops=4 * DIM * pairs,
                )
            )
    return found


def _inputs(length: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, length, heads, DIM, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    return q.to(device), k.to(device), v.to(device)


def _plan(length: int, band: int | None, device: str) -> Plan:
    grid = Grid(BLOCK, length, length)
    mask = grid.causal()
    if band is not None:
        near = torch.ones_like(mask).triu(-(grid.key_blocks // band) + 1)
        near[:, 0] = True
        mask = mask & near
    mask = mask.expand(1, HEADS, -1, -1).to(device)
    return Plan.from_mask(mask, block_size=BLOCK, q_len=length, k_len=length)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's causal attention of [B, T, H, D] tensors with grouped key heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def _sdpa(tensors: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> Callable[[], object]:
    return partial(dense_attention, *tensors())


def _blocks(tensors: Callable[[], tuple[Tensor, Tensor, Tensor]], plan: Plan) -> Callable[[], object]:
    return partial(attend, *tensors(), plan, impl="blocks")


def _check(tensors: Callable[[], tuple[Tensor, Tensor, Tensor]], plan: Plan, *, is_dense: bool) -> None:
    q, k, v = tensors()
    got = attend(q, k, v, plan, impl="blocks").y
    assert_close("attend blocks", attend(q, k, v, plan, impl="reference").y, got, 1e-5)
    if is_dense:
        assert_close("attend against sdpa", dense_attention(q, k, v), got, 1e-5)
