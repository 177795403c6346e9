"""`whimbrel merge SRC... --out DIR`: average checkpoints."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from whimbrel.cli.args import parse
from whimbrel.errors import ConfigError


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
    curve: Literal["linear", "cosine", "minus-sqrt"] | None = None
    """Decay of the learning rate that `--method decay` imitates."""
    weights: tuple[str, ...] = ()
    """Weights for `--method explicit`, oldest first: 0.25 or 1/3."""
    dtype: str | None = None
    """Type of the averaged floats, e.g. float32 or bfloat16; default: the sources'."""
    memory_limit: int = 256
    """Most memory for buffers, MiB."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print the report as JSON."""


SUBCOMMANDS = {"forecast": "whimbrel.cli.merge_forecast", "path": "whimbrel.cli.merge_path"}


def main(argv: list[str]) -> int:
    """Merge, or hand over to a subcommand."""
    if argv and argv[0] in SUBCOMMANDS:
        return importlib.import_module(SUBCOMMANDS[argv[0]]).main(argv[1:])
    args = parse(Args, argv, verb="merge")
    from whimbrel.config import MergeConfig
    from whimbrel.merge import merge_checkpoints
    from whimbrel.merge.config import DecayConfig
    from whimbrel.progress import track

    method: str | MergeConfig = args.method
    if args.curve is not None:
        if args.method != "decay":
            raise ConfigError(f"--curve is for --method decay, not '{args.method}'; leave it out")
        method = DecayConfig(curve=args.curve)
    with track("merge", 1, "B") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        report = merge_checkpoints(
            args.sources,
            args.out,
            method=method,
            dtype=args.dtype,
            alpha=args.alpha,
            weights=args.weights or None,
            memory_limit=args.memory_limit * 2**20,
            overwrite=args.overwrite,
            progress=progress,
        )
    weights = report.weights.floats()
    if args.json:
        fields = {"out", "tensors", "read_bytes", "written_bytes", "seconds"}
        data = {name: value for name, value in report._asdict().items() if name in fields}
        print(json.dumps(data | {"sources": report.sources, "weights": weights}, default=str))
        return 0
    rate = report.read_bytes / max(report.seconds, 1e-9) / 1e9
    print(
        f"merged {len(report.sources)} checkpoints by {args.method} "
        f"({', '.join(f'{weight:.4g}' for weight in weights)}) into {report.out}: {report.tensors} tensors, "
        f"{report.read_bytes:,} bytes read at {rate:.2f} GB/s"
    )
    return 0
