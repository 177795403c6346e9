"""The kernels as PyTorch operators with their gradients: `recurrence` serves RLA, RDN and the one-state scans.

Both streams of a two-state recurrence, or the only one of a one-state recurrence, go through the same code. A
one-state recurrence is the second stream alone: it reads after its own write.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from whimbrel.scan.kernels import backward as _backward
from whimbrel.scan.kernels import forward as _forward
from whimbrel.scan.kernels import hopper_launch as _hopper
from whimbrel.scan.kernels import prepare as _prepare
from whimbrel.scan.kernels.operators import differentiate, operator
from whimbrel.scan.kernels.quick import launch
from whimbrel.scan.kernels.segments import count_chunks, segments

CHUNK = 32
COLUMNS = 32
WARPS = 2
"""Tokens in a chunk, value columns of a program and its warps, for the kernels that run anywhere.

Two warps keep Triton from Hopper's matrix instructions: with them Triton 3.6 miscompiled these kernels (a wrong output
at K = 32, an illegal access at 32 columns), and Hopper has kernels of its own.
"""


class Flags(NamedTuple):
    """What is compiled into the kernels."""

    DELTA: bool
    TWO: bool
    GATED: bool
    DECAYED: bool
    CLIP: bool


def _chunk(q: Tensor, v: Tensor) -> int:
    return _hopper.CHUNK if _hopper.fits(q, v) else CHUNK


def _block(dim: int, most: int = 1 << 30) -> int:
    """Columns of a tile over `dim`: a power of two, at least what a matrix unit takes."""
    return max(16, min(most, triton.next_power_of_2(dim)))


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _scan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    first_rate: Tensor | None,
    second_rate: Tensor,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    delta: bool,
    gated: bool,
    decayed: bool,
    clip: float | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y as v, final states fp32 [2, N, HV, K, V], and for the backward: gates, tiles, saved states, the clip's mask.

    q, k [B, T, H, K], v [B, T, HV, V], contiguous; log_decay and rates [B, T, HV]; start as the final states.
    `first_rate` None means one state, the second. Tensors that only the backward needs are empty without `save`.
    """
    batch, time, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    chunk = _chunk(q, v)
    flags = Flags(delta, first_rate is not None, gated, decayed, clip is not None)
    table = segments(cu_seqlens, batch, time, chunk, 1, q.device)
    tokens, chunks, sequences = batch * time, table.chunk_start.numel(), table.stretch_start.numel()
    y = torch.empty_like(v)
    ends = _empty(q, _states(sequences, value_heads, key_dim, value_dim), torch.float32)
    if not flags.TWO:
        ends[0].zero_()
    gates = _empty(q, (3, value_heads, tokens), torch.float32)
    tiles = _empty(q, _tiles(flags, value_heads, chunks, chunk), q.dtype)
    saved = _empty(q, (2, chunks, value_heads, key_dim, value_dim) if save else (0,), q.dtype)
    inside = _empty(q, v.shape if save and _keeps_mask(q, v, flags, sequences) else (0,), torch.int8)
    hopper = _hopper.fits(q, v)
    residual, carried = (_empty(q, shape, dtype) for shape, dtype in _hopper_extras(q, v, flags, sequences, save))
    common: dict[str, Any] = {"C": chunk, "BK": _block(key_dim), "K": key_dim, "PRECISION": _precision(q.dtype)}
    if tokens == 0:
        ends.zero_() if start is None else ends.copy_(start)
        return y, ends, gates, tiles, saved, inside, residual, carried
    inverses = 2 if flags.DELTA and flags.TWO else 1
    launch(
        _prepare.prepare,
        chunks * value_heads * inverses,
        k,
        log_decay,
        second_rate if first_rate is None else first_rate,
        second_rate,
        gates,
        tiles,
        table.chunk_start,
        table.chunk_end,
        tokens,
        chunks,
        heads,
        value_heads,
        DELTA=flags.DELTA,
        TWO=flags.TWO,
        SOLVE="tf32x3" if q.dtype == torch.float32 else "half",
        num_warps=4 if hopper else WARPS,
        num_stages=1,
        **({"maxnreg": 128} if hopper else {}),  # four programs on a multiprocessor
        **common,
    )
    if hopper:
        _hopper.forward(
            q, k, v, gates, tiles, saved, inside, residual, carried, start, ends, y,
            cu_seqlens, flags, scale, clip, save,
        )  # fmt: skip
        return y, ends, gates, tiles, saved, inside, residual, carried
    block = _block(value_dim, COLUMNS)
    launch(
        _forward.forward,
        sequences * value_heads * triton.cdiv(value_dim, block),
        q,
        k,
        v,
        gates,
        tiles,
        ends if start is None else start,
        ends,
        y,
        inside,
        saved,
        table.stretch_start,
        table.stretch_end,
        table.stretch_chunk,
        tokens,
        chunks,
        sequences,
        heads,
        value_heads,
        scale,
        clip or 0.0,
        V=value_dim,
        BV=block,
        FROM=start is not None,
        SAVE=save,
        num_warps=WARPS,
        num_stages=1,
        **flags._asdict(),
        **common,
    )
    return y, ends, gates, tiles, saved, inside, residual, carried


def _fake_forward(
    q, k, v, log_decay, first_rate, second_rate, start, cu_seqlens, delta, gated, decayed, clip, scale, save
):
    batch, time, _, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = _chunk(q, v)
    flags = Flags(delta, first_rate is not None, gated, decayed, clip is not None)
    chunks = count_chunks(batch * time, sequences, chunk)
    return (
        torch.empty_like(v),
        _empty(q, _states(sequences, value_heads, key_dim, value_dim), torch.float32),
        _empty(q, (3, value_heads, batch * time), torch.float32),
        _empty(q, _tiles(flags, value_heads, chunks, chunk), q.dtype),
        _empty(q, (2, chunks, value_heads, key_dim, value_dim) if save else (0,), q.dtype),
        _empty(q, v.shape if save and _keeps_mask(q, v, flags, sequences) else (0,), torch.int8),
        *(_empty(q, shape, dtype) for shape, dtype in _hopper_extras(q, v, flags, sequences, save)),
    )


def _keeps_mask(q: Tensor, v: Tensor, flags: Flags, sequences: int) -> bool:
    """Whether the backward reads where the clip was active; on Hopper only a walk that cannot see the states does."""
    if not (flags.TWO and flags.CLIP):
        return False
    return not _hopper.fits(q, v) or _hopper.splits(q, v, sequences) > 1


def _hopper_extras(q: Tensor, v: Tensor, flags: Flags, sequences: int, save: bool) -> list[tuple[Any, torch.dtype]]:
    """Shape and dtype of what only the kernels for Hopper keep: the residual, and what carries a state on."""
    if not _hopper.fits(q, v):
        return [((0,), q.dtype), ((0,), torch.float32)]
    value_heads = v.shape[2]
    splits = _hopper.splits(q, v, sequences)
    carried = _hopper.carried_shape(flags.DELTA, sequences * splits, splits, value_heads, q.shape[3])
    kept = flags.TWO and (save or splits > 1)
    return [(v.shape if kept else (0,), q.dtype), (carried, torch.float32)]


def _empty(like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _states(sequences: int, heads: int, key_dim: int, value_dim: int) -> tuple[int, ...]:
    return 2, sequences, heads, key_dim, value_dim


def _tiles(flags: Flags, heads: int, chunks: int, chunk: int) -> tuple[int, ...]:
    return (2, heads, chunks, chunk, chunk) if flags.DELTA or flags.TWO else (0,)


def _scan_backward(
    dy: Tensor,
    dends: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    tiles: Tensor,
    saved: Tensor,
    inside: Tensor,
    residual: Tensor,
    carried: Tensor,
    cu_seqlens: Tensor | None,
    delta: bool,
    two: bool,
    gated: bool,
    decayed: bool,
    clip: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv as q, k, v; fp32 cotangents [B, T, HV] of log decay, first and second rate; of the start, fp32."""
    batch, time, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    chunk = _chunk(q, v)
    flags = Flags(delta, two, gated, decayed, clip is not None)
    table = segments(cu_seqlens, batch, time, chunk, 1, q.device)
    tokens, chunks, sequences = batch * time, table.chunk_start.numel(), table.stretch_start.numel()
    dv = torch.empty_like(v)
    dstarts = _empty(q, _states(sequences, value_heads, key_dim, value_dim), torch.float32)
    if not two:
        dstarts[0].zero_()
    group_dtype = q.dtype if value_heads == heads or _hopper.fits(q, v) else torch.float32
    dq = _empty(q, (batch, time, value_heads, key_dim), group_dtype)
    dk = torch.empty_like(dq)
    dlog, dfirst, dsecond = (_empty(q, (batch, time, value_heads), torch.float32) for _ in range(3))
    common: dict[str, Any] = {
        "K": key_dim,
        "V": value_dim,
        "C": chunk,
        "BK": _block(key_dim),
        "PRECISION": _precision(q.dtype),
        **flags._asdict(),
    }
    if _hopper.fits(q, v):
        _hopper.backward(
            q, k, v, dy, gates, tiles, saved, inside, residual, carried, dends, dstarts,
            dq, dk, dv, dlog, dfirst, dsecond, cu_seqlens, flags, scale, clip,
        )  # fmt: skip
    elif tokens:
        dr = torch.empty_like(v) if two else dv
        pulled = torch.empty_like(saved)
        block = _block(value_dim, COLUMNS)
        launch(
            _backward.backward_states,
            sequences * value_heads * triton.cdiv(value_dim, block),
            q,
            k,
            dy,
            gates,
            tiles,
            inside,
            dstarts if dends is None else dends,
            dstarts,
            dv,
            dr,
            pulled,
            table.stretch_start,
            table.stretch_end,
            table.stretch_chunk,
            tokens,
            chunks,
            sequences,
            heads,
            value_heads,
            scale,
            BV=block,
            FROM=dends is not None,
            num_warps=WARPS,
            num_stages=1,
            **common,
        )
        launch(
            _backward.backward_tokens,
            chunks * value_heads,
            q,
            k,
            v,
            dy,
            dv,
            dr,
            gates,
            tiles,
            saved,
            pulled,
            dq,
            dk,
            dlog,
            dfirst,
            dsecond,
            table.chunk_start,
            table.chunk_end,
            tokens,
            chunks,
            heads,
            value_heads,
            scale,
            clip or 0.0,
            BV=_block(value_dim, COLUMNS),
            num_warps=WARPS,
            num_stages=1,
            **common,
        )
    elif dends is not None:
        dstarts.copy_(dends)
    else:
        dstarts.zero_()
    if value_heads != heads:
        dq, dk = (x.unflatten(2, (heads, -1)).sum(3, dtype=torch.float32).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dlog, dfirst, dsecond, dstarts


def _fake_backward(
    dy,
    dends,
    q,
    k,
    v,
    gates,
    tiles,
    saved,
    inside,
    residual,
    carried,
    cu_seqlens,
    delta,
    two,
    gated,
    decayed,
    clip,
    scale,
):
    batch, time, _, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rates = [_empty(q, (batch, time, value_heads), torch.float32) for _ in range(3)]
    states = _empty(q, _states(sequences, value_heads, key_dim, value_dim), torch.float32)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *rates, states


scan_forward = operator("scan_forward", _scan_forward, _fake_forward)
scan_backward = operator("scan_backward", _scan_backward, _fake_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, first_rate, second_rate, start, cu_seqlens, *options, _ = inputs
    _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.dtypes = [None if x is None else x.dtype for x in (log_decay, first_rate, second_rate, start)]
    ctx.save_for_backward(q, k, v, cu_seqlens, *kept)
    ctx.mark_non_differentiable(*kept)


def _pull(ctx: Any, dy: Tensor | None, dends: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, gates, tiles, saved, inside, residual, carried = ctx.saved_tensors
    delta, gated, decayed, clip, scale = ctx.options
    log_type, first_type, second_type, start_type = ctx.dtypes
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    dends = None if dends is None else dends.contiguous()
    dq, dk, dv, dlog, dfirst, dsecond, dstart = scan_backward(
        dy, dends, q, k, v, gates, tiles, saved, inside, residual, carried, cu_seqlens,
        delta, first_type is not None, gated, decayed, clip, scale,
    )  # fmt: skip
    return (
        dq,
        dk,
        dv,
        dlog.to(log_type),
        None if first_type is None else dfirst.to(first_type),
        dsecond.to(second_type),
        None if start_type is None else dstart,
        *(None,) * 7,
    )


differentiate(scan_forward, _keep, _pull)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    first_rate: Tensor | None,
    second_rate: Tensor,
    *,
    states: tuple[Tensor, ...] | None,
    cu_seqlens: Tensor | None,
    delta: bool,
    gated: bool = True,
    decayed: bool = False,
    clip: float | None = None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, base state, second state) of a recurrence with checked arguments, differentiable once.

    q, k [B, T, H, K] and v [B, T, HV, V] of one dtype, bf16, fp16 or fp32; log_decay and rates [B, T, HV]; states
    [N, HV, K, V], None for zero. y has v's shape and dtype, the states come back in fp32. With `first_rate` None there
    is one state, the second, and `states` holds one; the base that comes back is zero.
    """
    start = None
    if states is not None:
        both = states if first_rate is not None else (torch.zeros_like(states[0]), states[0])
        start = torch.stack([x.float() for x in both])
    key_dim, value_dim = q.shape[3], v.shape[3]
    more_keys, more_values = _hopper.missing(q, v)
    if more_keys or more_values:
        q, k = (F.pad(x, (0, more_keys)) for x in (q, k))
        v = F.pad(v, (0, more_values))
        start = None if start is None else F.pad(start, (0, more_values, 0, more_keys))
    tensors = (q, k, v, log_decay, first_rate, second_rate)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, start))
    y, ends, *_ = scan_forward(
        *(None if x is None else x.contiguous() for x in tensors),
        start, cu_seqlens, delta, gated, decayed, clip, scale, save,
    )  # fmt: skip
    if more_keys or more_values:
        y, ends = y[..., :value_dim], ends[..., :key_dim, :value_dim]
    return y, ends[0], ends[1]
