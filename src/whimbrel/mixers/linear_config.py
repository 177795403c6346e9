"""The options that the linear mixers share. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from whimbrel.config import MixerConfig, check_literals, require


@dataclass(frozen=True, kw_only=True)
class LinearMixerConfig(MixerConfig):
    """Heads, convolution and code of a mixer with a constant-size state."""

    NUM_GATES: ClassVar[int]
    """Gates of a value head: decay and beta, and gamma where a second state corrects the first."""
    NUM_STATES: ClassVar[int]
    """Matrices [key dim, value dim] that a value head keeps."""

    GATE_SETS: ClassVar[int] = 1
    """Sets of these gates that a value head has."""

    num_heads: int = 3
    """Heads of queries and keys."""
    head_dim: int = 64
    """Channels of a query or key head."""
    num_value_heads: int = 0
    """Heads of values and states, a multiple of num_heads; 0 takes num_heads."""
    value_head_dim: int = 0
    """Channels of a value head; 0 takes head_dim."""
    conv_size: int = 4
    """Tokens that the short convolution on queries, keys and values spans."""
    impl: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Code of the recurrence; a named choice never falls back."""

    def __post_init__(self) -> None:
        check_literals(self, "mixer.")
        for name in ("num_heads", "head_dim", "conv_size"):
            require(getattr(self, name) > 0, f"mixer.{name}", getattr(self, name), "a positive number")
        heads = self.num_value_heads
        require(
            heads >= 0 and heads % self.num_heads == 0,
            "mixer.num_value_heads",
            heads,
            f"0 or a multiple of mixer.num_heads = {self.num_heads}",
        )
        require(self.value_head_dim >= 0, "mixer.value_head_dim", self.value_head_dim, "0 or a positive number")

    @property
    def value_heads(self) -> int:
        """Heads of values, with 0 resolved."""
        return self.num_value_heads or self.num_heads

    @property
    def value_dim(self) -> int:
        """Channels of a value head, with 0 resolved."""
        return self.value_head_dim or self.head_dim

    def layer_options(self) -> dict[str, Any]:
        """Keyword arguments of the layer, but for `norm_eps`."""
        return {
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "num_value_heads": self.value_heads,
            "value_head_dim": self.value_dim,
            "conv_size": self.conv_size,
            "impl": self.impl,
        }

    def parameter_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the layer."""
        keys, values = self.num_heads * self.head_dim, self.value_heads * self.value_dim
        gated = self.GATE_SETS * self.value_heads
        return {
            "A_log": (gated,),
            "dt_bias": (gated,),
            "q_proj.weight": (keys, hidden_size),
            "k_proj.weight": (keys, hidden_size),
            "v_proj.weight": (values, hidden_size),
            "gate_proj.weight": (values, hidden_size),
            "gates.weight": (self.NUM_GATES * gated, hidden_size),
            "conv.weight": (2 * keys + values, 1, self.conv_size),
            "norm.weight": (self.value_dim,),
            "o_proj.weight": (hidden_size, values),
        }

    def num_params(self, hidden_size: int) -> int:
        """Parameters of the layer."""
        return sum(math.prod(shape) for shape in self.parameter_shapes(hidden_size).values())

    def state_bytes(self, hidden_size: int, tokens: int, *, bytes_per_element: int = 4) -> int:
        """Bytes of the layer's state for one sequence, the same for any number of tokens.

        `bytes_per_element` is that of the activations, which the convolution's state is kept in; the recurrent
        states take at least 4 bytes an element.
        """
        channels = 2 * self.num_heads * self.head_dim + self.value_heads * self.value_dim
        recurrent = self.NUM_STATES * self.value_heads * self.head_dim * self.value_dim
        return channels * (self.conv_size - 1) * bytes_per_element + recurrent * max(4, bytes_per_element)
