"""The function `decay_scan`; checks and the choice of code are in `one_state`."""

from __future__ import annotations

from torch import Tensor

from whimbrel.scan.base import Out
from whimbrel.scan.decay.reference import recur
from whimbrel.scan.one_state import run


def decay_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Out:
    """Scan with a scalar decay. For every token, with alpha = exp(log_decay):

        S_t = alpha_t S_(t-1) + beta_t v_t k_t^T
        y_t = S_t q_t

    q, k: [B, T, H, K]. Value head h goes with q/k head h // (HV / H).
    v: [B, T, HV, V], HV a multiple of H. q, k and v have one floating dtype, which y gets too.
    log_decay, beta: [B, T, HV]; log_decay is a natural logarithm, at most 0; beta is a rate in [0, 1].
    scale: factor on q, None for K ** -0.5.
    state: [N, HV, K, V] from an earlier call; None starts at zero.
    cu_seqlens: int32 or int64 [N + 1], edges of N sequences packed along T; B is 1 then. Without it N is B.
    impl: "reference" (token by token, fp64), "chunked" (PyTorch, any device), "triton" (kernels on CUDA, computing in
        fp32 from bf16, fp16 or fp32, K and V up to 256), or "auto", which takes the kernels where they were measured:
        on Hopper, in bf16 or fp16, K and V up to 128.

    Returns Out(y [B, T, HV, V], state) with the state in fp32 (fp64 for fp64 inputs). Chunked results are
    differentiable once in all tensors, the state included.

    Raises ConfigError where the arguments do not fit together, UnsupportedError for an `impl` this build lacks.
    This is gated linear attention with one decay per head (Mamba-2, arXiv 2405.21060); beta multiplies what is written.
    """
    return run(
        "decay_scan",
        recur,
        q,
        k,
        v,
        log_decay,
        beta,
        delta=False,
        scale=scale,
        state=state,
        cu_seqlens=cu_seqlens,
        impl=impl,
    )
