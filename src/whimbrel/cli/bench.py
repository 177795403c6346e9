"""`whimbrel bench CASE`: time an operation against its rivals."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro

from whimbrel.cli.args import parse
from whimbrel.errors import ConfigError, nearest

if TYPE_CHECKING:
    from whimbrel.bench.results import ResultLine


@dataclass(frozen=True)
class Args:
    """Time an operation against its rivals, after checking that they agree."""

    case: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CASE")]
    """What to time; `whimbrel show kinds` lists the cases."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a CUDA device where there is one."""
    quick: bool = False
    """Small shapes only."""
    only: tuple[str, ...] = ()
    """Implementations to time; none is all."""
    first_call: bool = False
    """Measure the first call instead, in fresh processes with empty compilation caches, on the first shape."""
    coverage: bool = False
    """Of `prefill`: print what each selector keeps of the attention, by input, layer and head, in place of times."""
    out: Path | None = None
    """Folder for the result lines, appended to OUT/CASE.jsonl; without it nothing is written."""
    json: bool = False
    """Print JSON lines instead of a table."""


def main(argv: list[str]) -> int:
    """Time one case."""
    args = parse(Args, argv, verb="bench")
    before = signal.signal(signal.SIGTERM, _end)
    try:
        return _time(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: object) -> NoReturn:
    """End as at Ctrl-C: temporary files, which may take gigabytes, and processes of rivals do not stay behind."""
    raise SystemExit(128 + number)


def _time(args: Args) -> int:
    from whimbrel.bench import CASES

    if args.case not in CASES:
        raise ConfigError(f"unknown case '{args.case}'{nearest(args.case, CASES)}; use one of {', '.join(CASES)}")
    from whimbrel.training.processes import pick_device

    device, only = pick_device(args.device).type, args.only or None
    if args.coverage:
        if args.case != "prefill":
            raise ConfigError(f"--coverage goes with the case prefill, not '{args.case}'; leave it out")
        lines = _coverage(device, args)
    elif args.first_call:
        from whimbrel.bench.first_call import first_calls

        lines = first_calls(args.case, device=device, quick=args.quick, only=only, out=args.out, table=not args.json)
    else:
        from whimbrel.bench.runner import run_case

        lines = run_case(args.case, device=device, quick=args.quick, only=only, out=args.out, table=not args.json)
    if args.json:
        print("\n".join(json.dumps(line) for line in lines))
    return 0


def _coverage(device: str, args: Args) -> list[ResultLine]:
    """Print and record what selectors keep, head by head."""
    from whimbrel.bench.results import record
    from whimbrel.sparse.prefill.bench import coverage_rows

    lines = []
    if not args.json:
        print("     N  input      layer  head  selector               density  recall: min     p5   mean covered")
    for row in coverage_rows(device=device, quick=args.quick):
        p = row.params
        for metric in ("density", "recall_min", "recall_p5", "recall_mean", "covered"):
            value = getattr(row, metric)
            lines.append(record("prefill_heads", row.selector, p, metric, value, "share", device=device, out=args.out))
        if not args.json:
            place = f"{p['N']:>6}  {p['input']:<10} {p.get('layer', ''):>5} {p['head']:>5}  {row.selector:<22}"
            recall = f"{row.recall_min:7.3f}{row.recall_p5:7.3f}{row.recall_mean:7.3f}"
            figures = f"{row.density:7.3f}       {recall}{row.covered:8.3f}"
            print(f"{place} {figures}", flush=True)
    return lines
