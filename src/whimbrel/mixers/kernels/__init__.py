"""Triton kernels around the recurrence: short convolution, gates, gated norm. `ops` holds their PyTorch operators.

Triton is imported when a kernel first runs, so that everything else works without it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whimbrel.scan.kernels import HAS_TRITON


def usable(x: Tensor) -> bool:
    """Whether the kernels take `x`: they need CUDA and Triton, and compute in fp32."""
    return HAS_TRITON and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
