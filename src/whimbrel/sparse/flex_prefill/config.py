"""Options of FlexPrefill."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from whimbrel.config import SelectorConfig, require

if TYPE_CHECKING:
    from whimbrel.sparse.apply import Selector


@dataclass(frozen=True, kw_only=True)
class FlexPrefillConfig(SelectorConfig):
    """FlexPrefill (arXiv 2502.20766): the last queries of the prompt choose the blocks of all rows."""

    ROW_LOCAL: ClassVar[bool] = False
    """Whether a row's choice is the same for every suffix and every cut of the prompt on block borders."""

    coverage: float = 0.95
    """Share of the attention mass to keep, above 0 and up to 1; gamma of the paper."""
    row_share: float = 0.95
    """Share of the probe's queries that must keep the coverage, each by itself; above 0 and up to 1. `official` asks it
    of none."""
    mode: Literal["corrected", "official"] = "corrected"
    """`corrected`: what the paper states; `official`: what the authors' code selects, with its defects, to
    compare."""
    tau: float = 0.1
    """Square root of the Jensen-Shannon divergence (natural logarithm) below which a head counts as
    query-aware; 0 makes no head query-aware."""
    min_budget: int = 1024
    """Tokens each row keeps at least, rounded up to blocks; in `official` the verticals and the slashes,
    each."""
    max_budget: int | None = None
    """Tokens each row keeps at most, rounded up to blocks; a row cut by it can miss the coverage. None is no
    limit."""
    block_size: int = 128
    """Tokens of a block."""

    def __post_init__(self) -> None:
        require(0 < self.coverage <= 1, "flex_prefill.coverage", self.coverage, "a share above 0 and up to 1")
        require(0 < self.row_share <= 1, "flex_prefill.row_share", self.row_share, "a share above 0 and up to 1")
        modes = ("corrected", "official")
        require(self.mode in modes, "flex_prefill.mode", self.mode, " or ".join(map(repr, modes)))
        require(self.tau >= 0, "flex_prefill.tau", self.tau, "0 (no query-aware head) or a positive divergence")
        require(self.min_budget >= 0, "flex_prefill.min_budget", self.min_budget, "0 or more tokens")
        most = self.max_budget
        at_least = f"None or at least min_budget = {self.min_budget} tokens, and at least 1"
        require(most is None or most >= max(1, self.min_budget), "flex_prefill.max_budget", most, at_least)
        require(self.block_size > 0, "flex_prefill.block_size", self.block_size, "a positive number of tokens")

    def build(self) -> Selector:
        """The selector (q, k, *, scale) -> Plan."""
        from whimbrel.sparse.flex_prefill import corrected, official

        select = official.select if self.mode == "official" else partial(corrected.select, row_share=self.row_share)
        return partial(
            select,
            coverage=self.coverage,
            tau=self.tau,
            min_budget=self.min_budget,
            max_budget=self.max_budget,
            block_size=self.block_size,
        )
