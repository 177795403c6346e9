"""The softmax attention layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from whimbrel.config import require
from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.mixers.base import KVCache, Out, check_input
from whimbrel.mixers.norm import RMSNorm
from whimbrel.mixers.softmax.config import RopeScaling
from whimbrel.scan.common import check_cu_seqlens

Prefill = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q [B, Tq, H, D], k [B, Tk, Hkv, D], v, scale) -> y [B, Tq, H, D]; the queries are the last Tq positions."""


_DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def decoding_kernels(queries: int, device: torch.device) -> AbstractContextManager[object]:
    """Where torch's attention of so many queries is to run: one new token on CUDA does without cuDNN.

    cuDNN makes a plan for each number of keys, which takes the host tens of ms a token.
    """
    return sdpa_kernel(_DECODING) if queries == 1 and device.type == "cuda" else nullcontext()


class SoftmaxAttention(nn.Module):
    """Causal softmax attention: y, cache = layer(x, cache) for x [B, T, hidden_size].

    Arguments as in SoftmaxConfig, where they are described; None for `num_kv_heads` takes `num_heads`. Grouped
    queries: arXiv 2305.13245; rotary positions: arXiv 2104.09864, with channel i paired with i + head_dim / 2.

    `prefill`, when set, computes the attention of every call in evaluation mode with more than one new token,
    without cu_seqlens, and without a window that cuts keys off.
    """

    prefill: Prefill | None = None

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int,
        rope_theta: float = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
        window: int = 0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, size in {"hidden_size": hidden_size, "num_heads": num_heads, "head_dim": head_dim}.items():
            require(size > 0, name, size, "a positive number")
        self.hidden_size, self.num_heads, self.head_dim, self.window = hidden_size, num_heads, head_dim, window
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling or RopeScaling()
        self.num_kv_heads = num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads = {num_kv_heads} is not allowed; use a divisor of num_heads = {num_heads}")
        if head_dim % 2:
            raise ConfigError(f"head_dim = {head_dim} is not allowed; use an even number, for the rotary positions")
        keys = self.num_kv_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, keys, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, keys, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=out_bias)
        self.q_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, state: KVCache | None = None, *, cu_seqlens: Tensor | None = None) -> Out:
        """x [B, T, hidden_size] -> Out(y [B, T, hidden_size], KVCache of all tokens so far).

        cu_seqlens [N + 1] marks N packed sequences in a batch of 1, whose positions all begin at 0. Such a call
        takes no cache, and returns None for it: sequences of different lengths do not fit in one. Raises
        UnsupportedError for both a cache and cu_seqlens, ConfigError for an x of another shape or dtype than the
        layer's, or cu_seqlens that do not fit it.
        """
        check_input("softmax", x, self.q_proj, self.hidden_size)
        if state is not None and cu_seqlens is not None:
            raise UnsupportedError(
                "softmax: a cache was given together with cu_seqlens, but packed sequences cannot go on from a cache; "
                "run the sequences one by one or padded to one length"
            )
        batch, time, _ = x.shape
        if cu_seqlens is not None:
            check_cu_seqlens("softmax", cu_seqlens, batch, time)
            lengths = cu_seqlens.diff().tolist()
            heads = self.heads(x, torch.cat([torch.arange(n, device=x.device) for n in lengths]))
            pieces = zip(*(tensor.split(lengths, 1) for tensor in heads), strict=True)
            y = torch.cat([_attend(q, k, v, self.window) for q, k, v in pieces], 1)
            return Out(self.o_proj(y.flatten(2)), None)
        start = 0 if state is None else state.k.shape[1]
        q, k, v = self.heads(x, torch.arange(start, start + time, device=x.device))
        if state is not None:
            k, v = torch.cat((state.k, k), 1), torch.cat((state.v, v), 1)
        whole = not self.window or k.shape[1] <= self.window
        if self.prefill is not None and time > 1 and not self.training and whole:
            y = self.prefill(q, k, v, self.head_dim**-0.5)
        else:
            y = _attend(q, k, v, self.window)
        return Out(self.o_proj(y.flatten(2)), KVCache(k, v))

    def heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k and v [B, T, Hkv, D] of x [B, T, hidden_size].

        q and k are turned to `positions`, [T] or [B, T] int64.
        """
        batch, time, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, time, self.num_heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(batch, time, self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).view(batch, time, self.num_kv_heads, self.head_dim)
        rotation = self._rotation(positions, q.dtype)
        return _rotate(q, rotation), _rotate(k, rotation), v

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles at positions [..., T], each [..., T, 1, head_dim / 2], from fp64 angles."""
        half = self.head_dim // 2
        exponents = torch.arange(half, device=positions.device, dtype=torch.float64) / -half
        angles = positions[..., None, None] * _scaled(self.rope_theta**exponents, self.rope_scaling)
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def extra_repr(self) -> str:
        """Heads, for print(model)."""
        return f"{self.num_heads} heads, {self.num_kv_heads} of keys, dim {self.head_dim}"


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (i, i + D / 2) of x [B, T, heads, D] by the angles, in at least fp32."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def _scaled(rates: Tensor, scaling: RopeScaling) -> Tensor:
    """Radians a token, changed as `scaling` says."""
    if scaling.kind == "none":
        return rates
    slow = rates / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_tokens * rates / (2 * math.pi)
    kept = ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0, 1)
    return slow + (rates - slow) * kept


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Causal attention of q [B, Tq, H, D], the last Tq positions, to k, v [B, Tk, Hkv, D]."""
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    # is_causal aligns the first query with the first key, so it is right for equal lengths only.
    if 1 < queries < keys or 0 < window < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if mask is not None and window:
        mask = mask.triu(keys - queries - window + 1)
    with decoding_kernels(queries, q.device):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and queries == keys,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return y.transpose(1, 2)
