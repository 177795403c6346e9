"""Queries and keys with a known attention structure: inputs for tests and benchmarks of sparse attention.

All makers return Heads with the default scale 1 / sqrt(dim) in mind. "Logit" below means q . k / sqrt(dim).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """Inputs of one attention call."""

    q: Tensor
    """[batch, tokens, heads, dim]."""
    k: Tensor
    """[batch, tokens, kv_heads, dim]."""
    v: Tensor
    """[batch, tokens, kv_heads, dim], Gaussian."""


def gaussian(
    seed: int,
    *,
    tokens: int,
    q_len: int | None = None,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Heads:
    """Unstructured: every logit is close to standard normal. The queries are the last `q_len` positions.

    One seed gives other numbers on another device.
    """
    g = torch.Generator(device).manual_seed(seed)
    q = torch.randn(batch, q_len or tokens, heads, dim, generator=g, device=device)
    k, v = (torch.randn(batch, tokens, kv_heads, dim, generator=g, device=device) for _ in range(2))
    return Heads(q.to(dtype), k.to(dtype), v.to(dtype))


def scattered(seed: int, *, tokens: int, columns: int = 200, height: float = 9.0, dim: int = 64) -> Heads:
    """`columns` random keys stand `height` above all others in every row's logits: scattered verticals."""
    g = torch.Generator().manual_seed(seed)
    noise_q, noise_k, v = _noise(g, tokens, dim)
    direction = _unit(g, dim)
    k = noise_k
    k[:, torch.randperm(tokens, generator=g)[:columns]] += height * direction
    return Heads(noise_q + math.sqrt(dim) * direction, k, v)


def slashes(seed: int, *, tokens: int, period: int = 409, height: float = 8.5, dim: int = 64) -> Heads:
    """Keys at distances 0, period, 2 period, ... stand `height` above the mean: sharp diagonals a few tokens
    wide.

    Rotations by the harmonics of the period, as a rotary embedding makes them; their sum is a Dirichlet
    kernel. The period is prime by default, so the diagonals cross blocks at every phase.
    """
    g = torch.Generator().manual_seed(seed)
    noise_q, noise_k, v = _noise(g, tokens, dim)
    pairs = dim // 2
    angle = torch.arange(tokens)[:, None] * (2 * math.pi / period * torch.arange(1, pairs + 1))
    turned = torch.cat([angle.cos(), angle.sin()], -1)[None, :, None, :dim]
    return Heads(noise_q + turned * (height * math.sqrt(dim) / pairs), noise_k + turned, v)


def local(seed: int, *, tokens: int, decay: float = 400.0, dim: int = 64) -> Heads:
    """Logits fall by 1 per `decay` tokens of distance."""
    g = torch.Generator().manual_seed(seed)
    noise_q, noise_k, v = _noise(g, tokens, dim)
    direction = _unit(g, dim)
    place = (torch.arange(tokens) / decay)[None, :, None, None]
    return Heads(noise_q + math.sqrt(dim) * direction, noise_k + place * direction, v)


def diffuse(seed: int, *, tokens: int, dim: int = 64) -> Heads:
    """Nearly flat attention: logits of standard deviation about 0.1."""
    return Heads(*_noise(torch.Generator().manual_seed(seed), tokens, dim))


def blocky(
    seed: int, *, tokens: int, block_size: int = 128, least: float = 0.3, most: float = 6.0, dim: int = 64
) -> Heads:
    """Keys of one block are equal but for noise, and queries of one block share a sharpness: pooling loses
    nothing.

    Logits of the blocks in a row of blocks are Gaussian with a standard deviation drawn log-uniformly between
    `least` and `most`; the last block's is `least`, so that a probe of it sees a head that pooled estimates
    describe.
    """
    g = torch.Generator().manual_seed(seed)
    noise_q, noise_k, v = _noise(g, tokens, dim)
    blocks = -(-tokens // block_size)
    spread = least * (most / least) ** torch.rand(blocks, generator=g)
    spread[-1] = least
    of_block = torch.arange(tokens) // block_size
    query = _unit(g, blocks, dim) * spread[:, None] * math.sqrt(dim)
    key = torch.randn(blocks, dim, generator=g)
    return Heads(0.1 * noise_q + query[of_block][None, :, None], 0.1 * noise_k + key[of_block][None, :, None], v)


STRUCTURED: dict[str, Callable[..., Heads]] = {
    "scattered": scattered,
    "slashes": slashes,
    "local": local,
    "diffuse": diffuse,
}
"""Name -> maker(seed, *, tokens, dim): the four kinds of head that separate selection rules."""


def structured(seed: int, *, tokens: int, dim: int = 64, dtype: torch.dtype = torch.float32) -> Heads:
    """The four structured heads side by side, each with its own key head: batch 1, heads = kv_heads = 4."""
    made = [make(seed + i, tokens=tokens, dim=dim) for i, make in enumerate(STRUCTURED.values())]
    return Heads(*(torch.cat(parts, 2).to(dtype) for parts in zip(*made, strict=True)))


def mixed(
    seed: int,
    *,
    tokens: int,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    batch: int = 1,
    theta: float = 1e6,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> Heads:
    """Heads from diffuse to sharp with rotary locality, an attention sink and hot columns.

    With n Gaussian, 1 the all-ones vector and s_h running from 0.3 to 1.6 over the query heads: q = 0.6 n +
    s_h 1 and k = 0.6 n + 1, both then turned by a rotary embedding of base `theta`. With a random unit vector
    u per key head: q + 4 u, the first four keys + 12 u, and max(8, tokens / 4096) random keys + 6 u. One seed gives
    other numbers on another device.
    """
    g = torch.Generator(device).manual_seed(seed)
    sharpness = torch.linspace(0.3, 1.6, heads, device=device)[:, None]
    q = 0.6 * torch.randn(batch, tokens, heads, dim, generator=g, device=device) + sharpness
    k = 0.6 * torch.randn(batch, tokens, kv_heads, dim, generator=g, device=device) + 1
    q, k = (_rotate(x, theta) for x in (q, k))
    u = _unit(g, batch, 1, kv_heads, dim)
    q = q + 4 * u.repeat_interleave(heads // kv_heads, 2)
    k[:, :4] += 12 * u
    hot = torch.randperm(tokens, generator=g, device=device)[: max(8, tokens // 4096)]
    k[:, hot] += 6 * u
    v = torch.randn(batch, tokens, kv_heads, dim, generator=g, device=device)
    return Heads(q.to(dtype), k.to(dtype), v.to(dtype))


def fading(
    seed: int,
    *,
    tokens: int,
    share: float,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> Heads:
    """Heads whose attention fades with distance: the nearest keys, `share` of all causal pairs, hold 95 % of it.

    As `local`, with one direction a key head. One seed gives other numbers on another device.
    """
    g = torch.Generator(device).manual_seed(seed)
    q = 0.3 * torch.randn(1, tokens, heads, dim, generator=g, device=device)
    k = 0.3 * torch.randn(1, tokens, kv_heads, dim, generator=g, device=device)
    direction = _unit(g, kv_heads, dim)
    # A window of w tokens holds w * tokens - w^2 / 2 pairs, and all but exp(-w / decay) of the attention.
    decay = tokens * (1 - math.sqrt(1 - share)) / math.log(20)
    place = (torch.arange(tokens, device=device) / decay)[None, :, None, None]
    q = q + math.sqrt(dim) * direction.repeat_interleave(heads // kv_heads, 0)
    v = torch.randn(1, tokens, kv_heads, dim, generator=g, device=device)
    return Heads(q.to(dtype), (k + place * direction).to(dtype), v.to(dtype))


def _noise(g: torch.Generator, tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, tokens, 1, dim, generator=g) for _ in range(3))
    return 0.3 * q, 0.3 * k, v


def _unit(g: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=g, device=g.device), dim=-1)


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding, halves paired (x_i with x_(i + dim / 2)); x [B, T, H, D] at positions 0 to T - 1."""
    half = x.shape[-1] // 2
    rate = theta ** (-torch.arange(half, device=x.device) / half)
    angle = (torch.arange(x.shape[1], device=x.device)[:, None] * rate)[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
