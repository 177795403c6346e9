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

from whimbrel.launches import compiling_ahead, launch, replay
from whimbrel.scan.kernels import backward as _backward
from whimbrel.scan.kernels import forward as _forward
from whimbrel.scan.kernels import hopper_launch as _hopper
from whimbrel.scan.kernels import prepare as _prepare
from whimbrel.scan.kernels.operators import differentiate, operator, plain
from whimbrel.scan.kernels.segments import Segments, count_chunks, segments

CHUNK = 32
COLUMNS = 32
WARPS = 2
"""Tokens in a chunk, value columns of a program and its warps, for the kernels that run anywhere.

Two warps keep Triton from Hopper's matrix instructions: with them Triton 3.6 miscompiled these kernels (a wrong output
at K = 32, an illegal access at 32 columns), and Hopper has kernels of its own.
"""


_begun: set[Any] = set()
"""Kinds of calls with gradients whose kernels were compiled, or are being compiled side by side."""


class Flags(NamedTuple):
    """What is compiled into the kernels."""

    DELTA: bool
    TWO: bool
    GATED: bool
    DECAYED: bool
    CLIP: bool


def _chunk(hopper: bool) -> int:
    return _hopper.CHUNK if hopper else CHUNK


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
    batch, time, _, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    hopper = _hopper.fits(q, v)
    flags = Flags(delta, first_rate is not None, gated, decayed, clip is not None)
    table, parts = _cut(q, v, cu_seqlens, hopper)
    tokens, chunks, sequences = batch * time, table.chunk_start.numel(), table.stretch_start.numel() // parts
    gates = _empty(q, (3, value_heads, tokens), torch.float32)
    tiles = _empty(q, _tiles(flags, value_heads, chunks, _chunk(hopper)), q.dtype)
    dtypes = [None if x is None else x.dtype for x in (q, log_decay, first_rate, second_rate, start)]
    shapes = q.shape, v.shape, sequences, parts, *dtypes
    kind = flags, key_dim, value_dim, parts == 1, start is None, *dtypes
    if tokens and hopper and save and kind not in _begun:
        _begun.add(kind)
        _compile_together(
            q, k, v, log_decay, first_rate, second_rate, start, cu_seqlens, delta, gated, decayed, clip, scale, save
        )  # fmt: skip
    if tokens:
        # By itself and first, so that the device is at work while the host finds memory for the rest.
        replay(
            ("prepare", flags, *shapes),
            (k, log_decay, first_rate, second_rate, gates, tiles, *table),
            lambda: _prepare_chunks(k, log_decay, first_rate, second_rate, gates, tiles, table, flags, hopper),
        )
    y = torch.empty_like(v)
    ends = _empty(q, _states(sequences, value_heads, key_dim, value_dim), torch.float32)
    if not flags.TWO:
        ends[0].zero_()
    saved = _empty(q, _saved(hopper, flags, chunks, value_heads, key_dim, value_dim) if save else (0,), q.dtype)
    inside = _empty(q, v.shape if save and flags.TWO and flags.CLIP and not hopper else (0,), torch.int8)
    residual, carried, scratch = (
        _empty(q, shape, dtype) for shape, dtype in _hopper_extras(q, v, flags, sequences, parts, save, hopper)
    )
    kept = y, ends, gates, tiles, saved, inside, residual, carried
    if tokens == 0:
        ends.zero_() if start is None else ends.copy_(start)
        return kept

    def run() -> None:
        if hopper:
            _hopper.forward(
                q, k, v, gates, tiles, saved, residual, carried, start, ends, y, scratch,
                table, parts, flags, scale, clip, save,
            )  # fmt: skip
        else:
            _forward_anywhere(q, k, v, gates, tiles, saved, inside, start, ends, y, table, flags, scale, clip, save)

    replay(("forward", flags, scale, clip, save, *shapes), (q, k, v, start, *kept, scratch, *table), run)
    return kept


def _compile_together(*inputs: Any) -> None:
    """Have all kernels of a call with gradients compiled side by side; inputs as for `_scan_forward`."""
    q, k, v, _, first_rate, _, _, cu_seqlens, delta, *options, _ = inputs
    with compiling_ahead():
        y, _, *kept = _scan_forward(*inputs)
        given: list[Any] = [y, None, q, k, v, *kept, cu_seqlens, delta, first_rate is not None, *options]
        _scan_backward(*given)


def _cut(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, hopper: bool) -> tuple[Segments, int]:
    """Chunks and stretches of a call, and how many stretches a sequence has."""
    if hopper:
        return _hopper.cut(q, v, cu_seqlens)
    return segments(cu_seqlens, q.shape[0], q.shape[1], CHUNK, 1, q.device), 1


def _prepare_chunks(
    k: Tensor,
    log_decay: Tensor,
    first_rate: Tensor | None,
    second_rate: Tensor,
    gates: Tensor,
    tiles: Tensor,
    table: Segments,
    flags: Flags,
    hopper: bool,
) -> None:
    """Fill gates and tiles."""
    if hopper and flags.DELTA:
        _hopper.prepare(k, log_decay, first_rate, second_rate, gates, tiles, table)
        return
    heads, key_dim = k.shape[2:]
    value_heads, chunks = log_decay.shape[2], table.chunk_start.numel()
    launch(
        _prepare.prepare,
        chunks * value_heads * (2 if flags.DELTA and flags.TWO else 1),
        k,
        log_decay,
        second_rate if first_rate is None else first_rate,
        second_rate,
        gates,
        tiles,
        table.chunk_start,
        table.chunk_end,
        gates.shape[2],
        chunks,
        heads,
        value_heads,
        K=key_dim,
        C=_chunk(hopper),
        BK=_block(key_dim),
        DELTA=flags.DELTA,
        TWO=flags.TWO,
        PRECISION=_precision(k.dtype),
        SOLVE="tf32x3" if k.dtype == torch.float32 else "half",
        num_warps=4 if hopper else WARPS,
        num_stages=1,
        **({"maxnreg": 128} if hopper else {}),  # four programs on a multiprocessor
    )


def _forward_anywhere(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    tiles: Tensor,
    saved: Tensor,
    inside: Tensor,
    start: Tensor | None,
    ends: Tensor,
    y: Tensor,
    table: Segments,
    flags: Flags,
    scale: float,
    clip: float | None,
    save: bool,
) -> None:
    """Fill y, ends, and what the backward needs, on any device."""
    heads, key_dim = q.shape[2:]
    value_heads, value_dim = v.shape[2:]
    sequences, block = table.stretch_start.numel(), _block(value_dim, COLUMNS)
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
        gates.shape[2],
        table.chunk_start.numel(),
        sequences,
        heads,
        value_heads,
        scale,
        clip or 0.0,
        K=key_dim,
        V=value_dim,
        C=CHUNK,
        BK=_block(key_dim),
        BV=block,
        FROM=start is not None,
        SAVE=save,
        PRECISION=_precision(q.dtype),
        num_warps=WARPS,
        num_stages=1,
        **flags._asdict(),
    )


def _fake_forward(
    q, k, v, log_decay, first_rate, second_rate, start, cu_seqlens, delta, gated, decayed, clip, scale, save
):
    batch, time, _, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    hopper = _hopper.fits(q, v)
    chunk, parts = _chunk(hopper), _hopper.splits(q, v, sequences) if hopper else 1
    flags = Flags(delta, first_rate is not None, gated, decayed, clip is not None)
    chunks = count_chunks(batch * time, sequences, chunk)
    residual, carried, _ = _hopper_extras(q, v, flags, sequences, parts, save, hopper)
    return (
        torch.empty_like(v),
        _empty(q, _states(sequences, value_heads, key_dim, value_dim), torch.float32),
        _empty(q, (3, value_heads, batch * time), torch.float32),
        _empty(q, _tiles(flags, value_heads, chunks, chunk), q.dtype),
        _empty(q, _saved(hopper, flags, chunks, value_heads, key_dim, value_dim) if save else (0,), q.dtype),
        _empty(q, v.shape if save and flags.TWO and flags.CLIP and not hopper else (0,), torch.int8),
        *(_empty(q, shape, dtype) for shape, dtype in (residual, carried)),
    )


def _hopper_extras(
    q: Tensor, v: Tensor, flags: Flags, sequences: int, parts: int, save: bool, hopper: bool
) -> list[tuple[Any, torch.dtype]]:
    """Shape and dtype of what only the kernels for Hopper have: the residual, what carries a state on, and scratch."""
    if not hopper:
        return [((0,), q.dtype), ((0,), torch.float32), ((0,), torch.float32)]
    value_heads, value_dim = v.shape[2:]
    carried = _hopper.carried_shape(flags.DELTA, sequences * parts, parts, value_heads, q.shape[3])
    scratch = _hopper.scratch_shape(flags.DELTA, parts, sequences, value_heads, q.shape[3], value_dim)
    kept = flags.TWO and (save or parts > 1)
    return [(v.shape if kept else (0,), q.dtype), (carried, torch.float32), (scratch, torch.float32)]


def _empty(like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _states(sequences: int, heads: int, key_dim: int, value_dim: int) -> tuple[int, ...]:
    return 2, sequences, heads, key_dim, value_dim


def _saved(hopper: bool, flags: Flags, chunks: int, heads: int, key_dim: int, value_dim: int) -> tuple[int, ...]:
    """States at the chunks' starts; the kernels that run anywhere leave the first plane of one state empty."""
    return 1 if hopper and not flags.TWO else 2, chunks, heads, key_dim, value_dim


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
    hopper = _hopper.fits(q, v)
    flags = Flags(delta, two, gated, decayed, clip is not None)
    table, parts = _cut(q, v, cu_seqlens, hopper)
    sequences = table.stretch_start.numel() // parts
    dv = torch.empty_like(v)
    dstarts = _empty(q, _states(sequences, value_heads, key_dim, value_dim), torch.float32)
    if not two:
        dstarts[0].zero_()
    group_dtype = q.dtype if value_heads == heads or hopper else torch.float32
    dq = _empty(q, (batch, time, value_heads, key_dim), group_dtype)
    dk = torch.empty_like(dq)
    dlog, dfirst, dsecond = (_empty(q, (batch, time, value_heads), torch.float32) for _ in range(3))
    results = dq, dk, dv, dlog, dfirst, dsecond, dstarts
    if not batch * time:
        dstarts.zero_() if dends is None else dstarts.copy_(dends)
        return torch.empty_like(q), torch.empty_like(k), *results[2:]
    dr = torch.empty_like(v) if two and not hopper else dv
    pulled = _empty(q, (0,) if hopper else saved.shape, saved.dtype)
    scratch = _empty(q, _hopper.scratch_shape(delta, parts, sequences, value_heads, key_dim, value_dim), torch.float32)

    def run() -> None:
        if hopper:
            _hopper.backward(
                q, k, v, dy, gates, tiles, saved, residual, carried, dends, dstarts,
                dq, dk, dv, dlog, dfirst, dsecond, scratch, table, parts, flags, scale, clip,
            )  # fmt: skip
        else:
            _backward_anywhere(
                q, k, v, dy, gates, tiles, saved, inside, dends, dstarts,
                dq, dk, dv, dr, pulled, dlog, dfirst, dsecond, table, flags, scale, clip,
            )  # fmt: skip

    given = (q, k, v, dy, gates, tiles, saved, inside, residual, carried, dends)
    tensors = (*given, *results, *(() if hopper else (dr, pulled)), scratch, *table)
    key = ("backward", flags, scale, clip, q.shape, v.shape, sequences, parts, q.dtype, dends is None)
    replay(key, tensors, run)
    if value_heads != heads:
        dq, dk = (x.unflatten(2, (heads, -1)).sum(3, dtype=torch.float32).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dlog, dfirst, dsecond, dstarts


def _backward_anywhere(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    gates: Tensor,
    tiles: Tensor,
    saved: Tensor,
    inside: Tensor,
    dends: Tensor | None,
    dstarts: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dr: Tensor,
    pulled: Tensor,
    dlog: Tensor,
    dfirst: Tensor,
    dsecond: Tensor,
    table: Segments,
    flags: Flags,
    scale: float,
    clip: float | None,
) -> None:
    """Fill the cotangents on any device; `dr` and `pulled` are used on the way."""
    heads, key_dim = q.shape[2:]
    value_heads, value_dim = v.shape[2:]
    tokens, chunks, sequences = gates.shape[2], table.chunk_start.numel(), table.stretch_start.numel()
    block = _block(value_dim, COLUMNS)
    common: dict[str, Any] = {
        "K": key_dim,
        "V": value_dim,
        "C": CHUNK,
        "BK": _block(key_dim),
        "BV": block,
        "PRECISION": _precision(q.dtype),
        "num_warps": WARPS,
        "num_stages": 1,
        **flags._asdict(),
    }
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
        FROM=dends is not None,
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
        **common,
    )


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
    run = _scan_backward if plain(dy) else scan_backward
    dq, dk, dv, dlog, dfirst, dsecond, dstart = run(
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


_plain_forward = differentiate(scan_forward, _keep, _pull)


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
    run = _plain_forward if plain(*tensors, start) else scan_forward
    y, ends, *_ = run(
        *(None if x is None else x.contiguous() for x in tensors),
        start, cu_seqlens, delta, gated, decayed, clip, scale, save,
    )  # fmt: skip
    if more_keys or more_values:
        y, ends = y[..., :value_dim], ends[..., :key_dim, :value_dim]
    return y, ends[0], ends[1]
