"""The RLA layer."""

from __future__ import annotations

from whimbrel.mixers.rla.op import rla
from whimbrel.mixers.two_state.layer import TwoStateMixer


class RLA(TwoStateMixer):
    """Residual Linear Attention: y, state = layer(x, state) for x [B, T, hidden_size].

    Arguments as in RLAConfig, where they are described; None for `num_value_heads` and `value_head_dim` takes
    `num_heads` and `head_dim`, None for `clip` turns clipping off. Source: arXiv 2509.25223.
    """

    _op = staticmethod(rla)
