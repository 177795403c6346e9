"""Dense causal attention by torch: what runs where skipping blocks does not pay."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.functional import scaled_dot_product_attention


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """torch's causal attention of [B, T, H, D] tensors with grouped key heads, by the backend that it prefers."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale).transpose(1, 2)


def fastest_dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """The same by cuDNN where it takes the call.

    On Hopper torch prefers FlashAttention 2, which takes 1.7 times as long. It is switched off for the call as
    `torch.nn.attention.sdpa_kernel` does, which takes three times as long for that: much beside a short call.
    """
    others = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    if not q.is_cuda or not _cudnn_takes(q, k, v):
        return dense_attention(q, k, v, scale=scale)
    try:
        _switch(False, False, False)
        return dense_attention(q, k, v, scale=scale)
    finally:
        _switch(*others)


_MOST_KEPT = 256
_kept: dict[object, bool] = {}


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Asked once for tensors of the same layouts under the same settings, as torch takes its time to answer."""
    settings = cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    layouts = [(x.shape, x.stride(), x.requires_grad) for x in (q, k, v)]
    key = (*settings, q.dtype, q.device, *layouts)
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found = _kept[key] = cuda.can_use_cudnn_attention(cuda.SDPAParams(q, k, v, None, 0.0, True, True))
    return found


def _switch(flash: bool, efficient: bool, math: bool) -> None:
    cuda.enable_flash_sdp(flash)
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_math_sdp(math)
