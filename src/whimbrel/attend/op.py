"""Attention over a block plan, and the merge of attention over disjoint keys."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.attend.blocks import attend_blocks
from whimbrel.attend.plan import Plan
from whimbrel.attend.reference import attend_reference
from whimbrel.attend.shapes import Shape, check_qkv, default_scale
from whimbrel.errors import ConfigError, UnsupportedError, nearest

_IMPLS = {"reference": attend_reference, "blocks": attend_blocks}
_NAMES = ("auto", *_IMPLS, "triton")


class Out(NamedTuple):
    """Result of attention over some of the keys."""

    y: Tensor
    """[B, Tq, H, Dv]: softmax-weighted values, in the dtype of q."""
    lse: Tensor
    """[B, Tq, H], fp32: natural logarithm of the sum of exp(logit) over the keys attended to."""


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None, impl: str = "auto") -> Out:
    """Causal softmax attention over the key blocks that `plan` selects.

    Args:
        q: [B, Tq, H, D], the last Tq positions of the sequence.
        k: [B, Tk, Hkv, D] with H a multiple of Hkv; query head h reads key head h // (H / Hkv).
        v: [B, Tk, Hkv, Dv].
        plan: for batch B, H heads, q_len Tq and k_len Tk.
        scale: factor on q . k; 1 / sqrt(D) by default.
        impl: "blocks" computes the selected blocks in PyTorch on any device; "reference" is a masked softmax
            in fp64 for small inputs; "auto" chooses and says so once (logger `whimbrel.attend`, level INFO).

    Returns:
        Out(y, lse). Products and sums are taken in fp32, for fp64 inputs in fp64. `y` and `lse` are
        differentiable in q, k and v, though "blocks" then keeps all computed logits: there is no backward of
        its own.

    Raises:
        ConfigError: tensors or plan do not fit together, or `impl` is unknown.
        UnsupportedError: `impl` is known but cannot run here.
    """
    shape = check_qkv(q, k, v)
    check_fit(plan, shape, q.device)
    if impl == "auto":
        impl = _auto()
    elif impl == "triton":
        raise UnsupportedError("attend: impl='triton' is not built yet; use impl='blocks', or impl='reference' in fp64")
    elif impl not in _IMPLS:
        raise ConfigError(
            f"attend: impl = '{impl}' is not known{nearest(impl, _NAMES)}; use one of {', '.join(_NAMES)}"
        )
    y, lse = _IMPLS[impl](q, k, v, plan.check(), default_scale(shape.dim, scale))
    return Out(y.to(q.dtype).contiguous(), lse.float().contiguous())


@functools.cache
def _auto() -> str:
    logging.getLogger("whimbrel.attend").info("attend: impl='auto' runs 'blocks', the one fast path of this version")
    return "blocks"


def check_fit(plan: Plan, shape: Shape, device: torch.device) -> None:
    """Raise ConfigError unless `plan` was made for tensors of this shape on this device."""
    for name, planned, given in (
        ("batch", plan.batch, shape.batch),
        ("num_heads", plan.num_heads, shape.heads),
        ("q_len", plan.q_len, shape.q_len),
        ("k_len", plan.k_len, shape.k_len),
    ):
        if planned != given:
            raise ConfigError(f"plan.{name} = {planned} does not fit q and k, which have {given}; plan these tensors")
    if plan.indices.device != device or plan.offsets.device != device:
        raise ConfigError(f"plan lies on {plan.indices.device} but q on {device}; bring them to one device")


def merge_parts(parts: Sequence[Out]) -> Out:
    """Attention over the union of disjoint key sets from the attention over each: exact up to rounding.

    Each part has the same shapes. A query that saw no key in a part has lse -inf there, and that part's y is
    not looked at. Raises ConfigError for no part, or for parts of different shapes.
    """
    if not parts:
        raise ConfigError("merge_parts got no part; give at least one Out(y, lse)")
    shapes = {(tuple(part.y.shape), tuple(part.lse.shape)) for part in parts}
    if len(shapes) > 1 or parts[0].y.shape[:-1] != parts[0].lse.shape:
        raise ConfigError(
            f"merge_parts got parts of shapes {sorted(shapes)}; give y [B, T, H, D] and lse [B, T, H], all equal"
        )
    lses = torch.stack([part.lse for part in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().masked_fill(lses == -torch.inf, 0).unsqueeze(-1)
    ys = torch.stack([part.y for part in parts])
    y = (weights * ys.masked_fill(weights == 0, 0)).sum(0)
    return Out(y.to(parts[0].y.dtype), lse)
