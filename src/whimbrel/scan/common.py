"""What every recurrence needs besides its mathematics: checks of the arguments, choice of code, packing."""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from whimbrel.errors import ConfigError, UnsupportedError, nearest
from whimbrel.scan.kernels import HAS_TRITON

IMPLS = ("auto", "reference", "chunked", "triton")
MOST_KERNEL_DIM = 256
MOST_FORMS = 1 << 10
"""Kinds of calls whose form is kept, of some 1 KB each; when there are more, all are forgotten."""
_log = logging.getLogger("whimbrel")
_announced: set[tuple[str, str]] = set()
_forms: dict[Any, Callable[..., Any]] = {}
_edges_that_held: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}


def form_of(
    find: Callable[[], Callable[..., Any]],
    op: str,
    tensors: Sequence[Tensor],
    state: Any,
    cu_seqlens: Tensor | None,
    options: Sequence[Any],
) -> Callable[..., Any]:
    """find(), which checks a call and says how it runs, or what it said of an earlier call alike.

    Checks and choice take the host tens of microseconds, for which a GPU waits where a call is short, and on a GPU they
    look at nothing but types, shapes, dtypes, devices, options, and whether autograd records. Calls that have those in
    common are alike. Edges of packed sequences and decays on a CPU are looked at each time, so such calls have no like.
    """
    kind = _kind(op, tensors, state, cu_seqlens, options)
    if kind is None:
        return find()
    try:
        form = _forms.get(kind)
    except TypeError:  # an option of a type that cannot be one
        return find()
    if form is None:
        form = find()
        if len(_forms) >= MOST_FORMS:
            _forms.clear()
        _forms[kind] = form
    return form


def _kind(
    op: str, tensors: Sequence[Tensor], state: Any, cu_seqlens: Tensor | None, options: Sequence[Any]
) -> tuple[Any, ...] | None:
    """What a call's form depends on, None where that is more than can be kept."""
    if torch.compiler.is_compiling() or cu_seqlens is not None:
        return None
    if state is not None:
        tensors = (*tensors, *state) if isinstance(state, tuple) else (*tensors, state)
    kind: list[Any] = [op, type(state), torch.is_grad_enabled(), *options, *map(type, options)]  # 1 equals 1.0
    try:
        if tensors[0].is_cpu:
            return None
        for x in tensors:
            kind.append((type(x), x.shape, x.dtype, x.device, x.requires_grad))
    except AttributeError:  # not a tensor
        return None
    return tuple(kind)


def choose(op: str, impl: str, q: Tensor, v: Tensor, *others: Tensor | None, one_step: bool = False) -> str:
    """The code that will run: "reference", "chunked", "triton" or "step".

    `one_step` says that the call is a single token without gradients, for which "auto" takes the one-step path.
    "auto" says once per process and path what it chose; a named choice is taken or refused, never replaced.
    """
    if impl == "auto":
        refusal = kernel_unproven(q, v) or kernel_refusal(q, v, *others)
        if one_step:
            chosen, why = "step", "one token, no gradient"
        elif refusal is None:
            chosen, why = "triton", "kernels for this device"
        else:
            chosen, why = "chunked", f"plain PyTorch on any device; no kernel: {refusal}"
        if not torch.compiler.is_compiling() and (op, chosen) not in _announced:
            _announced.add((op, chosen))
            _log.info("%s: impl='auto' chose '%s' (%s)", op, chosen, why)
        return chosen
    if impl == "triton":
        if refusal := kernel_refusal(q, v, *others):
            raise UnsupportedError(
                f"{op}: impl = 'triton' is not available here: {refusal}; impl='chunked' runs on any device"
            )
        return "step" if one_step else impl
    check_choice(op, "impl", impl, IMPLS)
    return impl


def kernel_refusal(q: Tensor, v: Tensor, *others: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take this call; None where they can.

    They compute in fp32 from bf16, fp16 or fp32, on CUDA or, where TRITON_INTERPRET is set, in Triton's interpreter.
    """
    if not HAS_TRITON:
        return "Triton is not installed"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {q.device}, not on a CUDA device"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or compute_dtype(*others) == torch.float64:
        return "they compute in fp32, and an input is neither bf16, fp16 nor fp32"
    if max(q.shape[3], v.shape[3]) > MOST_KERNEL_DIM:
        return f"K = {q.shape[3]} and V = {v.shape[3]}, of which they take at most {MOST_KERNEL_DIM}"
    return None


def kernel_unproven(q: Tensor, v: Tensor) -> str | None:
    """Why "auto" leaves the kernels alone although they can run; None where they were measured to be the fastest."""
    if not q.is_cuda:
        return f"the tensors are on {q.device}, not on a CUDA device"
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return "they were measured on Hopper only, name impl='triton' to use them"
    if q.dtype == torch.float32 or max(q.shape[3], v.shape[3]) > 128:
        return "the fast ones take bf16 or fp16 with K and V up to 128, name impl='triton' for the others"
    return None


def check_choice(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(
            f"{op}: {name} = {value!r} is unknown; choose one of {', '.join(allowed)}{nearest(value, allowed)}"
        )


def check_inputs(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    states: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ConfigError unless the arguments of a recurrence fit together.

    q and k [B, T, H, K], v [B, T, HV, V] of one floating dtype with HV a multiple of H; every gate [B, T, HV],
    `log_decay` among them at most 0 (looked at on the CPU only, since it would make other devices wait);
    every state [N, HV, K, V]; cu_seqlens int [N + 1] from 0 to T, and then B = 1.
    """
    for name, x in {"q": q, "k": k, "v": v, **gates, **states}.items():
        if not isinstance(x, Tensor) and not (x is None and name in states):
            raise ConfigError(f"{op}: {name} is of type {type(x).__name__}; give a tensor")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ConfigError(f"{op}: {name} has shape {list(x.shape)}; give [batch, time, heads, dim]")
        if not x.dtype.is_floating_point:
            raise ConfigError(f"{op}: {name} has dtype {x.dtype}; give a floating dtype")
    if k.shape != q.shape:
        raise ConfigError(f"{op}: k has shape {list(k.shape)}, q has {list(q.shape)}; they must be equal")
    if v.shape[:2] != q.shape[:2]:
        raise ConfigError(
            f"{op}: v has batch and time {list(v.shape[:2])}, q has {list(q.shape[:2])}; they must be equal"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"{op}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; give all three the same dtype")
    heads, value_heads = q.shape[2], v.shape[2]
    if heads == 0 or value_heads == 0 or value_heads % heads:
        raise ConfigError(f"{op}: v has {value_heads} heads; give a multiple of the {heads} heads of q and k")
    for name, x in gates.items():
        if x.shape != v.shape[:3]:
            raise ConfigError(
                f"{op}: {name} has shape {list(x.shape)}; give [batch, time, value heads] = {list(v.shape[:3])}"
            )
        if not x.dtype.is_floating_point:
            raise ConfigError(f"{op}: {name} has dtype {x.dtype}; give a floating dtype")
    log_decay = gates["log_decay"]
    look = log_decay.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and log_decay.numel() and (top := float(log_decay.detach().max())) > 0:
        raise ConfigError(
            f"{op}: log_decay has the value {top:.4g}; it is the natural logarithm of the decay and at most 0, "
            "pass decay.log()"
        )
    sequences = q.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, q.shape[0], q.shape[1])
        sequences = cu_seqlens.numel() - 1
    wanted = [sequences, value_heads, q.shape[3], v.shape[3]]
    for name, state in states.items():
        if state is not None and list(state.shape) != wanted:
            raise ConfigError(
                f"{op}: {name} has shape {list(state.shape)}; give [sequences, value heads, K, V] = {wanted}"
            )
    others = {"k": k, "v": v, **gates, **{n: s for n, s in states.items() if s is not None}}
    for name, x in others.items():
        if x.device != q.device:
            raise ConfigError(f"{op}: {name} is on {x.device}, q is on {q.device}; move them to one device")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, batch: int, time: int) -> None:
    """Raise ConfigError unless cu_seqlens, int32 or int64 [N + 1], rises from 0 to `time` in a batch of 1."""
    if not isinstance(cu_seqlens, Tensor):
        raise ConfigError(
            f"{op}: cu_seqlens is of type {type(cu_seqlens).__name__}; give a tensor, int32 or int64 [sequences + 1]"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ConfigError(
            f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; "
            "give int32 or int64 [sequences + 1]"
        )
    if batch != 1:
        raise ConfigError(
            f"{op}: cu_seqlens goes with batch 1, but the batch is {batch}; concatenate the sequences along time"
        )
    if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # neither may wait for values
    if _edges_held(cu_seqlens, time):
        return
    edges = cu_seqlens.tolist()
    if edges[0] != 0 or edges[-1] != time or any(b < a for a, b in pairwise(edges)):
        raise ConfigError(
            f"{op}: cu_seqlens runs from {edges[0]} to {edges[-1]}; it must rise from 0 to the time length {time}"
        )
    if len(_edges_that_held) > 64:
        _edges_that_held.clear()
    _edges_that_held[id(cu_seqlens)] = (weakref.ref(cu_seqlens), cu_seqlens._version, time)


def _edges_held(cu_seqlens: Tensor, time: int) -> bool:
    """Whether these very values were found good: a look makes a GPU wait, and all layers share one tensor."""
    seen = _edges_that_held.get(id(cu_seqlens))
    return seen is not None and (seen[0]() is cu_seqlens) and seen[1:] == (cu_seqlens._version, time)


def checked_scale(op: str, scale: float | None, key_dim: int) -> float:
    """`scale`, or 1 / sqrt(key_dim) where it is None. It multiplies q only. Raises ConfigError for no finite number."""
    if scale is None:
        return key_dim**-0.5
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ConfigError(f"{op}: scale = {scale!r} is not allowed; give a finite number, or None for K ** -0.5")
    return float(scale)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where an input is fp64, else fp32: no recurrence runs in less."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is to record this call."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def one_token(cu_seqlens: Tensor | None, q: Tensor, *others: Tensor | None) -> bool:
    """Whether the call is a single token per batch row without gradients, as in decoding."""
    return q.shape[1] == 1 and cu_seqlens is None and not needs_grad(q, *others)


def spread_heads(x: Tensor, value_heads: int, dim: int) -> Tensor:
    """Repeat the heads in `dim` so that value head h stands beside q/k head h // (value heads / heads)."""
    group = value_heads // x.shape[dim]
    return x if group == 1 else x.repeat_interleave(group, dim)


def in_rows(value_heads: int, *vectors: Tensor) -> list[Tensor]:
    """[B, T, heads, D] -> [B, T, HV, 1, D] in fp64: row vectors, so that a recurrence reads as in a paper."""
    return [spread_heads(x.double(), value_heads, 2).unsqueeze(-2) for x in vectors]


def by_sequence(
    recur: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    states: Sequence[Tensor],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """recur(*tensors, *states) -> (y, *states), once per packed sequence, or once where nothing is packed."""
    if cu_seqlens is None:
        return recur(*tensors, *states)
    parts = [
        recur(*(x[:, a:b] for x in tensors), *(s[n : n + 1] for s in states))
        for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))
    ]
    y, *ends = zip(*parts)
    return torch.cat(y, 1), *(torch.cat(s) for s in ends)
