"""`whimbrel merge SRC... --out DIR`: average checkpoints."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from whimbrel.cli.args import parse
from whimbrel.cli.merge_options import Options, print_done, print_plan, reporting, warn
from whimbrel.errors import ConfigError

if TYPE_CHECKING:
    from whimbrel.config import MergeConfig


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    """Average the weights of checkpoints, oldest first, or those of a run at a grid of tokens (--every, --preset).

    `whimbrel merge sweep`, `forecast` and `path` are commands of their own.
    """

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoints, oldest first: step folders, folders or files of safetensors or pytorch_model.bin, distributed
    checkpoints of torch. With --every or --preset: one run folder."""
    out: Path | None = None
    """Folder to write; it appears only when the merge is complete."""
    method: str = "sma"
    """sma, wma, ema, or another kind of the merge family (`whimbrel show kinds`)."""
    alpha: float | None = None
    """Weight of the newest checkpoint in the recursion of `ema`."""
    curve: Literal["linear", "cosine", "minus-sqrt"] | None = None
    """Decay of the learning rate that `--method decay` imitates."""
    curve_file: Path | None = None
    """A file with that decay, one share of the full rate for each checkpoint, oldest first, beginning with 1."""
    weights: tuple[str, ...] = ()
    """Weights for `--method explicit`, oldest first: 0.25 or 1/3."""
    any_sum: bool = False
    """Accept --weights that do not sum to 1."""
    every: str | None = None
    """Tokens between two checkpoints: 8B."""
    count: int | None = None
    """Number of checkpoints."""
    end: str | None = None
    """Tokens of the newest checkpoint to take; default: the run's newest."""
    preset: Literal["dense", "moe"] | None = None
    """Take --every and --count from the paper's table, by the size of the model."""
    optimizer: Literal["average", "newest", "reset"] | None = None
    """Merge the optimizer's state too, so that a run can go on from the result."""


SUBCOMMANDS = {
    "forecast": "whimbrel.cli.merge_forecast",
    "path": "whimbrel.cli.merge_path",
    "sweep": "whimbrel.cli.merge_sweep",
}


def main(argv: list[str]) -> int:
    """Merge, or hand over to a subcommand."""
    if argv and argv[0] in SUBCOMMANDS:
        return importlib.import_module(SUBCOMMANDS[argv[0]]).main(argv[1:])
    args = parse(Args, argv, verb="merge")
    if args.out is None and not args.dry_run:
        raise ConfigError("whimbrel merge needs --out DIR, the folder to write (or --dry-run)")
    from whimbrel.merge.job import Target
    from whimbrel.merge.reading import disk_rate
    from whimbrel.merge.sources import open_source
    from whimbrel.merge.stream import merge_many, plan_merge

    paths = _paths(args)
    target = Target("", tuple(range(len(paths))), _method(args))
    rules, limit = args.rules(args.optimizer), args.memory_limit * 2**20
    if args.dry_run or args.out is None:
        plan = plan_merge(paths, [target], rules=rules, memory_limit=limit, workers=args.workers)
        print_plan(plan, args.out, as_json=args.json, extra={})
        return 0
    rate = disk_rate(open_source(paths[-1]))
    with reporting(args.json, rate) as progress:
        report = merge_many(
            paths, args.out, [target], rules=rules, tokens_per_step=args.step_tokens(), memory_limit=limit,
            workers=args.workers, overwrite=args.overwrite, progress=progress,
        )  # fmt: skip
    weights = ", ".join(f"{weight:.4g}" for weight in report.weights.floats())
    text = f"merged {len(paths)} checkpoints by {args.method} ({weights}) into {args.out}"
    print_done(report, text, as_json=args.json, extra={})
    return 0


def _paths(args: Args) -> list[Path]:
    """The checkpoints named, or those of the run at the grid of tokens."""
    from whimbrel.merge.select import count_parameters, list_candidates, parse_tokens, preset, say_tokens, select_window

    grid = {"--count": args.count, "--end": args.end}
    if args.every is None and args.preset is None:
        for flag, value in grid.items():
            if value is not None:
                raise ConfigError(f"{flag} is for a run folder with --every or --preset; leave it out")
        return list(args.sources)
    if len(args.sources) != 1:
        raise ConfigError(f"--every and --preset take one run folder, not {len(args.sources)} checkpoints")
    run, count = args.sources[0], args.count
    every = None if args.every is None else parse_tokens(args.every, "--every")
    if args.preset is not None:
        newest = list_candidates(run, tokens_per_step=args.step_tokens())[-1]
        found = preset(args.preset, count_parameters(newest.path))
        every, count = every or found.every, count or found.count
    if every is None or count is None:
        raise ConfigError("--every needs --count, the number of checkpoints")
    end = None if args.end is None else parse_tokens(args.end, "--end")
    window = select_window(
        run, every=every, count=count, end=end, tolerance=args.tolerance, tokens_per_step=args.step_tokens()
    )
    warn(window.warnings)
    if not args.json:
        first, last = window.chosen[0], window.chosen[-1]
        print(
            f"{count} checkpoints from {say_tokens(first.tokens)} to {say_tokens(last.tokens)} tokens,"
            f" {say_tokens(every)} apart, at most {say_tokens(window.off)} from the grid"
        )
    return window.paths


def _method(args: Args) -> MergeConfig:
    from whimbrel.merge.config import DecayConfig, ExplicitConfig, merge_config

    if args.curve is not None or args.curve_file is not None:
        flag = "--curve" if args.curve is not None else "--curve-file"
        if args.method != "decay":
            raise ConfigError(f"{flag} is for --method decay, not '{args.method}'; leave it out")
        if args.curve_file is None:
            return DecayConfig(curve=args.curve or "minus-sqrt")
        if args.curve is not None:
            raise ConfigError("--curve and --curve-file name two decays; give one of them")
        return DecayConfig(values=_read_curve(args.curve_file))
    if args.any_sum and args.method == "explicit":
        return ExplicitConfig(values=args.weights, any_sum=True)
    if args.any_sum:
        raise ConfigError(f"--any-sum is for --method explicit, not '{args.method}'; leave it out")
    return merge_config(args.method, alpha=args.alpha, weights=args.weights or None)


def _read_curve(path: Path) -> tuple[str, ...]:
    try:
        values = tuple(path.read_text(encoding="utf-8").replace(",", " ").split())
    except OSError as error:
        raise ConfigError(f"--curve-file = '{path}' cannot be read ({error.strerror})") from None
    if not values:
        raise ConfigError(f"--curve-file = '{path}' holds no numbers; write one share of the full rate a line")
    return values
