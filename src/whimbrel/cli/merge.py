"""`whimbrel merge SRC... --out DIR`: average checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from whimbrel.cli.args import parse


@dataclass(frozen=True)
class Args:
    """Average the weights of checkpoints, oldest first."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoint folders or safetensors files, oldest first."""
    out: Path
    """Folder to write; it appears only when the merge is complete."""
    method: str = "sma"
    """sma, wma, ema, or another kind of the merge family (`whimbrel show kinds`)."""
    alpha: float | None = None
    """Weight of the newest checkpoint in the recursion of `ema`."""
    weights: tuple[float, ...] = ()
    """Weights for `--method explicit`, oldest first."""
    memory_limit: int = 256
    """Most memory for buffers, MiB."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print the report as JSON."""
