"""Where the time of recurrences goes, by kernel, beside what the card could do: python benchmarks/roofline.py

Lines are of the case `roofline`. For each recurrence, shape and pass (`forward`, without gradients, or
`forward+backward`):

- `time` of every kernel by name, ms a call, all of its launches together, from torch's profiler; `launches` beside it
- `all kernels`, their sum; `limit`, the larger of two times: the products of the chunkwise form (chunks of 64) at the
  rate of a square matrix product of torch, and the bytes of inputs and results, each once, at the rate of a copy
- `matmul` and `copy`: those rates, measured first, TFLOP/s and TB/s

So `limit` counts nothing that a kernel writes for another one. Needs CUDA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from whimbrel.bench.results import RESULTS, record
from whimbrel.bench.runner import time_alternating
from whimbrel.mixers.rdn import rdn
from whimbrel.mixers.rla import rla
from whimbrel.scan.bench import BUDGET, Contender, Problem, outputs
from whimbrel.scan.decay import decay_scan
from whimbrel.scan.delta import delta_scan

CHUNK = 64
SHAPES = ((16, 2048), (1, 16_384), (1, 32_768))
CALLS = 20
CONTENDERS = {
    name: Contender(call=outputs(op, "triton"), truth=outputs(op), takes=takes)
    for name, op, takes in (("rdn", rdn, 6), ("rla", rla, 6), ("delta", delta_scan, 5), ("decay", decay_scan, 5))
}
PRODUCTS = {"rdn": ((6, 7), (16, 17)), "rla": ((5, 5), (13, 12)), "delta": ((3, 4), (8, 10)), "decay": ((2, 2), (5, 5))}
"""Of a chunk and head, forward and backward: products of C x K x V, and of C x C x D."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    given = parser.parse_args()
    flops, bandwidth = rates("cuda")
    write = partial(record, "roofline", device="cuda", out=given.out)
    write("matmul", {}, "rate", flops / 1e12, "TFLOP/s")
    write("copy", {}, "rate", bandwidth / 1e12, "TB/s")
    print(f"matmul {flops / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    for name in given.only:
        for shape in SHAPES:
            problem = Problem(*shape, 16, 128, "cuda")
            CONTENDERS[name].check(problem, BUDGET, backward=True)
            for backward in (False, True):
                params = {"op": name, "pass": "forward+backward" if backward else "forward"} | problem.params
                kernels = by_kernel(CONTENDERS[name].set_up(problem, backward=backward), CALLS)
                for kernel, (milliseconds, launches) in kernels.items():
                    write(kernel, params, "time", milliseconds, "ms")
                    write(kernel, params, "launches", launches, "launches")
                total, bound = (
                    sum(x for x, _ in kernels.values()),
                    1e3 * limit(name, problem, flops, bandwidth, backward),
                )
                write("all kernels", params, "time", total, "ms")
                write("limit", params, "time", bound, "ms")
                parts = ", ".join(f"{kernel} {x:.3f} ({n:g})" for kernel, (x, n) in kernels.items())
                print(f"{params}: {total:.3f} ms, limit {bound:.3f}: {parts}", flush=True)


def rates(device: str, size: int = 8192) -> tuple[float, float]:
    """Operations a second of a bf16 product of square matrices, and bytes read and written a second by a copy."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(8 * size * size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = time_alternating(calls, device=device, budget_seconds=0.3, least=5, most=50)
    return 2 * size**3 / float(np.median(times["matmul"])), 4 * source.numel() / float(np.median(times["copy"]))


def limit(name: str, problem: Problem, flops: float, bandwidth: float, backward: bool) -> float:
    """Seconds that the call cannot go below at these rates: of its products, or of inputs and results."""
    tokens = problem.batch * problem.time * problem.heads
    wide, square = (sum(counts) if backward else counts[0] for counts in zip(*PRODUCTS[name], strict=True))
    operations = 2 * tokens * problem.dim * (wide * problem.dim + square * CHUNK)
    element = problem.dtype.itemsize * problem.dim
    gates = 4 * (3 if name in ("rdn", "rla") else 2)
    moved = tokens * ((4 * element + gates) + backward * (7 * element + 2 * gates))
    return max(operations / flops, moved / bandwidth)


def by_kernel(call: Callable[[], object], calls: int) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches a call of every kernel, the longest first."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return summed([(e.key, e.self_device_time_total, e.count) for e in found.key_averages()], calls)


def summed(events: list[tuple[str, float, int]], calls: int) -> dict[str, tuple[float, float]]:
    """The same of (name, microseconds, launches) over all calls; torch's own kernels count as one, "torch"."""
    kernels: dict[str, tuple[float, float]] = {}
    for key, microseconds, count in events:
        if microseconds <= 0:
            continue
        name = "torch" if "::" in key or key.startswith(("Memcpy", "Memset")) else key
        time, launches = kernels.get(name, (0.0, 0.0))
        kernels[name] = time + microseconds / 1e3 / calls, launches + count / calls
    return dict(sorted(kernels.items(), key=lambda item: -item[1][0]))


if __name__ == "__main__":
    main()
