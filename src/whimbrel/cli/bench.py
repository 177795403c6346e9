"""`whimbrel bench CASE`: time an operation against its rivals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from whimbrel.cli.args import parse
from whimbrel.errors import ConfigError, nearest


@dataclass(frozen=True)
class Args:
    """Time an operation against its rivals, after checking that they agree."""

    case: tyro.conf.Positional[str]
    """What to time; `whimbrel show kinds` lists the cases."""
    device: str = "auto"
    """cpu, cuda or auto."""
    quick: bool = False
    """Small shapes only."""
    only: tuple[str, ...] = ()
    """Implementations to time; none is all."""
    first_call: bool = False
    """Measure the first call instead, in fresh processes with empty compilation caches, on the first shape."""
    out: Path | None = None
    """Folder for the result lines, appended to OUT/CASE.jsonl; without it nothing is written."""
    json: bool = False
    """Print JSON lines instead of a table."""


def main(argv: list[str]) -> int:
    """Time one case."""
    args = parse(Args, argv, verb="bench")
    from whimbrel.bench import CASES

    if args.case not in CASES:
        raise ConfigError(f"unknown case '{args.case}'{nearest(args.case, CASES)}; use one of {', '.join(CASES)}")
    from whimbrel.training.processes import pick_device

    device, only = pick_device(args.device).type, args.only or None
    if args.first_call:
        from whimbrel.bench.first_call import first_calls

        lines = first_calls(args.case, device=device, quick=args.quick, only=only, out=args.out, table=not args.json)
    else:
        from whimbrel.bench.runner import run_case

        lines = run_case(args.case, device=device, quick=args.quick, only=only, out=args.out, table=not args.json)
    if args.json:
        print("\n".join(json.dumps(line) for line in lines))
    return 0
