"""The step for parameters that are not projected, against torch.optim.AdamW."""

from __future__ import annotations

import pytest
import torch

from whimbrel.errors import ConfigError
from whimbrel.optim import AdamWConfig
from whimbrel.optim.adamw.optimizer import AdamW, adamw_step
from whimbrel.testing.budget import assert_close

SHAPES = [(5, 7), (3,), ()]


def steps_of(params, grads_of, *, steps, **options):
    """Steps of `adamw_step` in place, from zero state; returns the state."""
    counts = [torch.zeros(()) for _ in params]
    means, squares = ([torch.zeros(p.shape) for p in params] for _ in range(2))
    for step in range(steps):
        adamw_step(params, grads_of(step), counts, means, squares, **options)
    return counts, means, squares


def grads_of(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_equals_torch_without_eps_and_decay():
    start = grads_of(99)
    ours = [p.clone() for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    steps_of(ours, grads_of, steps=30, lr=0.01, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
    rival = AdamW(theirs, lr=0.01, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
    for step in range(30):
        for param, grad in zip(theirs, grads_of(step), strict=True):
            param.grad = grad
        rival.step()
    for a, b in zip(theirs, ours, strict=True):
        assert_close("weights", a, b, 2e-6)


def test_decay_comes_after_the_update():
    start, grad = torch.tensor([2.0]), torch.tensor([3.0])
    param = [start.clone()]
    steps_of(param, lambda _: [grad], steps=1, lr=0.1, betas=(0.9, 0.999), eps=0.0, weight_decay=0.5)
    assert param[0].item() == pytest.approx((2.0 - 0.1) * (1 - 0.1 * 0.5))


def test_learning_rate_may_be_a_tensor():
    a, b = ([p.clone() for p in grads_of(99)] for _ in range(2))
    options = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
    steps_of(a, grads_of, steps=3, lr=0.25, **options)
    steps_of(b, grads_of, steps=3, lr=torch.tensor(0.25), **options)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_low_precision_weights_keep_float32_state():
    params = [p.bfloat16() for p in grads_of(99)]
    _, means, squares = steps_of(params, grads_of, steps=3, lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    assert all(p.dtype == torch.bfloat16 for p in params)
    assert all(t.dtype == torch.float32 for t in (*means, *squares))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "optim.lr = -1.0 is not allowed; use a number of at least 0"),
        ({"betas": (0.9, 1.0)}, "optim.betas = (0.9, 1.0) is not allowed; use two numbers of at least 0 and below 1"),
        ({"eps": -1e-8}, "optim.eps = -1e-08 is not allowed; use a number of at least 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError) as error:
        AdamWConfig(**options)
    assert str(error.value) == message
