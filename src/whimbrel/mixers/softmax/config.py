"""Options of softmax attention. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whimbrel.config import MixerConfig, require

if TYPE_CHECKING:
    from whimbrel.mixers.softmax.layer import SoftmaxAttention


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(MixerConfig):
    """Causal softmax attention with grouped queries and rotary positions."""

    num_heads: int = 3
    """Heads of queries."""
    num_kv_heads: int = 0
    """Heads of keys and values, a divisor of num_heads; 0 takes num_heads."""
    head_dim: int = 64
    """Channels of a head; even, as rotary positions turn pairs of channels."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies: the slowest pair of channels turns once in about 2 pi * theta tokens."""
    qk_norm: bool = False
    """Normalise every query and key head to unit root mean square, with a learned weight."""

    def __post_init__(self) -> None:
        require(self.num_heads > 0, "softmax.num_heads", self.num_heads, "a positive number")
        require(
            self.num_kv_heads >= 0 and self.num_heads % self.kv_heads == 0,
            "softmax.num_kv_heads",
            self.num_kv_heads,
            f"0 or a divisor of softmax.num_heads = {self.num_heads}",
        )
        require(
            self.head_dim > 0 and self.head_dim % 2 == 0, "softmax.head_dim", self.head_dim, "a positive even number"
        )
        require(self.rope_theta > 0, "softmax.rope_theta", self.rope_theta, "a positive base")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, with 0 resolved."""
        return self.num_kv_heads or self.num_heads

    def build(self, hidden_size: int, norm_eps: float) -> SoftmaxAttention:
        """The layer."""
        from whimbrel.mixers.softmax.layer import SoftmaxAttention

        return SoftmaxAttention(
            hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            qk_norm=self.qk_norm,
            norm_eps=norm_eps,
        )

    def parameter_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the layer."""
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "q_proj.weight": (queries, hidden_size),
            "k_proj.weight": (keys, hidden_size),
            "v_proj.weight": (keys, hidden_size),
            "o_proj.weight": (hidden_size, queries),
        }
        if self.qk_norm:
            shapes |= {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        return shapes

    def num_params(self, hidden_size: int) -> int:
        """Parameters of the layer."""
        return sum(math.prod(shape) for shape in self.parameter_shapes(hidden_size).values())

    def state_bytes(self, hidden_size: int, tokens: int, *, bytes_per_element: int = 4) -> int:
        """Bytes of the cached keys and values of one sequence after `tokens` tokens."""
        return 2 * tokens * self.kv_heads * self.head_dim * bytes_per_element
