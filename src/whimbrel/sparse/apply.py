"""A selector at work: plan, attention over the plan, and what it cost."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from whimbrel.attend.dense import fastest_dense
from whimbrel.attend.op import attend, merge_parts
from whimbrel.attend.plan import Plan
from whimbrel.attend.shapes import check_qkv
from whimbrel.sparse.blocks import plan_of
from whimbrel.sparse.coverage import Audit, bounds, coverage, lacking


class Selector(Protocol):
    """Chooses key blocks: what `build()` of a selector's config returns."""

    def __call__(self, q: Tensor, k: Tensor, /, *, scale: float | None = None) -> Plan:
        """The plan for q [B, Tq, H, D], the last Tq positions, and k [B, Tk, Hkv, D], heads not repeated.

        `scale` is the factor on q . k, 1 / sqrt(D) by default.
        """
        ...


class Target(NamedTuple):
    """What `repair` holds every query block to."""

    coverage: float = 0.95
    """Share of its attention mass that a query keeps."""
    row_share: float = 0.95
    """Share of the audited queries of a block that must keep it."""
    audit_rows: int = 16
    """Queries of a block that are audited, exactly."""


class Out(NamedTuple):
    """Result of sparse prefill."""

    y: Tensor
    """[B, Tq, H, Dv]: the attention output, in the dtype of q."""
    plan: Plan
    """Key blocks that were attended to, repaired ones among them."""
    audit: Audit | None = None
    """What the plan keeps, where it was asked for."""
    repaired: float = 0.0
    """Share of the query blocks, over batch and heads, that a repair gave more key blocks."""

    @property
    def density(self) -> Tensor:
        """fp64 [B, H]: token pairs attended to, as a share of all causal token pairs."""
        return self.plan.density()


def apply_selector(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: Selector,
    *,
    scale: float | None = None,
    impl: str = "auto",
    dense_below: int = 0,
    audit_rows: int = 0,
    repair: Target | None = None,
) -> Out:
    """Attention of q [B, Tq, H, D] over the blocks of k [B, Tk, Hkv, D] and v [B, Tk, Hkv, Dv] that
    `selector` picks.

    Args:
        scale, impl: as for `attend`.
        dense_below: calls with fewer keys attend to all blocks, and nothing is selected;
            `whimbrel.sparse.crossover.sparse_from` has the measured length. Whole prompts go to torch's attention then
            if `impl` is "auto" and nothing is audited. A prompt in chunks is dense in its first ones, so leave 0 where
            chunks are to equal the whole.
        audit_rows: queries, evenly spaced over the call, whose coverage `Out.audit` holds: exact, and as proved.
        repair: query blocks whose audited queries miss this target attend to more blocks in a second pass, merged by
            log-sum-exp. Waits for the device, once for every query block, and computes `Target.audit_rows` dense rows
            for each.

    Raises ConfigError where q, k and v do not fit together, and what the selector raises.
    """
    shape = check_qkv(q, k, v)
    if shape.k_len < dense_below:
        plan = _dense_plan(shape.batch, shape.heads, shape.q_len, shape.k_len, q.device)
        if impl == "auto" and not audit_rows and shape.q_len == shape.k_len and q.shape[-1] == v.shape[-1]:
            return Out(fastest_dense(q, k, v, scale=scale), plan)
    else:
        plan = selector(q, k, scale=scale)
    found, repaired = attend(q, k, v, plan, scale=scale, impl=impl), 0.0
    part = None if repair is None else lacking(q, k, plan, **repair._asdict(), scale=scale)
    if part is not None:
        found = merge_parts([found, attend(q, k, v, part, scale=scale, impl=impl)])
        repaired = float((part.counts() > 0).double().mean())
        plan = plan_of(plan.to_mask() | part.to_mask(), plan.grid)
    audit = audit_of(q, k, plan, found.lse, audit_rows, scale=scale) if audit_rows else None
    return Out(found.y, plan, audit, repaired)


def audit_of(q: Tensor, k: Tensor, plan: Plan, lse: Tensor, rows: int, *, scale: float | None = None) -> Audit:
    """What a plan keeps for so many queries, evenly spaced; lse [B, Tq, H] is that of attention over it."""
    at = torch.linspace(0, q.shape[1] - 1, min(rows, q.shape[1]), device=q.device).round().long()
    achieved = coverage(q, k, plan, scale=scale, rows=at)
    return Audit(at, achieved, bounds(q, k, plan, lse, scale=scale, rows=at).low)


@functools.lru_cache(maxsize=4)
def _dense_plan(batch: int, heads: int, q_len: int, k_len: int, device: torch.device) -> Plan:
    """All layers of a model ask for the same."""
    sizes = {"batch": batch, "num_heads": heads, "q_len": q_len, "k_len": k_len}
    return Plan.dense(block_size=128, device=device, **sizes)
