"""Options of the window selector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from whimbrel.config import SelectorConfig, require

if TYPE_CHECKING:
    from whimbrel.sparse.apply import Selector


@dataclass(frozen=True, kw_only=True)
class WindowConfig(SelectorConfig):
    """The first tokens of the sequence and the nearest tokens of each query, in whole blocks."""

    ROW_LOCAL: ClassVar[bool] = True
    """Whether a row's choice is the same for every suffix and every cut of the prompt on block borders."""

    sink_tokens: int = 128
    """Tokens at the start of the sequence that every query sees."""
    window_tokens: int = 1024
    """Nearest tokens that every query sees, itself included."""
    block_size: int = 128
    """Tokens of a block."""

    def __post_init__(self) -> None:
        require(self.sink_tokens >= 0, "window.sink_tokens", self.sink_tokens, "0 or more tokens")
        require(self.window_tokens > 0, "window.window_tokens", self.window_tokens, "a positive number of tokens")
        require(self.block_size > 0, "window.block_size", self.block_size, "a positive number of tokens")

    def build(self) -> Selector:
        """The selector (q, k, *, scale) -> Plan."""
        from whimbrel.sparse.window.select import select

        return partial(
            select, sink_tokens=self.sink_tokens, window_tokens=self.window_tokens, block_size=self.block_size
        )
