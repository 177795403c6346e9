"""Updates in backward: the weights of the ordinary step, no gradient left, and what does not go with it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.optim import Fira, GaLore, param_groups
from whimbrel.testing.budget import assert_close
from whimbrel.testing.optim import TinyModel, flat

REFUSAL = (
    " does not go with updates in backward, where no two gradients exist at once; leave it out, or leave out "
    "fuse_into_backward"
)


def make(cls, model):
    return cls(param_groups(model, min_dim=4), lr=1e-2, rank=4, refresh_steps=3, weight_decay=0.1)


def backward(model, step):
    x = torch.randn(16, 13, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


@pytest.mark.parametrize("cls", [Fira, GaLore])
def test_equals_the_ordinary_step(cls):
    plain, fused = TinyModel(), TinyModel()
    ordinary, in_backward = make(cls, plain), make(cls, fused)
    start = flat(plain)
    in_backward.fuse_into_backward(fused)
    for step in range(8):
        backward(plain, step)
        ordinary.step()
        ordinary.zero_grad()
        backward(fused, step)
        assert all(param.grad is None for param in fused.parameters())
        in_backward.step()
    # one by one in place of batches, which differ in the last bits
    assert_close("movement", flat(plain) - start, flat(fused) - start, 1e-5)
    assert [group["step"] for group in in_backward.param_groups] == [8, 8, 8]
    for (name, param), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        for key, value in ordinary.state[param].items():
            assert_close(f"{name} {key}", value, in_backward.state[other][key], 1e-4, floor=1e-8)


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_norm_of_all_gradients_is_reported(in_backward):
    model, seen = TinyModel(), []
    optimizer = make(Fira, model)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.double().norm()))
    optimizer.report_grad_norm()
    if in_backward:
        optimizer.fuse_into_backward(model)
    assert optimizer.grad_norm is None
    for step in range(4):
        seen.clear()
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert float(optimizer.grad_norm) == pytest.approx(float(torch.stack(seen).norm()), rel=1e-6)


def test_the_norm_is_of_unscaled_gradients_and_not_finite_where_one_is_not():
    model = TinyModel()
    optimizer, scaler = make(Fira, model), torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer.report_grad_norm()
    for step in range(3):
        x = torch.randn(16, 13, generator=torch.Generator().manual_seed(step))
        scaler.scale(model(x).square().mean()).backward()
        want = torch.stack([param.grad.norm() / 256.0 for param in model.parameters()]).norm()
        if step == 2:
            next(param for param in model.parameters() if param.ndim == 2).grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert float(optimizer.grad_norm) == pytest.approx(float(want) if step < 2 else float("inf"), rel=1e-6)


def test_holds_one_gradient_at_a_time():
    model, alive = TinyModel(), []
    optimizer = make(Fira, model)
    optimizer.fuse_into_backward(model)
    for param in model.parameters():
        # runs after the update's own hook
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    backward(model, 0)
    assert alive == [0] * len(list(model.parameters()))


def test_what_is_not_used_any_more_is_freed():
    model = TinyModel()
    optimizer = make(Fira, model)
    optimizer.fuse_into_backward(model)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    held = [weakref.ref(optimizer), *(weakref.ref(param) for param in model.parameters())]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_a_second_backward_is_refused():
    model = TinyModel()
    optimizer = make(Fira, model)
    optimizer.fuse_into_backward(model)
    backward(model, 0)
    with pytest.raises(UnsupportedError) as error:
        backward(model, 1)
    assert str(error.value) == "a second backward before optimizer.step()" + REFUSAL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation_steps": 4}, "accumulation_steps = 4" + REFUSAL),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm = 1.0" + REFUSAL),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "a gradient scaler" + REFUSAL),
    ],
)
def test_what_needs_all_gradients_is_refused(options, message):
    model = TinyModel()
    with pytest.raises(UnsupportedError) as error:
        make(Fira, model).fuse_into_backward(model, **options)
    assert str(error.value) == message


def test_a_scaler_that_was_not_named_is_refused_in_its_step():
    model = TinyModel()
    optimizer = make(Fira, model)
    optimizer.fuse_into_backward(model)
    optimizer.found_inf = torch.zeros(())
    with pytest.raises(UnsupportedError, match="a gradient scaler"):
        optimizer.step()


def test_parameters_outside_of_the_groups_are_named():
    model = TinyModel()
    optimizer = make(Fira, model)
    model.extra = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=r"extra is in no group of Fira"):
        optimizer.fuse_into_backward(model)
