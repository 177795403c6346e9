"""Options of softmax attention. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from whimbrel.config import MixerConfig, require

if TYPE_CHECKING:
    from whimbrel.mixers.softmax.layer import SoftmaxAttention

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies of a model were changed to reach further than it was first trained."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """`none`; `linear` divides all frequencies by `factor`; `llama3` divides those that turn less than `low_turns`
    times in `original_tokens`, leaves those that turn more than `high_turns` times, and goes over in between."""
    factor: float = 1.0
    """What slow frequencies are divided by."""
    low_turns: float = 1.0
    """Turns within `original_tokens` below which a frequency is divided by all of `factor` (`llama3`)."""
    high_turns: float = 4.0
    """Turns within `original_tokens` above which a frequency is left as it is (`llama3`)."""
    original_tokens: int = 8192
    """Context length of the first training, in tokens (`llama3`)."""

    def __post_init__(self) -> None:
        require(self.factor > 0, "softmax.rope_scaling.factor", self.factor, "a positive divisor")
        low, high = self.low_turns, self.high_turns
        require(low < high, "softmax.rope_scaling.low_turns", low, f"less than high_turns = {high}")
        tokens = self.original_tokens
        require(tokens > 0, "softmax.rope_scaling.original_tokens", tokens, "a positive number of tokens")


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
    rope_scaling: RopeScaling = RopeScaling()
    """Change of the rotary frequencies for longer contexts."""
    qk_norm: bool = False
    """Normalise every query and key head to unit root mean square, with a learned weight."""
    qkv_bias: bool = False
    """Add a learned bias to queries, keys and values."""
    out_bias: bool = False
    """Add a learned bias to the output projection."""
    window: int = 0
    """Latest tokens, its own included, that a token attends to; 0 is all of them."""

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
        require(self.window >= 0, "softmax.window", self.window, "0 (all tokens) or a positive number of tokens")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, with 0 resolved."""
        return self.num_kv_heads or self.num_heads

    def build(self, hidden_size: int, norm_eps: float) -> SoftmaxAttention:
        """The layer."""
        from whimbrel.mixers.softmax.layer import SoftmaxAttention

        return self.make(SoftmaxAttention, hidden_size, norm_eps)

    def make(self, layer: Callable[..., T], hidden_size: int, norm_eps: float) -> T:
        """`layer` with these options."""
        return layer(
            hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            window=self.window,
            norm_eps=norm_eps,
        )

    def parameter_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the layer."""
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        for name, rows, columns, bias in (
            ("q_proj", queries, hidden_size, self.qkv_bias),
            ("k_proj", keys, hidden_size, self.qkv_bias),
            ("v_proj", keys, hidden_size, self.qkv_bias),
            ("o_proj", hidden_size, queries, self.out_bias),
        ):
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes |= {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        return shapes

    def num_params(self, hidden_size: int) -> int:
        """Parameters of the layer."""
        return sum(math.prod(shape) for shape in self.parameter_shapes(hidden_size).values())

    def state_bytes(self, hidden_size: int, tokens: int, *, bytes_per_element: int = 4) -> int:
        """Bytes of the cached keys and values of one sequence after `tokens` tokens."""
        return 2 * tokens * self.kv_heads * self.head_dim * bytes_per_element
