"""Weights in 8 bits that are trained with stochastic rounding, as in Q-GaLore (arXiv 2407.08296, section 3.4).

Codes are symmetric, 127 steps to either side, with a scale for every GROUP weights of a row. The authors' asymmetric
codes clamp the zero point, which breaks groups of one sign; symmetric ones need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from whimbrel.errors import ConfigError
from whimbrel.optim import counter
from whimbrel.optim.weights.replace import replace_linears

GROUP = 256
"""Most weights of a row under one scale."""
LARGEST = 127


class Int8Linear(nn.Module):
    """y = x W^T with W [out, in] in codes int8 [out, in] and scales float32 [out, ceil(in / 256)].

    `weight` has the shape and dtype of W, and takes its gradient, but holds values only inside of an optimizer's step;
    outside every element is NaN, so that whoever reads it finds out. `dense` gives the values at any time.
    """

    def __init__(self, weight: Tensor, key: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", torch.empty(weight.shape, dtype=torch.int8, device=weight.device))
        scales = (weight.shape[0], -(-weight.shape[1] // GROUP))
        self.register_buffer("scale", torch.empty(scales, device=weight.device))
        self.register_buffer("writes", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self._key = key
        # nearest at first: the weights that are given are the ones to start from
        self._store(torch.full((), 1 << 15, dtype=torch.int64, device=weight.device))

    def dense(self) -> Tensor:
        """W [out, in], in the dtype of `weight`."""
        scale = self.scale.repeat_interleave(GROUP, -1)[:, : self.in_features]
        return (self.codes * scale).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _Int8.apply(x, self.weight, self)

    def extra_repr(self) -> str:
        """As nn.Linear."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias=False"

    @torch.no_grad()
    def open(self) -> None:
        """Give `weight` its values, for an optimizer to change."""
        self.weight.data = self.dense()

    @torch.no_grad()
    def close(self) -> None:
        """Round `weight` to codes, up or down with the chance that keeps its mean, and let its memory go."""
        self.writes += 1
        keys = counter.key(torch.full((), self._key, device=self.codes.device), self.writes)
        self._store(counter.lattice(keys, *self.codes.shape))

    def _store(self, bits: Tensor) -> None:
        value = self.weight.detach().float()
        padded = F.pad(value, (0, -self.in_features % GROUP)).unflatten(-1, (-1, GROUP))
        self.scale.copy_(padded.abs().amax(-1) / LARGEST)
        scale = self.scale.clamp_min(torch.finfo(torch.float32).tiny).repeat_interleave(GROUP, -1)
        share = value / scale[:, : self.in_features]
        code = (share + bits.float() * 2.0**-16).floor_().clamp_(-LARGEST, LARGEST)
        self.codes.copy_(code)
        # one element of memory under the whole shape
        nothing = torch.full((), float("nan"), dtype=self.weight.dtype, device=self.codes.device)
        self.weight.data = nothing.expand(self.codes.shape)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [name for name in missing if name != prefix + "weight"]


class _Int8(torch.autograd.Function):
    """A product with weights that are opened twice, forward and backward, rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Int8Linear) -> Tensor:
        kind = x.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.layer, ctx.needs = layer, (x.requires_grad, weight.requires_grad, x.dtype)
        x = x.to(ctx.dtype)
        ctx.save_for_backward(x)
        return F.linear(x, layer.dense().to(ctx.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyrefly: ignore [bad-override]
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, dtype = ctx.needs
        for_x = (grad @ ctx.layer.dense().to(ctx.dtype)).to(dtype) if needs_x else None
        if not needs_weight:
            return for_x, None, None
        for_weight = grad.flatten(0, -2).mT @ x.flatten(0, -2)
        return for_x, for_weight.to(ctx.layer.weight.dtype), None


def int8_weights(model: nn.Module, patterns: str | Sequence[str] = "blocks.*", *, seed: int = 0) -> list[Int8Linear]:
    """Keep the weights of linear layers in 8 bits; `attach` an optimizer of their parameters, which may exist before.

    patterns: of names of weights, which nn.Linear without bias must have. Returns the layers in the model's order.
    """
    layers: list[Int8Linear] = []

    def make(name: str, layer: nn.Linear) -> nn.Module:
        layers.append(Int8Linear(layer.weight, counter.base(seed, len(layers))))
        return layers[-1]

    replace_linears(model, patterns, make)
    return layers


def attach(optimizer: optim.Optimizer, layers: Sequence[Int8Linear]) -> None:
    """Open the optimizer's own 8-bit weights for its steps, and round them after each.

    Weights whose gradient is None stay as they are. During a step the opened weights take their full size: with one
    optimizer a block, stepped as soon as its gradients are there, that is the size of one block. Raises ConfigError
    where the optimizer holds none of the weights.
    """
    own = {param for group in optimizer.param_groups for param in group["params"]}
    mine = [layer for layer in layers if layer.weight in own]
    if not mine:
        raise ConfigError("the optimizer holds none of the 8-bit weights; build it from parameters of their model")
    opened: list[Int8Linear] = []

    def before(*_: Any) -> None:
        opened.extend(layer for layer in mine if layer.weight.grad is not None)
        for layer in opened:
            layer.open()

    def after(*_: Any) -> None:
        for layer in opened:
            layer.close()
        opened.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
