"""Tables and figures in Markdown, and the marks between which a page shows them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def header(*names: str) -> list[str]:
    """The first two lines of a table; a column may have no name."""
    return [row(names).replace("|  |", "| |"), f"|{'---|' * len(names)}"]


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def figure(page: Path, name: str, text: str) -> list[str]:
    """The figure, where it lies beside the page."""
    return [f"![{text}]({name})", ""] if (page.parent / name).exists() else []


def insert(page: str, text: str, name: str = "results") -> str:
    """`page` with what stands between the marks of that name replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = page.split(begin)
    return before + begin + text + "\n" + end + rest.split(end)[1]
