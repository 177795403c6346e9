"""Attention over a block plan, and the merge of attention over disjoint keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.attend import choice
from whimbrel.attend.blocks import attend_blocks
from whimbrel.attend.plan import Plan
from whimbrel.attend.reference import attend_reference
from whimbrel.attend.shapes import Shape, check_qkv, default_scale
from whimbrel.errors import ConfigError, UnsupportedError, nearest

_NAMES = ("auto", "reference", "blocks", "flex", "triton")


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
        impl: "triton" is our kernel for CUDA, forward only; "flex" torch's FlexAttention; "blocks" computes the
            selected blocks in PyTorch on any device; "reference" is a masked softmax in fp64 for small inputs;
            "auto" chooses and says so once (logger `whimbrel.attend`, level INFO).

    Returns:
        Out(y, lse). Sums are taken in fp32, for fp64 inputs in fp64. `y` and `lse` are differentiable in q, k and v
        except with "triton", though "blocks" then keeps all computed logits: there is no backward of its own.

    Raises:
        ConfigError: tensors or plan do not fit together, or `impl` is unknown.
        UnsupportedError: `impl` is known but cannot run here.
    """
    shape = check_qkv(q, k, v)
    check_fit(plan, shape, q.device)
    scale = default_scale(shape.dim, scale)
    impl = _chosen(impl, q, k, v, plan, scale)
    if impl == "triton":
        from whimbrel.attend.kernels.launch import attend_triton

        y, lse = attend_triton(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), [_trusted(plan)], scale)
        return Out(y.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2]))
    return _one(impl, q, k, v, plan, scale)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Plan], *, scale: float | None = None, impl: str = "auto"
) -> Out:
    """`attend` over sequences of any lengths that lie one behind the other, in one launch where `impl` is "triton".

    Args:
        q: [1, sum of the plans' q_len, H, D].
        k: [1, sum of the plans' k_len, Hkv, D]; v: [1, as k, Hkv, Dv].
        plans: one for each sequence, in order, each of batch 1 and all of one block size.
        scale, impl: as for `attend`.

    Returns and raises as `attend`; the sequences' queries lie one behind the other.
    """
    if not plans:
        raise ConfigError("attend_packed got no plan; give one for each sequence")
    for name, given, lengths in (
        ("q", q, [plan.q_len for plan in plans]),
        ("k", k, [plan.k_len for plan in plans]),
        ("v", v, [plan.k_len for plan in plans]),
    ):
        if given.dim() != 4 or given.shape[0] != 1 or given.shape[1] != sum(lengths):
            raise ConfigError(
                f"{name} has shape {tuple(given.shape)}; packed for these plans it is [1, {sum(lengths)}, heads, dim]"
            )
    if len({plan.block_size for plan in plans}) > 1:
        raise ConfigError(f"plans have block sizes {sorted({p.block_size for p in plans})}; give all the same")
    queries = q.split([plan.q_len for plan in plans], 1)
    keys, values = (x.split([plan.k_len for plan in plans], 1) for x in (k, v))
    for plan, *sequence in zip(plans, queries, keys, values):
        check_fit(plan, check_qkv(*sequence), q.device)
    scale = default_scale(q.shape[-1], scale)
    impl = _chosen(impl, q, k, v, plans[0], scale)
    if impl == "triton":
        from whimbrel.attend.kernels.launch import attend_triton

        y, lse = attend_triton(q[0], k[0], v[0], [_trusted(plan) for plan in plans], scale)
        return Out(y[None], lse[None])
    outs = [_one(impl, a, b, c, plan, scale) for a, b, c, plan in zip(queries, keys, values, plans)]
    return Out(torch.cat([out.y for out in outs], 1), torch.cat([out.lse for out in outs], 1))


def _one(impl: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Out:
    """One of the implementations that take a batch of equal lengths."""
    if impl == "flex":
        from whimbrel.attend.flex import attend_flex as run
    else:
        run = {"reference": attend_reference, "blocks": attend_blocks}[impl]
    y, lse = run(q, k, v, _trusted(plan), scale)
    return Out(y.to(q.dtype).contiguous(), lse.float().contiguous())


def _chosen(impl: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> str:
    if impl == "auto":
        return choice.auto(q, k, v, plan.block_size, scale)
    if impl not in _NAMES:
        raise ConfigError(
            f"attend: impl = '{impl}' is not known{nearest(impl, _NAMES)}; use one of {', '.join(_NAMES)}"
        )
    why = None
    if impl == "triton":
        why = choice.no_triton(q, k, v, plan.block_size, scale)
    elif impl == "flex":
        why = choice.no_flex(q, plan.block_size)
    if why is not None:
        raise UnsupportedError(f"attend: impl='{impl}' cannot run here: {why}; use impl='auto'")
    return impl


def _trusted(plan: Plan) -> Plan:
    """The plan, its contents checked unless it says where it comes from: a look at them makes a GPU wait."""
    return plan if plan.is_checked else plan.check()


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
