"""The GDN layer."""

from __future__ import annotations

from functools import partial

from whimbrel.mixers.linear import OneStateMixer, one_state
from whimbrel.scan.delta.op import delta_scan


class GDN(OneStateMixer):
    """Gated DeltaNet: y, state = layer(x, state) for x [B, T, hidden_size].

    Arguments as in GDNConfig, where they are described; None for `num_value_heads` and `value_head_dim` takes
    `num_heads` and `head_dim`. Source: arXiv 2412.06464.
    """

    _op = staticmethod(partial(one_state, delta_scan))
