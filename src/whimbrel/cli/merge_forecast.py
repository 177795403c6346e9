"""`whimbrel merge forecast RUN`: averages along a run, as a forecast of annealing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from whimbrel.cli.args import parse, print_table
from whimbrel.cli.held_out import held_out, run_checkpoints
from whimbrel.config import Config


@dataclass(frozen=True)
class Args:
    """Raw and averaged losses along a run, drift and noise between its checkpoints, and what they advise.

    Writes RUN/forecast.json and RUN/forecast.html.
    """

    run: tyro.conf.Positional[Path]
    """Run folder with checkpoints at equal distances."""
    counts: tuple[int, ...] = (3, 6, 10)
    """Sizes of the windows, in checkpoints."""
    every: int = 1
    """Take every n-th checkpoint, counted from the newest: a longer interval."""
    points: int = 6
    """Places along the run."""
    method: str = "sma"
    """sma, wma, ema, or another kind of the merge family."""
    annealed: Path | None = None
    """An annealed branch, run or checkpoint, to hold the forecast against."""
    data: Path | None = None
    """Folder of token shards; default: the corpus the model was trained on."""
    tokens: int | None = None
    """Held-out tokens, 0 for all; default: the run's eval.validation_tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a CUDA device where there is one."""
    json: bool = False
    """Print JSON instead of tables."""


def main(argv: list[str]) -> int:
    """Evaluate, write and print."""
    args = parse(Args, argv, verb="merge forecast")
    from whimbrel.checkpoint import load_weights, read_meta
    from whimbrel.evals.bpb import compare_bpb
    from whimbrel.evals.forecast import forecast
    from whimbrel.files import atomic_write_text
    from whimbrel.infer.load import model_dir
    from whimbrel.progress import track
    from whimbrel.report import write_report

    start = time.perf_counter()
    paths = stable_checkpoints(run_checkpoints(args.run, every=args.every))
    model, config, evaluate = held_out(paths[-1], data=args.data, tokens=args.tokens, device=args.device)
    with track("forecast", args.points * (1 + len(args.counts)), "model") as bar:
        found = forecast(
            model,
            paths,
            evaluate,
            counts=args.counts,
            points=args.points,
            method=args.method,
            progress=lambda what: bar.advance(1, what),
        )
    if args.annealed is not None:
        folder = model_dir(args.annealed)
        load_weights(folder, model)
        other = evaluate(model)
        load_weights(paths[-1], model)
        difference = compare_bpb(other, evaluate(model))._asdict()
        tokens = read_meta(folder).tokens
        found["annealed"] = {"tokens": tokens, "loss": other.nats_per_token, "difference": difference}
    atomic_write_text(args.run / "forecast.json", json.dumps(found, indent=1) + "\n")
    report = _report(args, config, found, tokens=read_meta(paths[-1]).tokens, seconds=time.perf_counter() - start)
    page = write_report(report, args.run / "forecast.html")
    if args.json:
        print(json.dumps(found))
        return 0
    _print(found)
    print(f"wrote {args.run / 'forecast.json'} and {page}")
    return 0


def stable_checkpoints(paths: list[Path]) -> list[Path]:
    """Those of `paths` from the constant stretch of the learning rate, by the configuration of the newest."""
    from whimbrel.checkpoint import read_meta
    from whimbrel.errors import CheckpointError
    from whimbrel.infer.load import load_run_config

    config = load_run_config(paths[-1])
    schedule = config.schedule
    last = config.steps - schedule.decay_steps if schedule.kind == "wsd" else schedule.warmup_steps
    found = [path for path in paths if schedule.warmup_steps <= read_meta(path).step <= last]
    if len(found) < 2:
        raise CheckpointError(
            f"{len(found)} of {len(paths)} checkpoints lie between warm-up (step {schedule.warmup_steps}) and decay "
            f"(step {last}); an average forecasts annealing only for a run at a constant rate"
        )
    return found


def _report(args: Args, config: Config, found: dict[str, Any], *, tokens: int, seconds: float) -> dict[str, Any]:
    import datetime
    import os
    from importlib import metadata

    from whimbrel.bench.results import commit, device_name
    from whimbrel.config import to_toml
    from whimbrel.model.memory import parameter_counts
    from whimbrel.training.processes import pick_device

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "header": {
            "name": f"Forecast of annealing: {args.run.name}",
            "summary": found["advice"][0],
            "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
            "hardware": f"{device_name(pick_device(args.device).type)}, {memory:.0f} GiB",
            "seconds": seconds,
            "tokens": tokens,
            "parameters": parameter_counts(config.model)["total"],
            "versions": {name: metadata.version(name) for name in ("whimbrel", "torch")},
            "commit": commit(),
        },
        "forecast": found,
        "configuration": {"toml": to_toml(config), "commands": [f"whimbrel merge forecast {args.run}"]},
    }


def _print(found: dict[str, Any]) -> None:
    at = {point["tokens"]: [f"{point['tokens']:,}", f"{point['loss']:.4f}"] for point in found["raw"]}
    for window in found["windows"]:
        cells = {point["tokens"]: _gain(point["difference"]) for point in window["points"]}
        for tokens, row in at.items():
            row.append(cells.get(tokens, ""))
    head = ("tokens", "checkpoint", *(f"average of {window['count']}" for window in found["windows"]))
    print_table(
        f"Loss in nats per token, and averages ({found['method']}) less the checkpoint", head, list(at.values())
    )
    if "annealed" in found:
        branch = found["annealed"]
        print(f"annealed branch: {branch['loss']:.4f}, {_gain(branch['difference'])} to the last checkpoint")
    if "statistics" in found:
        split = found["statistics"]
        rows = [(w["count"], f"{w['noise_left']:.0%}", f"{w['error']:.0%}") for w in split["windows"]]
        print_table("Variance left of one checkpoint's noise", ("window", "noise left", "with the lag"), rows)
        print(
            f"drift over one interval {split['drift']:.2g} of the weights' length, noise {split['noise']:.2g}, "
            f"correlation of neighbours {split['correlation']:.2f}"
        )
    for sentence in found["advice"]:
        print(sentence)
    print(found["limits"])


def _gain(difference: dict[str, float]) -> str:
    return f"{difference['value']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
