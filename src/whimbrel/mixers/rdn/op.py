"""The functions `rdn` and `rdn_step`; checks and the choice of code are in `mixers/two_state`."""

from __future__ import annotations

from torch import Tensor

from whimbrel.mixers.rdn.reference import recur
from whimbrel.mixers.two_state.op import run, run_step
from whimbrel.scan.base import Out, State


def rdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    clip: float | None = 1.0,
    scale: float | None = None,
    combine: str = "gated",
    residual: str = "undecayed",
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
    recompute: int = 0,
    impl: str = "auto",
) -> Out:
    """Residual Delta Net: a state S, and a second state R that is fitted to what S leaves over.

    For every token, with alpha = exp(log_decay):

        r_t = clip(v_t - S_(t-1) k_t)                     alpha_t S_(t-1) k_t with residual="decayed"
        S_t = alpha_t S_(t-1) (I - beta_t  k_t k_t^T) + beta_t  v_t k_t^T
        R_t = alpha_t R_(t-1) (I - gamma_t k_t k_t^T) + gamma_t r_t k_t^T
        y_t = alpha_t S_(t-1) q_t + gamma_t R_t q_t       S_(t-1) q_t + R_t q_t with combine="sum"

    q, k: [B, T, H, K]; k should have unit length. Value head h goes with q/k head h // (HV / H).
    v: [B, T, HV, V], HV a multiple of H. q, k and v have one floating dtype, which y gets too.
    log_decay, beta, gamma: [B, T, HV]; log_decay is a natural logarithm, at most 0; beta and gamma are rates in [0, 1].
    clip: bound on the elements of r, None for no bound.
    scale: factor on q, None for K ** -0.5.
    combine: "gated" (the paper's) or "sum" (its table 5).
    residual: "undecayed" (the paper's) or "decayed".
    state: State(base, residual), each [N, HV, K, V], from an earlier call; None starts at zero.
    cu_seqlens: int32 or int64 [N + 1], edges of N sequences packed along T; B is 1 then. Without it N is B.
    recompute: 0 keeps what the backward needs; a number of parts keeps the inputs and the states between parts, and
        runs each part again in the backward: less memory, more time, the same result up to rounding.
    impl: "reference" (token by token, fp64), "chunked" (PyTorch, any device), "triton" (kernels on CUDA, computing in
        fp32 from bf16, fp16 or fp32, K and V up to 256), or "auto", which takes the kernels where they were measured:
        on Hopper, in bf16 or fp16, K and V up to 128.

    Returns Out(y [B, T, HV, V], State) with states in fp32 (fp64 for fp64 inputs). Chunked results are
    differentiable once in all tensors, the states included.

    Raises ConfigError where the arguments do not fit together, UnsupportedError for an `impl` this build lacks.
    Source: arXiv 2509.25223; chunkwise form and backward are derived in the README of `whimbrel.scan`.
    """
    return run(
        "rdn",
        recur,
        q,
        k,
        v,
        log_decay,
        beta,
        gamma,
        delta=True,
        clip=clip,
        scale=scale,
        combine=combine,
        residual=residual,
        state=state,
        cu_seqlens=cu_seqlens,
        recompute=recompute,
        impl=impl,
    )


def rdn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    clip: float | None = 1.0,
    scale: float | None = None,
    combine: str = "gated",
    residual: str = "undecayed",
    state: State | None = None,
    out: State | None = None,
) -> Out:
    """One token of `rdn`, for decoding: the arguments of `rdn` without their time axis.

    q, k: [B, H, K]; v: [B, HV, V]; log_decay, beta, gamma: [B, HV]. Returns Out(y [B, HV, V], State); options, dtypes
    and errors as for `rdn`. Ordinary autograd differentiates it.
    out: where the states are written, which is then the state returned: contiguous, fp32 (fp64 for fp64 inputs), memory
        of its own or `state` itself. For decoding in a CUDA graph; not differentiable. None: new tensors.
    On CUDA with Triton and without gradients one kernel reads and writes both states once.
    """
    return run_step(
        "rdn_step",
        q,
        k,
        v,
        log_decay,
        beta,
        gamma,
        delta=True,
        clip=clip,
        scale=scale,
        combine=combine,
        residual=residual,
        state=state,
        out=out,
    )
