"""Triton: weight * y / sqrt(mean y^2 + eps) * silu(gate) over rows of WIDTH elements, forward and backward.

A program takes STEPS tiles of ROWS rows. Only y and gate are kept for the backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.launches import launch

_TILE = 1024
"""Elements of a tile: 8 for each thread, in 16-bit types one load of 16 bytes."""
_STEPS = 16
"""Tiles of a program in the backward; each leaves one row of partial sums."""


@triton.jit
def _load_weight(weight, lane, WIDTH: tl.constexpr):
    return tl.load(weight + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normalize(y, eps, WIDTH: tl.constexpr):
    inverse = tl.rsqrt(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
    return y * inverse, inverse


@triton.jit(do_not_specialize=["rows"])
def _forward(y, gate, weight, out, rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * WIDTH + lane[None, :]
    known = (row < rows)[:, None] & (lane < WIDTH)[None, :]
    value = tl.load(y + at, mask=known, other=0.0).to(tl.float32)
    opening = tl.load(gate + at, mask=known, other=0.0).to(tl.float32)
    value, _ = _normalize(value, eps, WIDTH)
    value *= _load_weight(weight, lane, WIDTH) * opening * tl.sigmoid(opening)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dout, y, gate, weight, dy, dgate, shares, rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    factor = _load_weight(weight, lane, WIDTH)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * WIDTH + lane[None, :]
        known = (row < rows)[:, None] & (lane < WIDTH)[None, :]
        grad = tl.load(dout + at, mask=known, other=0.0).to(tl.float32)
        value = tl.load(y + at, mask=known, other=0.0).to(tl.float32)
        opening = tl.load(gate + at, mask=known, other=0.0).to(tl.float32)
        value, inverse = _normalize(value, eps, WIDTH)
        part = tl.sigmoid(opening)
        silu = opening * part
        shown = grad * value
        sums += shown * silu
        dgate_value = shown * factor * part * (1 + opening - silu)
        tl.store(dgate + at, dgate_value.to(dgate.dtype.element_ty), mask=known)
        grad *= factor * silu
        grad = inverse * (grad - value * (tl.sum(grad * value, 1) / WIDTH)[:, None])
        tl.store(dy + at, grad.to(dy.dtype.element_ty), mask=known)
    tl.store(shares + tl.program_id(0).to(tl.int64) * WIDTH + lane, tl.sum(sums, 0), mask=lane < WIDTH)


def forward(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The normed and gated rows; arguments as in `ops.gated_norm`."""
    sizes, rows = _sizes(y)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    programs = triton.cdiv(rows, sizes["ROWS"])
    launch(_forward, programs, y.contiguous(), gate.contiguous(), weight, out, rows, eps, **sizes)
    return out


def backward(dout: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, gate and weight, each in its dtype."""
    sizes, rows = _sizes(y)
    y, gate = y.contiguous(), gate.contiguous()
    dy, dgate = torch.empty_like(y), torch.empty_like(gate)
    programs = triton.cdiv(rows, sizes["ROWS"] * _STEPS)
    # Each program leaves its share of the weight's gradient; added here, their order is always the same.
    shares = y.new_empty(programs, sizes["WIDTH"], dtype=torch.float32)
    launch(
        _backward, programs,
        dout.contiguous(), y, gate, weight, dy, dgate, shares, rows, eps, **sizes, STEPS=_STEPS
    )  # fmt: skip
    return dy, dgate, shares.sum(0).to(weight.dtype)


def _sizes(y: Tensor) -> tuple[dict[str, int], int]:
    """Constants of the kernels, and the number of rows."""
    width = y.shape[-1]
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "ROWS": max(1, _TILE // block)}, y.numel() // width
