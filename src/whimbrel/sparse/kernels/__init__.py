"""Triton kernels of selection. The other modules here import Triton, so they are imported only to be run."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from whimbrel.attend.choice import MOST_DIM, PROVEN_ON


def unfit(q: Tensor, block_size: int) -> str | None:
    """Why the kernels cannot choose for q, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {q.device}, not on a CUDA device"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the inputs are {q.dtype}, and they take bf16, fp16 or fp32"
    if q.shape[-1] > MOST_DIM:
        return f"heads have {q.shape[-1]} elements, of which they take at most {MOST_DIM}"
    if block_size not in (16, 32, 64, 128, 256):
        return f"block_size = {block_size}, and they take 16, 32, 64, 128 or 256"
    return None


def proven(q: Tensor) -> bool:
    """Whether "auto" trusts the kernels on q's device."""
    return q.is_cuda and torch.cuda.get_device_capability(q.device) in PROVEN_ON
