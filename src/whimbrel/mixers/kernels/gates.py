"""Triton: the log of the decay, -exp(A_log) softplus(x + dt_bias), and rates sigmoid(x), from one projection.

A program takes ROWS tokens by all heads, HEADS of them, gate after gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.launches import launch

_TILE = 1024
"""Elements of one gate in a program."""


@triton.jit
def _parameters(a_log, dt_bias, head, HEADS: tl.constexpr):
    """[1, heads]: -exp(A_log) and dt_bias."""
    decay = -tl.exp(tl.load(a_log + head, mask=head < HEADS, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + head, mask=head < HEADS, other=0.0).to(tl.float32)
    return decay[None, :], bias[None, :]


@triton.jit
def _softplus(x):
    """log(1 + e^x) without overflow, and with the relative precision of fp32 where it is small."""
    small = tl.exp(-tl.abs(x))
    total = 1 + small
    # The logarithm of the rounded total, corrected by how much of `small` the rounding left in it.
    left = total - 1
    log = tl.where(left == 0, small, tl.log(total) * (small / tl.where(left == 0, 1.0, left)))
    return tl.maximum(x, 0.0) + log


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    x, a_log, dt_bias, y, tokens,
    GATES: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, BLOCK)
    decay, bias = _parameters(a_log, dt_bias, head, HEADS)
    known = (token < tokens)[:, None] & (head < HEADS)[None, :]
    for gate in tl.static_range(GATES):
        at = (token[:, None] * GATES + gate) * HEADS + head[None, :]
        value = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
        if gate == 0:
            value = decay * _softplus(value + bias)
        else:
            value = tl.sigmoid(value)
        tl.store(y + (gate * tokens + token[:, None]) * HEADS + head[None, :], value, mask=known)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    dy, x, a_log, dt_bias, dx, shares, tokens,
    GATES: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, BLOCK)
    decay, bias = _parameters(a_log, dt_bias, head, HEADS)
    known = (token < tokens)[:, None] & (head < HEADS)[None, :]
    for gate in tl.static_range(GATES):
        at = (token[:, None] * GATES + gate) * HEADS + head[None, :]
        value = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
        grad = tl.load(dy + (gate * tokens + token[:, None]) * HEADS + head[None, :], mask=known, other=0.0)
        if gate == 0:
            grad *= decay
            value += bias
            share = tl.program_id(0) * 2 * HEADS + head
            tl.store(shares + share, tl.sum(grad * _softplus(value), 0), mask=head < HEADS)
            grad *= tl.sigmoid(value)
            tl.store(shares + share + HEADS, tl.sum(grad, 0), mask=head < HEADS)
        else:
            value = tl.sigmoid(value)
            grad *= value * (1 - value)
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=known)


def forward(x: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """[gates, B, T, heads] in fp32; arguments as in `ops.gates`."""
    sizes, tokens = _sizes(x, a_log)
    y = x.new_empty(sizes["GATES"], *x.shape[:-1], sizes["HEADS"], dtype=torch.float32)
    launch(_forward, triton.cdiv(tokens, sizes["ROWS"]), x.contiguous(), a_log, dt_bias, y, tokens, **sizes)
    return y


def backward(dy: Tensor, x: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A_log and dt_bias, each in its dtype."""
    sizes, tokens = _sizes(x, a_log)
    programs = triton.cdiv(tokens, sizes["ROWS"])
    x = x.contiguous()
    dx = torch.empty_like(x)
    # Each program leaves its share of the sums; added here, their order is always the same.
    shares = x.new_empty(programs, 2, sizes["HEADS"], dtype=torch.float32)
    launch(_backward, programs, dy.contiguous(), x, a_log, dt_bias, dx, shares, tokens, **sizes)
    d_a_log, d_dt_bias = shares.sum(0).unbind(0)
    return dx, d_a_log.to(a_log.dtype, copy=True), d_dt_bias.to(dt_bias.dtype, copy=True)


def _sizes(x: Tensor, a_log: Tensor) -> tuple[dict[str, int], int]:
    """Constants of the kernels, and the number of tokens."""
    heads = a_log.shape[0]
    block = triton.next_power_of_2(heads)
    sizes = {"GATES": x.shape[-1] // heads, "HEADS": heads, "BLOCK": block, "ROWS": max(1, _TILE // block)}
    return sizes, x.numel() // x.shape[-1]
