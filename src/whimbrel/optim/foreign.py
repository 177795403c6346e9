"""Checkpoints of other people's packages into our optimizers: `fira`, `galore-torch` and `pytorch-optimizer`.

They keep their projector as a Python object in the state, which torch.load refuses. Here its class is replaced by an
empty one that only takes attributes, so that nothing of theirs is imported or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whimbrel.errors import CheckpointError, ConfigError
from whimbrel.optim.base import LowRankOptimizer
from whimbrel.optim.groups import resolve_side

PROJECTORS = (
    "fira.gradient_projection.GradientProjector",
    "galore_torch.galore_projector.GaLoreProjector",
    "pytorch_optimizer.optimizer.galore_utils.GaLoreProjector",
    "pytorch_optimizer.optimizer.utils.galore.GaLoreProjector",
)
"""Classes of projectors in the states of these packages; pytorch-optimizer has moved its own."""


class _Projector:
    """What is left of a projector: its attributes."""


def read_foreign(path: str | Path) -> dict[str, Any]:
    """What torch.save wrote to `path`, an optimizer's state of one of these packages in it; runs no code from the file.

    Raises CheckpointError where the file holds other objects or cannot be read.
    """
    try:
        with torch.serialization.safe_globals([(_Projector, name) for name in PROJECTORS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of fira, galore-torch or pytorch-optimizer: {reason}; "
            "pass a file of torch.save(optimizer.state_dict())"
        ) from error


def load_foreign(optimizer: LowRankOptimizer, saved: Mapping[str, Any]) -> None:
    """Put the state_dict of another package's optimizer, from `read_foreign`, into ours.

    optimizer: over the same parameters in the same groups, which may be given as the package takes them ("rank",
    "update_proj_gap", "scale" ...). Moments, bases, steps and the limiter's norm go over; a run then goes on as the
    package would with refresh="exact" and stagger=False, up to rounding. pytorch-optimizer counts a step before it asks
    for a refresh, we after, so its refreshes come one step later here.

    Raises CheckpointError where parameters or shapes differ, ConfigError for state in int8 or int4.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    params = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    if len(numbers) != len(params):
        raise CheckpointError(
            f"the saved state is of {len(numbers)} parameters, the optimizer has {len(params)}; "
            "give it the groups that the saved one had, in their order"
        )
    for group in optimizer.param_groups:
        for name in ("state_dtype", "basis_dtype", "other_dtype"):
            if group[name] in ("int8", "int4"):
                raise ConfigError(
                    f"{name} = '{group[name]}' cannot be loaded from another package; use bfloat16 or float32"
                )
    counts = {number: group.get("step") for group in saved["param_groups"] for number in group["params"]}
    state, steps = {}, []
    for number, (group, param) in zip(numbers, params, strict=True):
        held = saved["state"].get(number, {})
        step = float(held.get("step", counts[number] or 0))
        steps.append((group, step))
        if held:
            state[number] = _converted(optimizer, group, param, held, step, f"parameter {number}")
    packed = optimizer.state_dict()
    for mine, group in zip(packed["param_groups"], optimizer.param_groups, strict=True):
        mine["step"] = int(max((step for other, step in steps if other is group), default=0))
    order = [number for group in packed["param_groups"] for number in group["params"]]
    packed["state"] = {order[numbers.index(number)]: values for number, values in state.items()}
    optimizer.load_state_dict(packed)


def _converted(
    optimizer: LowRankOptimizer, group: dict[str, Any], param: Tensor, held: Mapping[str, Any], step: float, name: str
) -> dict[str, Tensor]:
    projector = held.get("projector")
    if group["low_rank"] != (projector is not None):
        was = "projected" if projector is not None else "not projected"
        raise CheckpointError(
            f"{name}, of shape {list(param.shape)}, was {was} by the saved optimizer, but not here so"
        )
    found = {name: torch.as_tensor(held[name], dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
    found["step"] = torch.tensor(step)
    if projector is not None:
        basis = getattr(projector, "ortho_matrix", None)
        if not isinstance(basis, Tensor):
            raise CheckpointError(
                f"{name} was projected on two sides ('full') or not yet; only one-sided ones can be loaded"
            )
        left = resolve_side(group["side"], param.shape) == "left"
        found["basis"] = basis if left else basis.mT
        if left:
            found |= {key: found[key].mT for key in ("exp_avg", "exp_avg_sq")}
        if "limiter_norm" in optimizer.scalars:
            found["limiter_norm"] = torch.as_tensor(held.get("scaling_grad", 0.0), dtype=torch.float32).reshape(())
        if group["lazy_overlap"]:
            found["refresh_gap"] = torch.tensor(1.0)
    layout = optimizer.layout(param)
    return {key: value.to(getattr(torch, layout[key].dtype)).contiguous() for key, value in found.items()}
