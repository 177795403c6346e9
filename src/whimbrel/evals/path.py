"""Loss along the straight line between two models, whole or one layer at a time: is there a barrier between them?

An average lies on the lines between what is averaged. Where the loss rises along them, the checkpoints do not belong
to one basin and their average is worse than they are (linear mode connectivity, arXiv 1912.05671; by layer,
arXiv 2307.06966).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from whimbrel.checkpoint import load_weights
from whimbrel.checkpoint.weights import weights_of
from whimbrel.config import require
from whimbrel.evals.bpb import BpbResult
from whimbrel.evals.intervals import Interval, paired_difference
from whimbrel.merge.online import round_once

Evaluate = Callable[[nn.Module], BpbResult]
_LAYER = re.compile(r"^(.*?\d+|[^.]+)(?:\.|$)")


class Line(NamedTuple):
    """The loss along one line."""

    at: tuple[float, ...]
    """Shares of the second model."""
    losses: tuple[float, ...]
    """Loss there, nats per token."""
    barrier: Interval
    """Highest rise above the straight line between the losses of both ends, nats per token, with its 95 % interval
    from the same blocks of text; 0 or less where there is none."""
    barrier_at: float
    """Where."""


class LayerBarrier(NamedTuple):
    """What one layer's weights do on their way from the first model to the second, all others being the first's."""

    layer: str
    loss: float
    """Loss with the second model's layer, nats per token."""
    barrier: Interval
    """Rise of the loss half-way above the mean of both ends."""


def read_weights(path: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoint or merge, by name, in main memory; `model`, of their shapes, is left with them."""
    load_weights(path, model)
    return {name: value.detach().to("cpu", copy=True) for name, value in weights_of(model).tensors.items()}


def put_between(model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], share: float) -> None:
    """Make the model's weights (1 - share) a + share b for the names in `b`, and those of `a` for all others.

    Computed in float64 and rounded once; numbers that are not floating-point are taken from the nearer end.
    """
    with torch.no_grad():
        for name, value in weights_of(model).tensors.items():
            one, other = a[name], b.get(name, a[name])
            if one.is_floating_point() and 0 != share != 1:
                mixed = round_once((1 - share) * one.double() + share * other.double(), one.dtype)
            else:
                mixed = other if share >= 0.5 else one
            value.copy_(mixed)


def evaluate_path(
    model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], evaluate: Evaluate, *, points: int = 11
) -> Line:
    """The loss at `points` equal distances from `a` to `b`, both ends included; `model` is left at `b`."""
    require(points >= 3, "points", points, "at least 3, both ends and one between them")
    at = [i / (points - 1) for i in range(points)]
    found = []
    for share in at:
        put_between(model, a, b, share)
        found.append(evaluate(model))
    rises = [_rise(found[0], here, found[-1], share) for share, here in zip(at[1:-1], found[1:-1], strict=True)]
    highest = max(range(len(rises)), key=lambda i: rises[i].value)
    return Line(tuple(at), tuple(r.nats_per_token for r in found), rises[highest], at[highest + 1])


def evaluate_layers(
    model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], evaluate: Evaluate
) -> list[LayerBarrier]:
    """The barrier of each layer alone, in the order of the model; `model` is left with the last one moved."""
    put_between(model, a, {}, 0.0)
    start = evaluate(model)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in b.items():
        layers.setdefault(layer_of(name), {})[name] = value
    found = []
    for layer, weights in layers.items():
        half, end = (evaluate_at(model, a, weights, evaluate, share) for share in (0.5, 1.0))
        found.append(LayerBarrier(layer, end.nats_per_token, _rise(start, half, end, 0.5)))
    return found


def evaluate_at(
    model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], evaluate: Evaluate, share: float
) -> BpbResult:
    """The evaluation of the point `share` of the way from `a` to the weights in `b`."""
    put_between(model, a, b, share)
    return evaluate(model)


def evaluate_pairs(
    model: nn.Module, paths: Sequence[str | Path], evaluate: Evaluate
) -> tuple[list[float], list[list[Interval | None]]]:
    """The loss of each checkpoint, and for each pair of them the rise half-way, [i][j] for i < j and None else.

    Two models are in memory at a time.
    """
    ends = []
    for path in paths:
        load_weights(path, model)
        ends.append(evaluate(model))
    rises: list[list[Interval | None]] = [[None] * len(paths) for _ in paths]
    for i, first in enumerate(paths[:-1]):
        a = read_weights(first, model)
        for j in range(i + 1, len(paths)):
            b = read_weights(paths[j], model)
            half = evaluate_at(model, a, b, evaluate, 0.5)
            rises[i][j] = _rise(ends[i], half, ends[j], 0.5)
    return [end.nats_per_token for end in ends], rises


def layer_of(name: str) -> str:
    """The layer that a weight belongs to: its name up to the first number, or its first part where there is none."""
    found = _LAYER.match(name)
    return found.group(1) if found else name


def _rise(start: BpbResult, here: BpbResult, end: BpbResult, share: float) -> Interval:
    """How far the loss `here` lies above the line from `start` to `end`, paired over the same blocks."""
    line = (1 - share) * start.block_nats + share * end.block_nats
    return paired_difference(here.block_nats, line, here.block_tokens)
