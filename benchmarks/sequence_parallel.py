"""A recurrence over sequences that several cards share, against one card with the whole of them.

    python benchmarks/sequence_parallel.py --processes 2

One process a card. Every process makes the same inputs and takes its stretch; outputs and all gradients of the
stretches are compared with those of the whole before anything is timed. Lines of forward and backward go to
benchmarks/results/sequence_parallel.jsonl (`time`, ms): impl `one-card` is the whole sequence on one card, `rounds` and
`chain` are the two schedules, the slowest process's time from a barrier on. `peak_bytes` is that of the first process,
`difference` the largest RMS ratio of any output or gradient to the whole's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from whimbrel.bench.results import RESULTS, record
from whimbrel.mixers import parallel
from whimbrel.mixers.rdn import rdn
from whimbrel.mixers.rla import rla
from whimbrel.scan.bench import ARGUMENTS, BUDGET, Problem
from whimbrel.testing.budget import rms_ratio

OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rdn": (rdn, parallel.rdn),
    "rla": (rla, parallel.rla),
}
SCHEDULES = ("rounds", "chain")
LENGTHS = (32_768, 131_072)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of the one sequence")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    given = parser.parse_args(argv)
    if given.device == "cuda" and torch.cuda.device_count() < given.processes:
        parser.error(f"--processes = {given.processes}: there are {torch.cuda.device_count()} CUDA devices")
    if any(length % given.processes for length in given.lengths):
        parser.error(f"--lengths = {given.lengths}: each must be a multiple of --processes = {given.processes}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, given), nprocs=given.processes)


def work(rank: int, folder: str, given: argparse.Namespace) -> None:
    """Everything that process `rank` does."""
    if given.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if given.device == "cuda" else "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=given.processes,
    )
    for name in given.only:
        for length in given.lengths:
            compare(name, Problem(1, length, given.heads, given.dim, given.device), given)
    dist.destroy_process_group()


def compare(name: str, problem: Problem, given: argparse.Namespace) -> None:
    """Check both schedules of one recurrence at one length, then time them and one card."""
    rank, world = dist.get_rank(), dist.get_world_size()
    one, shared = OPS[name]
    inputs = problem.inputs()
    weight = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1)).to(inputs[2])
    wholes = [x.requires_grad_() for x in inputs]
    share = problem.time // world
    mine = slice(rank * share, (rank + 1) * share)
    parts = [x[:, mine].detach().clone().requires_grad_() for x in inputs]
    calls = {"one-card": partial(run, one, wholes, weight)}
    want = [x[:, mine].clone() for x in calls["one-card"]()]
    differences = {}
    for schedule in SCHEDULES:
        op = partial(shared, group=dist.group.WORLD, schedule=schedule)
        calls[schedule] = partial(run, op, parts, weight[:, mine].contiguous())
        differences[schedule] = largest_difference(name, want, calls[schedule]())
    params = {"op": name} | problem.params | {"processes": world}
    write = partial(record, "sequence_parallel", device=given.device, out=given.out)
    for impl, call in calls.items():
        times, peak = timed(call, given, alone=impl == "one-card")
        if rank:
            continue
        lines = [write(impl, params, "time", times, "ms")]
        if peak:
            lines.append(write(impl, params, "peak_bytes", peak, "bytes"))
        if impl in differences:
            lines.append(write(impl, params, "difference", differences[impl], "ratio"))
        print(name, problem.time, impl, *(f"{x['metric']} {x['value']:.4g} {x['unit']}" for x in lines), flush=True)


def run(op: Callable[..., Any], inputs: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """y and the gradients of (y * weight).sum() in all inputs."""
    y = op(*inputs).y
    return [y.detach(), *torch.autograd.grad(y, inputs, weight)]


def largest_difference(name: str, want: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest RMS ratio on any process; raises AssertionError where one is above the budget of the kernels."""
    ratios = {part: rms_ratio(a, b) for part, a, b in zip(("y", *ARGUMENTS), want, got, strict=True)}
    for part, ratio in ratios.items():
        assert ratio <= BUDGET[part], f"{name} {part}: RMS ratio {ratio:.2g} to one card, allowed {BUDGET[part]}"
    return float(highest(max(ratios.values()), want[0].device))


def timed(call: Callable[[], object], given: argparse.Namespace, *, alone: bool) -> tuple[list[float], int]:
    """Milliseconds of each repeat, of the slowest process, and the peak of this one's memory; `alone`: of rank 0."""
    cuda, milliseconds, peak = given.device == "cuda", [], 0
    device = torch.device(given.device, torch.cuda.current_device()) if cuda else torch.device("cpu")
    for repeat in range(given.repeats + 1):
        wait(device)
        if repeat == 0 and cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        if not alone or dist.get_rank() == 0:
            call()
        if cuda:
            torch.cuda.synchronize()
        spent = highest(1e3 * (time.perf_counter() - started), device)
        if repeat == 0 and cuda:
            peak = torch.cuda.max_memory_allocated() - before
        elif repeat:
            milliseconds.append(spent)
    return milliseconds, peak


def wait(device: torch.device) -> None:
    """Until all processes are here and no device has work left."""
    highest(0.0, device)
    if device.type == "cuda":
        torch.cuda.synchronize()


def highest(value: float, device: torch.device) -> float:
    """The largest `value` of all processes."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


if __name__ == "__main__":
    main()
