"""The kernels as PyTorch operators with their gradients: `recurrence` serves RLA, RDN and the one-state scans.

Both streams of a two-state recurrence, or the only one of a one-state recurrence, go through the same code. A
one-state recurrence is the second stream alone: it reads after its own write.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from whimbrel.launches import compile_together, launch, replay
from whimbrel.scan.common import needs_grad
from whimbrel.scan.kernels import backward as _backward
from whimbrel.scan.kernels import forward as _forward
from whimbrel.scan.kernels import hopper_launch as _hopper
from whimbrel.scan.kernels import prepare as _prepare
from whimbrel.scan.kernels.operators import differentiate, operator, plain
from whimbrel.scan.kernels.room import Room
from whimbrel.scan.kernels.segments import Segments, count_chunks, segments

CHUNK = 32
COLUMNS = 32
WARPS = 2
"""Tokens in a chunk, value columns of a program and its warps, for the kernels that run anywhere.

Two warps keep Triton from Hopper's matrix instructions: with them Triton 3.6 miscompiled these kernels (a wrong output
at K = 32, an illegal access at 32 columns), and Hopper has kernels of its own.
"""


MOST_SCANS = 1 << 8
"""Kinds of calls that are kept, of some 2 KB each; when there are more, all are forgotten."""
_scans: dict[Any, Scan] = {}


class Flags(NamedTuple):
    """What is compiled into the kernels."""

    DELTA: bool
    TWO: bool
    GATED: bool
    DECAYED: bool
    CLIP: bool


def _block(dim: int, most: int = 1 << 30) -> int:
    """Columns of a tile over `dim`: a power of two, at least what a matrix unit takes."""
    return max(16, min(most, triton.next_power_of_2(dim)))


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


class Scan:
    """How a recurrence runs over all inputs of the same shapes, dtype and options, wherever they lie.

    What follows from those alone is worked out once: which kernels, how they share out the tokens, and the memory they
    need. Launches are replayed by the addresses of a call, which `Room` makes few, and nothing else of it is looked at.
    """

    def __init__(
        self, q: Tensor, v: Tensor, sequences: int, flags: Flags, clip: float | None, scale: float, save: bool
    ) -> None:
        batch, time, heads, key_dim = q.shape
        value_heads, value_dim = v.shape[2:]
        self.flags, self.clip, self.scale, self.save = flags, clip, scale, save
        self.hopper = _hopper.fits(q, v)
        self.chunk = _hopper.CHUNK if self.hopper else CHUNK
        self.parts = _hopper.splits(q, v, sequences) if self.hopper else 1
        self.tokens, self.shape, self.shared = batch * time, (batch, time), value_heads != heads
        self.states = 2, sequences, value_heads, key_dim, value_dim
        self.rates = batch, time, value_heads
        # A key head's gradient is a sum over its value heads; what is not on Hopper adds them up in fp32.
        self.queries = (*self.rates, key_dim), q.dtype if self.hopper or not self.shared else torch.float32
        chunks = count_chunks(self.tokens, sequences, self.chunk)
        saved = 1 if self.hopper and not flags.TWO else 2, chunks, value_heads, key_dim, value_dim
        """States at the chunks' starts; the kernels that run anywhere leave the first plane of one state empty."""
        tiles = 2, value_heads, chunks, self.chunk, self.chunk
        handed = _hopper.scratch_shape(flags.DELTA, self.parts, sequences, value_heads, key_dim, value_dim)
        carried = _hopper.carried_shape(flags.DELTA, sequences * self.parts, self.parts, value_heads, key_dim)
        none, word = (0,), torch.float32
        self.kept = Room(
            q.device,
            gates=((3, value_heads, self.tokens), word),
            tiles=(tiles if flags.DELTA or flags.TWO else none, q.dtype),
            saved=(saved if save else none, q.dtype),
            inside=(v.shape if save and flags.TWO and flags.CLIP and not self.hopper else none, torch.int8),
            residual=(v.shape if self.hopper and flags.TWO and (save or self.parts > 1) else none, q.dtype),
            carried=(carried, word),
        )
        self.ahead = Room(q.device, handed=(handed, word))
        self.back = Room(
            q.device,
            handed=(handed, word),
            dresidual=(v.shape if flags.TWO and not self.hopper else none, q.dtype),
            pulled=(none if self.hopper else saved, q.dtype),
        )
        self.table: Segments | None = None
        # Memory like something is found in half the time that memory of given sizes takes; these hold one element each.
        self.like_states, self.like_rates = (_expanded(q, size, word) for size in (self.states, self.rates))
        self.like_queries = _expanded(q, *self.queries)

    def outputs(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for y as v, the final states, and what is kept for the backward."""
        return torch.empty_like(v), torch.empty_like(self.like_states), self.kept.new()

    def cotangents(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Memory for those of q and k, for each value head, v, log decay, first and second rate, and start."""
        new, queries, rates = torch.empty_like, self.like_queries, self.like_rates
        return new(queries), new(queries), new(v), new(rates), new(rates), new(rates), new(self.like_states)

    def cut(self, cu_seqlens: Tensor | None, device: torch.device) -> Segments:
        """Chunks and stretches of a call."""
        if cu_seqlens is not None:
            return segments(cu_seqlens, *self.shape, self.chunk, self.parts, device)
        if self.table is None:
            self.table = segments(None, *self.shape, self.chunk, self.parts, device)
        return self.table

    def forward(self, inputs: tuple[Any, ...], cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """y, final states, and what is kept, of q, k, v, log decay, first and second rate, and start."""
        _, _, v, log_decay, first_rate, second_rate, start = inputs
        outputs = _, ends, kept = self.outputs(v)
        if not self.tokens:
            ends.zero_() if start is None else ends.copy_(start.detach())
            return outputs
        table = self.cut(cu_seqlens, v.device)
        dtypes = log_decay.dtype, None if first_rate is None else first_rate.dtype, second_rate.dtype, start is None
        if self.hopper and self.save:
            self.compile(inputs, outputs, table, dtypes)
        scratch = self.ahead.new() if self.ahead.bytes else kept
        run = partial(self.launch_forward, inputs, outputs, scratch, table)
        replay((self, dtypes), (*inputs, *outputs, scratch if self.ahead.bytes else None, *table), run)
        return outputs

    def launch_forward(
        self,
        inputs: tuple[Any, ...],
        outputs: tuple[Tensor, Tensor, Tensor],
        scratch: Tensor,
        table: Segments,
    ) -> None:
        """Fill the outputs."""
        q, k, v, log_decay, first_rate, second_rate, start = inputs
        y, ends, kept = outputs
        gates, tiles, saved, inside, residual, carried = self.kept.parts_of(kept)
        flags, clip, scale = self.flags, self.clip, self.scale
        _prepare_chunks(k, log_decay, first_rate, second_rate, gates, tiles, table, flags, self.hopper)
        if self.hopper:
            (handed,) = self.ahead.parts_of(scratch)
            _hopper.forward(
                q, k, v, gates, tiles, saved, residual, carried, start, ends, y, handed,
                table, self.parts, flags, scale, clip, self.save,
            )  # fmt: skip
        else:
            _forward_anywhere(
                q, k, v, gates, tiles, saved, inside, start, ends, y, table, flags, scale, clip, self.save
            )

    def backward(
        self, dy: Tensor, dends: Tensor | None, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Cotangents of q, k, v, log decay, first and second rate, and start."""
        found = dq, dk, dv, dlog, dfirst, dsecond, dstart = self.cotangents(v)
        if not self.tokens:
            dstart.zero_() if dends is None else dstart.copy_(dends)
            return torch.empty_like(q), torch.empty_like(k), *found[2:]
        table, scratch = self.cut(cu_seqlens, v.device), self.back.new() if self.back.bytes else kept
        given = dy, dends, q, k, v, kept
        run = partial(self.launch_backward, given, found, scratch, table)
        replay((self, dends is None), (*given, *found, scratch if self.back.bytes else None, *table), run)
        if self.shared:
            heads = q.shape[2]
            dq, dk = (x.unflatten(2, (heads, -1)).sum(3, dtype=torch.float32).to(q.dtype) for x in (dq, dk))
        return dq, dk, dv, dlog, dfirst, dsecond, dstart

    def launch_backward(
        self, given: tuple[Any, ...], found: tuple[Tensor, ...], scratch: Tensor, table: Segments
    ) -> None:
        """Fill what is to be found."""
        dy, dends, q, k, v, kept = given
        dq, dk, dv, dlog, dfirst, dsecond, dstart = found
        gates, tiles, saved, inside, residual, carried = self.kept.parts_of(kept)
        handed, dresidual, pulled = self.back.parts_of(scratch)
        flags, clip, scale = self.flags, self.clip, self.scale
        if self.hopper:
            _hopper.backward(
                q, k, v, dy, gates, tiles, saved, residual, carried, dends, dstart,
                dq, dk, dv, dlog, dfirst, dsecond, handed, table, self.parts, flags, scale, clip,
            )  # fmt: skip
        else:
            _backward_anywhere(
                q, k, v, dy, gates, tiles, saved, inside, dends, dstart,
                dq, dk, dv, dresidual if flags.TWO else dv, pulled, dlog, dfirst, dsecond, table, flags, scale, clip,
            )  # fmt: skip

    def compile(
        self,
        inputs: tuple[Any, ...],
        outputs: tuple[Tensor, Tensor, Tensor],
        table: Segments,
        dtypes: tuple[Any, ...],
    ) -> None:
        """Have all kernels of a call with gradients compiled side by side, the first time that there is such a call."""
        q, k, v, *_ = inputs
        kind = self.flags, self.states[3:], self.queries[1], self.parts == 1, dtypes

        def make() -> None:
            self.launch_forward(inputs, outputs, self.ahead.new(), table)
            given = outputs[0], None, q, k, v, outputs[2]
            self.launch_backward(given, self.cotangents(v), self.back.new(), table)

        compile_together(("one process", *kind), make)


def _scan_of(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, flags: Flags, clip: float | None, scale: float, save: bool
) -> Scan:
    """The `Scan` of a call, an earlier one's where there was one alike."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    key = q.shape, v.shape, sequences, q.dtype, q.device, flags, clip, scale, save
    found = _scans.get(key)
    if found is None:
        if len(_scans) >= MOST_SCANS:
            _scans.clear()
        found = _scans[key] = Scan(q, v, sequences, flags, clip, scale, save)
    return found


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
) -> tuple[Tensor, Tensor, Tensor]:
    """y as v, final states fp32 [2, N, HV, K, V], and bytes for the backward, of which `save` false makes fewer.

    q, k [B, T, H, K], v [B, T, HV, V], contiguous; log_decay and rates [B, T, HV]; start as the final states.
    `first_rate` None means one state, the second; nothing is written to the first plane of the states then.
    """
    flags = Flags(delta, first_rate is not None, gated, decayed, clip is not None)
    scan = _scan_of(q, v, cu_seqlens, flags, clip, scale, save)
    return scan.forward((q, k, v, log_decay, first_rate, second_rate, start), cu_seqlens)


def _fake_forward(
    q, k, v, log_decay, first_rate, second_rate, start, cu_seqlens, delta, gated, decayed, clip, scale, save
):
    flags = Flags(delta, first_rate is not None, gated, decayed, clip is not None)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Scan(q, v, sequences, flags, clip, scale, save).outputs(v)


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
        C=_hopper.CHUNK if hopper else CHUNK,
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


def _expanded(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return like.new_empty((), dtype=dtype).expand(shape)


def _scan_backward(
    dy: Tensor,
    dends: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    delta: bool,
    two: bool,
    gated: bool,
    decayed: bool,
    clip: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv as q, k, v; fp32 cotangents [B, T, HV] of log decay, first and second rate; of the start, fp32.

    Of one state the first rate's is not written, nor the first plane of the start's.
    """
    flags = Flags(delta, two, gated, decayed, clip is not None)
    return _scan_of(q, v, cu_seqlens, flags, clip, scale, True).backward(dy, dends, q, k, v, kept, cu_seqlens)


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


def _fake_backward(dy, dends, q, k, v, kept, cu_seqlens, delta, two, gated, decayed, clip, scale):
    flags = Flags(delta, two, gated, decayed, clip is not None)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _, _, *rest = Scan(q, v, sequences, flags, clip, scale, True).cotangents(v)
    return torch.empty_like(q), torch.empty_like(k), *rest


scan_forward = operator("scan_forward", _scan_forward, _fake_forward)
scan_backward = operator("scan_backward", _scan_backward, _fake_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor], scan: Scan | None = None) -> None:
    q, k, v, log_decay, first_rate, second_rate, start, cu_seqlens, *options, _ = inputs
    kept = output[2]
    ctx.set_materialize_grads(False)
    ctx.options, ctx.scan = options, scan
    ctx.dtypes = [None if x is None else x.dtype for x in (log_decay, first_rate, second_rate, start)]
    ctx.save_for_backward(q, k, v, kept, cu_seqlens)
    ctx.mark_non_differentiable(kept)


def _pull(ctx: Any, dy: Tensor | None, dends: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, kept, cu_seqlens = ctx.saved_tensors
    log_type, first_type, second_type, start_type = ctx.dtypes
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    dends = None if dends is None else dends.contiguous()
    if ctx.scan is not None and plain(dy, dends):
        found = ctx.scan.backward(dy, dends, q, k, v, kept, cu_seqlens)
    else:
        delta, *options = ctx.options
        found = scan_backward(dy, dends, q, k, v, kept, cu_seqlens, delta, first_type is not None, *options)
    dq, dk, dv, dlog, dfirst, dsecond, dstart = found
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


_record = differentiate(scan_forward, _keep, _pull)


class Recurrence:
    """A recurrence with its options, for calls alike: same shapes, dtypes and device, and as much to be differentiated.

    delta: the delta rule, else states add; two: two states, else one; gated, decayed, clip, scale: as for `rla`.
    """

    def __init__(
        self,
        *,
        delta: bool,
        two: bool,
        gated: bool = True,
        decayed: bool = False,
        clip: float | None = None,
        scale: float,
    ) -> None:
        self.flags = Flags(delta, two, gated, decayed, clip is not None)
        self.clip, self.scale = None if clip is None else float(clip), scale
        self.missing: tuple[int, int] | None = None
        """Columns of zeros that keys and values need; not known before the first call, like all below."""
        self.save = False
        self.scan: Scan | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        first_rate: Tensor | None,
        second_rate: Tensor,
        *,
        states: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """(y, base state, second state), or (y, state), of checked arguments, differentiable once.

        q, k [B, T, H, K] and v [B, T, HV, V] of one dtype, bf16, fp16 or fp32; log_decay and rates [B, T, HV]; states
        [N, HV, K, V], None for zero. y has v's shape and dtype, the states come back in fp32. With `first_rate` None
        there is one state, the second, and `states` holds one.
        """
        start = None if states is None else stacked(states)
        if self.missing is None:
            self.missing = _hopper.missing(q, v)
            self.save = needs_grad(q, k, v, log_decay, first_rate, second_rate, start)
        more_keys, more_values = self.missing
        key_dim, value_dim = q.shape[3], v.shape[3]
        if more_keys or more_values:
            q, k = (F.pad(x, (0, more_keys)) for x in (q, k))
            v = F.pad(v, (0, more_values))
            start = None if start is None else F.pad(start, (0, more_values, 0, more_keys))
        given = (q, k, v, log_decay, first_rate, second_rate, start)
        inputs: tuple[Any, ...] = tuple([x if x is None or x.is_contiguous() else x.contiguous() for x in given])
        flags, clip, scale, save = self.flags, self.clip, self.scale, self.save
        options = (cu_seqlens, flags.DELTA, flags.GATED, flags.DECAYED, clip, scale, save)
        if plain(*inputs):
            if self.scan is None:
                self.scan = _scan_of(inputs[0], inputs[2], cu_seqlens, flags, clip, scale, save)
            output = self.scan.forward(inputs, cu_seqlens)
            if save:
                output = _record((output, self.scan), *inputs, *options)
        else:
            output = scan_forward(*inputs, *options)
        y, ends, _ = output
        if more_keys or more_values:
            y, ends = y[..., :value_dim], ends[..., :key_dim, :value_dim]
        return (y, ends[0], ends[1]) if flags.TWO else (y, ends[1])


def stacked(states: Sequence[Tensor]) -> Tensor:
    """Both states [N, HV, K, V] as one tensor [2, N, HV, K, V] in fp32; of a single one, the first is zero."""
    both = states if len(states) == 2 else (torch.zeros_like(states[0]), states[0])
    return torch.stack([x.float() for x in both])
