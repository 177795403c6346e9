"""Averages against annealing, as a start, and after a collapse: small replicas of arXiv 2505.12082, figures 3 to 7.

    python benchmarks/merge_quality.py anneal demo --seeds 0 1 2     # windows along a run, and annealed branches
    python benchmarks/merge_quality.py start demo --seeds 0 1 2      # annealing from an average and from the last
    python benchmarks/merge_quality.py spike demo --seeds 0 1 2      # optimizer states after a collapse

The second argument is a recipe or a TOML file, as for `whimbrel train`; --steps, --every, --anneal-steps and --device
override it. Runs are kept in --runs, so that a second call, or one after an interruption, does no work twice. Lines go
to benchmarks/results/merge_quality.jsonl: params recipe, tokens, method, interval_tokens, count and seed; metric loss,
on the held-out text of eval.validation_tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from whimbrel.bench.results import RESULTS, record
from whimbrel.checkpoint import list_checkpoints, load_checkpoint, load_weights, save_checkpoint, step_dir
from whimbrel.config import Config, load_config, to_toml, with_overrides
from whimbrel.data import TokenShards
from whimbrel.errors import TrainingError
from whimbrel.evals import BpbResult, compare_bpb, evaluate_bpb
from whimbrel.evals.intervals import Interval
from whimbrel.merge import OnlineAverage, load_average
from whimbrel.merge.config import DecayConfig, EMAConfig, SMAConfig, WMAConfig
from whimbrel.model import build_model
from whimbrel.training import loop
from whimbrel.training.loop import annealed, shards_for, train
from whimbrel.training.processes import pick_device

METHODS = {"sma": SMAConfig(), "wma": WMAConfig(), "ema": EMAConfig(), "minus-sqrt": DecayConfig()}
COUNTS, STRIDES = (3, 6, 10, 15), (1, 2, 4)
POLICIES = ("average", "newest", "reset")


class Study:
    """One recipe and seed: its runs, its held-out text, and where lines go."""

    def __init__(self, args: argparse.Namespace, config: Config, seed: int) -> None:
        self.args, self.config = args, with_overrides(config, {"seed": seed})
        self.device = pick_device(args.device)
        self.recipe = Path(args.source).stem
        self.folder = args.runs / f"{self.recipe}-{config.steps}" / f"seed-{seed}"
        self.model = build_model(self.config.model).to(self.device)
        self.text = TokenShards(shards_for(self.config), "validation")

    def evaluate(self, model: nn.Module) -> BpbResult:
        sizes = {"seq_len": self.config.data.seq_len, "max_tokens": self.config.eval.validation_tokens}
        return evaluate_bpb(model, self.text, **sizes)

    def judge(self, path: Path) -> BpbResult:
        load_weights(path, self.model)
        return self.evaluate(self.model)

    def train(self, name: str, config: Config, branch_from: Path | None = None) -> Path:
        """Run folder of a finished run."""
        folder = self.folder / name
        result = train(config, run_dir=folder, branch_from=branch_from)
        if result.interrupted:
            raise SystemExit(f"stopped at step {result.step} of {folder}; the same command goes on from there")
        return folder

    def line(self, method: str, score: BpbResult, *, step: int, raw: BpbResult | None = None, **params: Any) -> None:
        """Record and print one loss; with `raw` also the paired difference to it."""
        given = {"recipe": self.recipe, "tokens": step * self.config.batch_tokens, "method": method}
        given |= {"seed": self.config.seed, **params}
        difference = None if raw is None else compare_bpb(score, raw)
        write_line(given, score.nats_per_token, difference, device=self.device.type, out=self.args.out)


def write_line(
    given: dict[str, Any],
    loss: float,
    difference: Interval | None,
    *,
    device: str,
    out: Path,
    metric: str = "loss",
    quiet: bool = False,
) -> None:
    """Record and print one loss in nats a token, and its difference to the one that it is compared with."""
    text = " ".join(f"{name} {value}" for name, value in given.items()) + f": {loss:.4f}"
    if difference is not None:
        ends = zip(("difference", "difference_low", "difference_high"), difference, strict=True)
        given = given | {name: round(value, 6) for name, value in ends}
        text += f" ({difference.value:+.4f}, {difference.low:+.4f} to {difference.high:+.4f})"
    if not quiet:
        print(text, flush=True)
    record("merge_quality", "whimbrel", given, metric, loss, "nats per token", device=device, out=out)


def ends(study: Study) -> list[int]:
    """Steps at which an annealed branch ends, the last step among them."""
    config, every = study.config, study.config.checkpoint.every_steps
    forks = study.args.forks
    found = [round(config.steps * (i + 1) / forks / every) * every for i in range(forks)]
    least = config.schedule.warmup_steps + config.averaging.anneal_steps
    return [step for step in found if step >= least]


def anneal(study: Study) -> None:
    """At each fork, from equal tokens: the checkpoint, averages of every method, count and interval, the branch."""
    config, every = study.config, study.config.checkpoint.every_steps
    constant = study.train("constant", config)
    for end in ends(study):
        raw = study.judge(step_dir(constant, end))
        study.line("last", raw, step=end)
        start = end - config.averaging.anneal_steps
        branch = study.train(f"annealed-{end}", annealed(config, from_step=start), step_dir(constant, start))
        study.line("annealed", study.judge(branch / step_dir("", end).name), step=end, raw=raw)
        for stride in STRIDES:
            first = max(config.schedule.warmup_steps, every)
            paths = [step_dir(constant, step) for step in range(end, first - 1, -stride * every)][: max(COUNTS)][::-1]
            interval = stride * every * config.batch_tokens
            for (name, count), score in _averages(study, paths):
                study.line(name, score, step=end, raw=raw, count=count, interval_tokens=interval)


def _averages(study: Study, paths: list[Path]) -> Iterator[tuple[tuple[str, int], BpbResult]]:
    """Name and count of an average, and its evaluation, for the averages that end at the last of `paths`.

    Each checkpoint is read once, for all averages that it is in; their sums lie where the model does.
    """
    averages = {
        (name, count): OnlineAverage(study.model, count=count, method=method, device="same")
        for count in COUNTS
        if count <= len(paths)
        for name, method in METHODS.items()
    }
    for place, path in enumerate(paths):
        load_weights(path, study.model)
        for (_, count), average in averages.items():
            if place >= len(paths) - count:
                average.update(place)
    for key, average in averages.items():
        with average.swapped():
            yield key, study.evaluate(study.model)


def start(study: Study) -> None:
    """Continued training with a decaying rate, from the average of the last checkpoints and from the last one."""
    config, every = study.config, study.config.checkpoint.every_steps
    constant = study.train("constant", config)
    steps = config.averaging.anneal_steps
    for fork in (end - steps for end in ends(study)):
        last = step_dir(constant, fork)
        paths = [path for path in list_checkpoints(constant) if int(path.name[5:]) <= fork][-config.averaging.last :]
        results = {}
        for name in ("last", "average"):
            source = last if name == "last" else _averaged_start(study, paths, fork)
            run = study.train(f"start-{name}-{fork}", annealed(config, from_step=fork), source)
            results[name] = study.judge(run / step_dir("", fork + steps).name)
        study.line("start-last", results["last"], step=fork + steps)
        given = {"count": len(paths), "interval_tokens": every * config.batch_tokens}
        study.line("start-average", results["average"], step=fork + steps, raw=results["last"], **given)


def _averaged_start(study: Study, paths: list[Path], step: int) -> Path:
    """A step folder whose weights and moments are the average of `paths`."""
    config, folder = study.config, study.folder / "averaged"
    if not step_dir(folder, step).exists():
        optimizer = config.optim.build(config.optim.groups(study.model))
        load_checkpoint(paths[-1], model=study.model, optimizer=optimizer)
        extra = load_average(paths, model=study.model, optimizer=optimizer)
        save_checkpoint(
            folder,
            step=step,
            tokens=step * config.batch_tokens,
            model=study.model,
            optimizer=optimizer,
            extra=extra,
            config_toml=to_toml(config),
        )
    return step_dir(folder, step)


def spike(study: Study) -> None:
    """A burst of the learning rate at two thirds of the run, carried through with each optimizer state, and without.

    Where it goes back no update is left out, so that the optimizer states are compared and nothing else; leaving
    updates out is a line of its own. With --rate the whole run has that rate and collapses, or does not, by itself.
    """
    config, args = study.config, study.args
    settings: dict[str, Any] = {} if args.rate is None else {"optim.lr": args.rate}
    burst = None if args.rate is not None else 2 * config.steps // 3
    calm = with_overrides(config, settings)
    constant = None
    if burst is not None:
        constant = study.train("constant", calm)
        study.line("undisturbed", study.judge(list_checkpoints(constant)[-1]), step=config.steps)
    ways: dict[str, dict[str, Any]] = {"none": {"spikes.action": "log"}, "skip": {"spikes.action": "skip"}}
    restart = {"spikes.action": "restart", "spikes.max_skips": 0}
    ways |= {policy: restart | {"spikes.optimizer": policy} for policy in POLICIES}
    for policy, way in ways.items():
        own = with_overrides(calm, way)
        name = f"spike-{policy}" if args.rate is None else f"rate-{args.rate:g}-{policy}"
        if constant is not None and burst is not None:
            _begin_as(constant, study.folder / name, burst)
        try:
            with _burst(burst, args.burst_steps, args.burst_factor), warnings.catch_warnings():
                warnings.simplefilter("default")
                run = study.train(name, own)
        except TrainingError as error:
            print(f"seed {config.seed} {name}: ended early: {error}", flush=True)
            continue
        restarts = len(list(run.glob("before-restart-*")))
        study.line(name, study.judge(list_checkpoints(run)[-1]), step=config.steps, restarts=restarts)


def _begin_as(constant: Path, folder: Path, before: int) -> None:
    """Give a new run the checkpoints of `constant` up to the step `before`, until which the two are the same run."""
    if folder.exists():
        return
    for path in list_checkpoints(constant):
        if int(path.name[5:]) <= before:
            shutil.copytree(path, folder / path.name, copy_function=os.link)


@contextmanager
def _burst(step: int | None, steps: int, factor: float) -> Iterator[None]:
    """The learning rate is `factor` times as high over `steps` steps from `step`, the first time they are taken."""
    real: Callable[..., float] = loop.learning_rate_factor
    left = set() if step is None else set(range(step, step + steps))

    def raised(at: int, *args: Any, **kwargs: Any) -> float:
        hit = at in left
        left.discard(at)
        return real(at, *args, **kwargs) * (factor if hit else 1.0)

    loop.learning_rate_factor = raised
    try:
        yield
    finally:
        loop.learning_rate_factor = real


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("anneal", "start", "spike"))
    parser.add_argument("source", help="recipe or TOML file, with a constant rate")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--every", type=int, help="steps between checkpoints; default: the recipe's")
    parser.add_argument("--anneal-steps", type=int, help="length of a branch, a multiple of --every")
    parser.add_argument("--forks", type=int, default=3, help="places along the run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, help="spike: learning rate of the whole run, in place of the burst")
    parser.add_argument("--burst-steps", type=int, default=3)
    parser.add_argument("--burst-factor", type=float, default=100.0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/merge_quality"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    given = {"steps": args.steps, "checkpoint.every_steps": args.every, "averaging.anneal_steps": args.anneal_steps}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    # A constant rate, all checkpoints, and no evaluation on the way but the study's own.
    settings |= {"schedule.kind": "wsd", "schedule.decay_steps": 0, "checkpoint.keep": 0, "eval.checkpoint_tokens": 0}
    config = load_config(args.source, settings | {"device": args.device})
    if not config.averaging.anneal_steps or config.averaging.anneal_steps % config.checkpoint.every_steps:
        parser.error(f"--anneal-steps must be a positive multiple of --every = {config.checkpoint.every_steps}")
    if config.steps % config.checkpoint.every_steps:
        parser.error(f"--steps must be a multiple of --every = {config.checkpoint.every_steps}")
    for seed in args.seeds:
        {"anneal": anneal, "start": start, "spike": spike}[args.study](Study(args, config, seed))


if __name__ == "__main__":
    main()
