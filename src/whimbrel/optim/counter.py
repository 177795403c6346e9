"""Random bits as a pure function of a key and an element's index: the same on every device and in any sharding.

No generator has a state, so a stopped run goes on with the same bits, and a CUDA graph may replay them.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MEANS, SQUARES, WEIGHTS = 0, 1 << 30, 1 << 31
"""First rows of `lattice` for rounding the two moments and the weights."""
COLUMNS = 3 << 30
"""Index of the word from which the columns of `lattice` are counted."""
SPREAD = 0x85EBCA6B
"""Odd multiplier that carries low bits upwards (MurmurHash3)."""
GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio, which spreads small counts over all words."""


W = TypeVar("W", int, Tensor)


def mix(x: W) -> W:
    """Scramble words (values below 2^32, int or int64) by the finaliser of MurmurHash3 (A. Appleby, public domain)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & WORD
    return x ^ (x >> 16)


def base(seed: int, index: int) -> int:
    """The word of one parameter, counted from 0, under a seed."""
    return mix((mix((seed + 1) * GOLDEN & WORD) + (index + 1) * GOLDEN) & WORD)


def key(bases: Tensor, step: Tensor) -> Tensor:
    """Words [B] for a step [B] of the parameters with these `base` words [B], int64."""
    return mix((bases + step.long() * GOLDEN) & WORD)


def drawn_basis_key(base: int, epoch: int) -> int:
    """The word from which a matrix draws its basis; other than those for rounding."""
    return mix((mix(base ^ GOLDEN) + epoch * GOLDEN) & WORD)


def words(keys: Tensor, count: int, *, first: int = 0) -> Tensor:
    """Words [..., count] for the elements first, first + 1, ... under each of `keys` [...], int64 below 2^32."""
    index = torch.arange(first, first + count, device=keys.device)
    return mix(mix(index ^ keys[..., None]) + keys[..., None] & WORD)


def lattice(keys: Tensor, rows: int, columns: int, *, first: int = 0, first_column: int = 0) -> Tensor:
    """16 random bits for each element of matrices, [..., rows, columns], int32, under each of `keys` [...].

    A row has a word of its own, a column one from an arithmetic sequence, and one product mixes the two: a quarter of
    the operations of `words`, which are what a kernel that writes weights would otherwise spend most of its time on.
    Words are cut to 32 bits before, as the product wraps there by itself and takes half of the memory.
    """
    row = words(keys, rows, first=first)[..., :, None]
    start = words(keys, 1, first=COLUMNS)
    column = ((start + first_column + torch.arange(columns, device=keys.device)) * GOLDEN & WORD)[..., None, :]
    return (row.int() ^ column.int()).mul_(SPREAD - (WORD + 1)).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def normal(keys: Tensor, count: int) -> Tensor:
    """Standard normal float32 [..., count] (Box and Muller 1958)."""
    drawn = words(keys, 2 * count).unflatten(-1, (2, count)).double()
    radius = (-2 * ((drawn[..., 0, :] + 1) / (WORD + 1)).log()).sqrt()
    return (radius * (drawn[..., 1, :] * (2 * math.pi / (WORD + 1))).cos()).float()


def round_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16, up with a chance equal to the part that is cut off.

    bits: integers of x's shape, evenly spread over 0 to 65,535, which decide; the mean over them is x, so that small
    updates are not lost on the way to weights of 8 bits. Infinities and NaN stay what they are.
    """
    raised = (x.contiguous().view(torch.int32) + bits.int()).bitwise_and_(-1 << 16)
    return torch.where(x.isfinite(), raised.view(torch.float32), x).to(torch.bfloat16)
