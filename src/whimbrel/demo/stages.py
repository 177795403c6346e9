"""Stages of a job whose results are kept, so that a second run does no work twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whimbrel.files import atomic_write_text

Result = dict[str, Any]


class Stages:
    """Runs named stages once; a result is kept in FOLDER/NAME.json with the settings that it was made with.

    A result is plain data. `seconds` sums the time of all stages, those kept from an earlier run included.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        self._folder = folder
        self._key = hashlib.sha256(settings.encode()).hexdigest()
        self.seconds = 0.0

    def run(self, name: str, work: Callable[[], Result], say: Callable[[Result], str]) -> Result:
        """The result of `work`, kept or made now; one line on stdout says what was done and with what figure."""
        path = self._folder / f"{name}.json"
        kept = self._kept(path)
        if kept is not None:
            seconds, result = kept["seconds"], kept["result"]
        else:
            start = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - start
            atomic_write_text(path, json.dumps({"key": self._key, "seconds": seconds, "result": result}))
        self.seconds += seconds
        print(f"{name:<9} {say(result)} ({seconds:.1f} s{'' if kept is None else ', kept'})", flush=True)
        return result

    def _kept(self, path: Path) -> dict[str, Any] | None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return kept if kept.get("key") == self._key else None
