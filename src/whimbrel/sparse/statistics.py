"""Statistics of key blocks: computed once, kept beside a cache of keys, extended as blocks fill."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.config import require
from whimbrel.errors import ConfigError
from whimbrel.sparse.blocks import heads_first


class KeyStatistics(NamedTuple):
    """Of the keys of each block, fp32, or fp64 if the keys are; the last block may be short."""

    block_size: int
    """Tokens of a block."""
    keys: int
    """How many keys these are of."""
    means: Tensor
    """[B, Hkv, blocks, D]."""
    least: Tensor
    """[B, Hkv, blocks, D]: least deviation from the mean, element by element."""
    most: Tensor
    """[B, Hkv, blocks, D]: the largest."""
    radius: Tensor
    """[B, Hkv, blocks]: how far the farthest key lies from the mean."""

    @property
    def counts(self) -> Tensor:
        """[blocks]: keys of each block, in the dtype of the means."""
        begin = torch.arange(self.means.shape[2], device=self.means.device) * self.block_size
        return (self.keys - begin).clamp_max(self.block_size).to(self.means.dtype)


def key_statistics(k: Tensor, block_size: int, before: KeyStatistics | None = None) -> KeyStatistics:
    """Statistics of k [B, Tk, Hkv, D].

    Args:
        k: all keys so far.
        block_size: tokens of a block.
        before: statistics of the first keys of k. Blocks that were complete then are not read again, so a chunk of a
            prompt costs what its own keys cost. That these keys have not changed since is the caller's to see to.

    Raises:
        ConfigError: `before` is of other blocks or heads, or of more keys than k has.
    """
    require(block_size > 0, "block_size", block_size, "a positive number of tokens")
    whole = 0
    if before is not None:
        _check_earlier(before, k, block_size)
        whole = before.keys // block_size
    new = heads_first(k[:, whole * block_size :])
    full = new.shape[2] // block_size * block_size
    parts = [] if before is None else [tuple(x[:, :, :whole] for x in before[2:])]
    if full:
        parts.append(_of_blocks(new[:, :, :full].unflatten(2, (-1, block_size))))
    if full < new.shape[2]:
        parts.append(_of_blocks(new[:, :, full:].unsqueeze(2)))
    return KeyStatistics(block_size, k.shape[1], *(torch.cat(found, 2) for found in zip(*parts, strict=True)))


def check_statistics(found: KeyStatistics, k: Tensor, block_size: int) -> None:
    """Raise ConfigError unless these are of all keys of k [B, Tk, Hkv, D] in blocks of `block_size`."""
    _check_earlier(found, k, block_size)
    require(found.keys == k.shape[1], "statistics.keys", found.keys, f"{k.shape[1]}, the keys of k; extend them first")


def _check_earlier(found: KeyStatistics, k: Tensor, block_size: int) -> None:
    require(
        found.block_size == block_size, "statistics.block_size", found.block_size, f"{block_size}, that of the call"
    )
    batch, tokens, heads, dim = k.shape
    shape = found.means.shape
    if (shape[0], shape[1], shape[3]) != (batch, heads, dim):
        raise ConfigError(
            f"statistics: of batch {shape[0]}, {shape[1]} heads of {shape[3]}, but k is of batch {batch}, {heads} heads"
            f" of {dim}; compute them from this k"
        )
    require(found.keys <= tokens, "statistics.keys", found.keys, f"at most {tokens}, the keys of k")


def _of_blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Means, deviations and radius of x [B, Hkv, blocks, keys, D]."""
    means = x.mean(3)
    spread = x - means.unsqueeze(3)
    return means, spread.amin(3), spread.amax(3), spread.norm(dim=-1).amax(3)
