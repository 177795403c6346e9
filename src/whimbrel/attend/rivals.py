"""Dense attention that torch ships, one backend at a time: what skipping blocks is timed against."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from whimbrel.attend.dense import dense_attention


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`dense_attention` by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return dense_attention(q, k, v)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by the FlashAttention 2 that torch carries."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return dense_attention(q, k, v)


DENSE = {"sdpa-cudnn": cudnn_attention, "sdpa-flash": flash_attention}
"""Name in result lines -> function, on CUDA in bf16 or fp16."""
