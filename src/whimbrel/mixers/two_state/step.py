"""One token of RLA or RDN, for decoding: plain PyTorch, or one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.mixers.two_state.rule import Rule, both_states
from whimbrel.scan.base import Out, State
from whimbrel.scan.common import compute_dtype, spread_heads
from whimbrel.scan.one_state import step_in_kernel


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    rule: Rule,
    delta: bool,
    state: State | None,
    out: State | None = None,
    kernel: bool | None = None,
) -> Out:
    """One token [B, 1, ...]: both states are read once at k and q, and written once.

    out: where to write the states, which is then also the state returned; it may be `state` itself. None: new tensors.
    kernel: as `asked` in `step_in_kernel`.
    """
    if step_in_kernel(kernel, q, k, v, log_decay, beta, gamma, *(state or ())):
        from whimbrel.scan.kernels.step import step as run

        base, residual = state or (None, None)
        y, base, residual = run(
            q, k, v, log_decay, beta, gamma, base=base, residual=residual, delta=delta, out=out, **rule._asdict()
        )
        return Out(y, State(base, residual))
    dtype = compute_dtype(q, log_decay, beta, gamma, *(state or ()))
    heads = v.shape[2]
    q_, k_ = (spread_heads(x[:, 0].to(dtype), heads, 1) for x in (q, k))
    v_, log_alpha, beta_, gamma_ = (
        x[:, 0].to(dtype) for x in (v, log_decay[..., None], beta[..., None], gamma[..., None])
    )
    with torch.autocast(q.device.type, enabled=False):
        alpha, q_ = log_alpha.exp(), q_ * rule.scale
        base, residual = both_states(state, q, v, None, dtype)
        probes = torch.stack((k_, q_), -2)
        p, base_read = (probes @ base).unbind(-2)
        p_residual, residual_read = (probes @ residual).unbind(-2)
        u = beta_ * (v_ - alpha * p if delta else v_)
        r = v_ - (alpha * p if rule.decayed else p)
        if rule.clip is not None:
            r = r.clamp(-rule.clip, rule.clip)
        w = gamma_ * (r - alpha * p_residual if delta else r)
        correction = alpha * residual_read + (q_ * k_).sum(-1, keepdim=True) * w
        y = alpha * base_read + gamma_ * correction if rule.gated else base_read + correction
        base, residual = (s * alpha[..., None] + k_[..., None] * x[..., None, :] for s, x in ((base, u), (residual, w)))
    if out is not None:
        assert out.residual is not None
        base, residual = out.base.copy_(base), out.residual.copy_(residual)
    return Out(y[:, None].to(v.dtype), State(base, residual))
