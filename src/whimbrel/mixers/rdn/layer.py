"""The RDN layer."""

from __future__ import annotations

from whimbrel.mixers.rdn.op import rdn
from whimbrel.mixers.two_state.layer import TwoStateMixer


class RDN(TwoStateMixer):
    """Residual Delta Net: y, state = layer(x, state) for x [B, T, hidden_size].

    Arguments as in RDNConfig, where they are described; None for `num_value_heads` and `value_head_dim` takes
    `num_heads` and `head_dim`, None for `clip` turns clipping off. Source: arXiv 2509.25223.
    """

    _op = staticmethod(rdn)
