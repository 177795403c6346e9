"""Random numbers as a pure function of a seed and counters, equal under every version of NumPy.

NumPy promises a stable stream of its bit generators but not of `Generator`'s methods, so the few
distributions that the data needs are made here from the raw stream of Philox (Salmon et al. 2011, doi
10.1145/2063384.2063405).
"""

from __future__ import annotations

import math

import numpy as np


class Draws:
    """The stream that belongs to the given non-negative integers, such as a seed, a purpose and a step."""

    def __init__(self, *counters: int) -> None:
        # Two words for each counter and their number in front: a seed sequence does not tell (1) from (1, 0).
        words = [word for counter in counters for word in (counter & 0xFFFFFFFF, counter >> 32)]
        # Philox takes its key from the sequence. Given a key instead, it would first ask the system for a seed.
        self._bits = np.random.Philox(np.random.SeedSequence([len(counters), *words]))

    def raw(self, *shape: int) -> np.ndarray:
        """Uniform 64-bit integers, uint64 of `shape`."""
        return self._bits.random_raw(math.prod(shape)).reshape(shape)

    def below(self, limit: int, *shape: int) -> np.ndarray:
        """Uniform integers from 0 to `limit` - 1, int64 of `shape`; `limit` is at most 2**32."""
        high = self.raw(*shape) >> np.uint64(32)
        return ((high * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)

    def uniform(self, *shape: int) -> np.ndarray:
        """Uniform numbers in the open interval (0, 1), float64 of `shape`."""
        return ((self.raw(*shape) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def orders(self, length: int, *shape: int) -> np.ndarray:
        """Independent permutations of 0 .. `length` - 1, int64 [*shape, length]."""
        return np.argsort(self.raw(*shape, length), axis=-1, kind="stable")
