"""Progress on stderr: a bar with rate and remaining time on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """One task under way; `advance` moves it, `note` says a figure beside it."""

    def __init__(self, label: str, total: float, unit: str, *, live: Any = None, quiet: bool = False) -> None:
        self.label, self.total, self.unit = label, max(total, 1e-9), unit
        self.done = 0.0
        self._note = ""
        self._live = live
        self._quiet = quiet
        self._start = time.perf_counter()
        self._next_line = 0.25
        self._task = live.add_task(label, total=self.total, rate="", note="") if live is not None else None

    def advance(self, amount: float = 1.0, note: str | None = None) -> None:
        """Count `amount` more units as done; `note` replaces the text behind the bar."""
        self.done += amount
        self._note = self._note if note is None else note
        if self._live is not None:
            self._live.update(self._task, completed=self.done, rate=self._rate(), note=self._note)
        elif not self._quiet and self.done / self.total >= self._next_line:
            self._next_line = (self.done / self.total // 0.25 + 1) * 0.25
            left = (self.total - self.done) * (time.perf_counter() - self._start) / self.done
            share = min(self.done / self.total, 1.0)
            parts = [f"{share:.0%}", self._rate(), f"{left:.0f} s left", *filter(None, [self._note])]
            print(f"{self.label}: {', '.join(parts)}", file=sys.stderr)

    def _rate(self) -> str:
        rate = self.done / max(time.perf_counter() - self._start, 1e-9)
        for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if rate >= scale:
                return f"{rate / scale:.1f} {letter}{self.unit}/s"
        return f"{rate:.1f} {self.unit}/s"


@contextmanager
def track(label: str, total: float, unit: str = "step", *, quiet: bool = False) -> Iterator[Bar]:
    """A bar for `total` units; `quiet` silences it, as on every process but the first."""
    if quiet or not sys.stderr.isatty():
        yield Bar(label, total, unit, quiet=quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),  # so that 80 columns hold the times and a note
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as live:
        yield Bar(label, total, unit, live=live)
