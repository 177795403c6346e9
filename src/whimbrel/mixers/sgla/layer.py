"""The SGLA layer."""

from __future__ import annotations

from functools import partial

from whimbrel.mixers.linear import OneStateMixer, one_state
from whimbrel.scan.decay.op import decay_scan


class SGLA(OneStateMixer):
    """Scalar-gated linear attention: y, state = layer(x, state) for x [B, T, hidden_size].

    Arguments as in SGLAConfig, where they are described; None for `num_value_heads` and `value_head_dim` takes
    `num_heads` and `head_dim`. Source: arXiv 2405.21060, section 6.
    """

    _op = staticmethod(partial(one_state, decay_scan))
