"""The unit a page is made of: one finding with its figure, its numbers and how they were measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from whimbrel.report.svg import Svg


class Table(NamedTuple):
    """Texts as they are shown; the page escapes them. The first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Block(NamedTuple):
    """One row of the page: words on the left, a figure on the right."""

    title: str
    finding: str
    """One sentence computed from the data."""
    note: str = ""
    """How it was measured and how to read the figure."""
    draw: Callable[[float], Svg] | None = None
    """Draws for a width in pixels; called for a wide and a narrow screen."""
    table: Table | None = None
    """The numbers of the figure."""
    quotes: Sequence[tuple[str, str]] = ()
    """Texts to quote, each with its heading."""


NARROW = 480
"""Below this width in pixels a figure puts labels above their marks and not beside them."""
