"""Both moments of a batch of matrices: from their states into the shape of the projected gradient, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from whimbrel.optim import lowrank, storage
from whimbrel.optim.matrix import Matrix


def read_moments(batch: Sequence[Matrix], side: str) -> lowrank.Moments:
    """Step [B], and both moments in float32 and the shape of the projected gradient."""
    states = [matrix.state for matrix in batch]
    both = (storage.read_moment(states, key) for key in ("exp_avg", "exp_avg_sq"))
    return lowrank.Moments(
        storage.stack([state["step"] for state in states]), *(x.mT if side == "left" else x for x in both)
    )


def store_moments(batch: Sequence[Matrix], moments: lowrank.Moments, side: str, keys: Tensor, active: Tensor) -> None:
    """The reverse; keys [B] (`counter.key`) decide the rounding, and matrices not `active` [B] keep their codes."""
    states, owned = [matrix.state for matrix in batch], batch[0].spread.owned
    for key in ("exp_avg", "exp_avg_sq"):
        value = getattr(moments, key)
        first = 0 if owned is None else owned.start, 0
        storage.write_moment(states, key, value.mT if side == "left" else value, keys, active, first=first)
    storage.store(states, "step", moments.step)
