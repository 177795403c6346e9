"""The record of a run: one JSON line for each logged step, and TensorBoard events on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from whimbrel.errors import ConfigError
from whimbrel.files import atomic_write

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends to RUN/metrics.jsonl; lines after `last_step`, left by a run that was cut off, are dropped first."""

    def __init__(self, run_dir: Path, *, last_step: int, tensorboard: bool = False) -> None:
        self._path = run_dir / METRICS_FILE
        kept = [line for line in read_metrics(run_dir) if line["step"] <= last_step]
        with atomic_write(self._path) as file:
            file.writelines((json.dumps(line) + "\n").encode() for line in kept)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _tensorboard(run_dir) if tensorboard else None

    def write(self, **values: Any) -> None:
        """Append one line; `step` is required."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name not in ("step", "time"):
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's record; a last line that was cut off is left out."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard = true but the package is not installed; run pip install 'whimbrel[tensorboard]'"
        ) from error
    return SummaryWriter(str(run_dir / "tensorboard"))
