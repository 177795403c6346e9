"""State of a parameter: its layout by its group's options, how it lies over processes, and what may be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from whimbrel.errors import CheckpointError, UnsupportedError
from whimbrel.optim import storage
from whimbrel.optim.groups import resolve_side
from whimbrel.optim.layout import Entry, matrix_layout, other_layout
from whimbrel.optim.sharding import full, matrix_placements, place, zeros


def state_layout(group: dict[str, Any], shape: Sequence[int], scalars: Sequence[str]) -> dict[str, Entry]:
    """Names, shapes and dtypes of the state of a parameter of this shape; scalars: the method's own."""
    if not group["low_rank"]:
        return other_layout(shape, other_dtype=group["other_dtype"])
    return matrix_layout(
        shape,
        rank=group["rank"],
        side=group["side"],
        scalars=(*scalars, *(("refresh_gap",) if group["lazy_overlap"] else ())),
        state_dtype=group["state_dtype"],
        basis_dtype=None if group["refresh"] == "random" else group["basis_dtype"],
    )


def empty_entry(group: dict[str, Any], param: Tensor, key: str, layout: dict[str, Entry]) -> Tensor:
    """Zeros for one entry of the state; a DTensor where processes hold parts of it."""
    entry = layout[key]
    dtype = storage.DTYPES[entry.dtype]
    if not isinstance(param, DTensor):
        return torch.zeros(entry.shape, dtype=dtype, device=param.device)
    return zeros(entry.shape, dtype, param, _placements(group, param, key, layout))


def loaded_entry(group: dict[str, Any], param: Tensor, key: str, layout: dict[str, Entry], loaded: Tensor) -> Tensor:
    """A copy of a loaded entry that lies over processes as it does here, however it was saved."""
    placements = _placements(group, param, key, layout) if isinstance(param, DTensor) else ()
    if isinstance(loaded, DTensor) and isinstance(param, DTensor) and list(loaded.placements) == list(placements):
        return loaded.detach().clone()
    whole = full(loaded)
    if not isinstance(param, DTensor) or all(isinstance(p, Replicate) for p in placements):
        return whole.detach().clone()
    return place(whole, param, placements)


def check_loaded(loaded: dict[str, Tensor], layout: dict[str, Entry], *, param: str, optimizer: str) -> None:
    """Raise CheckpointError unless a loaded state has every entry of the layout, in its shape and dtype.

    param, optimizer: their names, for the message.
    """
    for key in layout:
        if key not in loaded:
            raise CheckpointError(
                f"optimizer state of {param} lacks '{key}'; load a state that {optimizer} has written"
            )
    for key, (shape, dtype) in layout.items():
        if tuple(loaded[key].shape) != shape:
            raise CheckpointError(
                f"optimizer state '{key}' of {param} has shape {list(loaded[key].shape)}, "
                f"but needs {list(shape)}; load it into the model that it was saved with"
            )
        if loaded[key].dtype != storage.DTYPES[dtype]:
            found = str(loaded[key].dtype).removeprefix("torch.")
            raise CheckpointError(
                f"optimizer state '{key}' of {param} is {found}, but needs {dtype}; "
                "load it with the state_dtype, basis_dtype and other_dtype of its run"
            )


def _placements(group: dict[str, Any], param: DTensor, key: str, layout: dict[str, Entry]) -> Sequence[Placement]:
    """Moments lie with the slices, or rows, of their parameter; bases and numbers are the same on every process."""
    if group["low_rank"]:
        return matrix_placements(param, key, resolve_side(group["side"], param.shape) == "left")
    if key == "step":
        return [Replicate()] * param.device_mesh.ndim
    by_last = any(getattr(p, "dim", None) in (-1, param.ndim - 1) for p in param.placements)
    if by_last and "exp_avg_scale" in layout:
        raise UnsupportedError(
            "other_dtype = 'int8' takes no parameters that are split along their last dimension, as vectors are "
            "under FSDP2; use float32 or bfloat16"
        )
    return param.placements
