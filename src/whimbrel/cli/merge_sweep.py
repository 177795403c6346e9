"""`whimbrel merge sweep RUN --out DIR`: several averages of a run in one pass over its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from whimbrel.cli.args import parse, print_table
from whimbrel.cli.merge_options import Options, print_done, print_plan, reporting, warn
from whimbrel.errors import ConfigError

if TYPE_CHECKING:
    from whimbrel.config import MergeConfig
    from whimbrel.merge.select import Window


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    """Average several windows of a run by several methods, reading each checkpoint once.

    DIR gets a folder for each combination, such as sma-8B-x10. Windows that the run is too short for are left out.
    """

    run: tyro.conf.Positional[Path]
    """Run folder with checkpoints."""
    out: Path | None = None
    """Folder to write; it appears only when all merges are complete."""
    every: tuple[str, ...]
    """Intervals in tokens: 4B 8B 16B."""
    counts: tuple[int, ...] = (10,)
    """Numbers of checkpoints: 3 6 10 15."""
    methods: tuple[str, ...] = ("sma",)
    """Methods, with their option behind a colon: sma wma ema:0.1 decay:cosine."""
    end: str | None = None
    """Tokens of the newest checkpoint to take; default: the run's newest."""


def main(argv: list[str]) -> int:
    """Sweep."""
    args = parse(Args, argv, verb="merge sweep")
    if args.out is None and not args.dry_run:
        raise ConfigError("whimbrel merge sweep needs --out DIR, the folder to write (or --dry-run)")
    from whimbrel.merge.job import Target
    from whimbrel.merge.reading import disk_rate
    from whimbrel.merge.select import Candidate, say_tokens
    from whimbrel.merge.sources import open_source
    from whimbrel.merge.stream import merge_many, plan_merge

    methods = {text: _method(text) for text in args.methods}
    windows = _windows(args)
    union: list[Candidate] = sorted({c for window in windows.values() for c in window.chosen}, key=lambda c: c.tokens)
    paths = [candidate.path for candidate in union]
    targets = [
        Target(f"{text.replace(':', '-')}-{name}", tuple(union.index(c) for c in window.chosen), method)
        for name, window in windows.items()
        for text, method in methods.items()
    ]
    rules, limit = args.rules(), args.memory_limit * 2**20
    extra = {"merges": [target.name for target in targets]}
    if args.dry_run or args.out is None:
        plan = plan_merge(paths, targets, rules=rules, memory_limit=limit, workers=args.workers)
        print_plan(plan, args.out, as_json=args.json, extra=extra)
        return 0
    with reporting(args.json, disk_rate(open_source(paths[-1]))) as progress:
        report = merge_many(
            paths, args.out, targets, rules=rules, tokens_per_step=args.step_tokens(), memory_limit=limit,
            workers=args.workers, overwrite=args.overwrite, progress=progress,
        )  # fmt: skip
    if not args.json:
        rows = []
        for target in targets:
            weights = target.config.weights(len(target.members))
            first, last = union[target.members[0]], union[target.members[-1]]
            span = f"{say_tokens(first.tokens)} to {say_tokens(last.tokens)}"
            rows.append((target.name, len(target.members), span, f"{weights.effective_count:.2f}"))
        print_table("merges", ("folder", "checkpoints", "tokens", "effective count"), rows)
    text = f"{len(targets)} merges of {len(paths)} checkpoints in one pass, into {args.out}"
    print_done(report, text, as_json=args.json, extra=extra)
    return 0


def _windows(args: Args) -> dict[str, Window]:
    """The windows that the run has checkpoints for, by name."""
    from whimbrel.merge.select import learning_rates, list_candidates, parse_tokens, pick

    candidates, rates = list_candidates(args.run, tokens_per_step=args.step_tokens()), learning_rates(args.run)
    end = None if args.end is None else parse_tokens(args.end, "--end")
    windows: dict[str, Window] = {}
    missing: list[str] = []
    for text in args.every:
        every = parse_tokens(text, "--every")
        for count in args.counts:
            name = f"{text}-x{count}"
            try:
                windows[name] = pick(
                    candidates, every=every, count=count, end=end, tolerance=args.tolerance, rates=rates
                )
            except ConfigError as error:
                missing.append(f"{name} is left out: {error}")
            else:
                warn([f"{name}: {warning}" for warning in windows[name].warnings])
    if not windows:
        raise ConfigError(f"no window of the sweep fits the run: {missing[0]}")
    warn(missing)
    return windows


def _method(text: str) -> MergeConfig:
    """The method that "kind" or "kind:option" names."""
    from whimbrel.merge.config import DecayConfig, merge_config

    kind, _, option = text.partition(":")
    if not option:
        return merge_config(kind)
    if kind == "decay":
        if option not in ("linear", "cosine", "minus-sqrt"):
            raise ConfigError(f"--methods {text}: the decay is linear, cosine or minus-sqrt")
        return DecayConfig(curve=option)
    try:
        return merge_config(kind, alpha=float(option))
    except ValueError:
        raise ConfigError(f"--methods {text}: '{option}' is no number; write ema:0.1") from None
