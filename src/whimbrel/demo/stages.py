"""Stages of a job whose results are kept, so that a second run does no work twice."""

from __future__ import annotations

import hashlib
import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whimbrel.files import atomic_write_text

Result = dict[str, Any]
COLUMNS = 80


class Stages:
    """Runs named stages once; a result is kept in FOLDER/NAME.json with the settings that it was made with.

    A result is plain data. `seconds` has the time of each stage, those kept from an earlier run included.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        self._folder = folder
        self._key = hashlib.sha256(settings.encode()).hexdigest()
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Result], say: Callable[[Result], str]) -> Result:
        """The result of `work`, kept or made now; stdout says what was done, with what figure and in what time."""
        path = self._folder / f"{name}.json"
        kept = self._kept(path)
        if kept is not None:
            seconds, result = kept["seconds"], kept["result"]
        else:
            start = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - start
            atomic_write_text(path, json.dumps({"key": self._key, "seconds": seconds, "result": result}))
        self.seconds[name] = seconds
        tell(name, f"{say(result)} ({seconds:.1f} s{'' if kept is None else ', kept'})")
        return result

    def _kept(self, path: Path) -> dict[str, Any] | None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return kept if kept.get("key") == self._key else None


def tell(name: str, text: str) -> None:
    """Print `text` behind `name`, in lines that a terminal of 80 columns holds."""
    print(
        textwrap.fill(
            text,
            COLUMNS,
            initial_indent=f"{name:<10}",
            subsequent_indent=" " * 10,
            break_long_words=False,
            break_on_hyphens=False,
        ),
        flush=True,
    )
