"""Weights as a low-rank product plus a sparse part on a fixed support (SLTrain), and restarts of such products.

SLTrain: arXiv 2406.02214. Refactorization with momentum reset: arXiv 2505.22922.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from whimbrel.config import require
from whimbrel.optim.weights.replace import replace_linears


class SLTrainLinear(nn.Module):
    """y = x W^T, W = alpha / rank B A, plus V on a random support of density `density`; 0 leaves the product alone.

    B [out, rank] starts at zero, A [rank, in] as nn.Linear, V [density out in] uniform in 1 / sqrt(in). W is formed in
    the forward and again in the backward, never kept. The support follows from the seed and is saved with the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        density: float = 0.03,
        alpha: float = 32.0,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        smaller = min(in_features, out_features)
        require(0 < rank <= smaller, "rank", rank, f"a whole number from 1 to {smaller}, the smaller side")
        require(0 <= density < 1, "density", density, "a share of at least 0 and below 1")
        self.in_features, self.out_features, self.alpha = in_features, out_features, alpha
        size = in_features * out_features
        count = round(density * size)
        generator = torch.Generator().manual_seed(seed)
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        bound = 1 / math.sqrt(in_features)
        a = (2 * torch.rand(rank, in_features, generator=generator) - 1) * bound
        self.a = nn.Parameter(a.to(device, dtype))
        v = (2 * torch.rand(count, generator=generator) - 1) * bound
        self.v = nn.Parameter(v.to(device, dtype)) if count else None
        support = torch.randperm(size, generator=generator)[:count].sort().values
        self.register_buffer("support", support.to(device, torch.int32 if size < 1 << 31 else torch.int64))

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b.shape[1]

    def dense(self) -> Tensor:
        """W [out, in]."""
        return _dense(self.b, self.a, self.v, self.support, self.alpha / self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _Product.apply(x, self.b, self.a, self.v, self.support, self.alpha / self.rank)

    def extra_repr(self) -> str:
        """Sizes."""
        count = 0 if self.v is None else self.v.numel()
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, sparse={count}"


def _dense(b: Tensor, a: Tensor, v: Tensor | None, support: Tensor, factor: float) -> Tensor:
    weight = torch.addmm(b.new_zeros(()), b, a, beta=0, alpha=factor)
    if v is not None:
        # no place occurs twice, so the order of the additions does not matter
        weight.view(-1).index_add_(0, support, v)
    return weight


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, a: Tensor, v: Tensor | None, support: Tensor, factor: float) -> Tensor:
        kind = x.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else b.dtype
        ctx.factor, ctx.x_dtype = factor, x.dtype
        x = x.to(ctx.dtype)
        ctx.save_for_backward(x, b, a, v, support)
        with torch.autocast(kind, enabled=False):
            return F.linear(x, _dense(b, a, v, support, factor).to(ctx.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        x, b, a, v, support = ctx.saved_tensors
        for_x = (grad @ _dense(b, a, v, support, ctx.factor).to(ctx.dtype)).to(ctx.x_dtype)
        whole = (grad.flatten(0, -2).mT @ x.flatten(0, -2)).to(b.dtype)
        for_v = None if v is None else whole.view(-1)[support.long()]
        return for_x, ctx.factor * (whole @ a.mT), ctx.factor * (b.mT @ whole), for_v, None, None


def sltrain(
    model: nn.Module,
    patterns: str | Sequence[str] = "blocks.*",
    *,
    rank: int,
    density: float = 0.03,
    alpha: float = 32.0,
    seed: int = 0,
) -> list[str]:
    """Replace linear layers by new `SLTrainLinear` ones, each with a support of its own; their weights are lost.

    Returns the names of the weights replaced. Density 0 gives plain low-rank layers. The paper trains 60M to 7B at rank
    128 to 1024, density 0.03 (0.05 at 7B), alpha 32 to 8 and a learning rate of 0.003.
    """
    count = 0

    def make(name: str, layer: nn.Linear) -> nn.Module:
        nonlocal count
        count += 1
        return SLTrainLinear(
            layer.in_features,
            layer.out_features,
            rank=rank,
            density=density,
            alpha=alpha,
            seed=seed * 1_000_003 + count,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )

    return replace_linears(model, patterns, make)


@torch.no_grad()
def refactorize(layers: Iterable[SLTrainLinear]) -> list[nn.Parameter]:
    """Write each product B A anew as U sqrt(S) sqrt(S) V^T, its singular value decomposition split evenly.

    W stays what it is; the two factors get equal singular values, the best conditioning that a product allows (arXiv
    2505.22922). The decomposition is of a rank x rank matrix, between the triangles of two QR, in float64. Returns the
    parameters that changed.
    """
    changed = []
    for layer in layers:
        q_out, r_out = torch.linalg.qr(layer.b.double())
        q_in, r_in = torch.linalg.qr(layer.a.mT.double())
        left, sizes, right = torch.linalg.svd(r_out @ r_in.mT)
        root = sizes.sqrt()
        layer.b.copy_(q_out @ left * root)
        layer.a.copy_((q_in @ right.mT * root).mT)
        changed += [layer.b, layer.a]
    return changed


class Step(NamedTuple):
    """Whether this step restarted, and the factor on the learning rate of the next."""

    restarted: bool
    factor: float


class Restarts:
    """Every `every` steps: refactorize, forget the optimizer's state, and bring the learning rate back in a few steps.

    Call `step` after each step of the optimizer, and multiply the next learning rate by the factor it returns: 1, or
    after a restart a line from `floor` up to 1 over `recovery` steps. As in the authors' code the state of all
    parameters goes, step counts included. (arXiv 2505.22922; 200 steps were best there.)
    """

    def __init__(
        self, model: nn.Module, optimizer: optim.Optimizer, *, every: int = 200, recovery: int = 10, floor: float = 1e-3
    ) -> None:
        require(every > 0, "every", every, "a positive number of steps")
        require(0 <= recovery < every, "recovery", recovery, f"a number of steps from 0 to below every = {every}")
        require(0 < floor <= 1, "floor", floor, "a share above 0 and at most 1")
        self.layers = [layer for layer in model.modules() if isinstance(layer, SLTrainLinear)]
        require(bool(self.layers), "model", type(model).__name__, "a model with SLTrainLinear layers, see sltrain()")
        self.optimizer, self.every, self.recovery, self.floor = optimizer, every, recovery, floor
        self.steps = 0

    def step(self) -> Step:
        """Count a step, and restart where one is due."""
        self.steps += 1
        restarted = self.steps % self.every == 0
        if restarted:
            refactorize(self.layers)
            self.optimizer.state.clear()
        since = self.steps % self.every
        if self.steps < self.every or since >= self.recovery:
            return Step(restarted, 1.0)
        return Step(restarted, self.floor + (1 - self.floor) * since / self.recovery)

    def state_dict(self) -> dict[str, int]:
        """The count of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a count of steps."""
        self.steps = state["steps"]
