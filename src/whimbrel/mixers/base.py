"""What mixer layers take and return besides plain tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from whimbrel.errors import ConfigError
from whimbrel.scan.base import Out, State

__all__ = ["KVCache", "LayerState", "Out", "State", "check_input"]


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


def check_input(name: str, x: Tensor, proj: nn.Module, width: int) -> None:
    """Raise ConfigError unless x is [batch, time, width] in the dtype of the layer's projections, or autocast is on."""
    if x.dim() != 3 or x.shape[2] != width:
        raise ConfigError(
            f"{name}: x has shape {list(x.shape)}; give [batch, time, hidden_size], hidden_size = {width}"
        )
    # Weights of other kinds, such as 8 bits, are turned into the dtype of x by their layers.
    own = getattr(proj, "weight", x).dtype
    if x.dtype != own and own.is_floating_point and not torch.is_autocast_enabled(x.device.type):
        raise ConfigError(
            f"{name}: x has dtype {x.dtype}, the layer {own}; use x.to({own}), layer.to(x.dtype) or torch.autocast"
        )
