"""Time an RDN layer with and without the kernels around its recurrence: python benchmarks/layer_kernels.py

Short convolution with unit length of q and k, gates, and gated norm, in Triton or in PyTorch; weights in fp32, bf16
autocast. Lines go to results/rdn_layer_fwd.jsonl and results/rdn_layer_fwd_bwd.jsonl, both timed in turn after a check.
Needs CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from whimbrel.bench.results import RESULTS, record
from whimbrel.bench.runner import time_alternating
from whimbrel.mixers import RDN, kernels
from whimbrel.testing.budget import assert_close

SHAPES = ((1024, 8, 4096), (1024, 1, 2048), (2048, 1, 32_768))
"""Width, batch and time; heads of 128."""
HEAD = 128
CHECKED = 2e-2
"""RMS ratio of the two outputs, both rounded to bf16 between operations."""


def main(out: Path | None = RESULTS, shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> None:
    for width, batch, time in shapes:
        torch.manual_seed(0)
        layer = RDN(width, num_heads=width // HEAD, head_dim=HEAD).cuda()
        x = torch.randn(batch, time, width, device="cuda", requires_grad=True)
        with torch.no_grad():
            torch_y, kernel_y = (call(layer, x, on=on, backward=False) for on in (False, True))
        assert_close("y", torch_y.float(), kernel_y.float(), CHECKED)
        params = {"B": batch, "T": time, "width": width, "D": HEAD}
        for case, backward in (("rdn_layer_fwd", False), ("rdn_layer_fwd_bwd", True)):
            calls = {
                "kernels": partial(call, layer, x, on=True, backward=backward),
                "torch": partial(call, layer, x, on=False, backward=backward),
            }
            times = time_alternating(calls, device="cuda", budget_seconds=1.0, least=5, most=100)
            for impl, seconds in times.items():
                line = record(case, impl, params, "time", [1e3 * s for s in seconds], "ms", device="cuda", out=out)
                record(case, impl, params, "peak_bytes", peak_bytes(calls[impl]), "bytes", device="cuda", out=out)
                print(f"{case} {params} {impl}: {line['value']:.3f} ms", flush=True)


def call(layer: RDN, x: torch.Tensor, *, on: bool, backward: bool) -> torch.Tensor:
    """The layer's output, and with `backward` gradients of the mean square in all parameters and x."""
    kernels.usable = lambda _: on  # pyrefly: ignore
    with torch.set_grad_enabled(backward), torch.autocast("cuda", torch.bfloat16):
        y, _ = layer(x)
    if backward:
        y.float().square().mean().backward()
        layer.zero_grad()
        x.grad = None
    return y


def peak_bytes(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
