"""What mixer layers take and return besides plain tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from whimbrel.scan.base import Out, State

__all__ = ["KVCache", "LayerState", "Out", "State"]


class LayerState(NamedTuple):
    """State of a linear mixer layer; its size does not depend on how many tokens were seen."""

    conv: Tensor
    """[N, channels, width - 1]: last inputs of the short convolution."""
    recurrent: State | Tensor
    """State of the recurrence: a pair where a second state corrects the first, else one tensor [N, HV, K, V]."""


class KVCache(NamedTuple):
    """State of a softmax layer; it grows with every token."""

    k: Tensor
    """[B, T, Hkv, D]: keys after the rotary embedding."""
    v: Tensor
    """[B, T, Hkv, D]: values."""
