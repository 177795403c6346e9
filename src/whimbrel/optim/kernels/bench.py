"""Benchmark case `optim_step`: optimizer steps and refreshes over the matrices of large decoders, beside rivals.

Weights and gradients are in bfloat16. Each run builds the optimizer anew, takes its first step outside of the
clock, and then a whole refresh gap, each step timed by itself.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from whimbrel._lazy import load_object
from whimbrel.bench.case import Case, Figures
from whimbrel.errors import UnsupportedError
from whimbrel.optim import Fira, FiraConfig, GaLore, GaLoreConfig
from whimbrel.optim.options import Impl

REFRESH_STEPS = 200
"""Steps between two refreshes (arXiv 2410.01623, section 5)."""
OFFICIAL_STEPS = 6
"""Steps timed of the published package, whose one refresh takes longer than all of them."""


class Layers(NamedTuple):
    """Matrices of a decoder without embeddings: (shape, count) in each of `depth` layers."""

    shapes: tuple[tuple[tuple[int, int], int], ...]
    depth: int


MODELS = {
    "1.2b": Layers((((2048, 2048), 4), ((5461, 2048), 2), ((2048, 5461), 1)), 24),
    "7b": Layers((((4096, 4096), 4), ((11008, 4096), 2), ((4096, 11008), 1)), 32),
    "tiny": Layers((((64, 64), 4), ((171, 64), 2), ((64, 171), 1)), 2),
}
STATES = {
    "bfloat16": {"state_dtype": "bfloat16", "basis_dtype": "bfloat16"},
    "int8+int4": {"state_dtype": "int8", "basis_dtype": "int4"},
}


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """Fira and GaLore at several ranks and state formats, torch's fused AdamW, an 8-bit AdamW, the published Fira."""
    model, ranks, gap = ("tiny", (16,), 8) if quick or device == "cpu" else ("1.2b", (128, 512), REFRESH_STEPS)
    found = []
    for rank in ranks:
        for state in STATES:
            impls: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
                "torch-adamw-fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
                "fira": partial(_ours, Fira, rank, state, gap, _impl(device)),
                "galore": partial(_ours, GaLore, rank, state, gap, _impl(device)),
                "adamw-8bit": _eight_bits,
            }
            if state == "bfloat16":
                impls["fira-official"] = partial(_official, rank, gap)
            found.append(
                Case(
                    name="optim_step",
                    params={"model": model, "rank": rank, "state": state, "refresh_steps": gap},
                    figures={name: partial(_measure, name, make, model, device, gap) for name, make in impls.items()},
                    rounds=1 if quick else 2,
                    metric="time",
                    check=partial(_check, rank, state, device),
                )
            )
    return found


def _impl(device: str) -> Impl:
    """The kernels where they are compiled, whether "auto" takes them yet or not."""
    return "triton" if device.startswith("cuda") else "eager"


def _ours(
    kind: type[Fira] | type[GaLore], rank: int, state: str, gap: int, impl: Impl, params: list[nn.Parameter]
) -> torch.optim.Optimizer:
    group = {"params": params, "rank": rank, "refresh_steps": gap, "impl": impl, **STATES[state]}
    return kind([group], lr=1e-4)


def _eight_bits(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    for target in ("torchao.optim:AdamW8bit", "bitsandbytes.optim:AdamW8bit"):
        try:
            return load_object(target)(params, lr=1e-4)
        except ImportError:
            continue
    raise UnsupportedError("it needs torchao or bitsandbytes: pip install one of them")


def _official(rank: int, gap: int, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    try:
        kind = load_object("fira:FiraAdamW")
    except ImportError as error:
        raise UnsupportedError("it needs the published package: pip install fira==1.0.2") from error
    group = {"params": params, "rank": rank, "update_proj_gap": gap, "alpha": 0.25, "proj_type": "std"}
    return kind([group], lr=1e-4)


def _parameters(model: str, device: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    layers = MODELS[model]
    return [
        nn.Parameter(0.02 * torch.randn(shape, device=device).bfloat16())
        for _ in range(layers.depth)
        for shape, count in layers.shapes
        for _ in range(count)
    ]


def _measure(
    name: str,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    model: str,
    device: str,
    gap: int,
) -> Figures:
    """Times of single steps in ms; bytes of state; most bytes above weights and gradients."""
    params = _parameters(model, device)
    for param in params:
        # a few strong directions and noise, about as gradients are
        m, n = param.shape
        strong = torch.randn(m, 8, device=device) @ torch.randn(8, n, device=device)
        param.grad = (1e-3 * (strong + torch.randn(m, n, device=device))).bfloat16()
        del strong
    held = sum(2 * param.nbytes for param in params)
    optimizer = make(params)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    optimizer.step()
    if cuda:
        torch.cuda.synchronize()
    first = 1e3 * (time.perf_counter() - started)
    for _ in range(3):
        optimizer.step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    published = name == "fira-official"
    times = _step_times(optimizer, OFFICIAL_STEPS if published else gap, cuda)
    median = statistics.median(times)
    # the published package fits all bases in the same step, which is its first
    amortised = median + (first - median) / gap if published else statistics.fmean(times)
    figures = {
        "time": (median, "ms"),
        "time_amortised": (amortised, "ms"),
        "time_max": (max(first, *times) if published else max(times), "ms"),
        "state_bytes": (float(_held(optimizer)), "bytes"),
    }
    if cuda:
        figures["peak_bytes"] = (float(torch.cuda.max_memory_allocated() - held), "bytes")
    del optimizer, params
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return figures


def _step_times(optimizer: torch.optim.Optimizer, steps: int, cuda: bool) -> list[float]:
    """Milliseconds of each step; on CUDA from events between the steps, which make nothing wait."""
    if not cuda:
        times = [time.perf_counter()]
        for _ in range(steps):
            optimizer.step()
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        optimizer.step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state, also of those inside of objects that it keeps."""

    def tensors(value: object, depth: int = 0) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, Mapping):
            return [x for part in value.values() for x in tensors(part, depth + 1)]
        if isinstance(value, (list, tuple)):
            return [x for part in value for x in tensors(part, depth + 1)]
        return tensors(vars(value), depth + 1) if depth < 4 and hasattr(value, "__dict__") else []

    def size(x: Tensor) -> int:
        if hasattr(x, "__tensor_flatten__"):
            names, _ = x.__tensor_flatten__()
            return sum(size(getattr(x, name)) for name in names)
        return x.nbytes

    return sum(size(x) for state in optimizer.state.values() for x in tensors(state))


def _check(rank: int, state: str, device: str) -> None:
    """The kernels move small matrices as the eager step does, and the state takes the bytes of its formula."""
    for kind, config in ((Fira, FiraConfig), (GaLore, GaLoreConfig)):
        moved = []
        for impl in (_impl(device), "eager"):
            torch.manual_seed(0)
            small = min(rank, 64)
            params = [nn.Parameter(torch.zeros(200, 136, device=device).bfloat16()) for _ in range(2)]
            optimizer = kind([{"params": params, "rank": small, "impl": impl, **STATES[state]}], lr=1e-2)
            for _ in range(4):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            moved.append(torch.stack([param.detach().float() for param in params]))
            stated = config(rank=small, **STATES[state]).state_bytes({"blocks.0": (200, 136), "blocks.1": (200, 136)})
            assert _held(optimizer) == stated, f"{kind.__name__}: state of {_held(optimizer)} bytes, stated {stated}"
        apart = float((moved[0] - moved[1]).norm() / moved[1].norm())
        assert apart < 0.05, f"{kind.__name__}: kernels and eager step part by {apart:.3g}"
