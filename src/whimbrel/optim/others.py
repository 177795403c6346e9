"""AdamW on the parameters of an optimizer that are not projected, in any dtype of weights and moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from whimbrel.optim import counter, storage
from whimbrel.optim.adamw.optimizer import adamw_step
from whimbrel.optim.amp import GradScale
from whimbrel.optim.sharding import local, local_grad, part_of
from whimbrel.optim.words import Words

PIECE_ELEMENTS = 1 << 24
"""Most elements of a parameter in few bits, outside of low-rank groups, that are stepped at once: beside its state a
step takes some 40 bytes for each, which for all of an embedding would be more than the state of all matrices."""


def step_others(
    group: dict[str, Any],
    params: Sequence[Tensor],
    states: Any,
    amp: GradScale,
    words: Words,
    offsets: dict[Tensor, int],
) -> None:
    """Step parameters of one group that have gradients; offsets: their numbers, from which random bits follow."""
    plain = [p for p in params if p.dtype == states[p]["exp_avg"].dtype == torch.float32]
    options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} | {"active": amp.usable()}
    if plain:
        held = [{key: local(value) for key, value in states[param].items()} for param in plain]
        gradients = [amp.unscaled(local_grad(param)) for param in plain]
        entries = ([state[key] for state in held] for key in ("step", "exp_avg", "exp_avg_sq"))
        adamw_step([local(param) for param in plain], gradients, *entries, **options)
    for param in params:
        if param.dtype != torch.float32 or states[param]["exp_avg"].dtype != torch.float32:
            word = words.of(group, [offsets[param]], param.device)
            _step_rows(param, states[param], amp, word, options, stochastic=group["stochastic_rounding"])


def _step_rows(
    param: Tensor, held: dict[str, Tensor], amp: GradScale, word: Tensor, options: dict[str, Any], *, stochastic: bool
) -> None:
    """Step one parameter, whose weights or moments are not in float32; by rows, each needs copies that are."""
    weight, grad = local(param), local_grad(param)
    state = {key: local(value) for key, value in held.items()}
    row, column = _first(param)
    counted = state["step"]
    for start, stop in _pieces(weight):
        rows = slice(start, stop) if weight.ndim else ...
        part = {key: value[rows] for key, value in state.items() if key != "step"}
        moments = [storage.read_moment([part], key)[0] for key in ("exp_avg", "exp_avg_sq")]
        value, counted = weight[rows].float(), state["step"].clone()
        adamw_step([value], [amp.unscaled(grad[rows])], [counted], *([x] for x in moments), **options)
        keys = counter.key(word, counted[None])
        first = row + start * math.prod(weight.shape[1:-1]), column
        for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            storage.write_moment([part], key, moment[None], keys, amp.usable(), first=first)
        storage.write_weights([weight[rows]], value[None], keys, stochastic=stochastic, first=first)
    state["step"].copy_(counted)


def _first(param: Tensor) -> tuple[int, int]:
    """Row and column at which the part held here begins, of a parameter as a matrix of its last dimension."""
    if param.ndim == 0:
        return 0, 0
    rows = part_of(param, 0).start * math.prod(param.shape[1:-1]) if param.ndim > 1 else 0
    return rows, part_of(param, -1).start


def _pieces(weight: Tensor) -> Iterable[tuple[int, int]]:
    """First and last row of each part of a parameter that is stepped at once; a vector is one part."""
    if weight.ndim < 2 or not weight.numel():
        return [(0, len(weight) if weight.ndim else 0)]
    rows = max(1, PIECE_ELEMENTS // math.prod(weight.shape[1:]))
    return [(start, min(start + rows, len(weight))) for start in range(0, len(weight), rows)]
