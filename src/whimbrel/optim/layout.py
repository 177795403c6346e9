"""What each parameter's state consists of: names, shapes and dtypes. Imports no torch.

A matrix has a projected side of d elements and another of s, "slices". Moments lie slice by slice, [s, r], on either
side, and a block of 8-bit codes never crosses a slice: whoever holds some slices holds their codes and scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from whimbrel.optim.groups import resolve_side

MOMENT_BLOCK = 256
"""Most codes under one scale, in elements of a slice, or of a row of a parameter that is not projected."""
BASIS_GROUP = 128
"""Rows of a column of the basis under one scale."""
SMALL = 4096
"""Elements below which the moments of a parameter that is not projected stay float32."""

BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1}


class Entry(NamedTuple):
    """Shape and dtype of one tensor of the state."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * BYTES[self.dtype]


def sides(shape: Sequence[int], side: str) -> tuple[int, int]:
    """(s, d) of an m x n matrix."""
    m, n = shape[-2:]
    return (n, m) if resolve_side(side, shape) == "left" else (m, n)


def matrix_layout(
    shape: Sequence[int],
    *,
    rank: int,
    side: str,
    scalars: Sequence[str],
    state_dtype: str,
    basis_dtype: str | None,
) -> dict[str, Entry]:
    """State of a low-rank matrix, or of E of them, [E, m, n]; `scalars` are float32 numbers of the method.

    basis_dtype: None where bases are drawn.
    """
    s, d = sides(shape, side)
    experts = tuple(shape[:-2])
    state = {"step": Entry((), "float32"), **moments_layout((s, rank), state_dtype)}
    state |= {name: Entry((), "float32") for name in scalars}
    if basis_dtype == "int4":
        state["basis"] = Entry((-(-d // 2), rank), "uint8")
        state["basis_scale"] = Entry((-(-d // BASIS_GROUP), rank), "float32")
    elif basis_dtype is not None:
        state["basis"] = Entry((d, rank), basis_dtype)
    return {name: Entry((*experts, *entry.shape), entry.dtype) for name, entry in state.items()}


def other_layout(shape: Sequence[int], *, other_dtype: str) -> dict[str, Entry]:
    """State of a parameter that is not projected."""
    dtype = "float32" if other_dtype == "int8" and math.prod(shape) < SMALL else other_dtype
    return {"step": Entry((), "float32"), **moments_layout(shape, dtype)}


def moments_layout(shape: Sequence[int], dtype: str) -> dict[str, Entry]:
    """Two moments of one shape, and under int8 their scales, one for each MOMENT_BLOCK along the last dimension."""
    shape = tuple(shape)
    state = {}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = Entry(shape, "uint8" if dtype == "int8" else dtype)
        if dtype == "int8":
            state[f"{name}_scale"] = Entry((*shape[:-1], -(-shape[-1] // MOMENT_BLOCK)), "float32")
    return state
