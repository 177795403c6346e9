"""Weights in 8 bits and in factors: products and gradients, training, saving, restarts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from whimbrel.errors import ConfigError
from whimbrel.optim import Fira
from whimbrel.optim.weights.int8 import Int8Linear, attach, int8_weights
from whimbrel.optim.weights.sltrain import Restarts, SLTrainLinear, refactorize, sltrain


def network(dtype=torch.float32, width=48):
    torch.manual_seed(0)
    layers = [nn.Linear(width, 300, bias=False), nn.Tanh(), nn.Linear(300, 8, bias=False)]
    return nn.ModuleDict({"blocks": nn.Sequential(*layers)}).to(dtype)


def fit(model, optimizer, steps, each=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 48, generator=generator)
    y = torch.randn(64, 8, generator=generator)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model["blocks"](x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if each is not None:
            each()
    return losses


def test_codes_are_near_the_weights_and_gradients_are_those_of_the_codes():
    model = network()
    before = model["blocks"][2].weight.detach().clone()
    layers = int8_weights(model)
    assert [type(layer) for layer in model["blocks"]] == [Int8Linear, nn.Tanh, Int8Linear]
    scale = layers[1].scale.repeat_interleave(256, 1)[:, :300]
    assert ((layers[1].dense() - before).abs() <= scale / 2 + 1e-7).all()
    x = torch.randn(5, 3, 300, dtype=torch.float32, requires_grad=True)
    weight = layers[1].dense().requires_grad_()
    force = torch.randn(5, 3, 8)
    want = torch.autograd.grad((x @ weight.mT * force).sum(), (x, weight))
    (layers[1](x) * force).sum().backward()
    torch.testing.assert_close(x.grad, want[0])
    torch.testing.assert_close(layers[1].weight.grad, want[1])


def test_groups_of_one_sign_keep_their_values():
    """Where a clamped zero point would lose them."""
    weight = 0.02 + 0.001 * torch.rand(4, 512)
    layer = Int8Linear(nn.Parameter(weight.clone()), 1)
    assert (layer.dense() / weight - 1).abs().max() < 0.005


def test_rounding_keeps_the_mean_of_small_steps():
    """Steps of a hundredth of a code, which rounding to nearest would all lose."""
    layer = Int8Linear(nn.Parameter(torch.full((64, 256), 0.5).index_fill(1, torch.tensor([0]), 1.0)), 7)
    step, start = float(layer.scale[0, 0]) / 100, layer.dense()
    for _ in range(200):
        layer.open()
        layer.weight.data[:, 1:] += step
        layer.close()
    moved = (layer.dense() - start)[:, 1:].mean().item() / step
    assert moved == pytest.approx(200, rel=0.05)


def test_training_in_8_bits_follows_training_in_floats():
    losses = {}
    for bits in (32, 8):
        model = network()
        layers = int8_weights(model) if bits == 8 else []
        optimizer = Fira([{"params": list(model.parameters()), "rank": 4}], lr=5e-3)
        if layers:
            attach(optimizer, layers)
        losses[bits] = fit(model, optimizer, 60)
        if layers:
            held = [layer.weight.untyped_storage().nbytes() for layer in layers]
            assert held == [4, 4]
            assert all(layer.weight.isnan().all() for layer in layers)
    assert losses[8][-1] < 0.6 * losses[8][0]
    assert losses[8][-1] == pytest.approx(losses[32][-1], rel=0.15)


def test_a_saved_model_in_8_bits_goes_on_bit_for_bit():
    def start():
        model = network()
        layers = int8_weights(model)
        optimizer = Fira([{"params": list(model.parameters()), "rank": 4}], lr=5e-3)
        attach(optimizer, layers)
        return model, optimizer

    model, optimizer = start()
    fit(model, optimizer, 5)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    assert not any(key.endswith("weight") for key in saved)
    state = copy.deepcopy(optimizer.state_dict())
    want = fit(model, optimizer, 5)
    again, other = start()
    again.load_state_dict(saved)
    other.load_state_dict(state)
    assert fit(again, other, 5) == want


def test_what_cannot_be_in_8_bits_is_refused_by_name():
    with pytest.raises(ConfigError, match="match no weight"):
        int8_weights(network(), "head.*")
    with pytest.raises(ConfigError, match=r"blocks\.0 has a bias"):
        int8_weights(nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(3, 3))}))
    model = network()
    layers = int8_weights(model)
    with pytest.raises(ConfigError, match="none of the 8-bit weights"):
        attach(torch.optim.SGD(network().parameters(), lr=0.1), layers)


@pytest.mark.parametrize("density", [0.0, 0.1])
def test_sltrain_has_the_gradients_of_its_formula(density):
    layer = SLTrainLinear(20, 12, rank=4, density=density, alpha=8.0, seed=3, dtype=torch.float64)
    with torch.no_grad():
        layer.b.normal_()
    leaves = [x.detach().clone().requires_grad_() for x in layer.parameters()]
    x = torch.randn(2, 5, 20, dtype=torch.float64, requires_grad=True)
    force = torch.randn(2, 5, 12, dtype=torch.float64)
    weight = 8 / 4 * leaves[0] @ leaves[1]
    if density:
        assert layer.v.numel() == layer.support.unique().numel() == 24
        weight = weight + torch.zeros(240, dtype=torch.float64).scatter(0, layer.support.long(), leaves[2]).view(12, 20)
    want = torch.autograd.grad((x @ weight.mT * force).sum(), [x, *leaves])
    (layer(x) * force).sum().backward()
    torch.testing.assert_close(layer.dense(), weight)
    for mine, theirs in zip([x, *layer.parameters()], want, strict=True):
        torch.testing.assert_close(mine.grad, theirs)


def test_sltrain_learns_and_states_its_parameters():
    model = network()
    assert sltrain(model, rank=4, density=0.05) == ["blocks.0.weight", "blocks.2.weight"]
    count = sum(p.numel() for p in model.parameters())
    assert count == sum((m + n) * 4 + round(0.05 * m * n) for m, n in ((300, 48), (8, 300)))
    supports = [layer.support[:20] for layer in model["blocks"] if isinstance(layer, SLTrainLinear)]
    assert not torch.equal(*supports)
    losses = fit(model, torch.optim.AdamW(model.parameters(), lr=3e-3), 80)
    assert losses[-1] < 0.6 * losses[0]


def test_refactorizing_leaves_the_weights_and_balances_the_factors():
    layer = SLTrainLinear(30, 20, rank=5, density=0.1)
    with torch.no_grad():
        layer.b.normal_(std=30)
    before = layer.dense()
    refactorize([layer])
    torch.testing.assert_close(layer.dense(), before, rtol=1e-4, atol=1e-4)
    ours, theirs = torch.linalg.svdvals(layer.b), torch.linalg.svdvals(layer.a)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_restarts_forget_the_state_and_bring_the_rate_back():
    model = network()
    sltrain(model, rank=4, density=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    restarts = Restarts(model, optimizer, every=20, recovery=4)
    seen = []

    def each():
        restarted, factor = restarts.step()
        seen.append((restarted, factor, len(optimizer.state)))
        optimizer.param_groups[0]["lr"] = 3e-3 * factor

    losses = fit(model, optimizer, 60, each)
    assert [i for i, (restarted, *_) in enumerate(seen, 1) if restarted] == [20, 40, 60]
    assert [factor for _, factor, _ in seen[18:25]] == pytest.approx([1.0, 0.001, 0.25075, 0.5005, 0.75025, 1.0, 1.0])
    assert (seen[19][2], seen[20][2]) == (0, 6)
    assert losses[-1] < losses[0]
    other = Restarts(model, optimizer, every=20, recovery=4)
    other.load_state_dict(restarts.state_dict())
    assert other.steps == 60
