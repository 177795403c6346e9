"""Quality at equal tokens: the same tiny model under several mixers, or several optimizers, over three seeds.

    python benchmarks/quality.py mixers --jobs 4
    python benchmarks/quality.py optimizers --jobs 4

Each method's learning rate is tuned on seed 0 over one grid; the best one is then run with the other seeds. Each
run is `whimbrel train` in a process of its own, kept in --runs, so that a second call does no work twice. Lines go to
benchmarks/results/quality-mixers.jsonl and quality-optimizers.jsonl; the tuning runs go to quality-tuning.jsonl.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from whimbrel.config import Config, load_config, to_toml, with_overrides
from whimbrel.model.memory import parameter_counts, parameter_shapes

GRID = {"mixers": (2.5e-3, 5e-3, 1e-2, 2e-2), "optimizers": (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)}
SEEDS = (0, 1, 2)
MIXERS = {"RDN hybrid": "tiny-rdn", "GDN": "tiny-gdn", "softmax": "tiny-softmax"}
OPTIMIZERS = ("fira", "galore", "adamw")


def variants(family: str) -> dict[str, Config]:
    """Name -> configuration before the learning rate and the seed are set."""
    if family == "mixers":
        return {name: load_config(recipe) for name, recipe in MIXERS.items()}
    base = load_config("tiny-rdn")
    rank, gap = base.optim.rank, base.optim.refresh_steps
    shared = {"optim.rank": rank, "optim.refresh_steps": gap}
    return {
        kind: with_overrides(base, {"optim.kind": kind} | ({} if kind == "adamw" else shared)) for kind in OPTIMIZERS
    }


def run(config: Config, folder: Path, device: str) -> dict[str, Any]:
    """Train and judge in processes of their own; gives the evaluation as plain data."""
    done = folder / "eval.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "start.toml"
        file.write_text(to_toml(dataclasses.replace(config, device=device)))
        call = [sys.executable, "-m", "whimbrel"]
        with (folder / "log.txt").open("w") as log:
            train = [*call, "train", str(file), "--run-dir", str(folder)]
            subprocess.run(train, check=True, stdout=log, stderr=log)
        judged = subprocess.run(
            [*call, "eval", str(folder), "--tasks", "bpb", "mqar", "--device", device, "--json"],
            check=True,
            capture_output=True,
            text=True,
        )
        done.write_text(judged.stdout)
    return json.loads(done.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("mixers", "optimizers"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="default: the recipe's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()

    every = load_config("tiny-rdn").steps if args.steps is None else args.steps
    common = {"steps": every, "checkpoint.every_steps": every, "eval.checkpoint_tokens": 0, "averaging.last": 1}

    def config_for(name: str, lr: float, seed: int) -> Config:
        return with_overrides(variants(args.family)[name], {**common, "optim.lr": lr, "seed": seed})

    def job(name: str, lr: float, seed: int) -> dict[str, Any]:
        folder = args.runs / f"{args.family}-{name.replace(' ', '-')}-lr{lr:g}-seed{seed}-steps{every}"
        return run(config_for(name, lr, seed), folder, args.device)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        tuning = {
            (name, lr): pool.submit(job, name, lr, 0) for name in variants(args.family) for lr in GRID[args.family]
        }
        best = {}
        for name in variants(args.family):
            losses = {lr: tuning[name, lr].result()["bpb"]["bits_per_byte"] for lr in GRID[args.family]}
            best[name] = min(losses, key=losses.__getitem__)
        final = {(name, seed): pool.submit(job, name, lr, seed) for name, lr in best.items() for seed in SEEDS}
        scores = {key: future.result() for key, future in final.items()}
    write(args, config_for, best, {key: f.result() for key, f in tuning.items()}, scores)


def write(args: Any, config_for: Any, best: Any, tuning: Any, scores: Any) -> None:
    """Append the result lines."""
    from whimbrel.bench.results import record

    for (name, lr), result in tuning.items():
        params = {"family": args.family, "lr": lr, "tokens": tokens(config_for(name, lr, 0)), "seed": 0}
        record("quality-tuning", name, params, "validation loss", result["bpb"]["bits_per_byte"], "bits per byte",
               device=args.device, out=args.out)  # fmt: skip
    for (name, seed), result in scores.items():
        config = config_for(name, best[name], seed)
        params = {
            "tokens": tokens(config),
            "seed": seed,
            "lr": best[name],
            "parameters": parameter_counts(config.model)["total"],
            "state_bytes": config.optim.state_bytes(parameter_shapes(config.model)),
            "chance": result["mqar"][0]["chance"],
            "setting": f"rate tuned on seed 0 over {len(GRID[args.family])} values, then {len(SEEDS)} seeds",
        }
        mqar = sum(cell["accuracy"] for cell in result["mqar"]) / len(result["mqar"])
        for metric, value, unit in (
            ("validation loss", result["bpb"]["bits_per_byte"], "bits per byte"),
            ("MQAR accuracy", mqar, "share"),
        ):
            record(f"quality-{args.family}", name, params, metric, value, unit, device=args.device, out=args.out)
        bits = result["bpb"]["bits_per_byte"]
        print(f"{name:12} seed {seed} lr {best[name]:g}: {bits:.4f} bits per byte, MQAR {mqar:.1%}")


def tokens(config: Config) -> int:
    return config.steps * config.batch_tokens


if __name__ == "__main__":
    main()
