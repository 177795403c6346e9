"""The kernels for Hopper with the delta rule where sequences begin before this call's tokens, or go on behind them.

States go from stretch to stretch by `hand`, which stands for `stretches.carry` and sees to those of other processes
too. So nothing runs twice: what a process must tell is what its own stretches need to be told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whimbrel.launches import compiling_ahead
from whimbrel.scan.kernels import hopper_launch
from whimbrel.scan.kernels.launch import Flags
from whimbrel.scan.kernels.segments import Segments, count_chunks, segments

Hand = Callable[..., None]
"""As `stretches.carry`, called once for each state: the first state first, going back the last one first."""

_begun: set[Any] = set()
"""Kinds of calls whose kernels were compiled, or are being compiled side by side."""


class Kept(NamedTuple):
    """What the forward keeps for the backward."""

    gates: Tensor
    tiles: Tensor
    saved: Tensor
    residual: Tensor
    carried: Tensor


class Walk:
    """A recurrence by the delta rule over this process's tokens, of one state or two."""

    def __init__(
        self, q: Tensor, v: Tensor, *, two: bool, gated: bool, decayed: bool, clip: float | None, scale: float
    ) -> None:
        self.flags = Flags(True, two, gated, decayed, clip is not None)
        self.clip, self.scale = clip, scale
        batch, time, _, self.key_dim = q.shape
        _, _, self.value_heads, self.value_dim = v.shape
        # In one piece the kernels would not ask for the states between, so there are at least two.
        self.parts = max(2, hopper_launch.splits(q, v, batch))
        self.batch, self.tokens, self.device = batch, batch * time, q.device
        self.chunks = count_chunks(self.tokens, batch, hopper_launch.CHUNK)

    def table(self) -> Segments:
        """Where chunks and stretches lie."""
        time = self.tokens // self.batch
        return segments(None, self.batch, time, hopper_launch.CHUNK, self.parts, self.device)

    def states(self) -> Tensor:
        """Room for two states of every sequence."""
        return self._empty(2, self.batch, self.value_heads, self.key_dim, self.value_dim)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        rates: tuple[Tensor, ...],
        start: Tensor | None,
        hand: Hand,
        *,
        save: bool,
    ) -> tuple[Tensor, Tensor, Kept]:
        """y, the states at the end [2, B, HV, K, V], and what is kept for the backward, which needs `save`.

        Tensors as `launch.recurrence` takes them, contiguous; start [2, B, HV, K, V] fp32, None for zero or for what
        `hand` knows. With one state it is the second.
        """
        first, second = rates[0] if self.flags.TWO else None, rates[-1]
        chunk, heads = hopper_launch.CHUNK, self.value_heads
        saved = (1 + self.flags.TWO, self.chunks, heads, self.key_dim, self.value_dim)
        kept = Kept(
            self._empty(3, heads, self.tokens),
            self._empty(2, heads, self.chunks, chunk, chunk, dtype=q.dtype),
            self._empty(*(saved if save else (0,)), dtype=q.dtype),
            torch.empty_like(v) if self.flags.TWO else self._empty(0, dtype=q.dtype),
            self._empty(*hopper_launch.carried_shape(True, self.batch * self.parts, self.parts, heads, self.key_dim)),
        )
        y, ends, scratch, table = torch.empty_like(v), self.states(), self._scratch(), self.table()

        def launch(hand: Hand) -> None:
            hopper_launch.prepare(k, log_decay, first, second, kept.gates, kept.tiles, table)
            hopper_launch.forward(
                q, k, v, *kept, start, ends, y, scratch,
                table, self.parts, self.flags, self.scale, self.clip, save, hand,
            )  # fmt: skip

        kind = self.flags, q.dtype, log_decay.dtype, *(x.dtype for x in rates), self.key_dim, self.value_dim, save
        if kind not in _begun:
            _begun.add(kind)
            with compiling_ahead():
                launch(hopper_launch.carry)
                if save:
                    self._launch_backward(y, None, q, k, v, kept, self._cotangents(q, v), scratch, hopper_launch.carry)
        launch(hand)
        return y, ends, kept

    def backward(
        self, dy: Tensor, dends: Tensor | None, q: Tensor, k: Tensor, v: Tensor, kept: Kept, hand: Hand
    ) -> tuple[Tensor, ...]:
        """Cotangents of q, k, v, log decay, first and second rate, and start; with one state, the second's alone."""
        found = dq, dk, *rest = self._cotangents(q, v)
        self._launch_backward(dy, dends, q, k, v, kept, found, self._scratch(), hand)
        if self.value_heads != q.shape[2]:
            dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3, dtype=torch.float32).to(q.dtype) for x in (dq, dk))
        return dq, dk, *rest

    def _launch_backward(
        self,
        dy: Tensor,
        dends: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Kept,
        found: tuple[Tensor, ...],
        scratch: Tensor,
        hand: Hand,
    ) -> None:
        dq, dk, dv, dlog, dfirst, dsecond, dstarts = found
        hopper_launch.backward(
            q, k, v, dy, *kept, dends, dstarts, dq, dk, dv, dlog, dfirst, dsecond, scratch,
            self.table(), self.parts, self.flags, self.scale, self.clip, hand,
        )  # fmt: skip

    def _cotangents(self, q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        tall = (*v.shape[:3], self.key_dim)
        dq, dk = (self._empty(*tall, dtype=q.dtype) for _ in range(2))
        return dq, dk, torch.empty_like(v), *(self._empty(*v.shape[:3]) for _ in range(3)), self.states()

    def _scratch(self) -> Tensor:
        sizes = self.parts, self.batch, self.value_heads, self.key_dim, self.value_dim
        return self._empty(*hopper_launch.scratch_shape(True, *sizes))

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)
