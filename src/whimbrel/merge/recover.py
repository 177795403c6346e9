"""The way back from a collapse: weights, and on request optimizer state, averaged over earlier checkpoints.

arXiv 2505.12082, figure 7, goes on from the average of three checkpoints saved before the collapse. It does not say
what becomes of the optimizer's state, so that is a choice here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from whimbrel.checkpoint import load_checkpoint
from whimbrel.checkpoint import optimizer as optimizer_state
from whimbrel.checkpoint.full import Extra
from whimbrel.checkpoint.weights import weights_of
from whimbrel.config import MergeConfig, require
from whimbrel.merge.online import OnlineAverage

Policy = Literal["average", "newest", "reset"]


def load_average(
    paths: Sequence[str | Path],
    *,
    model: nn.Module,
    optimizer: Optimizer,
    method: str | MergeConfig = "sma",
    policy: Policy = "average",
) -> Extra:
    """Put the average of step folders, oldest first, into `model` and `optimizer`; returns the newest one's `extra`.

    The weights are averaged by `method`, bit for bit as `merge_checkpoints` does. policy: what the optimizer goes on
    with. "average": state tensors in the coordinates of their parameter (first and second moments) are averaged as
    the weights are, which keeps second moments positive; counters, and state of another shape, such as the bases of
    low-rank optimizers and the moments inside them, are the newest checkpoint's, since moments in different bases
    have no mean. "newest": all of it is the newest's. "reset": none of it; warm the learning rate up again.

    Needs 8 bytes of main memory for each averaged element of this process's shard. Every process calls it. Raises
    CheckpointError as `load_checkpoint` does.
    """
    require(policy in ("average", "newest", "reset"), "policy", policy, "'average', 'newest' or 'reset'")
    require(len(paths) > 0, "number of checkpoints to go back to", 0, "at least one")

    def averaged() -> dict[str, Tensor]:
        tensors = dict(weights_of(model).tensors)
        return tensors | (_moments(model, optimizer) if policy == "average" else {})

    extra = load_checkpoint(paths[0], model=model, optimizer=optimizer)
    average = OnlineAverage(averaged, count=len(paths), method=method)
    average.update(0)
    for number, path in enumerate(paths[1:], start=1):
        extra = load_checkpoint(path, model=model, optimizer=optimizer)
        average.update(number)
    average.swap_in()
    if policy == "reset":
        _forget(optimizer)
    return extra


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Floating-point state tensors that have their parameter's shape, counters apart."""
    tensors, layout = optimizer_state.pack(model, optimizer)
    return {
        full: tensors[full]
        for name, values in layout["state"].items()
        for key, value in values.items()
        if value.get("follows") and key != "step" and tensors[full := f"optim/{name}/{key}"].is_floating_point()
    }


def _forget(optimizer: Optimizer) -> None:
    """Empty the state and begin its counters anew; options and learning rates stay."""
    packed = optimizer.state_dict()
    packed["state"] = {}
    for group in packed["param_groups"]:
        if "step" in group:
            group["step"] = torch.zeros_like(group["step"]) if isinstance(group["step"], Tensor) else 0
    optimizer.load_state_dict(packed)
