"""Normalisation against its formula, and gradients against automatic differentiation of the formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from whimbrel.mixers.norm import RMSNorm, l2_norm
from whimbrel.testing.budget import assert_close


def make_x(*shape, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def compare(make, formula, x, ratio):
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = x.detach().double().requires_grad_()
    expected, got = formula(wide), make(x)
    assert got.dtype == x.dtype
    (want,) = torch.autograd.grad((expected * probe).sum(), wide)
    (found,) = torch.autograd.grad((got * probe.to(x.dtype)).sum(), x)
    assert found.dtype == x.dtype
    assert_close("value", expected, got, ratio)
    assert_close("gradient", want, found, ratio)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_l2_norm(dtype, ratio):
    x = make_x(3, 5, 7, dtype=dtype)
    compare(l2_norm, lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), x, ratio)


def test_l2_norm_of_nothing_is_zero_with_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    y = l2_norm(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert_close("gradient", torch.full((2, 4), 1e3), x.grad, 1e-6)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm(dtype, ratio):
    norm = RMSNorm(7, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    weight = norm.weight.detach().to(dtype).double()
    norm = norm.to(dtype)
    x = make_x(3, 5, 7, dtype=dtype)
    compare(norm, lambda x: F.rms_norm(x, (7,), weight, 1e-3), x, ratio)


def test_weights_of_rms_norm_get_their_gradient():
    norm, x = RMSNorm(7).double(), make_x(4, 7)
    other = torch.ones(7, dtype=torch.float64, requires_grad=True)
    norm(x).square().sum().backward()
    F.rms_norm(x.detach(), (7,), other, 1e-5).square().sum().backward()
    assert_close("weight", other.grad, norm.weight.grad, 1e-12)


def test_fp32_weights_keep_the_dtype_of_a_bf16_input():
    assert RMSNorm(7)(make_x(2, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.gpu
def test_rms_norm_on_cuda_is_that_of_the_cpu():
    norm, x = RMSNorm(64), make_x(5, 64, dtype=torch.float32)
    assert_close("value", norm(x), norm.cuda()(x.cuda()), 1e-6)
