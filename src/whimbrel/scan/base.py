"""The results of recurrences: fixed fields, tensors only."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class State(NamedTuple):
    """Recurrent state of a mixer, one per sequence, always in fp32 (fp64 for fp64 inputs)."""

    base: Tensor
    """[N, HV, K, V]: what the recurrence has written so far."""
    residual: Tensor | None
    """[N, HV, K, V]: the second, correcting state; None for mixers that have a single state."""


class Out(NamedTuple):
    """Result of an operation or of a layer."""

    y: Tensor
    """The output, one vector per token."""
    state: Any
    """What the next call takes as `state`; its type is that of the operation or layer."""
