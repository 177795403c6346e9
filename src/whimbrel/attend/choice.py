"""Which implementation of `attend` runs, and why one cannot."""

from __future__ import annotations

import functools
import logging
import math
import os
from importlib.util import find_spec

import torch
from torch import Tensor

PROVEN_ON: tuple[tuple[int, int], ...] = ((9, 0),)
"""CUDA capabilities on which the kernel was compared with fp64 and found the fastest; "auto" takes it there alone."""

SPARSE_FROM: dict[tuple[int, int], int] = {(9, 0): 16_384}
"""CUDA capability -> keys from which on selecting blocks and attending to them took less time than dense attention,
where the selection keeps 95 % of the attention of SPARSE_HEADS heads of mixed sharpness. At half of it they take the
same time."""
SPARSE_HEADS = 32
"""Query heads of that measurement. A call of fewer has to be longer, to have as much to leave out beside what every
selection takes: four heads were slower at 16,384 keys."""

MOST_DIM = 256
"""Most elements of a head, of keys and of values, that the kernel takes."""


def no_triton(q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float) -> str | None:
    """Why the Triton kernel cannot run, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {q.device}, not on a CUDA device"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the inputs are {q.dtype}, and it takes bf16, fp16 or fp32"
    if max(q.shape[-1], v.shape[-1]) > MOST_DIM:
        return f"heads have {q.shape[-1]} and {v.shape[-1]} elements, of which it takes at most {MOST_DIM}"
    if block_size < 16 or block_size & (block_size - 1):
        return f"block_size = {block_size}, and it takes powers of two from 16 on"
    if scale < 0:
        return f"scale = {scale}, and it takes no negative one"
    if needs_grad(q, k, v):
        return "an input requires grad, and it has no backward"
    return None


def no_flex(q: Tensor, block_size: int) -> str | None:
    """Why FlexAttention cannot run, or None."""
    if q.is_cuda and block_size % 128:
        return f"block_size = {block_size}, and compiled it takes multiples of 128"
    return None


def auto(q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float) -> str:
    """The implementation to run; says once for each reason what it took and why."""
    why = no_triton(q, k, v, block_size, scale)
    if why is None and not q.is_cuda:
        why = f"the tensors are on {q.device}, not on a CUDA device"
    if why is None:
        capability = torch.cuda.get_device_capability(q.device)
        if capability not in PROVEN_ON:
            why = f"it is not yet compared with fp64 on CUDA capability {capability[0]}.{capability[1]}"
    if why is None:
        _say("attend: impl='auto' runs 'triton', the fastest on this device")
        return "triton"
    _say(f"attend: impl='auto' runs 'blocks' and not 'triton': {why}")
    return "blocks"


def sparse_from(device: torch.device, heads: int = SPARSE_HEADS) -> int:
    """Keys below which dense attention was measured to take less time on this device; 0 where nothing was measured.

    heads: query heads of all sequences of a call. Fewer than SPARSE_HEADS raise the length until the pairs are as many.
    Says once what it found (logger `whimbrel.attend`, level INFO).
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    found = 0 if capability is None else SPARSE_FROM.get(capability, 0)
    if found:
        found = at_heads(found, heads)
        _say(f"attend: below {found} keys dense attention is the faster one on this device, as measured")
    else:
        _say(f"attend: on {device.type} nothing says below which length dense attention is the faster one")
    return found


def at_heads(keys: int, heads: int) -> int:
    """How many keys give a call of so many heads as many pairs as `keys` give SPARSE_HEADS, but never fewer."""
    return math.ceil(keys * max(1.0, (SPARSE_HEADS / heads) ** 0.5))


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd is to record this call."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@functools.cache
def _say(message: str) -> None:
    logging.getLogger("whimbrel.attend").info(message)
