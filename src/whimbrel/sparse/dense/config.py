"""Options of the dense selector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from whimbrel.config import SelectorConfig, require

if TYPE_CHECKING:
    from whimbrel.sparse.apply import Selector


@dataclass(frozen=True, kw_only=True)
class DenseConfig(SelectorConfig):
    """Every causal block."""

    ROW_LOCAL: ClassVar[bool] = True
    """Whether a row's choice is the same for every suffix and every cut of the prompt on block borders."""

    block_size: int = 128
    """Tokens of a block."""

    def __post_init__(self) -> None:
        require(self.block_size > 0, "dense.block_size", self.block_size, "a positive number of tokens")

    def build(self) -> Selector:
        """The selector (q, k, *, scale) -> Plan."""
        from whimbrel.sparse.dense.select import select

        return partial(select, block_size=self.block_size)
