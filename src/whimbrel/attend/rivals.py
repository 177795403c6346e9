"""Dense attention that torch ships, one backend at a time: what skipping blocks is timed against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's causal attention of [B, T, H, D] tensors with grouped key heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return dense_attention(q, k, v)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by the FlashAttention 2 that torch carries."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return dense_attention(q, k, v)


DENSE = {"sdpa-cudnn": cudnn_attention, "sdpa-flash": flash_attention}
"""Name in result lines -> function, on CUDA in bf16 or fp16."""
