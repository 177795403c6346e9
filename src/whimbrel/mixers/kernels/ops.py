"""The kernels as PyTorch operators with gradients, which torch.compile and checkpointing take as they are.

Kernels are imported inside of the operators: nothing that is traced gets there, and Triton is not needed before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whimbrel.scan.kernels.operators import differentiate, operator

RUN = 32
"""Tokens that a program of the convolution walks along: more means fewer programs that read fewer tokens twice."""


def _short_conv(
    x: Tensor, weight: Tensor, state: Tensor | None, table: Tensor | None, rows: int, head: int, eps: float
) -> Tensor:
    """silu of the causal depthwise convolution of x [B, T, C] with weight [C, 1, size], computed in fp32.

    state [N, C, size - 1]: the inputs before the first ones, None for zeros. Each sequence is walked in runs of `rows`
    rows (at least size - 1, or T); `table` [4, runs] from `cut` says where they are if sequences are packed.
    `head` above 0 scales every `head` channels of a token to unit length, y / sqrt(sum y^2 + eps).

    Returns y of the shape and dtype of x, contiguous. Differentiable once in x, weight and state.
    """
    from whimbrel.mixers.kernels import conv

    return conv.forward(x, weight, state, table, rows, head, eps)


def _short_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    table: Tensor | None,
    rows: int,
    head: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from whimbrel.mixers.kernels import conv

    return conv.backward(dy, x, weight, state, table, rows, head, eps)


def _fake_short_conv(x, weight, state, table, rows, head, eps):
    return _like(x)


def _fake_short_conv_backward(dy, x, weight, state, table, rows, head, eps):
    return _like(x), _like(weight), x.new_empty(0) if state is None else _like(state)


def _keep_short_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.rows, ctx.head, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_short_conv(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, state, table = ctx.saved_tensors
    dx, dweight, dstate = short_conv_backward(dy, x, weight, state, table, ctx.rows, ctx.head, ctx.eps)
    return dx, dweight, None if state is None else dstate, None, None, None, None


short_conv = operator("short_conv", _short_conv, _fake_short_conv)
short_conv_backward = operator("short_conv_backward", _short_conv_backward, _fake_short_conv_backward)
differentiate(short_conv, _keep_short_conv, _differentiate_short_conv)


def _gates(x: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Gates from their projection x [B, T, gates * heads], fp32 [gates, B, T, heads].

    The first is the log of the decay, -exp(a_log) softplus(x + dt_bias) with a_log and dt_bias [heads]; the others are
    rates, sigmoid(x). Differentiable once in all three.
    """
    from whimbrel.mixers.kernels import gates as kernels

    return kernels.forward(x, a_log, dt_bias)


def _gates_backward(dy: Tensor, x: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from whimbrel.mixers.kernels import gates as kernels

    return kernels.backward(dy, x, a_log, dt_bias)


def _fake_gates(x, a_log, dt_bias):
    heads = a_log.shape[0]
    return x.new_empty(x.shape[-1] // heads, *x.shape[:-1], heads, dtype=torch.float32)


def _fake_gates_backward(dy, x, a_log, dt_bias):
    return _like(x), _like(a_log), _like(dt_bias)


gates = operator("gates", _gates, _fake_gates)
gates_backward = operator("gates_backward", _gates_backward, _fake_gates_backward)
differentiate(
    gates,
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, dy: gates_backward(dy, *ctx.saved_tensors),
)


def _gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * y / sqrt(mean y^2 + eps) * silu(gate) over the last dim, computed in fp32.

    y [..., V], gate of as many elements in the same order, weight [V] -> shape and dtype of y, contiguous.
    Differentiable once in all three.
    """
    from whimbrel.mixers.kernels import norm

    return norm.forward(y, gate, weight, eps)


def _gated_norm_backward(
    dout: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from whimbrel.mixers.kernels import norm

    return norm.backward(dout, y, gate, weight, eps)


def _fake_gated_norm(y, gate, weight, eps):
    return _like(y)


def _fake_gated_norm_backward(dout, y, gate, weight, eps):
    return _like(y), _like(gate), _like(weight)


def _keep_gated_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_gated_norm(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_norm_backward(dout, *ctx.saved_tensors, ctx.eps), None


gated_norm = operator("gated_norm", _gated_norm, _fake_gated_norm)
gated_norm_backward = operator("gated_norm_backward", _gated_norm_backward, _fake_gated_norm_backward)
differentiate(gated_norm, _keep_gated_norm, _differentiate_gated_norm)


def cut(edges: Tensor, time: int, rows: int) -> Tensor:
    """Runs of at most `rows` tokens of one sequence each: first row, edges of the sequence, number of the sequence.

    edges int [N + 1] from 0 to `time` -> int64 [4, runs]; an empty sequence has one run without rows. The number of
    runs is a bound that does not depend on the values of `edges`, so nothing waits for the device; what is too much
    is -1.
    """
    edges = edges.long()
    begin, end = edges[:-1], edges[1:]
    each = ((end - begin + rows - 1) // rows).clamp_min(1)
    last = each.cumsum(0)
    run = torch.arange(-(-time // rows) + begin.shape[0], device=edges.device)
    sequence = torch.searchsorted(last, run, right=True)
    found = sequence < begin.shape[0]
    owner = sequence.clamp_max(begin.shape[0] - 1)
    start = begin[owner] + (run - last[owner] + each[owner]) * rows
    table = torch.stack((start, begin[owner], end[owner], owner))
    return torch.where(found, table, -1)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
