"""A selector at work: plan, attention over the plan, and what it cost."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from whimbrel.attend.op import attend
from whimbrel.attend.plan import Plan
from whimbrel.attend.shapes import check_qkv


class Selector(Protocol):
    """Chooses key blocks: what `build()` of a selector's config returns."""

    def __call__(self, q: Tensor, k: Tensor, /, *, scale: float | None = None) -> Plan:
        """The plan for q [B, Tq, H, D], the last Tq positions, and k [B, Tk, Hkv, D], heads not repeated.

        `scale` is the factor on q . k, 1 / sqrt(D) by default.
        """
        ...


class Out(NamedTuple):
    """Result of sparse prefill."""

    y: Tensor
    """[B, Tq, H, Dv]: the attention output, in the dtype of q."""
    plan: Plan
    """Key blocks that were attended to."""
    density: Tensor
    """fp64 [B, H]: token pairs attended to, as a share of all causal token pairs."""


def apply_selector(
    q: Tensor, k: Tensor, v: Tensor, selector: Selector, *, scale: float | None = None, impl: str = "auto"
) -> Out:
    """Attention of q [B, Tq, H, D] over the blocks of k [B, Tk, Hkv, D] and v [B, Tk, Hkv, Dv] that
    `selector` picks.

    `impl` is that of `attend`. Raises ConfigError where q, k and v do not fit together, and what the selector
    raises.
    """
    check_qkv(q, k, v)
    plan = selector(q, k, scale=scale)
    return Out(attend(q, k, v, plan, scale=scale, impl=impl).y, plan, plan.density())
