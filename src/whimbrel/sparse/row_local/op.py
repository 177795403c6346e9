"""Row-local sparse prefill as one call."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from whimbrel.sparse.apply import Out, Target, apply_selector
from whimbrel.sparse.row_local.config import RowLocalConfig


def row_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    coverage: float = 0.95,
    row_share: float = 0.95,
    estimate: Literal["sampled", "mean", "exact"] = "sampled",
    probe_rows: int | None = None,
    min_budget: int = 0,
    max_budget: int | None = None,
    block_size: int = 128,
    scale: float | None = None,
    impl: str = "auto",
    audit_rows: int = 0,
    repair: bool = False,
) -> Out:
    """Causal attention where each query block picks its key blocks from its own queries and earlier keys.

    Args:
        q: [B, Tq, H, D], the last Tq positions of the prompt.
        k: [B, Tk, Hkv, D] with H a multiple of Hkv.
        v: [B, Tk, Hkv, Dv].
        coverage, row_share, estimate, probe_rows, min_budget, max_budget, block_size: see RowLocalConfig; budgets
            are tokens.
        scale: factor on q . k; 1 / sqrt(D) by default.
        impl: what attends, see `whimbrel.attend.attend`; what chooses is `RowLocalConfig.impl`, here "auto".
        audit_rows: queries whose coverage is measured, see `apply_selector`.
        repair: whether query blocks in which audited queries miss `coverage` attend to more blocks in a second pass.

    Returns:
        Out(y [B, Tq, H, Dv], plan, audit, repaired), with density [B, H].

    Raises:
        ConfigError: a setting or a shape is not allowed.
    """
    config = RowLocalConfig(
        coverage=coverage,
        row_share=row_share,
        estimate=estimate,
        probe_rows=probe_rows,
        min_budget=min_budget,
        max_budget=max_budget,
        block_size=block_size,
    )
    target = Target(coverage, row_share) if repair else None
    return apply_selector(q, k, v, config.build(), scale=scale, impl=impl, audit_rows=audit_rows, repair=target)
