"""One token of a recurrence in one launch, as in decoding: the states are read once and written once.

A program holds a block of value columns of one head's states in registers. A column needs no other column, so what is
read is written back by the program that read it, and the states may be updated in place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.launches import launch

_ROWS = ["q", "k", "v", "log_decay", "beta", "gamma", "y"]
_STRIDES = ["q_row", "k_row", "v_row", "log_decay_row", "beta_row", "gamma_row"]


# Rows are a few bytes beside the states: their alignment and strides are not worth a compilation of their own.
@triton.jit(do_not_specialize=[*_ROWS, *_STRIDES, "heads", "group"])
def _step(
    q,
    k,
    v,
    log_decay,
    beta,
    gamma,
    base,
    residual,
    y,
    new_base,
    new_residual,
    q_row,
    k_row,
    v_row,
    log_decay_row,
    beta_row,
    gamma_row,
    heads,
    group,
    scale,
    clip,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    FROM: tl.constexpr,
    DELTA: tl.constexpr,
    TWO: tl.constexpr,
    GATED: tl.constexpr,
    DECAYED: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Rows begin at their `_row` stride times the batch index; heads and elements in them lie close together."""
    NV: tl.constexpr = (V + BV - 1) // BV
    head = tl.program_id(0) // NV
    row, hv = (head // heads).to(tl.int64), head % heads
    kc = tl.arange(0, BK)
    vc = tl.program_id(0) % NV * BV + tl.arange(0, BV)
    some = vc < V
    inside = (kc < K)[:, None] & some[None, :]
    place = head.to(tl.int64) * (K * V) + kc[:, None] * V + vc[None, :]
    # Both states are asked for before either is used: so many bytes under way hide the memory's latency.
    b_s = tl.zeros([BK, BV], tl.float32)
    b_r = tl.zeros([BK, BV], tl.float32)
    if FROM:
        b_s = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
        if TWO:
            b_r = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    keys = hv // group * K + kc
    b_q = tl.load(q + row * q_row + keys, mask=kc < K, other=0.0).to(tl.float32) * scale
    b_k = tl.load(k + row * k_row + keys, mask=kc < K, other=0.0).to(tl.float32)
    b_v = tl.load(v + row * v_row + hv * V + vc, mask=some, other=0.0).to(tl.float32)
    alpha = tl.exp(tl.load(log_decay + row * log_decay_row + hv).to(tl.float32))
    b_beta = tl.load(beta + row * beta_row + hv).to(tl.float32)
    b_gamma = tl.load(gamma + row * gamma_row + hv).to(tl.float32)
    own = tl.sum(b_q * b_k)

    seen = tl.sum(b_s * b_k[:, None], axis=0)
    b_y = tl.sum(b_s * b_q[:, None], axis=0)
    write = b_beta * (b_v - alpha * seen) if DELTA else b_beta * b_v
    tl.store(new_base + place, alpha * b_s + b_k[:, None] * write[None, :], mask=inside)
    if TWO:
        left = b_v - alpha * seen if DECAYED else b_v - seen
        if CLIP:
            left = tl.clamp(left, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
        if DELTA:
            left = left - alpha * tl.sum(b_r * b_k[:, None], axis=0)
        write = b_gamma * left
        correction = alpha * tl.sum(b_r * b_q[:, None], axis=0) + own * write
        b_y = alpha * b_y + b_gamma * correction if GATED else b_y + correction
        tl.store(new_residual + place, alpha * b_r + b_k[:, None] * write[None, :], mask=inside)
    else:
        b_y = alpha * b_y + own * write
    tl.store(y + head.to(tl.int64) * V + vc, b_y.to(y.dtype.element_ty), mask=some)


@cache
def _sizes(key_dim: int, value_dim: int) -> tuple[int, dict[str, Any]]:
    """The number of blocks of value columns, and what is compiled into a program.

    32 columns fill a cache line of 128 bytes. A thread holds 32 numbers of each state, at any key dimension.
    """
    block_k, all_v = (1 << (dim - 1).bit_length() for dim in (key_dim, value_dim))
    block_v = min(32, all_v, max(1, 2**14 // block_k))
    warps = max(1, block_k * block_v // 1024)
    sizes = {"K": key_dim, "V": value_dim, "BK": block_k, "BV": block_v, "num_warps": warps, "num_stages": 1}
    return -(-value_dim // block_v), sizes


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor | None,
    base: Tensor | None,
    residual: Tensor | None,
    scale: float,
    clip: float | None,
    gated: bool,
    decayed: bool,
    delta: bool,
    y: Tensor,
    new_base: Tensor,
    new_residual: Tensor | None,
) -> None:
    batch, _, heads, value_dim = v.shape
    key_dim = q.shape[3]
    blocks, sizes = _sizes(key_dim, value_dim)
    flags: dict[str, Any] = {
        "FROM": base is not None,
        "DELTA": delta,
        "TWO": gamma is not None,
        "GATED": gated,
        "DECAYED": decayed,
        "CLIP": clip is not None,
    }
    gamma = beta if gamma is None else gamma
    launch(
        _step,
        batch * heads * blocks,
        q,
        k,
        v,
        log_decay,
        beta,
        gamma,
        new_base if base is None else base,
        new_residual if residual is None else residual,
        y,
        new_base,
        new_residual,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        log_decay.stride(0),
        beta.stride(0),
        gamma.stride(0),
        heads,
        heads // q.shape[2],
        scale,
        0.0 if clip is None else clip,
        **sizes,
        **flags,
    )
    # The dispatcher does not do this for an operator that is registered by hand.
    torch.autograd.graph.increment_version([x for x in (new_base, new_residual) if x is not None])


# By hand, since torch.library.custom_op costs about 20 times as much for each call, more than the kernel takes.
_library = torch.library.Library("whimbrel", "FRAGMENT")
_library.define(
    "scan_step(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? gamma, "
    "Tensor? base, Tensor? residual, float scale, float? clip, bool gated, bool decayed, bool delta, "
    "Tensor(a!) y, Tensor(b!) new_base, Tensor(c!)? new_residual) -> ()"
)
for _device in ("CPU", "CUDA"):
    _library.impl("scan_step", _launch, _device)
torch.library.register_fake("whimbrel::scan_step", lambda *_: None, lib=_library)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor | None = None,
    *,
    base: Tensor | None,
    residual: Tensor | None = None,
    scale: float,
    clip: float | None = None,
    gated: bool = True,
    decayed: bool = False,
    delta: bool,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, base, residual) after one token; without `gamma` there is one state, which is read after its own write.

    q, k [B, 1, H, K], v [B, 1, HV, V], gates [B, 1, HV], states [B, HV, K, V] of any float dtypes but fp64, computed in
    fp32; None for zeros.
    scale: factor on q. clip: bound on the second state's target; gated: the two reads are weighted by alpha and gamma;
    decayed: the target is what the decayed base leaves over; delta: the delta rule writes, else values are added.
    out: contiguous fp32 states to write to, which may be `base` and `residual` themselves; None for new ones.
    """
    if out is None:
        shape = (*v.shape[:1], v.shape[2], q.shape[3], v.shape[3])
        new = torch.empty(shape, dtype=torch.float32, device=v.device)
        out = new, None if gamma is None else torch.empty_like(new)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    rows = (None if x is None else _close(x) for x in (q, k, v, log_decay, beta, gamma))
    states = (None if x is None else x.contiguous() for x in (base, residual))
    torch.ops.whimbrel.scan_step.default(*rows, *states, scale, clip, gated, decayed, delta, y, *out)
    return y, *out


def _close(x: Tensor) -> Tensor:
    """`x` [B, 1, ...], copied unless what follows the batch lies close together, as in a part of a projection."""
    close = (1,) if x.dim() == 3 else (x.shape[3], 1)
    return x if x.stride()[2:] == close else x.contiguous()
