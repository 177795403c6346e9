"""Triton kernels around the recurrence: short convolution, gates, gated norm. `ops` holds their PyTorch operators.

Triton is imported when a kernel first runs, so that everything else works without it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from whimbrel.scan.kernels import HAS_TRITON

ENABLED = os.environ.get("WHIMBREL_LAYER_KERNELS") == "1"
"""Off unless asked for, since their speed is not measured.

They agree with fp64 in the interpreter; on an H100 no comparison of theirs failed, in a run that was cut short.
"""


def usable(x: Tensor) -> bool:
    """Whether the kernels take `x`: they need CUDA and Triton, and compute in fp32."""
    return ENABLED and HAS_TRITON and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
