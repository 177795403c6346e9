"""The loss in pieces against PyTorch's own cross entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from whimbrel.model import loss as module
from whimbrel.model.loss import IGNORE, cross_entropy_per_row, mean_cross_entropy
from whimbrel.testing.budget import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_case(rows, *, width=9, vocabulary=37, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[1::4] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [1, 5, 6, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_cross_entropy_in_value_and_gradient(monkeypatch, rows, dtype):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 37 * 6)
    hidden, weight, targets = make_case(rows, dtype=dtype)
    expected = F.cross_entropy((hidden @ weight.T).double(), targets)
    want = torch.autograd.grad(3 * expected, (hidden, weight))
    found = mean_cross_entropy(hidden, weight, targets)
    got = torch.autograd.grad(3 * found, (hidden, weight))
    assert found.dtype == dtype
    ratio = 1e-12 if dtype == torch.float64 else 2e-6
    for name, a, b in zip(("loss", "hidden", "weight"), (expected, *want), (found, *got), strict=True):
        assert_close(name, a, b, ratio)


@pytest.mark.parametrize("rows", [1, 6, 61])
def test_the_fused_loss_equals_cross_entropy_in_value_and_gradient(monkeypatch, rows):
    """liger-kernel, in Triton's interpreter where there is no CUDA."""
    monkeypatch.setattr(module, "_liger_serves", lambda hidden: True)
    hidden, weight, targets = make_case(rows)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    want = torch.autograd.grad(3 * expected, (hidden, weight))
    low = [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in (hidden, weight)]
    found = mean_cross_entropy(*low, targets.to(DEVICE))
    got = torch.autograd.grad(3 * found, low)
    assert found.dtype == torch.float32
    for name, a, b in zip(("loss", "hidden", "weight"), (expected, *want), (found, *got), strict=True):
        assert_close(name, a, b, 2e-6)
    with torch.no_grad():
        again = mean_cross_entropy(*low, targets.to(DEVICE))
    assert not again.requires_grad
    assert_close("without gradients", expected, again, 2e-6)


def test_the_fused_loss_of_nothing_to_count_is_zero(monkeypatch):
    monkeypatch.setattr(module, "_liger_serves", lambda hidden: True)
    hidden, weight, targets = make_case(8)
    low = [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in (hidden, weight)]
    loss = mean_cross_entropy(*low, torch.full_like(targets, IGNORE).to(DEVICE))
    loss.backward()
    assert loss == 0
    assert all(x.grad.abs().max() == 0 for x in low)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_on_the_card_stay_near_fp64(monkeypatch, fused, autocast):
    """A bf16 model, and an fp32 model under autocast."""
    monkeypatch.setattr(module, "_liger_serves", lambda hidden: fused)
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight, targets = make_case(3000, width=128, vocabulary=5000, dtype=dtype)
    expected = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    want = torch.autograd.grad(expected, (hidden, weight))
    low = [x.detach().cuda().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = mean_cross_entropy(*low, targets.cuda())
    got = torch.autograd.grad(found, low)
    assert found.dtype == torch.float32
    assert_close("loss", expected, found, 0.002)
    for name, a, b in zip(("hidden", "weight"), want, got, strict=True):
        assert b.dtype == dtype
        assert_close(name, a, b, 0.02)


def test_bf16_gradients_keep_the_dtype_and_stay_near():
    hidden, weight, targets = make_case(50, dtype=torch.bfloat16)
    found = mean_cross_entropy(hidden, weight, targets)
    assert found.dtype == torch.float32
    got = torch.autograd.grad(found, (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets)
    assert_close("loss", expected, found, 0.01)
    for name, a, b in zip(("hidden", "weight"), torch.autograd.grad(expected, wide), got, strict=True):
        assert b.dtype == torch.bfloat16
        assert_close(name, a, b, 0.02)


def test_per_row_losses_sum_to_the_mean(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 37 * 7)
    hidden, weight, targets = make_case(30)
    rows = cross_entropy_per_row(hidden, weight, targets)
    assert not rows.requires_grad
    assert torch.equal(rows == 0, targets == IGNORE)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert_close("rows", expected, rows, 1e-12)
    assert_close("mean", rows.sum() / (targets != IGNORE).sum(), mean_cross_entropy(hidden, weight, targets), 1e-12)


def test_nothing_to_count_gives_zero_loss_and_gradient():
    hidden, weight, targets = make_case(8)
    loss = mean_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_forms_no_more_logits_at_a_time_than_it_says(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 37 * 4)
    sizes, linear = [], F.linear

    def spy(h, w):
        sizes.append(h.shape[0] * w.shape[0])
        return linear(h, w)

    monkeypatch.setattr(module.F, "linear", spy)
    hidden, weight, targets = make_case(10)
    mean_cross_entropy(hidden, weight, targets).backward()
    assert sizes == [148, 148, 74]


def test_without_gradients_none_are_formed():
    hidden, weight, targets = make_case(8)
    with torch.no_grad():
        loss = mean_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert_close("loss", F.cross_entropy(hidden @ weight.T, targets), loss, 1e-12)
