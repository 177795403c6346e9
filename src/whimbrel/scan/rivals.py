"""Other people's kernels, and the paper's two passes made of them: what the recurrences here are timed against.

Nothing but benchmarks imports this. Every function takes tensors as `whimbrel.mixers.rdn.rdn` does and gives y alone;
its package is loaded at the first call, which raises UnsupportedError where the package is missing.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from whimbrel.errors import UnsupportedError
from whimbrel.scan.common import compute_dtype

Scan = Callable[..., Tensor]
"""scan(q, k, v, log_decay, beta) -> y: one pass over a single state, read after each write by q / sqrt(K)."""

CLIP = 1.0
"""Bound of the residual in the two passes, the paper's."""


def fla_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule of flash-linear-attention, in its own Triton kernels."""
    return _fla().delta(q, k, v, log_decay, beta)[0]


def fla_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Simple gated linear attention of flash-linear-attention, whose beta is 1."""
    return _fla().decay(q, k, v, log_decay)[0]


def fla_delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, states: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """One token of flash-linear-attention's gated delta rule: (y, state after)."""
    return _fla().step(q, k, v, g=log_decay, beta=beta, initial_state=states[0], output_final_state=True)


def flash_qla_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule of FlashQLA (TileLang), for K = V = 128."""
    return _flash_qla()(q, k, v, log_decay, beta)[0]


def cudnn_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention by cuDNN, through torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return y.transpose(1, 2)


def rdn_by_fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """RDN as the paper built it: two passes of flash-linear-attention's delta rule, the first giving the residual.

    What that kernel writes is u = beta (v - alpha S_(t-1) k). So S_(t-1) k = (v - u / beta) / alpha, and the read
    before the write is the read after it less (q k) u. Both are exact, and lose digits at small alpha.
    """
    read, written = _FlaDelta.apply(q, k, v, log_decay, beta)
    read, residual = _apart(read, written, q, k, v, log_decay, beta)
    return _joined(read, fla_delta(q, k, residual, log_decay, gamma), gamma)


def rdn_by_flash_qla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """RDN of passes of FlashQLA's delta rule, as `by_shifts`."""
    return by_shifts(flash_qla_delta, q, k, v, log_decay, beta, gamma)


def rla_by_fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """RLA of passes of flash-linear-attention's simple gated linear attention, as `by_shifts`."""

    def scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        return fla_decay(q, k, v * beta[..., None].to(v.dtype), log_decay)

    return by_shifts(scan, q, k, v, log_decay, beta, gamma)


def by_shifts(scan: Scan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """RLA or RDN of a base operator whose inside cannot be reached: two reads of S, one of R.

    A read after the write of token t - 1 with the query of token t is the read S_(t-1) q_t before the write of t. So
    queries that stand one token early give the base, and keys in their place what the residual is taken against.
    """
    base = partial(scan, k=k, v=v, log_decay=log_decay, beta=beta)
    residual = _residual(v, base(q=_early(k)), k.shape[-1] ** 0.5)
    read = _late_and_decayed(base(q=_early(q)), log_decay)
    return _joined(read, scan(q, k, residual, log_decay, gamma), gamma)


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in one kernel on CUDA: rivals should not pay for the glue that a kernel of their own would hold."""
    compiled = cache(lambda: torch.compile(function, dynamic=True))
    return lambda *args: (compiled() if args[0].is_cuda else function)(*args)


@_fused
def _apart(
    read: Tensor, written: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The read before the write, and the clipped residual."""
    wide = compute_dtype(q)
    u, own = written.to(wide), (q.to(wide) * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    seen = (v - u / beta[..., None]) * torch.exp(-log_decay)[..., None]
    return read - own * u, (v - seen).clamp(-CLIP, CLIP).to(v.dtype)


@_fused
def _residual(v: Tensor, seen_early: Tensor, unscale: float) -> Tensor:
    seen = _late(seen_early).to(compute_dtype(v)) * unscale
    return (v - seen).clamp(-CLIP, CLIP).to(v.dtype)


@_fused
def _late_and_decayed(read: Tensor, log_decay: Tensor) -> Tensor:
    return _late(read) * log_decay.exp()[..., None]


@_fused
def _joined(read: Tensor, correction: Tensor, gamma: Tensor) -> Tensor:
    return (read + gamma[..., None] * correction).to(correction.dtype)


def _early(x: Tensor) -> Tensor:
    """Token t of x [B, T, H, D] at place t - 1, zeros at the last."""
    return F.pad(x[:, 1:], (0, 0, 0, 0, 0, 1))


def _late(x: Tensor) -> Tensor:
    """Token t of x [B, T, H, D] at place t + 1, zeros at the first."""
    return F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0))


class _FlaDelta(torch.autograd.Function):
    """flash-linear-attention's delta rule that also gives what it writes, [B, T, H, V], with a gradient into both."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        fla, scale = _fla(), q.shape[-1] ** -0.5
        g = fla.cumsum(log_decay, chunk_size=64, scale=fla.per_ln2)
        w, u, inverse = fla.inside(k=k, v=v, g=g, beta=beta, chunk_size=64)
        h, written, _ = fla.states(k=k, w=w, u=u, g=g, chunk_size=64)
        y = fla.read(q=q, k=k, v=written, h=h, g=g, scale=scale, chunk_size=64)
        ctx.save_for_backward(q, k, v, g, beta, inverse)
        ctx.scale = scale
        return y, written

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dwritten: Tensor) -> tuple[Tensor, ...]:  # pyrefly: ignore [bad-override]
        fla, (q, k, v, g, beta, inverse) = _fla(), ctx.saved_tensors
        dy, scale = dy.contiguous(), ctx.scale
        w, u = fla.rebuild(k=k, v=v, beta=beta, A=inverse, g=g)
        h, written, _ = fla.states(k=k, w=w, u=u, g=g, chunk_size=64)
        pull = fla.pull_inside(q=q, k=k, g=g, do=dy, scale=scale, chunk_size=64).add_(dwritten)
        dh, _, du = fla.pull_states(q=q, k=k, w=w, g=g, do=dy, dv=pull, scale=scale, chunk_size=64)
        dq, dk, dw, dg = fla.pull_read(
            q=q, k=k, v=written, w=w, g=g, h=h, dv=du, do=dy, dh=dh, scale=scale, chunk_size=64
        )
        dk_too, dv, dbeta, dg_too = fla.pull_solve(k=k, v=v, beta=beta, g=g, A=inverse, dw=dw, du=du)
        dlog = fla.cumsum(dg.add_(dg_too), chunk_size=64, reverse=True)
        return dq, dk.add_(dk_too), dv, dlog, dbeta


@cache
def _fla() -> SimpleNamespace:
    """What is used of flash-linear-attention 0.6.

    It hands work to FlashQLA and TileLang where those are installed; that is switched off, so that each rival is timed
    by itself. On Hopper with Triton 3.4 to 3.7.0 it refuses its gated backward, whose key gradient is wrong there (its
    issue 640); the work is that of the right one, so the refusal is lifted, for timing alone.
    """
    os.environ.update(FLA_FLASH_QLA="0", FLA_TILELANG="0")
    read = _load("fla.ops.common.chunk_o", "fla-core==0.6.0 einops")
    read.TRITON_ABOVE_3_7_1 = True
    rule = _load("fla.ops.gated_delta_rule.chunk", "fla-core==0.6.0 einops")
    return SimpleNamespace(
        delta=rule.chunk_gated_delta_rule,
        decay=_load("fla.ops.simple_gla.chunk", "fla-core==0.6.0 einops").chunk_simple_gla,
        step=_load("fla.ops.gated_delta_rule.fused_recurrent", "fla-core==0.6.0").fused_recurrent_gated_delta_rule,
        per_ln2=rule.RCP_LN2,
        cumsum=rule.chunk_local_cumsum,
        inside=rule.chunk_gated_delta_rule_fwd_intra,
        states=rule.chunk_gated_delta_rule_fwd_h,
        read=rule.chunk_fwd_o,
        rebuild=rule.recompute_w_u_fwd,
        pull_inside=rule.chunk_bwd_dv_local,
        pull_states=rule.chunk_gated_delta_rule_bwd_dhu,
        pull_read=rule.chunk_bwd_dqkwg,
        pull_solve=rule.prepare_wy_repr_bwd,
    )


@cache
def _flash_qla() -> Callable[..., Any]:
    return _load("flash_qla", "flash-qla==0.1.3").chunk_gated_delta_rule


def _load(module: str, packages: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{error.name} is not installed; pip install {packages}") from error
