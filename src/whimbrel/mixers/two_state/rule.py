"""What fixes the mathematics of one call, and the checks of its arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.errors import ConfigError
from whimbrel.scan.base import State
from whimbrel.scan.common import check_choice, check_inputs, checked_scale, compute_dtype, needs_grad

COMBINE = ("gated", "sum")
RESIDUAL = ("undecayed", "decayed")


class Rule(NamedTuple):
    """The options that fix the mathematics of one call."""

    clip: float | None
    """Bound of the residual's elements; None for no bound."""
    scale: float
    """Factor on q."""
    gated: bool
    """The two reads are weighted by alpha and gamma, else summed."""
    decayed: bool
    """The residual is taken against alpha_t S_(t-1), else against S_(t-1)."""


def checked_rule(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    clip: float | None,
    scale: float | None,
    combine: str,
    residual: str,
    state: State | None,
    cu_seqlens: Tensor | None,
    recompute: int = 0,
    out: State | None = None,
) -> Rule:
    """The options as a `Rule`; raises ConfigError unless all arguments of `rla` or `rdn` fit together.

    `out` as for `step`.
    """
    check_options(op, clip=clip, combine=combine, residual=residual, recompute=recompute)
    gates = {"log_decay": log_decay, "beta": beta, "gamma": gamma}
    before, after = _parts(op, "state", state), _parts(op, "out", out)
    check_inputs(op, q, k, v, gates, {**before, **after}, cu_seqlens)
    if after:
        _check_out(op, after, q, k, v, *gates.values(), *before.values())
    return Rule(clip, checked_scale(op, scale, q.shape[3]), combine == "gated", residual == "decayed")


def check_options(op: str, *, clip: float | None, combine: str, residual: str, recompute: int) -> None:
    """Raise ConfigError for an option that no call of `rla` or `rdn` takes."""
    check_choice(op, "combine", combine, COMBINE)
    check_choice(op, "residual", residual, RESIDUAL)
    if clip is not None and not clip > 0:
        raise ConfigError(f"{op}: clip = {clip} is not allowed; give a number above 0, or None for no clipping")
    if not isinstance(recompute, int) or recompute < 0:
        raise ConfigError(f"{op}: recompute = {recompute!r} is not allowed; give 0 (off) or a number of parts")


def _parts(op: str, name: str, state: State | None) -> dict[str, Tensor]:
    """The two tensors of `state` by name, none where it is None."""
    if state is None:
        return {}
    if not isinstance(state, tuple) or len(state) != 2 or any(s is None for s in state):
        raise ConfigError(f"{op}: {name} lacks one of its two parts; give State(base, residual) of two tensors")
    return {f"{name}.{part}": x for part, x in zip(State._fields, state) if x is not None}


def _check_out(op: str, out: dict[str, Tensor], *inputs: Tensor) -> None:
    """Raise ConfigError unless a step on `inputs` can write its states to `out`."""
    dtype = compute_dtype(*inputs)
    for name, x in out.items():
        if x.dtype != dtype or not x.is_contiguous():
            raise ConfigError(
                f"{op}: {name} has dtype {x.dtype} and strides {list(x.stride())}; give a contiguous tensor of {dtype}"
            )
    if needs_grad(*inputs, *out.values()):
        raise ConfigError(f"{op}: out is written to, which autograd cannot record; call under torch.no_grad()")


def both_states(
    state: State | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Base and residual [N, HV, K, V] in `dtype`, zeros where `state` is None."""
    if state is None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        zero = q.new_zeros(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=dtype)
        return zero, zero
    assert state.residual is not None
    return state.base.to(dtype), state.residual.to(dtype)
