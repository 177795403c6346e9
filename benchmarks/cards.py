"""One machine with several cards: tokens a second of 1 and of N processes, and what a killed worker costs.

    python benchmarks/cards.py --recipe rdn-360m --processes 2
    python benchmarks/cards.py --recipe tiny-rdn --processes 1 --steps 60 --total 60 --kill-after 13 28 45

Trains the same configuration, with the same batch, in one process and in N under torchrun. The first stretch of the
second run gives its throughput; then a worker is killed with SIGKILL at a random moment, torchrun starts all of them
again, and the run goes on, to the next kill or its last step; with no step after --kill-after nobody is killed. Lines
go to benchmarks/results/cards.jsonl: `throughput`; `loss_gap`, the differences between the two runs' losses, step by
step, before the first kill (`largest`, `first`, `last`); `steps_lost` by the kills, which the distance of checkpoints
bounds; `seconds_to_go_on`, from a kill to the first new step; `repeat_gap`, of the losses of steps that were run
again; `restart_gap`, between the losses of the two runs from the first kill on, where the first has so many steps.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import run as torchrun

from whimbrel.bench.results import RESULTS, record
from whimbrel.config import Config, load_config, to_toml
from whimbrel.training.metrics import read_metrics

WARM_STEPS = 2
"""Steps at the start whose time does not count: kernels are compiled, memory is allocated."""


def write_text(folder: Path, *, documents: int, words: int) -> Path:
    """Text of words that follow Zipf's law, so that the loss has something to fall towards."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    known = ["".join(draw.choices("aeioulmnrst", k=draw.randint(2, 7))) for _ in range(3000)]
    odds = [1 / (rank + 1) for rank in range(len(known))]
    for number in range(documents):
        (folder / f"{number:03d}.txt").write_text(" ".join(draw.choices(known, odds, k=words)) + f" {number}.\n")
    return folder


def settings(args: argparse.Namespace, corpus: Path, steps: int) -> Config:
    overrides: dict[str, Any] = {
        "device": args.device,
        "steps": steps,
        "log_every": 1,
        "batch_tokens": args.batch_tokens,
        "micro_batch_tokens": args.micro_batch_tokens,
        "data.seq_len": args.seq_len,
        "data.corpus": str(corpus),
        "data.recall_fraction": 0.0,
        "checkpoint.every_steps": args.every,
        "checkpoint.keep": 2,
        "eval.checkpoint_tokens": 0,
        "schedule.warmup_steps": min(4, steps),
        "optim.lr": args.lr,
    }
    return load_config(args.recipe, overrides)


def start(config: Config, run_dir: Path, processes: int = 0) -> subprocess.Popen[bytes]:
    """`whimbrel train` in that many processes under torchrun, which starts them again; 0 for one without torchrun."""
    file = run_dir.with_suffix(".toml")
    file.write_text(to_toml(config))
    command = [sys.executable, "-m"]
    if processes:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=9"]
        # Workers that wait for a dead one in NCCL hear no SIGTERM; older releases give them 30 seconds.
        if "--shutdown-timeout" in Path(torchrun.__file__).read_text():
            command += ["--shutdown-timeout=3"]
        command += ["-m"]
    command += ["whimbrel", "train", str(file), "--run-dir", str(run_dir)]
    return subprocess.Popen(command, stdout=sys.stderr)


def losses(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in read_metrics(run_dir) if "loss" in line}


def wait(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        sys.exit(f"a run ended with status {process.returncode}; see its messages above")


def workers(agent: int) -> list[int]:
    """Processes that torchrun has started and that train."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == agent and b"train" in command:
            found.append(int(folder.name))
    return sorted(found)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="rdn-360m")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument("--micro-batch-tokens", type=int, default=32_768)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="steps in one process")
    parser.add_argument("--every", type=int, default=8, help="steps between checkpoints")
    parser.add_argument("--lr", type=float, default=2e-4, help="so low that rounding stays small between the two runs")
    parser.add_argument("--total", type=int, default=18, help="steps of the run in which a worker is killed")
    parser.add_argument("--kill-after", type=int, nargs="*", default=[12], help="steps after which a worker is killed")
    parser.add_argument("--words", type=int, default=12_000, help="words of each of 100 documents")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    import torch

    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    draw = random.Random(args.seed)
    names = ("recipe", "batch_tokens", "micro_batch_tokens", "seq_len", "lr")
    params = {name: getattr(args, name) for name in names}

    def write(impl: str, metric: str, values: float | list[float], unit: str, **more: Any) -> None:
        line = record("cards", impl, {**params, **more}, metric, values, unit, device=device, out=args.out)
        print(
            f"{impl:12} {metric:17} {line['value']:12,.4g} {unit}  ({line['q25']:,.4g} to {line['q75']:,.4g})",
            flush=True,
        )

    def compare(many: dict[int, dict[str, Any]]) -> None:
        """The rate of the second run, and how far its losses are from those of the first, by what it had logged."""
        write(together, "throughput", rates(many), "tokens/s")
        gaps = [abs(one[step]["loss"] - many[step]["loss"]) for step in one if step in many]
        ends = {"largest": max(gaps), "first": gaps[0], "last": gaps[-1], "last_loss": one[len(gaps)]["loss"]}
        ends = {name: round(value, 6) for name, value in ends.items()}
        write(together, "loss_gap", gaps, "nats", steps=len(gaps), **ends)

    alone, together = "1 process", f"{args.processes} processes" if args.processes > 1 else "1 process, started again"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        corpus = write_text(root / "text", documents=100, words=args.words)
        wait(start(settings(args, corpus, args.steps), root / "one"))
        one = losses(root / "one")
        write(alone, "throughput", rates(one), "tokens/s")

        process = start(settings(args, corpus, args.total), root / "many", args.processes)
        kills: list[Kill] = []
        for step in args.kill_after:
            kills.append(kill(process, root / "many", step, args.batch_tokens, draw))
            if len(kills) == 1:
                compare(kills[0].before)
        wait(process)
        after = losses(root / "many")
    if sorted(after) != list(range(1, args.total + 1)):
        sys.exit(f"steps are missing after the restart: {sorted(after)}")
    if not kills:
        compare(after)
        return
    found = [kill.cost(later) for kill, later in zip(kills, [*(kill.before for kill in kills[1:]), after])]
    lost = [cost.steps for cost in found]
    write(together, "steps_lost", lost, "steps", every=args.every, kills=len(kills), most=max(lost))
    write(together, "seconds_to_go_on", [cost.seconds for cost in found], "s")
    again = [gap for cost in found for gap in cost.gaps]
    if again:
        write(together, "repeat_gap", max(again), "nats", steps=len(again))
    late = [abs(one[step]["loss"] - after[step]["loss"]) for step in one if step > min(args.kill_after)]
    if late:
        write(together, "restart_gap", max(late), "nats", steps=len(late))


class Cost(NamedTuple):
    """What a kill cost."""

    steps: int
    seconds: float
    gaps: list[float]
    """Between the losses of steps that were run again, in nats."""


class Kill(NamedTuple):
    """A worker's end."""

    moment: float
    before: dict[int, dict[str, Any]]
    """What the run had logged."""

    def cost(self, later: dict[int, dict[str, Any]]) -> Cost:
        """By what the run had logged at a later time."""
        new = min((step for step, line in later.items() if line["time"] > self.moment), default=max(later) + 1)
        gaps = [abs(later[step]["loss"] - self.before[step]["loss"]) for step in self.before if step >= new]
        return Cost(max(self.before) - (new - 1), later[new]["time"] - self.moment, gaps)


def kill(process: subprocess.Popen[bytes], run_dir: Path, step: int, batch_tokens: int, draw: random.Random) -> Kill:
    """End a worker with SIGKILL at a random moment of the step after this one."""
    while max(losses(run_dir), default=0) < step:
        if process.poll() is not None:
            wait(process)
            sys.exit(f"the run ended before step {step}")
        time.sleep(0.02)
    time.sleep(draw.uniform(0, statistics.median(batch_tokens / rate for rate in rates(losses(run_dir)))))
    before = losses(run_dir)
    os.kill(draw.choice(workers(process.pid)), signal.SIGKILL)
    return Kill(time.time(), before)


def rates(lines: dict[int, dict[str, Any]]) -> list[float]:
    return [line["tokens_per_second"] for step, line in lines.items() if step > WARM_STEPS]


if __name__ == "__main__":
    main()
