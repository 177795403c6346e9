"""The block around a linear recurrence: projections, short convolution, gates, recurrence, gated norm.

The macro design is that of Gated DeltaNet (arXiv 2412.06464, figure 1), the decay parametrisation that of Mamba-2
(arXiv 2405.21060). One class serves every recurrence; the folders beside this file bind it to theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from whimbrel.config import require
from whimbrel.errors import ConfigError
from whimbrel.mixers import kernels
from whimbrel.mixers.base import LayerState, Out, State, check_input
from whimbrel.mixers.kernels import ops
from whimbrel.mixers.norm import GatedRMSNorm, l2_norm
from whimbrel.scan.common import IMPLS, check_choice, check_cu_seqlens

UNIT_EPS = 1e-6
"""Added to the squared length of q and k before they are scaled to unit length."""


class LinearMixer(nn.Module):
    """A token mixer whose state has a constant size.

    `recurrence(q, k, v, log_decay, beta[, gamma], *, state, cu_seqlens) -> Out` gets q, k [B, T, num_heads,
    head_dim] of unit length, v [B, T, num_value_heads, value_head_dim], and `num_gates` gates
    [B, T, gate_sets * num_value_heads] in fp32: the log of the decay, then rates from 0 to 1.
    """

    def __init__(
        self,
        hidden_size: int,
        recurrence: Callable[..., Out],
        *,
        num_gates: int,
        gate_sets: int = 1,
        num_heads: int,
        head_dim: int,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "head_dim": head_dim, "conv_size": conv_size}
        for name, size in sizes.items():
            require(size > 0, name, size, "a positive number")
        self.recurrence = recurrence
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.num_value_heads = num_value_heads or num_heads
        self.value_head_dim = value_head_dim or head_dim
        if self.num_value_heads % num_heads:
            raise ConfigError(
                f"num_value_heads = {num_value_heads} is not allowed; use a multiple of num_heads = {num_heads}"
            )
        keys, values = num_heads * head_dim, self.num_value_heads * self.value_head_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.gate_proj = nn.Linear(hidden_size, values, bias=False)
        gated = gate_sets * self.num_value_heads
        self.gates = nn.Linear(hidden_size, num_gates * gated, bias=False)
        self.conv = ShortConv((keys, keys, values), conv_size, units=(head_dim, head_dim, 0))
        self.A_log, self.dt_bias = _decay_parameters(gated)
        self.norm = GatedRMSNorm(self.value_head_dim, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def forward(self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None) -> Out:
        """x [B, T, hidden_size] -> Out(y [B, T, hidden_size], LayerState).

        `state` is that of an earlier call, None at the start of a sequence. cu_seqlens [N + 1] marks N packed
        sequences in a batch of 1; states then have N rows. Raises ConfigError for an x of another shape or dtype than
        the layer's, or cu_seqlens that do not fit it.
        """
        check_input(type(self).__name__, x, self.q_proj, self.hidden_size)
        batch, time, _ = x.shape
        if cu_seqlens is not None:
            check_cu_seqlens(type(self).__name__, cu_seqlens, batch, time)
        streams = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), conv = self.conv(streams, None if state is None else state.conv, cu_seqlens=cu_seqlens)
        y, recurrent = self.recurrence(
            q.view(batch, time, self.num_heads, self.head_dim),
            k.view(batch, time, self.num_heads, self.head_dim),
            v.view(batch, time, self.num_value_heads, self.value_head_dim),
            *self._gates(self.gates(x)),
            state=None if state is None else state.recurrent,
            cu_seqlens=cu_seqlens,
        )
        y = self.norm(y, self.gate_proj(x)).flatten(2)
        return Out(self.o_proj(y), LayerState(conv, recurrent))

    def _gates(self, x: Tensor) -> Sequence[Tensor]:
        if kernels.usable(x):
            return ops.gates(x, self.A_log, self.dt_bias).unbind(0)
        decay, *rates = _at_least_fp32(x).split(self.A_log.shape[0], dim=-1)
        decay = -_at_least_fp32(self.A_log).exp() * F.softplus(decay + self.dt_bias)
        return [decay, *(rate.sigmoid() for rate in rates)]


class OneStateMixer(LinearMixer):
    """A linear mixer with the recurrence `_op` of the subclass, over one state.

    Arguments as in LinearMixerConfig, where they are described; None for `num_value_heads` and `value_head_dim` takes
    `num_heads` and `head_dim`.
    """

    _op: ClassVar[Callable[..., Out]]
    """Takes what `LinearMixer` gives its recurrence, and `impl`."""
    gate_sets: ClassVar[int] = 1
    """Sets of gates that a value head has."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        impl: Literal["auto", "reference", "chunked", "triton"] = "auto",
    ) -> None:
        check_choice(type(self).__name__, "impl", impl, IMPLS)
        super().__init__(
            hidden_size,
            partial(type(self)._op, impl=impl),
            num_gates=2,
            gate_sets=self.gate_sets,
            num_heads=num_heads,
            head_dim=head_dim,
            num_value_heads=num_value_heads,
            value_head_dim=value_head_dim,
            conv_size=conv_size,
            norm_eps=norm_eps,
        )


def one_state(
    scan: Callable[..., Out],
    *tensors: Tensor,
    state: State | None,
    cu_seqlens: Tensor | None,
    impl: Literal["auto", "reference", "chunked", "triton"],
) -> Out:
    """A scan over a single state as a recurrence of LinearMixer: its state is the base, there is no residual."""
    y, base = scan(*tensors, state=None if state is None else state.base, cu_seqlens=cu_seqlens, impl=impl)
    return Out(y, State(base, None))


def _decay_parameters(heads: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log and dt_bias: A uniform in [1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1]; never decayed."""
    a_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log_())
    dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp_()
    dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
    for parameter in (a_log, dt_bias):
        parameter._no_weight_decay = True  # pyrefly: ignore
    return a_log, dt_bias


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class ShortConv(nn.Module):
    """A causal depthwise convolution followed by SiLU, over several streams of channels with one weight.

    units: for each stream, how many channels in a row are scaled to unit length; 0 leaves them as they are.
    """

    def __init__(self, widths: tuple[int, ...], size: int, units: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.widths = widths
        self.units = units or (0,) * len(widths)
        self.weight = nn.Parameter(torch.empty(sum(widths), 1, size).uniform_(-(size**-0.5), size**-0.5))

    def forward(
        self, streams: tuple[Tensor, ...], state: Tensor | None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Streams [B, T, width] -> the same shapes, and the state [N, channels, size - 1] after them."""
        after = _last_inputs(streams, state, self.weight.shape[2] - 1, cu_seqlens)
        if kernels.usable(streams[0]):
            return self._fused(streams, state, cu_seqlens), after
        if state is not None and cu_seqlens is None and streams[0].shape[1] == 1:
            done = self._step(torch.cat(streams, -1), state)
        else:
            # One row per tap, so that every product below runs along contiguous memory.
            taps = _at_least_fp32(self.weight)[:, 0].t().contiguous().split(self.widths, dim=1)
            done = [_conv_stream(*args, cu_seqlens) for args in zip(streams, taps, self._split(state), strict=True)]
        return tuple(_unit_length(y, unit) for y, unit in zip(done, self.units, strict=True)), after

    def _split(self, state: Tensor | None) -> Sequence[Tensor | None]:
        return (None,) * len(self.widths) if state is None else state.split(self.widths, dim=1)

    def _step(self, x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        window = torch.cat((state, x.transpose(1, 2)), 2)
        y = F.silu((window * _at_least_fp32(self.weight)[:, 0]).sum(-1, keepdim=True)).to(x.dtype)
        return y.transpose(1, 2).split(self.widths, dim=-1)

    def _fused(
        self, streams: tuple[Tensor, ...], state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ...]:
        time = streams[0].shape[1]
        rows = ops.RUN if time > 1 else 1
        table = None if cu_seqlens is None else ops.cut(cu_seqlens, time, rows)
        parts = zip(streams, self.weight.split(self.widths), self._split(state), self.units, strict=True)
        return tuple(ops.short_conv(x, weight, past, table, rows, unit, UNIT_EPS) for x, weight, past, unit in parts)

    def extra_repr(self) -> str:
        """Channels and size, for print(model)."""
        return f"{self.weight.shape[0]}, size={self.weight.shape[2]}"


def _unit_length(x: Tensor, unit: int) -> Tensor:
    return l2_norm(x.unflatten(-1, (-1, unit)), eps=UNIT_EPS).flatten(-2) if unit else x


def _last_inputs(streams: tuple[Tensor, ...], state: Tensor | None, past: int, cu_seqlens: Tensor | None) -> Tensor:
    """The last `past` inputs of every sequence, [N, channels, past]; those before the streams come from `state`."""
    time = streams[0].shape[1]
    if cu_seqlens is not None:
        return _last_of_packed(streams, state, past, cu_seqlens.long())
    last = torch.cat([x[:, max(0, time - past) :] for x in streams], -1).transpose(1, 2)
    if time < past:
        before = F.pad(last, (past - time, -time)) if state is None else state[:, :, time:]
        last = torch.cat((before, last), 2)
    return last.contiguous()


def _last_of_packed(streams: tuple[Tensor, ...], state: Tensor | None, past: int, edges: Tensor) -> Tensor:
    rows = edges[1:, None] + torch.arange(-past, 0, device=edges.device)
    last = torch.cat([x[0, rows.clamp_min(0)] for x in streams], -1).transpose(1, 2)
    into = rows - edges[:-1, None]
    before = 0.0
    if state is not None:
        before = state.gather(2, (into + past).clamp_max(past - 1)[:, None].expand_as(last))
    return torch.where((into >= 0)[:, None], last, before)


def _conv_stream(x: Tensor, taps: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """One stream x [B, T, C] with taps [size, C] and state [N, C, size - 1] -> y [B, T, C]."""
    time = x.shape[1]
    if cu_seqlens is not None:
        return _conv_packed(x, taps, state, cu_seqlens.long())
    if state is not None:
        x = torch.cat((state.transpose(1, 2), x), 1)
    return _ConvSiLU.apply(x, taps)[:, x.shape[1] - time :]


def _conv_packed(x: Tensor, taps: Tensor, state: Tensor | None, edges: Tensor) -> Tensor:
    """The same for packed sequences: each gets its own past in front of it, which keeps the others out."""
    time, past, sequences = x.shape[1], taps.shape[0] - 1, edges.shape[0] - 1
    tokens = torch.arange(time, device=x.device)
    rows = tokens + (torch.searchsorted(edges[1:], tokens, right=True) + 1) * past
    spaced = x[0].new_zeros(time + sequences * past, x.shape[2]).index_copy(0, rows, x[0])
    if state is not None:
        heads = edges[:-1, None] + torch.arange(sequences * past, device=x.device).view(sequences, past)
        spaced = spaced.index_copy(0, heads.flatten(), state.transpose(1, 2).flatten(0, 1))
    return _ConvSiLU.apply(spaced[None], taps)[:, rows]


class _ConvSiLU(torch.autograd.Function):
    """silu(sum_j taps[size - 1 - j] * x[t - j]) for x [B, T, C], taps [size, C], zeros before the first token.

    Shifted products along contiguous channels: on the CPU twice as fast as a grouped conv1d, forward and backward.
    The sums are formed in the dtype of `taps`; the result has that of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        time, last = x.shape[1], taps.shape[0] - 1
        pre = x * taps[last]
        for j in range(1, min(last, time - 1) + 1):
            pre[:, j:].addcmul_(x[:, : time - j], taps[last - j])
        ctx.save_for_backward(x, taps, pre)
        return F.silu(pre).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore [bad-override]
        x, taps, pre = ctx.saved_tensors
        time, last = x.shape[1], taps.shape[0] - 1
        grad = torch.ops.aten.silu_backward(grad.to(pre.dtype), pre)
        dx, dtaps = grad * taps[last], torch.zeros_like(taps)
        dtaps[last] = (grad * x).sum((0, 1))
        scratch = grad.new_empty(grad.numel())
        for j in range(1, min(last, time - 1) + 1):
            later, earlier = grad[:, j:], x[:, : time - j]
            dx[:, : time - j].addcmul_(later, taps[last - j])
            product = torch.mul(later, earlier, out=scratch[: later.numel()].view(later.shape))
            dtaps[last - j] = product.sum((0, 1))
        return dx.to(x.dtype), dtaps
