"""From which length on selecting blocks pays: where sparse prefill was measured to be faster than dense attention."""

from __future__ import annotations

import functools
import logging
import sys

import torch

PAYS_FROM: dict[tuple[int, int], dict[str, dict[int, dict[int, int]]]] = {
    (9, 0): {
        "row_local": {128: {32: 16_384}, 256: {16: 16_384}},
        "flex_prefill": {128: {32: 65_536}},
    }
}
"""CUDA capability -> kind of selector -> elements of a head -> query heads of a call -> keys from which on selection
and attention, at 95 % of the attention of heads of mixed sharpness, took less time than cuDNN's dense attention at
every length that was timed. `whimbrel bench prefill_crossover` measures it, and a test holds it to the lines."""
NEVER = sys.maxsize
"""Keys of a call that nothing says to make sparse: longer than any."""


def sparse_from(device: torch.device, *, heads: int, head_dim: int, kind: str = "row_local") -> int:
    """Keys from which on a call was measured to take less time sparse than dense; fewer are to run dense.

    The launches of a selection take the same for few heads as for many, so a call of fewer heads has to be longer. It
    counts as the measured one of the same heads with as many of them or the next fewer; NEVER where there is none. 0 on
    a device on which nothing was measured. Says once what it found (logger `whimbrel.sparse`, level INFO).

    Args:
        device: of queries and keys.
        heads: query heads of all sequences of the call.
        head_dim: elements of a head.
        kind: the selector's; one that was not measured itself counts as "row_local".
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    measured = None if capability is None else PAYS_FROM.get(capability)
    if measured is None:
        _say(f"sparse prefill: on {device.type} nothing says below which length dense attention is the faster one")
        return 0
    by_heads = measured.get(kind, measured["row_local"]).get(head_dim, {})
    fewer = [count for count in by_heads if count <= heads]
    found = by_heads[max(fewer)] if fewer else NEVER
    what = f"{heads} heads of {head_dim} under '{kind}'"
    if found == NEVER:
        _say(f"sparse prefill: {what} were not measured to be faster than dense attention at any length")
    else:
        _say(f"sparse prefill: below {found} keys dense attention is the faster one for {what}, as measured")
    return found


@functools.cache
def _say(message: str) -> None:
    logging.getLogger("whimbrel.sparse").info(message)
