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
_GLUE = "\u00a0"  # a space at which no line is broken


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
        found = self._found(path)
        seconds, result = found.get("seconds", 0.0), found.get("result")
        kept = result is not None
        if result is None:
            start, before = time.perf_counter(), seconds
            entry: dict[str, Any] = {"key": self._key}
            try:
                entry["result"] = result = work()
            finally:  # a stage that was cut off leaves the time that it took
                seconds = entry["seconds"] = before + time.perf_counter() - start
                atomic_write_text(path, json.dumps(entry))
        self.seconds[name] = seconds
        tell(name, f"{say(result)} ({seconds:.1f}{_GLUE}s{f',{_GLUE}kept' if kept else ''})")
        return result

    def _found(self, path: Path) -> dict[str, Any]:
        """What an earlier run with these settings left: the time, and the result if it came to one."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return found if found.get("key") == self._key else {}


def tell(name: str, text: str) -> None:
    """Print `text` behind `name`, in lines that a terminal of 80 columns holds."""
    wrapped = textwrap.fill(
        text,
        COLUMNS,
        initial_indent=f"{name:<10}",
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )
    print(wrapped.replace(_GLUE, " "), flush=True)
