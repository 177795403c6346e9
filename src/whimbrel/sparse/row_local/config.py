"""Options of row-local selection."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from whimbrel.config import SelectorConfig, check_literals, require

if TYPE_CHECKING:
    from whimbrel.sparse.apply import Selector


@dataclass(frozen=True, kw_only=True)
class RowLocalConfig(SelectorConfig):
    """Each query block is chosen from its own queries and earlier keys only."""

    ROW_LOCAL: ClassVar[bool] = True
    """Whether a row's choice is the same for every suffix and every cut of the prompt on block borders."""

    coverage: float = 0.95
    """Share of its attention mass that a query keeps, as estimated; above 0 and up to 1."""
    row_share: float = 0.95
    """Share of the looked-at queries of a block that must keep the coverage, each by itself; above 0 and up to 1. Of 16
    it is all at the default."""
    estimate: Literal["sampled", "mean", "exact"] = "sampled"
    """Block masses come from: `exact` all queries of the block and all their keys; `sampled` some of its
    queries and all their keys; `mean` all its queries and the mean key of each earlier block (cheapest, blind
    to single keys)."""
    probe_rows: int | None = None
    """Queries per block that `sampled` looks at, evenly spaced, the block's last one included. None is 4, and 16 for
    heads and blocks where what three of these choose would not do for the fourth."""
    min_budget: int = 0
    """Tokens each row keeps at least, rounded up to blocks; first, previous and own block are kept in any
    case."""
    max_budget: int | None = None
    """Tokens each row keeps at most, rounded up to blocks; a row cut by it can miss the coverage. None is no
    limit."""
    block_size: int = 128
    """Tokens of a block."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """What chooses: `triton` kernels on CUDA, which wait for the device on long prompts alone, or `torch` anywhere.
    `auto` takes the kernels on devices where they were compared with PyTorch."""

    def __post_init__(self) -> None:
        check_literals(self, "row_local.")
        require(0 < self.coverage <= 1, "row_local.coverage", self.coverage, "a share above 0 and up to 1")
        require(0 < self.row_share <= 1, "row_local.row_share", self.row_share, "a share above 0 and up to 1")
        only = f"None: only estimate='sampled' samples, not '{self.estimate}'"
        require(
            self.probe_rows is None or self.estimate == "sampled",
            "row_local.probe_rows",
            self.probe_rows,
            only,
        )
        positive = "a positive number of queries"
        require(self.probe_rows is None or self.probe_rows > 0, "row_local.probe_rows", self.probe_rows, positive)
        require(self.min_budget >= 0, "row_local.min_budget", self.min_budget, "0 or more tokens")
        most = self.max_budget
        at_least = f"None or at least min_budget = {self.min_budget} tokens, and at least 1"
        require(most is None or most >= max(1, self.min_budget), "row_local.max_budget", most, at_least)
        require(self.block_size > 0, "row_local.block_size", self.block_size, "a positive number of tokens")
        own = "'auto' or 'torch': estimate='mean' has no kernels"
        require(self.impl != "triton" or self.estimate != "mean", "row_local.impl", self.impl, own)

    def build(self) -> Selector:
        """The selector (q, k, *, scale) -> Plan."""
        from whimbrel.sparse.row_local.select import select

        return partial(
            select,
            coverage=self.coverage,
            row_share=self.row_share,
            estimate=self.estimate,
            probe_rows=self.probe_rows,
            min_budget=self.min_budget,
            max_budget=self.max_budget,
            block_size=self.block_size,
            impl=self.impl,
        )
