"""Benchmark cases of `attend`: work skipped against the dense attention that torch ships."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from whimbrel.attend.dense import dense_attention
from whimbrel.attend.op import attend
from whimbrel.attend.plan import Grid, Plan
from whimbrel.attend.rivals import DENSE
from whimbrel.bench.case import Case, Rival
from whimbrel.testing.budget import assert_close
from whimbrel.testing.heads import Heads, gaussian

HEADS, KEY_HEADS, DIM, BLOCK = 8, 2, 64, 64
DENSITIES = (1.0, 0.4, 0.2, 0.1, 0.05)
"""Shares of the causal blocks in the plans that are timed on CUDA."""
CUDA_LENGTHS = (8192, 32_768, 131_072)


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """On CUDA: random plans by density, 32 query heads on 8 key heads of 128 in bf16. Elsewhere: plans that keep all
    causal blocks, and the first block with a band of a quarter, an eighth of the blocks.

    Dense attention always computes all causal pairs, so on a sparse plan it is what skipping is measured against, and
    not equal in its result. Rates count the pairs that the plan selects.
    """
    if device == "cuda":
        lengths = CUDA_LENGTHS[:1] if quick else CUDA_LENGTHS
        return [_cuda_case(length, density) for length in lengths for density in DENSITIES]
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


def _cuda_case(length: int, density: float) -> Case:
    def call(impl: str) -> Callable[[], object]:
        return partial(attend, *_on_cuda(length), random_plan(length, density), impl=impl)

    def dense(function: Callable[..., Tensor]) -> Callable[[], object]:
        return partial(function, *_on_cuda(length))

    return Case(
        name="attend",
        params={"T": length, "H": 32, "Hkv": 8, "D": 128, "block": 128, "density": density, "dtype": "bfloat16"},
        impls={"triton": partial(call, "triton")},
        check=partial(_check_cuda, length, density),
        rivals={"flex-attention": Rival(partial(call, "flex"), partial(_check_flex, length, density))}
        | {name: Rival(partial(dense, function), lambda: "") for name, function in DENSE.items()},
        metric="time",
        flops=4 * 128 * density * 32 * length * (length + 1) / 2,
    )


@cache
def _on_cuda(length: int) -> Heads:
    return gaussian(length, tokens=length, heads=32, kv_heads=8, dim=128, dtype=torch.bfloat16, device="cuda")


@cache
def random_plan(length: int, density: float, device: str = "cuda") -> Plan:
    """32 heads, whose blocks of 128 are drawn so that they hold `density` of the causal pairs, diagonal included."""
    grid = Grid(128, length, length)
    random = torch.Generator(device).manual_seed(length)
    blocks = grid.key_blocks
    share = (density * blocks - 1) / (blocks - 1)  # of the blocks before the diagonal, which holds half as many pairs
    mask = torch.rand(1, 32, blocks, blocks, generator=random, device=device) < share
    mask &= grid.causal(mask.device)
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)
    return Plan.from_mask(mask, block_size=128, q_len=length, k_len=length)


def _check_cuda(length: int, density: float) -> None:
    """The last queries against a masked softmax, alone and as part of all."""
    q, k, v = _on_cuda(length)
    whole = random_plan(length, density)
    mask = whole.to_mask()[:, :, -1:]
    plan = Plan.from_mask(mask, block_size=128, q_len=64, k_len=length)
    want = attend(q[:, -64:], k, v, plan, impl="reference")
    assert_close("last queries", want.y.double(), attend(q[:, -64:], k, v, plan, impl="triton").y, 6e-3)
    assert_close("last queries of all", want.y.double(), attend(q, k, v, whole, impl="triton").y[:, -64:], 6e-3)


def _check_flex(length: int, density: float) -> str:
    tensors, plan = _on_cuda(length), random_plan(length, density)
    want, got = (attend(*tensors, plan, impl=impl).y for impl in ("triton", "flex"))
    assert_close("flex", want, got, 1e-2)
    return ""


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
