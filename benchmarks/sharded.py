"""Low-rank optimizers under FSDP2: the losses of one card, the time beside sharded AdamW, what checkpoints give back.

    torchrun --nproc-per-node 2 benchmarks/sharded.py --recipe fira-130m

Tokens are arithmetic sequences, which a model learns within tens of steps. Lines go to
benchmarks/results/optim_sharded.jsonl:

- `loss_difference`: largest difference of the losses of --steps steps, relative, of all processes (impl `fira`) and of
  one process that takes the batch in as many pieces (`one-in-pieces`) to one process that takes it whole, in float32.
  The latter is what rounding alone does.
- `time`: ms of a training step in bfloat16 autocast, float32 weights, for Fira and for torch's fused AdamW, alternating
  in stretches; refreshes are included as they come. `overhead`: Fira's median over AdamW's, less 1. `state_bytes`: of
  this process.
- `resumed_bitwise`: 1 if a run that was saved and loaded by torch.distributed.checkpoint on as many processes has every
  weight of one that was not, `repeated_bitwise`: the same for a run that was only repeated.
- `loaded_on_one`: largest relative difference of the losses of one process, which has loaded what all have saved, to
  those with which all went on.
"""

from __future__ import annotations

import argparse
import os
import shutil
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
from whimbrel.config import load_config
from whimbrel.model import build_model
from whimbrel.optim import AdamWConfig
from whimbrel.training.processes import Processes, pick_device, shard


class Job:
    """A model in training on all processes, or whole on this one."""

    def __init__(self, args: argparse.Namespace, processes: Processes, *, optimizer: str = "fira", rank: int) -> None:
        config = load_config(args.recipe)
        if args.layers:
            config = replace(config, model=replace(config.model, num_layers=args.layers))
        self.processes, self.vocabulary, self.length = processes, config.model.vocab_size, args.seq_len
        self.model = build_model(config.model, seed=0).to(processes.device)
        shard(self.model, processes)
        low_rank = replace(config.optim, rank=rank, min_dim=rank, impl=args.impl, side=args.side)
        optim = low_rank if optimizer == "fira" else AdamWConfig(lr=1e-3)
        self.optimizer = optim.build(optim.groups(self.model))
        if optimizer != "fira":
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
    parser.add_argument(
        "--side", choices=("std", "right"), default="std", help="right sends least, and is what kernels take"
    )
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
    params = {"recipe": args.recipe, "rank": args.rank, "world": everyone.world, "impl": args.impl, "side": args.side}

    def line(impl: str, metric: str, values: float | list[float], unit: str) -> None:
        if everyone.first:
            record("optim_sharded", impl, params, metric, values, unit, device=device.type, out=args.out)
            middle = values if isinstance(values, float) else sorted(values)[len(values) // 2]
            print(f"{impl:20} {metric:20} {middle:.6g} {unit}", flush=True)

    compare_times(args, everyone, line)
    compare_losses(args, everyone, alone, line)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels' backward for float32 adds in no fixed order
        checkpoints(args, everyone, alone, line)
    dist.destroy_process_group()


def compare_losses(args: argparse.Namespace, everyone: Processes, alone: Processes, line: Any) -> None:
    steps, sequences = range(args.steps), args.sequences
    reference = Job(args, alone, rank=args.rank).losses(steps, sequences)
    pieces = Job(args, alone, rank=args.rank).losses(steps, sequences, pieces=everyone.world)
    spread = Job(args, everyone, rank=args.rank).losses(steps, sequences)
    if everyone.first:
        print("losses, one and all:", [round(x, 4) for x in reference[::5]], [round(x, 4) for x in spread[::5]])
    line("one-in-pieces", "loss_difference", largest(reference, pieces), "1")
    line("fira", "loss_difference", largest(reference, spread), "1")


def checkpoints(args: argparse.Namespace, everyone: Processes, alone: Processes, line: Any) -> None:
    half, sequences = args.steps // 2, args.sequences
    folder = [tempfile.mkdtemp() if everyone.first else ""]
    dist.broadcast_object_list(folder, src=0)
    through, again, resumed = (Job(args, everyone, rank=args.rank) for _ in range(3))
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
        one = Job(args, alone, rank=args.rank)
        one.losses(range(90, 91), sequences)
        state = one.state()
        dcp.load(state, checkpoint_id=folder[0], no_dist=True)
        one.load(state)
        line("fira", "loaded_on_one", largest(rest, one.losses(range(half, args.steps), sequences)), "1")
        shutil.rmtree(folder[0])
    everyone.wait()


def compare_times(args: argparse.Namespace, everyone: Processes, line: Any) -> None:
    jobs = {name: Job(args, everyone, optimizer=name, rank=args.rank) for name in ("fira", "torch-adamw-fused")}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        timed(job, 0, 5, args.timed_sequences)
    for number in range(args.rounds):
        for name, job in jobs.items():
            times[name] += timed(job, 5 + number * args.steps, args.steps, args.timed_sequences)
    middle = {}
    for name, job in jobs.items():
        held = sum(local(v).nbytes for s in job.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        line(name, "time", times[name], "ms")
        line(name, "state_bytes", float(held), "B")
        middle[name] = sorted(times[name])[len(times[name]) // 2]
    line("fira", "overhead", middle["fira"] / middle["torch-adamw-fused"] - 1, "1")


if __name__ == "__main__":
    main()
