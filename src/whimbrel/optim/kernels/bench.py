"""Benchmark case `optim_step`: optimizer steps and refreshes over the matrices of large decoders, beside rivals.

Weights and gradients are in bfloat16. Each run builds the optimizer anew and takes one refresh gap outside of the
clock, in which kernels are loaded; its first bases stand in for fitted ones, which would take most of the run. Then
each step of the next gap is timed by itself for the mean and the longest, and some steps without a refresh after it
for `time`; `gpu_*` are what kernels take in one of these, by a profile.

Published packages decompose all matrices in one step, which at 1.2 B takes most of a minute. That step is measured on
the matrices of one layer and scaled by the number of layers (`refresh_layers` in the params says so); their other
steps are measured on the whole model, from bases that stand in for decomposed ones.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from whimbrel._lazy import load_object
from whimbrel.bench.case import Case, Figures
from whimbrel.errors import UnsupportedError
from whimbrel.optim import Fira, FiraConfig, GaLore, GaLoreConfig, lowrank
from whimbrel.optim.options import Impl

REFRESH_STEPS = 200
"""Steps between two refreshes (arXiv 2410.01623, section 5)."""
Params = list[nn.Parameter]
Make = Callable[[Params], Optimizer]

PLAIN_STEPS = 40
"""Steps timed of what has no refresh, or whose refresh is measured apart."""
KERNELS = ("project", "project_unaligned", "settle", "adam", "coefficients", "blend", "unpack", "write")
"""Those of a step, in their order."""


class Layers(NamedTuple):
    """Matrices of a decoder without embeddings: (shape, count) in each of `depth` layers."""

    shapes: tuple[tuple[tuple[int, int], int], ...]
    depth: int


MODELS = {
    "1.2b": Layers((((2048, 2048), 4), ((5461, 2048), 2), ((2048, 5461), 1)), 24),
    "7b": Layers((((4096, 4096), 4), ((11008, 4096), 2), ((4096, 11008), 1)), 32),
    "60m": Layers((((512, 512), 4), ((1376, 512), 2), ((512, 1376), 1)), 8),
    "tiny": Layers((((64, 64), 4), ((171, 64), 2), ((64, 171), 1)), 2),
}
STATES = {
    "bfloat16": {"state_dtype": "bfloat16", "basis_dtype": "bfloat16"},
    "int8+int4": {"state_dtype": "int8", "basis_dtype": "int4"},
}


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """Fira and GaLore at several ranks and state formats, torch's fused AdamW, an 8-bit AdamW, published packages."""
    model, ranks, gap = ("tiny", (16,), 8) if quick or device == "cpu" else ("1.2b", (128, 512), REFRESH_STEPS)
    found = []
    for state in STATES:
        for rank in ranks:
            measure = partial(_measure, model=model, device=device, gap=gap)
            figures = {
                "torch-adamw-fused": partial(measure, _adamw, refreshes=False),
                "fira": partial(measure, partial(_ours, Fira, rank, state, gap, _impl(device))),
                "galore": partial(measure, partial(_ours, GaLore, rank, state, gap, _impl(device))),
                "adamw-8bit": partial(measure, _eight_bits, refreshes=False),
            }
            if state == "bfloat16":
                for name, package in PUBLISHED.items():
                    figures[name] = partial(_measure_published, partial(package.make, rank, gap), model, device, gap)
            found.append(
                Case(
                    name="optim_step",
                    params={"model": model, "rank": rank, "state": state, "refresh_steps": gap},
                    figures=figures,
                    apart={name: {"refresh_layers": 1} for name in PUBLISHED},
                    rounds=1,
                    metric="time",
                    check=partial(_check, rank, state, device),
                )
            )
    if model != "tiny":
        measure = partial(_measure, model="60m", device=device, gap=PLAIN_STEPS)
        step = partial(_ours, Fira, 128, "bfloat16", PLAIN_STEPS)
        found.append(
            Case(
                name="optim_step",
                params={"model": "60m", "rank": 128, "state": "bfloat16", "refresh_steps": PLAIN_STEPS},
                figures={
                    "torch-adamw-fused": partial(measure, _adamw, refreshes=False),
                    "fira": partial(measure, partial(step, "triton")),
                    "fira, in PyTorch": partial(measure, partial(step, "eager")),
                },
                rounds=1,
                metric="time",
                check=partial(_check, 128, "bfloat16", device),
            )
        )
    return found


def _impl(device: str) -> Impl:
    """The kernels where they are compiled, whether "auto" takes them yet or not."""
    return "triton" if device.startswith("cuda") else "eager"


def _ours(kind: type[Fira] | type[GaLore], rank: int, state: str, gap: int, impl: Impl, params: Params) -> Optimizer:
    group = {"params": params, "rank": rank, "refresh_steps": gap, "impl": impl, **STATES[state]}
    return kind([group], lr=1e-4)


def _adamw(params: Params) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def _eight_bits(params: Params) -> Optimizer:
    for target in ("bitsandbytes.optim:AdamW8bit", "torchao.optim:AdamW8bit"):
        try:
            return load_object(target)(params, lr=1e-4)
        except ImportError:
            continue
    raise UnsupportedError("it needs bitsandbytes or torchao: pip install one of them")


class Package(NamedTuple):
    """A published optimizer: where it is, what installs it, and its names for the factor and the side."""

    target: str
    install: str
    scale: str
    side: str

    def make(self, rank: int, gap: int, params: Params) -> Optimizer:
        try:
            kind = load_object(self.target)
        except ImportError as error:
            raise UnsupportedError(f"it needs the published package: pip install {self.install}") from error
        group = {"params": params, "rank": rank, "update_proj_gap": gap, self.scale: 0.25, self.side: "std"}
        return kind([group], lr=1e-4)


PUBLISHED = {
    "fira-official": Package("fira:FiraAdamW", "fira==1.0.2", "alpha", "proj_type"),
    "galore-torch": Package("galore_torch:GaLoreAdamW", "galore-torch==1.0 bitsandbytes", "scale", "proj_type"),
    "fira, pytorch-optimizer": Package(
        "pytorch_optimizer:Fira", "pytorch-optimizer==4.1.0", "scale", "projection_type"
    ),
}


def _parameters(layers: Layers, device: str) -> list[nn.Parameter]:
    """Weights with gradients of a few strong directions and noise, about as gradients are."""
    torch.manual_seed(0)
    params = []
    for shape, count in layers.shapes * layers.depth:
        for _ in range(count):
            param = nn.Parameter(0.02 * torch.randn(shape, device=device).bfloat16())
            strong = torch.randn(shape[0], 8, device=device) @ torch.randn(8, shape[1], device=device)
            param.grad = (1e-3 * (strong + torch.randn(shape, device=device))).bfloat16()
            params.append(param)
    return params


def _measure(make: Make, *, model: str, device: str, gap: int, refreshes: bool = True) -> Figures:
    """Times of single steps in ms; bytes of state; most bytes above weights and gradients."""
    params = _parameters(MODELS[model], device)
    before = _held_by_all(device)
    optimizer = make(params)
    steps = gap if refreshes else min(gap, PLAIN_STEPS)
    with _stand_in_for_first_fits():
        for _ in range(steps):
            optimizer.step()
    times, peak = _step_times(optimizer, steps, device)
    quiet = _without_refresh(optimizer, min(gap, PLAIN_STEPS), device) if refreshes else times
    figures: dict[str, tuple[float | list[float], str]] = {
        "time": (quiet, "ms"),
        "time_amortised": (statistics.fmean(times), "ms"),
        "time_max": (max(times), "ms"),
        "state_bytes": (float(_held(optimizer)), "bytes"),
    }
    if peak is not None:
        figures["peak_bytes"] = (float(peak - before), "bytes")
        figures |= {f"gpu_{name}": (time, "ms") for name, time in _kernel_times(optimizer).items()}
    del optimizer, params
    _free(device)
    return figures


def _kernel_times(optimizer: Optimizer) -> dict[str, float]:
    """Milliseconds of the GPU in each of our kernels in the next step; nothing of other optimizers."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    spent = {event.key: event.device_time_total / 1e3 for event in profile.key_averages()}
    return {name: spent[name] for name in KERNELS if name in spent}


def _measure_published(make: Make, model: str, device: str, gap: int) -> Figures:
    """The same of a package that decomposes all matrices at once, from one layer's decompositions."""
    try:
        refresh, extra = _refresh_of_a_layer(make, model, device)
        params = _parameters(MODELS[model], device)
        before = _held_by_all(device)
        optimizer = make(params)
        with _stand_in_for_svd():
            optimizer.step()
        times, peak = _step_times(optimizer, min(gap - 2, PLAIN_STEPS), device)
    except UnsupportedError:
        raise
    except Exception as error:  # somebody else's code may fail in any way, and the others are still to be timed
        raise UnsupportedError(f"it fails: {type(error).__name__}: {error}") from error
    middle, whole = statistics.median(times), refresh * MODELS[model].depth
    state = _held(optimizer)
    figures: dict[str, tuple[float | list[float], str]] = {
        "time": (times, "ms"),
        "time_amortised": (middle + whole / gap, "ms"),
        "time_max": (middle + whole, "ms"),
        "state_bytes": (float(state), "bytes"),
    }
    if peak is not None and extra is not None:
        figures["peak_bytes"] = (float(max(peak - before, state + extra)), "bytes")
    del optimizer, params
    _free(device)
    return figures


def _refresh_of_a_layer(make: Make, model: str, device: str) -> tuple[float, int | None]:
    """Milliseconds by which decomposing the matrices of one layer lengthens a step, and bytes that it needs."""
    layer = MODELS[model]._replace(depth=1)
    params = _parameters(layer, device)
    torch.linalg.svd(torch.randn(64, 64, device=device), full_matrices=False)  # loads the solver
    held = _held_by_all(device)
    optimizer = make(params)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    optimizer.step()  # the one that decomposes, so not left out as `_step_times` leaves out its first
    if cuda:
        torch.cuda.synchronize()
    first = 1e3 * (time.perf_counter() - began)
    extra = torch.cuda.max_memory_allocated() - held - _held(optimizer) if cuda else None
    later, _ = _step_times(optimizer, 5, device)
    return first - statistics.median(later), extra


@contextmanager
def _stand_in_for_first_fits() -> Iterator[None]:
    """Columns of the identity in place of the first bases of our optimizers; later fits start from them."""
    original = lowrank.fit_first

    def stand_in(grad: Tensor, noise: Tensor, side: str, rank: int, **_: object) -> Tensor:
        return torch.eye(noise.shape[-2], rank, device=grad.device).expand(len(grad), -1, -1)

    lowrank.fit_first = stand_in
    try:
        yield
    finally:
        lowrank.fit_first = original


@contextmanager
def _stand_in_for_svd() -> Iterator[None]:
    """Columns of the identity in place of singular vectors, which are as large, and cost nothing."""
    original = torch.linalg.svd

    def stand_in(x: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor]:
        k = min(x.shape)
        made = {"device": x.device, "dtype": x.dtype}
        return torch.eye(x.shape[0], k, **made), torch.ones(k, **made), torch.eye(k, x.shape[1], **made)

    torch.linalg.svd = stand_in
    try:
        yield
    finally:
        torch.linalg.svd = original


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _step_times(optimizer: Optimizer, steps: int, device: str) -> tuple[list[float], int | None]:
    """Milliseconds of each step, on CUDA from events between the steps, which make nothing wait; and the peak there."""
    if not device.startswith("cuda"):
        times = [time.perf_counter()]
        for _ in range(steps):
            optimizer.step()
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(times)], None
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()  # here the device waits for the host's first launch
    events[0].record()
    for event in events[1:]:
        optimizer.step()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return times, torch.cuda.max_memory_allocated() + _held_by_graphs()


def _without_refresh(optimizer: Optimizer, steps: int, device: str) -> list[float]:
    for group in optimizer.param_groups:
        group["refresh_steps"] = 1 << 30
    for _ in range(4):
        optimizer.step()
    return _step_times(optimizer, steps, device)[0]


def _held_by_all(device: str) -> int:
    """Bytes of all tensors, cuBLAS's workspace among them."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def _held_by_graphs() -> int:
    """Bytes of memory that CUDA graphs keep for themselves, in which no tensor lies between their replays."""
    return sum(x["total_size"] for x in torch.cuda.memory_snapshot() if tuple(x["segment_pool_id"]) != (0, 0))


def _held(optimizer: Optimizer) -> int:
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

    held = [x for state in optimizer.state.values() for x in tensors(state)]
    return sum({(x.device, x.data_ptr(), x.shape): size(x) for x in held}.values())  # tables may be shared


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
