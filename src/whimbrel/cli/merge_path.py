"""`whimbrel merge path A B`: the loss between checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from whimbrel.cli.args import parse, print_table
from whimbrel.cli.held_out import HeldOut, held_out, run_checkpoints
from whimbrel.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from whimbrel.evals.intervals import Interval


@dataclass(frozen=True)
class Args:
    """The loss along the line between two checkpoints; half-way between each pair of three or more, or of a run's."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more checkpoints, merges or runs (their newest checkpoints), or one run folder."""
    points: int = 11
    """Points on the line between two, both ends included."""
    per_layer: bool = False
    """Also move one layer at a time from the first to the second."""
    every: int = 1
    """Of a run, take every n-th checkpoint, counted from the newest."""
    max_barrier: float | None = None
    """Fail where the loss rises by more nats per token than this above the straight line."""
    data: Path | None = None
    """Folder of token shards; default: the corpus the model was trained on."""
    tokens: int | None = None
    """Held-out tokens, 0 for all; default: the run's eval.validation_tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a CUDA device where there is one."""
    json: bool = False
    """Print JSON instead of tables."""


def main(argv: list[str]) -> int:
    """Evaluate between checkpoints and print; raises CheckpointError across a barrier above --max-barrier."""
    args = parse(Args, argv, verb="merge path")
    from whimbrel.infer.load import model_dir

    several = len(args.sources) > 1
    paths = (
        [model_dir(path) for path in args.sources] if several else run_checkpoints(args.sources[0], every=args.every)
    )
    if args.per_layer and len(paths) != 2:
        raise ConfigError(f"--per-layer is for two checkpoints, not {len(paths)}; name the first and the last")
    work = held_out(paths[-1], data=args.data, tokens=args.tokens, device=args.device)
    if len(paths) == 2:
        result, barrier = _between_two(paths, work, args)
    else:
        result, barrier = _between_pairs(paths, work, as_json=args.json)
    if args.json:
        print(json.dumps(result))
    if args.max_barrier is not None and barrier[0].value > args.max_barrier:
        rise, where = barrier
        raise CheckpointError(
            f"the loss rises by {rise.value:.4f} nats per token (95 % interval {rise.low:.4f} to {rise.high:.4f}) "
            f"{where}, more than --max-barrier = {args.max_barrier}: an average across it is worse than what it is "
            "made of; average checkpoints of one stretch of the run"
        )
    return 0


def _between_two(paths: list[Path], work: HeldOut, args: Args) -> tuple[dict[str, Any], tuple[Interval, str]]:
    from whimbrel.evals.path import evaluate_layers, evaluate_path, read_weights

    model, _, evaluate = work
    a, b = (read_weights(path, model) for path in paths)
    line = evaluate_path(model, a, b, evaluate, points=args.points)
    layers = evaluate_layers(model, a, b, evaluate) if args.per_layer else []
    result: dict[str, Any] = {
        "sources": [str(path) for path in paths],
        "at": line.at,
        "losses": line.losses,
        "barrier": line.barrier._asdict(),
        "barrier_at": line.barrier_at,
    }
    if layers:
        result["layers"] = [row._asdict() | {"barrier": row.barrier._asdict()} for row in layers]
    if not args.json:
        first, last = line.losses[0], line.losses[-1]
        rows = [
            (f"{at:.2f}", f"{loss:.4f}", f"{loss - (1 - at) * first - at * last:+.4f}")
            for at, loss in zip(line.at, line.losses, strict=True)
        ]
        print_table(f"From {paths[0]} to {paths[1]}", ("share", "nats per token", "above the line"), rows)
        print(_verdict(line.barrier, f"at {line.barrier_at:.2f}"))
        if layers:
            table = [(r.layer, f"{r.loss:.4f}", f"{r.barrier.value:+.4f}", _interval(r.barrier)) for r in layers]
            print_table("One layer at a time", ("layer", "at its end", "half-way", "95 % interval"), table)
    return result, (line.barrier, f"at {line.barrier_at:.2f} of the way from {paths[0]} to {paths[1]}")


def _between_pairs(paths: list[Path], work: HeldOut, *, as_json: bool) -> tuple[dict[str, Any], tuple[Interval, str]]:
    from whimbrel.evals.path import evaluate_pairs

    losses, rises = evaluate_pairs(work.model, paths, work.evaluate)
    pairs = [(rise, i, j) for i, row in enumerate(rises) for j, rise in enumerate(row) if rise is not None]
    highest, i, j = max(pairs, key=lambda pair: pair[0].value)
    result = {
        "sources": [str(path) for path in paths],
        "losses": losses,
        "half_way": [[None if rise is None else rise._asdict() for rise in row] for row in rises],
    }
    if not as_json:
        rows = [
            (path.name, f"{loss:.4f}", *("" if rise is None else f"{rise.value:+.4f}" for rise in row))
            for path, loss, row in zip(paths, losses, rises, strict=True)
        ]
        head = ("checkpoint", "nats per token", *(path.name for path in paths))
        print_table("Rise of the loss half-way between two, above the mean of both", head, rows)
        print(_verdict(highest, f"half-way from {paths[i].name} to {paths[j].name}"))
    return result, (highest, f"half-way from {paths[i]} to {paths[j]}")


def _interval(rise: Interval) -> str:
    return f"{rise.low:+.4f} to {rise.high:+.4f}"


def _verdict(rise: Interval, where: str) -> str:
    if rise.low > 0:
        return f"barrier of {rise.value:.4f} nats per token {where} (95 % interval {_interval(rise)})"
    return (
        f"no barrier: the highest point {where} is {rise.value:+.4f} above the line (95 % interval {_interval(rise)})"
    )
