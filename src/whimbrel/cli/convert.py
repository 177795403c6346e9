"""`whimbrel convert SOURCE --out DIR`: between Whimbrel, Hugging Face transformers and the Llama family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from whimbrel.cli.args import parse
from whimbrel.errors import CheckpointError


@dataclass(frozen=True)
class Args:
    """Write a model as a folder that Whimbrel and transformers both load, or as a model of the Llama family."""

    source: tyro.conf.Positional[Path]
    """Checkpoint, merge or run folder, or a transformers model: whimbrel, llama (SmolLM2), mistral, qwen2, qwen3."""
    out: Path
    """Folder to write; it appears only when it is complete."""
    to: Literal["whimbrel", "llama", "mistral", "qwen2", "qwen3"] = "whimbrel"
    """Model type to write."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print the report as JSON."""


def main(argv: list[str]) -> int:
    """Convert."""
    args = parse(Args, argv, verb="convert")
    if not args.source.is_dir():  # said before transformers is imported, which takes seconds
        raise CheckpointError(
            f"'{args.source}' is not a folder; name a checkpoint, a merge or a run, or a model's folder"
        )
    from whimbrel.integrations.hf import convert_checkpoint

    report = convert_checkpoint(args.source, args.out, to=args.to, overwrite=args.overwrite)
    if args.json:
        print(json.dumps(report._asdict(), default=str))
    else:
        print(
            f"wrote {report.out}: model type {report.model_type}, {report.parameters:,} parameters, "
            f"{report.written_bytes:,} bytes of weights (source: {report.source_type})"
        )
    return 0
