"""FlexPrefill as one call."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from whimbrel.sparse.apply import Out, Target, apply_selector
from whimbrel.sparse.flex_prefill.config import FlexPrefillConfig


def flex_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    coverage: float = 0.95,
    row_share: float = 0.95,
    mode: Literal["corrected", "official"] = "corrected",
    tau: float = 0.1,
    min_budget: int = 1024,
    max_budget: int | None = None,
    block_size: int = 128,
    scale: float | None = None,
    impl: str = "auto",
    audit_rows: int = 0,
    repair: bool = False,
) -> Out:
    """Causal attention over the blocks that FlexPrefill selects (arXiv 2502.20766).

    Args:
        q: [B, Tq, H, D], the last Tq positions of the prompt; `mode="official"` needs Tq == Tk.
        k: [B, Tk, Hkv, D] with H a multiple of Hkv.
        v: [B, Tk, Hkv, Dv].
        coverage, row_share, mode, tau, min_budget, max_budget, block_size: see FlexPrefillConfig; budgets are tokens.
        scale: factor on q . k; 1 / sqrt(D) by default. The official selection ignores it, its attention does
            not.
        impl: see `whimbrel.attend.attend`.
        audit_rows: queries whose coverage is measured, see `apply_selector`.
        repair: whether query blocks in which audited queries miss `coverage` attend to more blocks in a second pass.

    Returns:
        Out(y [B, Tq, H, Dv], plan, audit, repaired), with density [B, H].

    Raises:
        ConfigError: a setting or a shape is not allowed.
        UnsupportedError: `mode="official"` with Tq < Tk.
    """
    config = FlexPrefillConfig(
        coverage=coverage,
        row_share=row_share,
        mode=mode,
        tau=tau,
        min_budget=min_budget,
        max_budget=max_budget,
        block_size=block_size,
    )
    target = Target(coverage, row_share) if repair else None
    return apply_selector(q, k, v, config.build(), scale=scale, impl=impl, audit_rows=audit_rows, repair=target)
