"""Which implementation of `attend` runs, and why one cannot."""

from __future__ import annotations

import functools
import logging
import os
from importlib.util import find_spec

import torch
from torch import Tensor

PROVEN_ON: tuple[tuple[int, int], ...] = ((9, 0),)
"""CUDA capabilities on which the kernel was compared with fp64 and found the fastest; "auto" takes it there alone."""

MOST_DIM = 256
"""Most elements of a head, of keys and of values, that the kernel takes."""


def no_triton(q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float) -> str | None:
    """Why the Triton kernel cannot run on q, k and v [..., heads, dim], whatever their sizes before; or None."""
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


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd is to record this call."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@functools.cache
def _say(message: str) -> None:
    logging.getLogger("whimbrel.attend").info(message)
