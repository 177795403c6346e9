"""The softmax attention layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.mixers.base import KVCache, Out
from whimbrel.mixers.norm import RMSNorm
from whimbrel.scan.common import _check_cu_seqlens as check_cu_seqlens

Prefill = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q [B, Tq, H, D], k [B, Tk, Hkv, D], v, scale) -> y [B, Tq, H, D]; the queries are the last Tq positions."""


class SoftmaxAttention(nn.Module):
    """Causal softmax attention: y, cache = layer(x, cache) for x [B, T, hidden_size].

    Arguments as in SoftmaxConfig, where they are described; None for `num_kv_heads` takes `num_heads`. Grouped
    queries: arXiv 2305.13245; rotary positions: arXiv 2104.09864, with channel i paired with i + head_dim / 2.

    `prefill`, when set, computes the attention of every call in evaluation mode with more than one new token and
    without cu_seqlens.
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
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rope_theta = num_heads, head_dim, rope_theta
        self.num_kv_heads = num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads = {num_kv_heads} is not allowed; use a divisor of num_heads = {num_heads}")
        if head_dim % 2:
            raise ConfigError(f"head_dim = {head_dim} is not allowed; use an even number, for the rotary positions")
        keys = self.num_kv_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, state: KVCache | None = None, *, cu_seqlens: Tensor | None = None) -> Out:
        """x [B, T, hidden_size] -> Out(y [B, T, hidden_size], KVCache of all tokens so far).

        cu_seqlens [N + 1] marks N packed sequences in a batch of 1, whose positions all begin at 0. Such a call
        takes no cache, and returns None for it: sequences of different lengths do not fit in one. Raises
        UnsupportedError for both a cache and cu_seqlens, ConfigError for cu_seqlens that do not fit x.
        """
        if state is not None and cu_seqlens is not None:
            raise UnsupportedError(
                "softmax: a cache was given together with cu_seqlens, but packed sequences cannot go on from a cache; "
                "run the sequences one by one or padded to one length"
            )
        batch, time, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, time, self.num_heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(batch, time, self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).view(batch, time, self.num_kv_heads, self.head_dim)
        if cu_seqlens is not None:
            check_cu_seqlens("softmax", cu_seqlens, batch, time)
            lengths = cu_seqlens.diff().tolist()
            rotation = self._rotation(torch.cat([torch.arange(n, device=x.device) for n in lengths]), q.dtype)
            q, k = _rotate(q, rotation), _rotate(k, rotation)
            pieces = zip(*(tensor.split(lengths, 1) for tensor in (q, k, v)), strict=True)
            return Out(self.o_proj(torch.cat([_attend(*piece) for piece in pieces], 1).flatten(2)), None)
        start = 0 if state is None else state.k.shape[1]
        rotation = self._rotation(torch.arange(start, start + time, device=x.device), q.dtype)
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        if state is not None:
            k, v = torch.cat((state.k, k), 1), torch.cat((state.v, v), 1)
        if self.prefill is not None and time > 1 and not self.training:
            y = self.prefill(q, k, v, self.head_dim**-0.5)
        else:
            y = _attend(q, k, v)
        return Out(self.o_proj(y.flatten(2)), KVCache(k, v))

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles at positions [T], each [T, 1, head_dim / 2], from fp64 angles."""
        half = self.head_dim // 2
        exponents = torch.arange(half, device=positions.device, dtype=torch.float64) / -half
        angles = positions[:, None, None] * self.rope_theta**exponents
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


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, Tq, H, D], the last Tq positions, to k, v [B, Tk, Hkv, D]."""
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    # is_causal aligns the first query with the first key, so it is right for equal lengths only.
    if 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=queries == keys,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)
