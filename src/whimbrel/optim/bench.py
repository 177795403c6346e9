"""Benchmark cases of the optimizers: one step over the matrices of a small decoder, and the state it keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from whimbrel.bench.case import Case
from whimbrel.config import OptimConfig
from whimbrel.optim.adamw.config import AdamWConfig
from whimbrel.optim.fira.config import FiraConfig
from whimbrel.optim.galore.config import GaLoreConfig
from whimbrel.testing.budget import assert_close

RANK = 64
REFRESH_STEPS = 20
"""Shorter than in training, so that the repeats of one run see every matrix refreshed."""


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """AdamW against GaLore and Fira with power iteration, Fira with exact refreshes, and Fira written naively."""
    depth, width = (2, 128) if quick else (8, 256)
    configs: dict[str, OptimConfig] = {
        "adamw": AdamWConfig(),
        "galore": GaLoreConfig(rank=RANK, refresh_steps=REFRESH_STEPS),
        "fira": FiraConfig(rank=RANK, refresh_steps=REFRESH_STEPS),
        "fira, exact refresh": FiraConfig(rank=RANK, refresh_steps=REFRESH_STEPS, refresh="exact"),
    }
    params = {"depth": depth, "width": width, "rank": RANK, "refresh_steps": REFRESH_STEPS, "dtype": "float32"}
    return [
        Case(
            name="optim",
            params=params,
            impls={
                **{name: partial(_step, config, depth, width, device) for name, config in configs.items()},
                "fira, one by one": partial(_naive_step, depth, width, device),
            },
            sizes={name: partial(_state_bytes, config, depth, width, device) for name, config in configs.items()},
            check=partial(_check, configs, depth, width, device),
            metric="step",
        )
    ]


class _Decoder(nn.Module):
    """Parameters of a decoder by name and shape, without a forward."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(4096, width)
        inner = 8 * width // 3 // 8 * 8
        shapes = ((width, width),) * 4 + ((width, inner),) * 2 + ((inner, width),)
        self.blocks = nn.ModuleList(
            nn.ModuleList([*(nn.Linear(a, b, bias=False) for a, b in shapes), nn.RMSNorm(width)]) for _ in range(depth)
        )


def _prepare(config: OptimConfig, depth: int, width: int, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = _Decoder(depth, width).to(device)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
    return model, config.build(config.groups(model))


def _step(config: OptimConfig, depth: int, width: int, device: str) -> Callable[[], object]:
    model, optimizer = _prepare(config, depth, width, device)

    def call() -> object:
        optimizer.step()
        return model

    return call


def _naive_step(depth: int, width: int, device: str) -> Callable[[], nn.Module]:
    """Fira as the authors' code computes it: matrix by matrix, a residual in full, a host read for each limiter."""
    model, optimizer = _prepare(FiraConfig(rank=RANK), depth, width, device)
    options = optimizer.defaults
    beta1, beta2 = options["betas"]
    states: dict[Tensor, dict[str, Any]] = {p: {"step": 0, "norm": 0.0} for p in model.parameters()}

    def step_one(param: Tensor, low_rank: bool) -> None:
        state, grad = states[param], param.grad
        assert grad is not None
        right = low_rank and param.shape[0] >= param.shape[1]
        if low_rank and state["step"] % REFRESH_STEPS == 0:
            left, _, rows = torch.linalg.svd(grad, full_matrices=False)
            state["basis"] = rows[:RANK].T if right else left[:, :RANK]

        def up(low: Tensor) -> Tensor:
            return options["alpha"] * (low @ state["basis"].T if right else state["basis"] @ low)

        low = (grad @ state["basis"] if right else state["basis"].T @ grad) if low_rank else grad
        state["step"] += 1
        state["mean"] = state.get("mean", 0) * beta1 + (1 - beta1) * low
        state["square"] = state.get("square", 0) * beta2 + (1 - beta2) * low * low
        direction = state["mean"] / (state["square"].sqrt() + options["eps"])
        size = options["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        if low_rank:
            dim = 1 if right else 0
            factor = direction.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)
            residual = (grad - up(low)) * factor
            norm, gamma = float(residual.norm()), options["gamma"]
            scale = min(1.0, gamma * (state["norm"] + 1e-8) / norm) if state["norm"] else 1.0
            state["norm"] = norm * scale
            direction = up(direction) + scale * residual
        param -= size * direction

    @torch.no_grad()
    def call() -> nn.Module:
        for group in optimizer.param_groups:
            for param in group["params"]:
                step_one(param, group["low_rank"])
        return model

    return call


def _state_bytes(config: OptimConfig, depth: int, width: int, device: str) -> int:
    _, optimizer = _prepare(config, depth, width, device)
    optimizer.step()
    tensors = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)


def _check(configs: dict[str, OptimConfig], depth: int, width: int, device: str) -> None:
    """Rivals differ by design; each must move every matrix, stay finite, and keep the state its formula states."""
    for name, config in configs.items():
        model, optimizer = _prepare(config, depth, width, device)
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        for _ in range(3):
            optimizer.step()
        for key, value in model.named_parameters():
            assert torch.isfinite(value).all(), f"{name}: {key} is not finite"
            assert not torch.equal(value, before[key]), f"{name}: {key} did not move"
        shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
        kept, stated = _state_bytes(config, depth, width, device), config.state_bytes(shapes)
        assert kept == stated, f"{name}: state of {kept} bytes, its formula states {stated}"
    naive = _naive_step(depth, width, device)
    model, optimizer = _prepare(
        FiraConfig(rank=RANK, refresh_steps=REFRESH_STEPS, refresh="exact", stagger=False), depth, width, device
    )
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    for _ in range(3):
        rival = naive()
        optimizer.step()
    for key, value in model.named_parameters():
        assert_close(f"movement of {key}", rival.get_parameter(key) - start[key], value - start[key], 1e-3)
