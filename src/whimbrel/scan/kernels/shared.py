"""The kernels for Hopper with the delta rule where sequences begin before this call's tokens, or go on behind them.

States go from stretch to stretch by `stretches.carry`, and at the ends of these tokens from process to process. So
nothing runs twice: what a process must tell is what its own stretches need to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whimbrel.launches import compile_together, pause, replay
from whimbrel.scan.kernels import hopper_launch
from whimbrel.scan.kernels.launch import Flags
from whimbrel.scan.kernels.segments import Segments, count_chunks, segments
from whimbrel.scan.kernels.stretches import carry


class Neighbours(NamedTuple):
    """The processes before and behind this one. Equal ones make a call alike."""

    key: Any
    """What tells them from others, and this process's place among them."""
    tells: tuple[bool, bool]
    """Whether this process has somebody to tell its ends, and going back, its starts' cotangents."""
    asks: tuple[bool, bool]
    """Whether it is told the start of its tokens, and going back, the cotangent of their end."""
    between: bool
    """Whether there are processes in the middle, which also tell what takes a start to an end."""
    exchange: Callable[..., None]
    """exchange(state, across, back): `state` [N, HV, K, V] is what this process tells, and becomes what it is told;
    `across` [N, HV, K, K] with `between`, else None."""


class Walk:
    """A recurrence by the delta rule over this process's tokens, of one state or two, in all calls of these shapes."""

    def __init__(
        self,
        shape: Sequence[int],
        value_shape: Sequence[int],
        device: torch.device,
        flags: Flags,
        clip: float | None,
        scale: float,
    ) -> None:
        batch, time, self.heads, key_dim = shape
        _, _, value_heads, value_dim = value_shape
        self.flags, self.clip, self.scale, self.device = flags, clip, scale, device
        # In one piece the kernels would not ask for the states between, so there are at least two.
        splits = hopper_launch.count_stretches(batch * time, batch, value_heads, value_dim)
        self.parts = max(2, splits)
        self.shape, self.value_shape, self.sizes = (*value_shape[:3], key_dim), value_shape, (batch, value_heads)
        self.tokens, self.chunks = batch * time, count_chunks(batch * time, batch, hopper_launch.CHUNK)
        self.table: Segments = segments(None, batch, time, hopper_launch.CHUNK, self.parts, device)

    def forward(
        self,
        inputs: tuple[Any, ...],
        neighbours: Neighbours,
        *,
        save: bool,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """y, the states at the end [2, B, HV, K, V], and what is kept for the backward, which needs `save`.

        inputs: q, k, v, log decay, first and second rate as `launch.Recurrence` takes them, contiguous, and the start
        [2, B, HV, K, V] fp32, None for zero or for what neighbours know. With one state it is the second.
        """
        q, _, v, log_decay, first, second, start = inputs
        (batch, heads), key_dim, chunk = self.sizes, self.shape[3], hopper_launch.CHUNK
        saved = (1 + self.flags.TWO, self.chunks, heads, *self._state()) if save else (0,)
        states = (2, batch, heads, *self._state())
        kept = (
            self._empty((3, heads, self.tokens)),
            self._empty((2, heads, self.chunks, chunk, chunk), q.dtype),
            self._empty(saved, q.dtype),
            torch.empty_like(v) if self.flags.TWO else self._empty((0,), q.dtype),
            self._empty(hopper_launch.carried_shape(True, batch * self.parts, self.parts, heads, key_dim)),
            self._empty((2, batch, heads, key_dim, key_dim) if neighbours.between else (0,)),
        )
        y, ends, passed = torch.empty_like(v), self._empty(states), self._empty(states)
        tensors = (*inputs, y, ends, *kept, passed, self._scratch(), *self.table)
        kind = log_decay.dtype, None if first is None else first.dtype, second.dtype, start is None, save, q.dtype

        def make() -> None:
            self._launch_forward(tensors, neighbours, save)
            if save:
                self._launch_backward(self._back(y, None, q, q, v, kept), neighbours)

        compile_together(("several", self.flags, self.shape[3], v.shape[3], kind), make)
        replay((self, kind, neighbours.key), tensors, partial(self._launch_forward, tensors, neighbours, save))
        return y, ends, kept

    def backward(
        self,
        dy: Tensor,
        dends: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: tuple[Tensor, ...],
        neighbours: Neighbours,
    ) -> tuple[Tensor, ...]:
        """Cotangents of q, k, v, log decay, first and second rate, and start; with one state, the second's alone."""
        tensors = self._back(dy, dends, q, k, v, kept)
        kind = self, q.dtype, dends is None, neighbours.key
        replay(kind, tensors, partial(self._launch_backward, tensors, neighbours))
        dq, dk, *rest = tensors[11:18]
        if self.shape[2] != self.heads:
            dq, dk = (x.unflatten(2, (self.heads, -1)).sum(3, dtype=torch.float32).to(q.dtype) for x in (dq, dk))
        return dq, dk, *rest

    def _launch_forward(self, tensors: tuple[Any, ...], neighbours: Neighbours, save: bool) -> None:
        q, k, v, log_decay, first, second, start, y, ends, *rest = tensors
        gates, tiles, saved, residual, carried, across, _, scratch, *_ = rest
        order = iter((0, 1) if self.flags.TWO else (1,))

        def hand(local: Tensor, by: Tensor, given: Tensor | None, parts: int, *, back: bool, out: Tensor) -> None:
            self._hand(tensors, neighbours, next(order), across, local, by, given, out, back=back)

        hopper_launch.prepare(k, log_decay, first, second, gates, tiles, self.table)
        hopper_launch.forward(
            q, k, v, gates, tiles, saved, residual, carried, start, ends, y, scratch,
            self.table, self.parts, self.flags, self.scale, self.clip, save, hand,
        )  # fmt: skip

    def _back(
        self, dy: Tensor, dends: Tensor | None, q: Tensor, k: Tensor, v: Tensor, kept: tuple[Tensor, ...]
    ) -> tuple[Any, ...]:
        """All memory of a backward: 5 inputs, 6 that were kept, 7 results and what else is needed on the way."""
        states, rates = (2, *self.sizes, *self._state()), self.value_shape[:3]
        return (
            *(dy, dends, q, k, v),
            *kept,
            *(self._empty(self.shape, q.dtype), self._empty(self.shape, q.dtype), torch.empty_like(v)),
            *(self._empty(rates), self._empty(rates), self._empty(rates), self._empty(states)),
            *(self._empty(states), self._scratch()),
            *self.table,
        )

    def _launch_backward(self, tensors: tuple[Any, ...], neighbours: Neighbours) -> None:
        dy, dends, q, k, v, gates, tiles, saved, residual, carried, across, *rest = tensors
        dq, dk, dv, dlog, dfirst, dsecond, dstart, _, scratch, *_ = rest
        order = iter((1, 0) if self.flags.TWO else (1,))

        def hand(local: Tensor, by: Tensor, given: Tensor | None, parts: int, *, back: bool, out: Tensor) -> None:
            self._hand(tensors, neighbours, next(order), across, local, by, given, out, back=back)

        hopper_launch.backward(
            q, k, v, dy, gates, tiles, saved, residual, carried, dends, dstart,
            dq, dk, dv, dlog, dfirst, dsecond, scratch,
            self.table, self.parts, self.flags, self.scale, self.clip, hand,
        )  # fmt: skip

    def _hand(
        self,
        tensors: tuple[Any, ...],
        neighbours: Neighbours,
        state: int,
        across: Tensor,
        local: Tensor,
        by: Tensor,
        given: Tensor | None,
        out: Tensor,
        *,
        back: bool,
    ) -> None:
        """`carry` over the stretches here and of the neighbours."""
        place = 18 if back else 15
        tells, asks = neighbours.tells[back], neighbours.asks[back]
        if tells:
            carry(local, by, given, self.parts, back=back, out=out, beyond=tensors[place][state])
        if neighbours.between and not back and tells and asks:
            self._across(by, across[state])

        def message(tensors: Sequence[Any]) -> None:
            passed, dends, through = tensors[place][state], tensors[1], tensors[10 if back else 14]
            neighbours.exchange(passed, through[state] if neighbours.between else None, back=back)
            if back and asks and dends is not None:
                passed += dends[state]

        pause(message, tensors)
        if asks:
            carry(local, by, tensors[place][state], self.parts, back=back, out=out)

    def _across(self, by: Tensor, out: Tensor) -> None:
        """The product of the matrices of all stretches of each sequence."""
        unit = torch.eye(by.shape[3], dtype=by.dtype, device=by.device).expand_as(out).contiguous()
        carry(torch.zeros_like(by), by, unit, self.parts, back=False, out=torch.empty_like(by), beyond=out)

    def _state(self) -> tuple[int, int]:
        return self.shape[3], self.value_shape[3]

    def _scratch(self) -> Tensor:
        batch, heads = self.sizes
        return self._empty(hopper_launch.scratch_shape(True, self.parts, batch, heads, *self._state()))

    def _empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


@lru_cache(maxsize=256)
def walk_over(
    shape: torch.Size, value_shape: torch.Size, device: torch.device, flags: Flags, clip: float | None, scale: float
) -> Walk:
    """The `Walk` of calls with q of `shape` and v of `value_shape`."""
    return Walk(shape, value_shape, device, flags, clip, scale)
