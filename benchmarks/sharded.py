"""Low-rank optimizers under FSDP2: the losses of one card, the time beside sharded AdamW, what checkpoints give back.

    torchrun --nproc-per-node 2 benchmarks/sharded.py --recipe fira-130m --side right std

Tokens are arithmetic sequences, which a model learns within tens of steps. Lines go to
benchmarks/results/optim_sharded.jsonl:

- `loss_difference`: largest difference of the losses of --steps steps, relative, of all processes (impl `fira`) and of
  one process that takes the batch in as many pieces (`one-in-pieces`) to one process that takes it whole, in float32.
  The latter is what rounding alone does.
- `time`: ms of a training step in bfloat16 autocast, float32 weights, of Fira on each side and of torch's fused AdamW,
  alternating in stretches; refreshes are included as they come. `overhead`: Fira's median over AdamW's, less 1, and
  `overhead_of_means`, which counts every refresh. `state_bytes`: of this process.
- `resumed_bitwise`: 1 if a run that was saved and loaded by torch.distributed.checkpoint on as many processes has every
  weight of one that was not, `repeated_bitwise`: the same for a run that was only repeated.
- `loaded_on_one`: largest relative difference of the losses of one process, which has loaded what all have saved, to
  those with which all went on.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.attention import SDPBackend, sdpa_kernel

from whimbrel.bench.results import RESULTS, record
from whimbrel.config import Config, load_config
from whimbrel.model import build_model
from whimbrel.optim import AdamWConfig
from whimbrel.training.processes import Processes, pick_device, shard


@functools.cache
def built(recipe: str, layers: int) -> tuple[Config, nn.Module]:
    """The configuration and its model, to be copied."""
    config = load_config(recipe)
    if layers:
        config = replace(config, model=replace(config.model, num_layers=layers))
    return config, build_model(config.model, seed=0)


class Job:
    """A model in training on all processes, or whole on this one."""

    def __init__(self, args: argparse.Namespace, processes: Processes, side: str | None) -> None:
        """side: of Fira's bases; None takes AdamW."""
        config, model = built(args.recipe, args.layers)
        self.processes, self.vocabulary, self.length = processes, config.model.vocab_size, args.seq_len
        self.model = copy.deepcopy(model).to(processes.device)
        shard(self.model, processes)
        optim = AdamWConfig(lr=1e-3)
        if side is not None:
            optim = replace(config.optim, rank=args.rank, min_dim=args.rank, impl=args.impl, side=side)
        self.optimizer = optim.build(optim.groups(self.model))
        if side is None:
            for group in self.optimizer.param_groups:
                group["fused"] = processes.device.type == "cuda"

    def tokens(self, step: int, sequences: int) -> Tensor:
        """The batch [sequences, T] of a step, on every process."""
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(self.vocabulary, (sequences, 1), generator=generator)
        pace = torch.randint(1, 8, (sequences, 1), generator=generator)
        return (start + pace * torch.arange(self.length + 1)) % min(self.vocabulary, 997)

    def step(self, step: int, sequences: int, *, pieces: int = 1, autocast: bool = False) -> Tensor:
        """One step on this process's part of the batch; returns the loss over all of it."""
        device, world = self.processes.device, self.processes.world
        mine = self.tokens(step, sequences).chunk(world)[self.processes.rank].to(device)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for part in mine.chunk(pieces):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = self.model.loss(part[:, :-1], part[:, 1:]) / pieces
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        return self.processes.sum(total) / world

    def losses(self, steps: range, sequences: int, **options: Any) -> list[float]:
        return [self.step(step, sequences, **options).item() for step in steps]

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optim": get_optimizer_state_dict(self.model, self.optimizer)}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optim"])

    def same(self, other: nn.Module) -> bool:
        """Whether the other model has this one's bits, in every process."""
        pairs = zip(self.model.parameters(), other.parameters(), strict=True)
        differs = sum(not torch.equal(local(a), local(b)) for a, b in pairs)
        return not self.processes.any(bool(differs))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def largest(reference: list[float], found: list[float]) -> float:
    return max(abs(a - b) / a for a, b in zip(reference, found, strict=True))


def timed(job: Job, start: int, steps: int, sequences: int) -> list[float]:
    """Milliseconds of each step."""
    found = []
    for step in range(start, start + steps):
        if job.processes.device.type == "cuda":
            torch.cuda.synchronize()
        job.processes.wait()
        began = time.perf_counter()
        job.step(step, sequences, autocast=True)
        if job.processes.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - began))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fira-130m")
    parser.add_argument("--layers", type=int, default=0, help="layers in place of the recipe's")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=32, help="in a batch, where losses are compared")
    parser.add_argument("--timed-sequences", type=int, default=256, help="in a batch, where steps are timed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--impl", choices=("auto", "eager", "triton"), default="auto")
    sides = ("std", "right")
    parser.add_argument(
        "--side", choices=sides, nargs="+", default=["std"], help="one after another; right sends least"
    )
    parts = ("times", "losses", "checkpoints")
    parser.add_argument("--only", choices=parts, nargs="+", default=list(parts), help="what is measured")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    everyone = Processes(dist.get_rank(), dist.get_world_size(), device)
    alone = Processes(0, 1, device)
    params = {"recipe": args.recipe, "rank": args.rank, "world": everyone.world}

    def line(impl: str, metric: str, values: float | list[float], unit: str, *, side: str | None) -> None:
        if everyone.first:
            how = params if side is None else params | {"impl": args.impl, "side": side}
            record("optim_sharded", impl, how, metric, values, unit, device=device.type, out=args.out)
            middle = values if isinstance(values, float) else sorted(values)[len(values) // 2]
            print(f"{impl:20} {side or '':6} {metric:20} {middle:.6g} {unit}", flush=True)

    if "times" in args.only:
        compare_times(args, everyone, line)
    for side in args.side if "losses" in args.only else ():
        compare_losses(args, everyone, alone, functools.partial(line, side=side), side)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels' backward for float32 adds in no fixed order
        for side in args.side if "checkpoints" in args.only else ():
            checkpoints(args, everyone, alone, functools.partial(line, side=side), side)
    dist.destroy_process_group()


def compare_losses(args: argparse.Namespace, everyone: Processes, alone: Processes, line: Any, side: str) -> None:
    steps, sequences = range(args.steps), args.sequences
    reference = Job(args, alone, side).losses(steps, sequences)
    pieces = Job(args, alone, side).losses(steps, sequences, pieces=everyone.world)
    spread = Job(args, everyone, side).losses(steps, sequences)
    if everyone.first:
        print("losses, one and all:", [round(x, 4) for x in reference[::5]], [round(x, 4) for x in spread[::5]])
    line("one-in-pieces", "loss_difference", largest(reference, pieces), "1")
    line("fira", "loss_difference", largest(reference, spread), "1")


def checkpoints(args: argparse.Namespace, everyone: Processes, alone: Processes, line: Any, side: str) -> None:
    half, sequences = args.steps // 2, args.sequences
    folder = [tempfile.mkdtemp() if everyone.first else ""]
    dist.broadcast_object_list(folder, src=0)
    through, again, resumed = (Job(args, everyone, side) for _ in range(3))
    through.losses(range(half), sequences)
    dcp.save(through.state(), checkpoint_id=folder[0])
    rest = through.losses(range(half, args.steps), sequences)
    again.losses(range(args.steps), sequences)
    line("fira", "repeated_bitwise", float(through.same(again.model)), "1")
    resumed.losses(range(90, 91), sequences)  # makes the state that is read into
    state = resumed.state()
    dcp.load(state, checkpoint_id=folder[0])
    resumed.load(state)
    resumed.losses(range(half, args.steps), sequences)
    line("fira", "resumed_bitwise", float(through.same(resumed.model)), "1")
    if everyone.first:
        one = Job(args, alone, side)
        one.losses(range(90, 91), sequences)
        state = one.state()
        dcp.load(state, checkpoint_id=folder[0], no_dist=True)
        one.load(state)
        line("fira", "loaded_on_one", largest(rest, one.losses(range(half, args.steps), sequences)), "1")
        shutil.rmtree(folder[0])
    everyone.wait()


def compare_times(args: argparse.Namespace, everyone: Processes, line: Any) -> None:
    sides = [None, *args.side]
    jobs = {side: Job(args, everyone, side) for side in sides}
    times: dict[str | None, list[float]] = {side: [] for side in sides}
    for job in jobs.values():
        timed(job, 0, 5, args.timed_sequences)
    for number in range(args.rounds):
        for side, job in jobs.items():
            times[side] += timed(job, 5 + number * args.steps, args.steps, args.timed_sequences)
    for side, job in jobs.items():
        impl = "torch-adamw-fused" if side is None else "fira"
        held = sum(local(v).nbytes for s in job.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        line(impl, "time", times[side], "ms", side=side)
        line(impl, "state_bytes", float(held), "B", side=side)
    for side in args.side:
        for metric, middle in (("overhead", statistics.median), ("overhead_of_means", statistics.fmean)):
            line("fira", metric, middle(times[side]) / middle(times[None]) - 1, "1", side=side)


if __name__ == "__main__":
    main()
