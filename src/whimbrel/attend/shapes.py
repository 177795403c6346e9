"""What attention accepts: one check of q, k and v for every function that takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from whimbrel.errors import ConfigError


class Shape(NamedTuple):
    """Sizes of one attention call; the queries are the last `q_len` of `k_len` positions."""

    batch: int
    q_len: int
    k_len: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def group(self) -> int:
        """Query heads that share one key head; query head h reads key head h // group."""
        return self.heads // self.kv_heads


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None = None) -> Shape:
    """Sizes of q [B, Tq, H, D], k [B, Tk, Hkv, D] and, where given, v [B, Tk, Hkv, Dv].

    Raises ConfigError unless all are floating point of one dtype on one device, not empty, Tq <= Tk and H is
    a multiple of Hkv.
    """
    # Every call comes through here, and a short one takes the GPU less than a millisecond: as few questions as will do.
    dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and (x.dim() != 4 or x.dtype != dtype or x.device != device or not x.numel()):
            raise _unfit(name, x, q)
    if not dtype.is_floating_point:
        raise _unfit("q", q, q)
    batch, q_len, heads, dim = q.shape
    k_batch, k_len, kv_heads, k_dim = k.shape
    if k_batch != batch or k_dim != dim:
        raise ConfigError(
            f"k has shape {tuple(k.shape)} but q has {tuple(q.shape)}; the first and last sizes must be equal"
        )
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ConfigError(
            f"v has shape {tuple(v.shape)} but k has {tuple(k.shape)}; all but the last size must be equal"
        )
    if heads % kv_heads:
        raise ConfigError(
            f"q has {heads} heads, which is not a multiple of the {kv_heads} heads of k; give one that is"
        )
    if q_len > k_len:
        raise ConfigError(f"q has {q_len} positions but k has only {k_len}; give the keys of all positions")
    return Shape(batch, q_len, k_len, heads, kv_heads, dim)


def _unfit(name: str, x: Tensor, q: Tensor) -> ConfigError:
    """What is wrong with x beside q."""
    shape = tuple(x.shape)
    if x.dim() != 4:
        return ConfigError(f"{name} has shape {shape}; attention takes [batch, time, heads, dim]")
    if x.numel() == 0:
        return ConfigError(f"{name} has shape {shape}, which is empty; every size must be at least 1")
    if not x.is_floating_point():
        return ConfigError(f"{name} has dtype {x.dtype}; attention takes a floating-point dtype")
    return ConfigError(
        f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; bring them to one dtype and device"
    )


def default_scale(dim: int, scale: float | None) -> float:
    """`scale`, or 1 / sqrt(dim) where it is None."""
    return dim**-0.5 if scale is None else scale
