"""A selector at work: plan, attention over the plan, and what it cost."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
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
) -> Out:
    """Attention of q [B, Tq, H, D] over the blocks of k [B, Tk, Hkv, D] and v [B, Tk, Hkv, Dv] that
    `selector` picks.

    `impl` is that of `attend`. Calls with fewer than `dense_below` keys attend to all blocks, and nothing is selected;
    `whimbrel.attend.choice.sparse_from` has the measured length. A prompt in chunks is then dense in its first ones, so
    leave 0 where chunks are to equal the whole. Raises ConfigError where q, k and v do not fit together, and what the
    selector raises.
    """
    shape = check_qkv(q, k, v)
    if shape.k_len < dense_below:
        plan = _dense_plan(shape.batch, shape.heads, shape.q_len, shape.k_len, q.device)
    else:
        plan = selector(q, k, scale=scale)
    return Out(attend(q, k, v, plan, scale=scale, impl=impl).y, plan)


@functools.lru_cache(maxsize=4)
def _dense_plan(batch: int, heads: int, q_len: int, k_len: int, device: torch.device) -> Plan:
    """All layers of a model ask for the same."""
    sizes = {"batch": batch, "num_heads": heads, "q_len": q_len, "k_len": k_len}
    return Plan.dense(block_size=128, device=device, **sizes)
