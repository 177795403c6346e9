"""CRC-32 of bytes that are read in pieces, in any order. Imports no torch."""

from __future__ import annotations

import functools

_POLYNOMIAL = 0xEDB88320


class Pieces:
    """The CRC-32 of `size` bytes, from those of pieces that cover them without overlap."""

    def __init__(self, size: int) -> None:
        self._size, self._done, self._crc = size, 0, 0
        self._waiting: dict[int, tuple[int, int]] = {}

    def add(self, start: int, size: int, crc: int) -> int | None:
        """Take the CRC-32 of bytes [start, start + size); returns that of all once they are complete, else None."""
        self._waiting[start] = (size, crc)
        while self._done in self._waiting:
            length, value = self._waiting.pop(self._done)
            self._crc = combine(self._crc, value, length)
            self._done += length
        return self._crc if self._done == self._size else None


def combine(first: int, second: int, second_size: int) -> int:
    """The CRC-32 of two byte strings one after the other, from theirs and the length of the second."""
    return _times(_zeros(second_size), first) ^ second


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32, the highest bit being x^0."""
    product, bit = 0, 1 << 31
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@functools.lru_cache(4096)
def _zeros(size: int) -> int:
    """x^(8 size): what `size` zero bytes multiply a CRC with."""
    power, square = 1 << 31, 1 << 23
    while size:
        if size & 1:
            power = _times(power, square)
        square = _times(square, square)
        size >>= 1
    return power
