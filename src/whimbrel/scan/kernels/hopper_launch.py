"""Launching the kernels written for Hopper, and cutting long sequences into stretches where there are few heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from whimbrel.launches import ALIGNMENT, Matrix, launch
from whimbrel.scan.kernels.segments import Segments, segments
from whimbrel.scan.kernels.stretches import carry

_HAS_GLUON = find_spec("triton.experimental.gluon") is not None
CHUNK = 64
ENOUGH = 264
"""Programs that fill the card: two on each of 132 multiprocessors."""
LEAST = 8
"""Chunks below which a stretch is not worth its overhead."""


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether these kernels take a call: Hopper, fp16 or bf16, K and V of 64 or 128, at least one token."""
    return q.shape[0] * q.shape[1] > 0 and fits_any_time(q, v)


def fits_any_time(q: Tensor, v: Tensor) -> bool:
    """The same without the tokens, of which processes may hold different numbers."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in (64, 128)
        and v.shape[3] in (64, 128)
        and _is_hopper(q.device)
    )


def missing(q: Tensor, v: Tensor) -> tuple[int, int]:
    """Columns of zeros that make K and V fit these kernels; none where nothing could."""
    dims = (q.shape[3], v.shape[3])
    if not q.is_cuda or q.dtype == torch.float32 or max(dims) > 128 or not _is_hopper(q.device):
        return 0, 0
    keys, values = ((64 if dim <= 64 else 128) - dim for dim in dims)
    return keys, values


@torch.compiler.assume_constant_result
@cache
def _is_hopper(device: torch.device) -> bool:
    return _HAS_GLUON and torch.cuda.get_device_capability(device) == (9, 0)


def count_stretches(tokens: int, sequences: int, value_heads: int, value_dim: int) -> int:
    """Into how many stretches each sequence is cut: 1 where the heads fill the card."""
    programs = max(1, sequences * value_heads * (value_dim // 64))
    if programs * 2 > ENOUGH:
        return 1
    return max(1, min(ENOUGH // programs, 64, tokens // (CHUNK * LEAST * max(1, sequences))))


def splits(q: Tensor, v: Tensor, sequences: int) -> int:
    """`count_stretches` of a call."""
    return count_stretches(q.shape[0] * q.shape[1], sequences, v.shape[2], v.shape[3])


def carried_shape(delta: bool, stretches: int, parts: int, value_heads: int, key_dim: int) -> tuple[int, ...]:
    """What takes a start state to the end of its stretch: a matrix for the delta rule, else a number."""
    if parts == 1:
        return (0,)
    shape = (2, stretches, value_heads)
    return (*shape, key_dim, key_dim) if delta else shape


def scratch_shape(
    delta: bool, splits: int, sequences: int, value_heads: int, key_dim: int, value_dim: int
) -> tuple[int, ...]:
    """States at the ends of stretches from a start of zero; for the delta rule also what each stretch starts from."""
    return (1 + delta, 2, sequences * splits, value_heads, key_dim, value_dim) if splits > 1 else (0,)


@cache
def _below(clip: float | None, dtype: torch.dtype) -> float:
    """The largest number of a dtype below the clip as it is in that dtype."""
    if clip is None:
        return 0.0
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    return float((torch.tensor(clip, dtype=dtype).view(bits) - 1).view(dtype))


def kept_errors(flags: Any, splits: int) -> bool:
    """Whether the forward keeps the second stream's error in place of the residual, which only stretches ask for."""
    return flags.DELTA and flags.TWO and splits == 1


def _matrices(*tensors: Tensor, rows: int = 64, columns: int = 64) -> list[Matrix]:
    """Blocks of [rows, columns] of [B, T, heads, D] as [B * T, heads * D], of all else as [.., last]."""
    return [Matrix(x, x.shape[-1] * (x.shape[2] if x.dim() == 4 else 1), rows, columns) for x in tensors]


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """Copies of those that lie where the copy engine cannot read, as a part of a larger tensor may."""
    return [x.clone() if x.data_ptr() % ALIGNMENT else x for x in tensors]


def cut(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Segments, int]:
    """The table, and the number of stretches in each sequence."""
    batch, time = q.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    parts = splits(q, v, sequences)
    return segments(cu_seqlens, batch, time, CHUNK, parts, q.device), parts


def prepare(
    k: Tensor,
    log_decay: Tensor,
    first_rate: Tensor | None,
    second_rate: Tensor,
    gates: Tensor,
    tiles: Tensor,
    table: Segments,
) -> None:
    """Fill gates and tiles, for the delta rule."""
    from whimbrel.scan.kernels.hopper_prepare import prepare_delta

    heads, key_dim = k.shape[2:]
    value_heads, chunks = log_decay.shape[2], table.chunk_start.numel()
    launch(
        prepare_delta,
        chunks * value_heads,
        *_matrices(*_aligned(k), tiles),
        log_decay,
        second_rate if first_rate is None else first_rate,
        second_rate,
        gates,
        table.chunk_start,
        table.chunk_end,
        gates.shape[2],
        chunks,
        heads,
        value_heads,
        K=key_dim,
        TWO=first_rate is not None,
        num_warps=4,
        maxnreg=128,  # four programs on a multiprocessor
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    tiles: Tensor,
    saved: Tensor,
    residual: Tensor,
    carried: Tensor,
    start: Tensor | None,
    ends: Tensor,
    y: Tensor,
    scratch: Tensor,
    table: Segments,
    splits: int,
    flags: Any,
    scale: float,
    clip: float | None,
    save: bool,
    hand: Callable[..., None] = carry,
) -> None:
    """Fill y, ends, and what the backward needs; `hand` as `carry`, for the delta rule in stretches."""
    from whimbrel.scan.kernels.hopper_ends import stretch_ends
    from whimbrel.scan.kernels.hopper_forward import forward_stream, forward_streams

    q, k, v = _aligned(q, k, v)
    heads, key_dim = q.shape[2:]
    value_heads, value_dim = v.shape[2:]
    stretches = table.stretch_start.numel()
    queries, keys, values, result = _matrices(q, k, v, y)
    solved = _matrices(tiles)[0] if tiles.numel() else queries
    keep = _matrices(saved)[0] if save else queries
    left = _matrices(residual)[0] if residual.numel() else result
    local = scratch[0] if splits > 1 else ends
    begins = scratch[1] if splits > 1 and flags.DELTA else start

    def stream(kernel: Any, given: Any, **constants: Any) -> None:
        launch(
            kernel,
            stretches * value_heads * (value_dim // 64),
            queries,
            keys,
            given,
            solved,
            keep,
            result,
            left,
            gates,
            ends if begins is None else begins,
            local,
            ends,
            y,
            residual,
            carried,
            table.stretch_start,
            table.stretch_end,
            table.stretch_chunk,
            q.shape[0] * q.shape[1],
            table.chunk_start.numel(),
            stretches,
            splits,
            heads,
            value_heads,
            scale,
            clip or 0.0,
            _below(clip, q.dtype),
            K=key_dim,
            V=value_dim,
            FROM=begins is not None,
            SAVE=save,
            num_warps=4,
            **constants,
            **flags._asdict(),
        )

    if flags.TWO and splits == 1:
        stream(forward_streams, values)
        return
    for first in (True, False) if flags.TWO else (False,):
        given = values if first or not flags.TWO else left
        if splits > 1 and not flags.DELTA:
            _sum_stretches(
                (keys, given, keys, given), gates, local, carried, table,
                (q.shape[0] * q.shape[1], stretches, heads, value_heads, scale),
                K=key_dim, V=value_dim, FIRST=first, BACK=False, flags=flags,
            )  # fmt: skip
        elif splits > 1:
            i = 0 if first else 1
            # Matrices of both streams at once: they do not depend on what the first one leaves.
            maps = (2 if first else 0) if flags.TWO else 1
            launch(
                stretch_ends,
                stretches * value_heads * (value_dim + maps * key_dim) // 64,
                keys,
                given,
                solved,
                gates,
                local,
                carried,
                table.stretch_start,
                table.stretch_end,
                table.stretch_chunk,
                q.shape[0] * q.shape[1],
                table.chunk_start.numel(),
                stretches,
                heads,
                value_heads,
                K=key_dim,
                V=value_dim,
                FIRST=first,
                TWO=flags.TWO,
                MAPS=maps > 0,
                num_warps=4,
                maxnreg=168,  # three programs on a multiprocessor
            )
            begin = None if start is None else start[i]
            hand(local[i], carried[i], begin, splits, back=False, out=scratch[1, i])
        stream(forward_stream, given, FIRST=first, GATHER=splits > 1 and not flags.DELTA)


def _sum_stretches(
    matrices: tuple[Matrix, ...], gates: Tensor, sums: Tensor, carried: Tensor, table: Segments, sizes: tuple[Any, ...],
    flags: Any, **constants: Any,
) -> None:  # fmt: skip
    """Fill `sums`, and on the way forward `carried`, where states add."""
    from whimbrel.scan.kernels.hopper_sums import stretch_sums

    _, stretches, _, value_heads, _ = sizes
    launch(
        stretch_sums,
        stretches * value_heads * (constants["V"] // 64),
        *matrices,
        gates,
        sums,
        carried,
        table.stretch_start,
        table.stretch_end,
        *sizes,
        TWO=flags.TWO,
        GATED=flags.GATED,
        DECAYED=flags.DECAYED,
        num_warps=4,
        **constants,
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    gates: Tensor,
    tiles: Tensor,
    saved: Tensor,
    residual: Tensor,
    carried: Tensor,
    dends: Tensor | None,
    dstarts: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlog: Tensor,
    dfirst: Tensor,
    dsecond: Tensor,
    scratch: Tensor,
    table: Segments,
    splits: int,
    flags: Any,
    scale: float,
    clip: float | None,
    hand: Callable[..., None] = carry,
) -> None:
    """Fill the cotangents; `hand` as for `forward`."""
    from whimbrel.scan.kernels.hopper_adding import backward_adding
    from whimbrel.scan.kernels.hopper_backward import backward_stream, reach

    q, k, v, dy = _aligned(q, k, v, dy)
    heads, key_dim = q.shape[2:]
    value_heads, value_dim = v.shape[2:]
    tokens, chunks, stretches = q.shape[0] * q.shape[1], table.chunk_start.numel(), table.stretch_start.numel()
    queries, keys, to_q, to_k = _matrices(q, k, dq, dk, columns=key_dim)
    values, asked, to_v = _matrices(v, dy, dv, columns=value_dim)
    left = _matrices(residual, columns=value_dim)[0] if flags.TWO else values
    solved = _matrices(tiles)[0] if tiles.numel() else queries
    kept = _matrices(saved.view(-1, value_dim), rows=key_dim, columns=value_dim)[0]
    local = scratch[0] if splits > 1 else dstarts
    finals = scratch[1] if splits > 1 and flags.DELTA else dends
    stretch = table.stretch_start, table.stretch_end, table.stretch_chunk
    if splits > 1:
        small = _matrices(q, k, dy)
        small_dv = _matrices(dv)[0]

    for first in (False, True) if flags.TWO else (False,):
        if splits > 1 and not flags.DELTA:
            small_q, small_k, small_dy = small
            _sum_stretches(
                (small_q, small_dy, small_k, small_dv), gates, local, carried, table,
                (tokens, stretches, heads, value_heads, scale),
                K=key_dim, V=value_dim, FIRST=first, BACK=True, flags=flags,
            )  # fmt: skip
        elif splits > 1:
            stream = 0 if first else 1
            launch(
                reach,
                stretches * value_heads * (value_dim // 64),
                *small,
                solved,
                gates,
                local,
                dv,
                residual,
                *stretch,
                tokens,
                chunks,
                stretches,
                heads,
                value_heads,
                scale,
                _below(clip, q.dtype),
                K=key_dim,
                V=value_dim,
                FIRST=first,
                TWO=flags.TWO,
                GATED=flags.GATED,
                DECAYED=flags.DECAYED,
                CLIP=flags.CLIP,
                num_warps=4,
            )
            end = None if dends is None else dends[stream]
            hand(local[stream], carried[stream], end, splits, back=True, out=scratch[1, stream])
        streams = queries, keys, values if first or not flags.TWO else left, asked
        results = dv, dq, dk, dlog, dfirst if first else dsecond
        sizes = tokens, chunks, stretches, splits, heads, value_heads, scale
        options: dict[str, Any] = {
            "K": key_dim,
            "V": value_dim,
            "FIRST": first,
            "TWO": flags.TWO,
            "GATED": flags.GATED,
            "DECAYED": flags.DECAYED,
            "CLIP": flags.CLIP,
            "FROM": finals is not None,
            "num_warps": 8,
        }
        ends = dstarts if finals is None else finals
        if flags.DELTA:
            launch(
                backward_stream,
                stretches * value_heads,
                *streams,
                solved,
                kept,
                to_v,
                to_q,
                to_k,
                gates,
                ends,
                dstarts,
                *results,
                *stretch,
                *sizes,
                clip or 0.0,
                KEPT=kept_errors(flags, splits) and not first,
                **options,
            )
        else:
            launch(
                backward_adding,
                stretches * value_heads,
                *streams,
                kept,
                to_v,
                to_q,
                to_k,
                gates,
                ends,
                local,
                carried,
                dstarts,
                *results,
                *stretch,
                *sizes,
                _below(clip, q.dtype),
                GATHER=splits > 1,
                **options,
            )
