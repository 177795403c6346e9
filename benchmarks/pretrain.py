"""The shape of the tables of GaLore and Fira: LLaMA-60M on real text under several optimizers, at equal tokens.

    python benchmarks/pretrain.py data/shards --jobs 6 --device cuda

Each optimizer's learning rate is tuned on seed 0 over one grid with --tune-tokens; where the best is the lowest or the
highest, the grid goes on beyond it by factors of two, at most --extend times. The best one is then run with every seed
and --tokens. Rank 128, sequences of 256 tokens, a refresh every 200 steps, warm-up of 10 %, cosine to 10 %, no
decay and no clipping, as in the authors' scripts; the text, the vocabulary and the number of tokens are those of the
shards and of the call. Weights are float32 and products bfloat16. A run goes on from its last checkpoint and keeps its
result in --runs, so that a second call does no work twice; lines in --known are taken as runs that have been done.
--seconds ends the call early with what there is.

Lines go to benchmarks/results/pretrain.jsonl. `perplexity` is exp of the mean loss of all batches of the validation
text; `perplexity_as_published` divides the sum by one batch too many, as the loops of GaLore, Fira and APOLLO do.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from whimbrel.config import Config, load_config
from whimbrel.model.memory import parameter_shapes

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim.kind": "adamw"},
    "galore": {"optim.kind": "galore", "optim.rank": 128, "optim.min_dim": 128},
    "fira": {},
    "fira-paper": {"optim.residual_mode": "paper"},
    "apollo": {"optim.kind": "apollo", "optim.rank": 128, "optim.min_dim": 128},
    "fira-int8+int4": {"optim.state_dtype": "int8", "optim.basis_dtype": "int4", "optim.other_dtype": "int8"},
    "fira-exact": {"optim.refresh": "exact", "optim.stagger": False},
}
TUNED_AS = {"fira-exact": "fira"}
"""Optimizers that take the learning rate of another one and run with the first seed only."""


def config_for(args: argparse.Namespace, name: str, lr: float, seed: int, tokens: int) -> Config:
    """The run of one optimizer."""
    steps = max(1, tokens // args.batch_tokens)
    vocabulary = json.loads((args.shards / "manifest.json").read_text())["vocab_size"]
    return load_config(
        args.recipe,
        {
            "name": name,
            "steps": steps,
            "seed": seed,
            "device": args.device,
            "batch_tokens": args.batch_tokens,
            "micro_batch_tokens": args.batch_tokens,
            "model.vocab_size": vocabulary,
            "data.corpus": str(args.shards),
            "schedule.warmup_steps": max(1, steps // 10),
            "checkpoint.every_steps": min(steps, args.checkpoint_steps),
            "checkpoint.keep": 1,
            "averaging.last": 1,
            "eval.checkpoint_tokens": 0,
            "log_every": min(steps, 50),
            **OPTIMIZERS[name],
            **({} if name == "adamw" else {"optim.impl": args.impl}),
            "optim.lr": lr,
        },
    )


def run(config: Config, folder: Path, eval_tokens: int, eval_batch: int) -> dict[str, float]:
    """Train and evaluate one model in this process; gives what was measured, also to result.json."""
    import torch

    from whimbrel.data import TokenShards
    from whimbrel.infer import load_model
    from whimbrel.training import train

    done = folder / "result.json"
    if not done.exists():
        torch.set_float32_matmul_precision("high")
        started = time.perf_counter()
        trained = train(config, run_dir=folder, quiet=True)
        if trained.interrupted:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - started
        rates = [
            json.loads(line).get("tokens_per_second") for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        model = load_model(folder, device=config.device)
        text = TokenShards(config.data.corpus, "validation", verify=False)
        found = evaluate(model, text, config.data.seq_len, eval_tokens, eval_batch, config.device)
        found |= {"tokens_per_second": sorted(r for r in rates if r)[len(rates) // 2], "seconds": seconds}
        found["state_bytes"] = config.optim.state_bytes(parameter_shapes(config.model))
        done.write_text(json.dumps(found))
        for checkpoint in folder.glob("step-*"):
            shutil.rmtree(checkpoint)
    return json.loads(done.read_text())


def evaluate(model: Any, text: Any, seq_len: int, tokens: int, rows: int, device: str) -> dict[str, float]:
    """Loss over the first `tokens` of a text in batches of equal size, divided as it should be and as published."""
    import torch

    width, losses = rows * seq_len, []
    for first in range(0, min(tokens, text.num_tokens - 1) - width + 1, width):
        ids = torch.from_numpy(text.read(first, first + width + 1)).to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            losses.append(model.per_token_loss(ids[:-1].view(rows, seq_len), ids[1:].view(rows, seq_len)).mean())
    total, batches = float(torch.stack(losses).double().sum()), len(losses)
    return {
        "loss": total / batches,
        "perplexity": math.exp(total / batches),
        "perplexity_as_published": math.exp(total / (batches + 1)),
        "eval_batches": batches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of token shards with a validation split")
    parser.add_argument("--recipe", default="fira-60m")
    parser.add_argument("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--grid", type=float, nargs="+", default=[1.25e-3, 2.5e-3, 5e-3, 1e-2])
    parser.add_argument("--extend", type=int, default=2, metavar="N", help="times that an optimizer's grid may grow")
    parser.add_argument("--known", type=Path, metavar="JSONL", help="lines of earlier runs on the same text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tune-tokens", type=int, default=30_000_000)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--batch-tokens", type=int, default=512 * 256)
    parser.add_argument("--eval-tokens", type=int, default=10_000_000)
    parser.add_argument("--eval-batch", type=int, default=256, help="sequences of a batch of the evaluation")
    parser.add_argument("--checkpoint-steps", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1, help="runs that share the device")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--impl", choices=("auto", "eager", "triton"), default="auto", help="of the low-rank steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    plan = Plan(args, known_runs(args) if args.known else {})
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        running: dict[concurrent.futures.Future[dict[str, float]], Run] = {}
        while True:
            while len(running) < args.jobs and (chosen := plan.next()) is not None:
                folder = args.runs / f"{chosen.name}-lr{chosen.lr:g}-seed{chosen.seed}-tokens{chosen.tokens}"
                config = config_for(args, *chosen)
                running[pool.submit(run, config, folder, args.eval_tokens, args.eval_batch)] = chosen
            if not running:
                return
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                chosen, result = running.pop(future), None
                try:
                    result = future.result()
                except Exception as error:  # one run that diverges is a result, not the end of the others
                    text = str(error).partition("\n")[0][:200]
                    print(f"{chosen.name} lr {chosen.lr:g}: {type(error).__name__}: {text}", flush=True)
                    # says nothing about the rate, as others may have taken the memory; the class is of torch
                    if type(error).__name__ == "OutOfMemoryError" and plan.again(chosen):
                        continue
                if result is not None:
                    write(args, *chosen, result)
                plan.done(chosen, math.inf if result is None else result["loss"])


class Run(NamedTuple):
    """One training run."""

    name: str
    lr: float
    seed: int
    tokens: int


def known_runs(args: argparse.Namespace) -> dict[Run, float]:
    """Losses of the runs whose lines are in --known, as far as recipe and batch are those of this call."""
    from whimbrel.bench.results import read_lines

    found = {}
    for line in read_lines(args.known):
        params = line["params"]
        same = (params["recipe"], params["batch_tokens"]) == (args.recipe, args.batch_tokens)
        if same and line["metric"] == "loss":
            rate, seed, tokens = float(params["lr"]), int(params["seed"]), int(params["tokens"])
            found[Run(line["impl"], rate, seed, tokens)] = line["value"]
    return found


class Plan:
    """Which run is next: first the grid of rates, then the first seed of every optimizer, then the others."""

    def __init__(self, args: argparse.Namespace, known: Mapping[Run, float] = MappingProxyType({})) -> None:
        self.args, self.end = args, time.monotonic() + args.seconds
        self.finished = dict(known)
        self.retried: set[Run] = set()
        leaders = [name for name in args.optimizers if name not in TUNED_AS]
        self.waiting: list[tuple[int, Run]] = []
        self.grids = {name: Grid({}, set(), args.extend) for name in leaders}
        for name, lr, seed, tokens in known:
            if name in self.grids and (seed, tokens) == (0, args.tune_tokens):
                self.grids[name].losses[lr] = known[Run(name, lr, seed, tokens)]
        for lr in args.grid:
            for name in leaders:
                if lr not in self.grids[name].losses:
                    self._tune(name, lr)
        for name, grid in self.grids.items():
            if not grid.open:
                self._choose(name)

    def next(self) -> Run | None:
        """The next run; None where there is none yet, or no more time to begin one."""
        if not self.waiting or time.monotonic() > self.end:
            return None
        first = min(self.waiting, key=lambda item: item[0])
        self.waiting.remove(first)
        return first[1]

    def again(self, run: Run) -> bool:
        """Put a run off until the others of its kind have begun; False where that has been done before."""
        if run in self.retried:
            return False
        self.retried.add(run)
        self.waiting.append((0 if self._tunes(run) else 1 + self.args.seeds.index(run.seed), run))
        return True

    def done(self, run: Run, loss: float) -> None:
        """Note the loss of a run (inf where it failed); the last of a grid brings more rates or the winner's runs."""
        self.finished[run] = loss
        if self._tunes(run):
            grid = self.grids[run.name]
            grid.open.remove(run.lr)
            grid.losses[run.lr] = loss
            if not grid.open:
                self._choose(run.name)

    def _tunes(self, run: Run) -> bool:
        grid = self.grids.get(run.name)
        return grid is not None and run.lr in grid.open and (run.seed, run.tokens) == (0, self.args.tune_tokens)

    def _tune(self, name: str, lr: float) -> None:
        self.grids[name].open.add(lr)
        self.waiting.append((0, Run(name, lr, 0, self.args.tune_tokens)))

    def _choose(self, name: str) -> None:
        """Go beyond an end of the grid where the best rate lies there, or line up the winner's runs."""
        grid, args = self.grids[name], self.args
        if min(grid.losses.values(), default=math.inf) == math.inf:
            return
        best = min(grid.losses, key=grid.losses.__getitem__)
        beyond = [rate for end, rate in ((min, best / 2), (max, best * 2)) if best == end(grid.losses)]
        if beyond and grid.extensions:
            self.grids[name] = grid._replace(extensions=grid.extensions - 1)
            for rate in beyond:
                self._tune(name, rate)
            return
        wanted = [(1 + i, Run(name, best, seed, args.tokens)) for i, seed in enumerate(args.seeds)]
        followers = [other for other in args.optimizers if TUNED_AS.get(other) == name]
        wanted += [(1, Run(follower, best, args.seeds[0], args.tokens)) for follower in followers]
        self.waiting += [(when, run) for when, run in wanted if run not in self.finished]


class Grid(NamedTuple):
    """Learning rates of one optimizer: losses of those tried, those under way, and how often more may come."""

    losses: dict[float, float]
    open: set[float]
    extensions: int


def write(args: argparse.Namespace, name: str, lr: float, seed: int, tokens: int, result: dict[str, float]) -> None:
    """Append the result lines of one run."""
    from whimbrel.bench.results import record

    params = {
        "recipe": args.recipe,
        "optimizer": name,
        "lr": lr,
        "seed": seed,
        "tokens": tokens // args.batch_tokens * args.batch_tokens,
        "batch_tokens": args.batch_tokens,
        "eval_batches": int(result["eval_batches"]),
        "state_bytes": int(result["state_bytes"]),
    }
    for metric, unit in (
        ("loss", "nats"),
        ("perplexity", "perplexity"),
        ("perplexity_as_published", "perplexity"),
        ("tokens_per_second", "tokens/s"),
    ):
        record("pretrain", name, params, metric, result[metric], unit, device=args.device, out=args.out)
    print(
        f"{name:16} lr {lr:<8g} seed {seed} {tokens / 1e6:.1f} M tokens: loss {result['loss']:.4f}, perplexity "
        f"{result['perplexity']:.2f} ({result['perplexity_as_published']:.2f} as published), "
        f"{result['tokens_per_second'] / 1e3:.0f} k tokens/s, {result['seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
