"""How far a result may lie from its fp64 reference. Tolerances are arguments; nothing loosens them."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_ratio(reference: Tensor, got: Tensor) -> float:
    """RMS(reference - got) / RMS(reference), computed in fp64; the reference RMS is floored at 1e-30."""
    ref, out = reference.detach().double().cpu(), got.detach().double().cpu()
    return float((ref - out).square().mean().sqrt() / ref.square().mean().sqrt().clamp_min(1e-30))


def assert_close(name: str, reference: Tensor, got: Tensor, ratio: float, *, floor: float = 0.0) -> None:
    """Raise AssertionError unless `got` has the reference's shape, is finite and within the RMS ratio.

    `floor` is an absolute bound on the largest difference below which the ratio is not looked at; it is meant
    for quantities whose exact value is (nearly) zero.
    """
    assert reference.shape == got.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(reference.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    if got.numel() == 0:
        return
    worst = float((reference.detach().double().cpu() - got.detach().double().cpu()).abs().max())
    if worst <= floor:
        return
    found = rms_ratio(reference, got)
    assert found <= ratio, f"{name}: RMS ratio {found:.3g} above {ratio:.3g} (largest difference {worst:.3g})"
