"""Moments and bases in few bits, random words, and optimizers that keep their state so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whimbrel.errors import CheckpointError, ConfigError
from whimbrel.optim import (
    AdamWConfig,
    Fira,
    FiraConfig,
    GaLoreConfig,
    counter,
    lowrank,
    memory_report,
    others,
    param_groups,
    storage,
)
from whimbrel.optim.layout import MOMENT_BLOCK
from whimbrel.testing.budget import assert_close, rms_ratio
from whimbrel.testing.optim import CONTRACTS, TinyModel, no_host_reads, shrink, train

SMALL_STATE = [
    {"state_dtype": "bfloat16", "basis_dtype": "bfloat16", "other_dtype": "bfloat16"},
    {"state_dtype": "int8", "basis_dtype": "int4", "other_dtype": "int8"},
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(shape, seed=0):
    columns = shape[-1]
    return counter.lattice(torch.tensor(counter.base(seed, 3)), torch.Size(shape).numel() // columns, columns).view(
        shape
    )


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("width", [7, MOMENT_BLOCK, 600])
def test_moments_come_back_to_a_few_parts_in_a_hundred(squared, width):
    x = random(5, width) * torch.logspace(-6, 0, 5)[:, None]
    x = x.square() if squared else x
    codes = storage.encode_moment(x, bits(x.shape), squared=squared)
    again = storage.decode_moment(codes, squared=squared)
    # every block, however small: each slice has its own scale
    for i in range(5):
        assert rms_ratio(x[i], again[i]) < 0.02
    assert codes.codes.dtype == torch.uint8
    assert codes.scale.shape == (5, -(-width // MOMENT_BLOCK))


@pytest.mark.parametrize("squared", [False, True])
def test_a_slice_of_codes_is_the_codes_of_the_slice(squared):
    x = random(6, 300).abs()
    w = bits(x.shape)
    whole, part = (storage.encode_moment(x[i], w[i], squared=squared) for i in (slice(None), slice(2, 5)))
    assert torch.equal(whole.codes[2:5], part.codes)
    assert torch.equal(whole.scale[2:5], part.scale)


def test_moments_of_zero_stay_zero():
    zero = storage.encode_moment(torch.zeros(2, 9), bits((2, 9)), squared=True)
    assert not storage.decode_moment(zero, squared=True).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])
def test_a_slow_average_arrives_although_codes_are_coarse(dtype):
    """0.999 v + 0.001 g^2 moves by a thousandth a step: rounded to nearest it would stand still."""
    state = {"step": torch.zeros(()), "exp_avg_sq": torch.zeros(40, 128, dtype=storage.DTYPES[dtype])}
    if dtype == "uint8":
        state["exp_avg_sq_scale"] = torch.zeros(40, 1)
    start = torch.ones(1, 40, 128)
    key = torch.tensor([counter.base(0, 0)])
    storage.write_moment([state], "exp_avg_sq", start, counter.key(key, torch.zeros(1)), None)
    for step in range(1, 1001):
        v = storage.read_moment([state], "exp_avg_sq") * 0.999 + 0.001 * 0.25
        storage.write_moment([state], "exp_avg_sq", v, counter.key(key, torch.full((1,), float(step))), None)
    want = 0.25 + 0.75 * 0.999**1000
    assert storage.read_moment([state], "exp_avg_sq").mean().item() == pytest.approx(want, rel=0.03)


def test_weights_in_bfloat16_are_rounded_without_bias():
    x = random(1000) * torch.logspace(-20, 20, 1000)
    drawn = [counter.round_to_bfloat16(x, bits(x.shape, seed=s)) for s in range(400)]
    assert all(((y.float() - x).abs() <= x.abs() * 2**-7).all() for y in drawn)
    mean = torch.stack([y.double() for y in drawn]).mean(0)
    assert ((mean - x) / x.abs()).abs().mean() < 2**-8 / 10
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1.5])
    got = counter.round_to_bfloat16(odd, torch.full((5,), 0xFFFF)).float()
    assert torch.equal(got.nan_to_num(7.0), odd.nan_to_num(7.0))


def test_words_look_random_and_depend_on_the_place_alone():
    key = torch.tensor(counter.base(0, 0))
    drawn = counter.words(key, 1 << 16)
    assert torch.equal(counter.words(key, 100, first=50), drawn[50:150])
    assert drawn.unique().numel() > 65500 - 10
    assert ((drawn[:, None] >> torch.arange(32)) & 1).double().mean(0).sub(0.5).abs().max() < 0.01
    other = counter.words(torch.tensor(counter.base(0, 1)), 1 << 16)
    assert torch.corrcoef(torch.stack([drawn, other]).double())[0, 1].abs() < 0.02
    normal = counter.normal(key, 1 << 15)
    assert (normal.mean().abs() < 0.02, abs(normal.std() - 1) < 0.02) == (True, True)


def test_the_lattice_looks_random_and_its_parts_are_those_of_larger_ones():
    keys = counter.key(torch.tensor([counter.base(0, i) for i in range(8)]), torch.ones(8))
    drawn = counter.lattice(keys, 256, 300, first=counter.WEIGHTS)
    assert torch.equal(counter.lattice(keys, 100, 200, first=counter.WEIGHTS), drawn[:, :100, :200])
    assert torch.equal(counter.lattice(keys, 10, 200, first=counter.WEIGHTS + 90), drawn[:, 90:100, :200])
    assert ((drawn[..., None] >> torch.arange(16)) & 1).double().mean((0, 1, 2)).sub(0.5).abs().max() < 0.004
    x = drawn.double() / 65536 - 0.5
    # a correlation of n pairs of uniform numbers has a standard deviation of 1 / sqrt(n)
    pairs = [(x[:-1], x[1:]), (x, counter.lattice(keys, 256, 300) / 65536 - 0.5)]
    pairs += [(x[:, :-k], x[:, k:]) for k in (1, 2, 8)] + [(x[..., :-k], x[..., k:]) for k in (1, 2, 8, 89)]
    pairs += [(x[:, :-1, :-1] * x[:, 1:, 1:] * 12, x[:, :-1, 1:] * x[:, 1:, :-1])]
    for a, b in pairs:
        assert abs((a * b).mean() * 12) * a.numel() ** 0.5 < 5


@pytest.mark.parametrize("d", [31, 256, 500])
def test_packed_bases_keep_columns_of_norm_one(d):
    basis = lowrank.orthonormal(random(2, d, 16))
    codes = storage.encode_basis(basis)
    assert codes.codes.shape == (2, -(-d // 2), 16)
    again = storage.decode_basis(codes, d)
    # 16 levels: about a tenth of an element, less in short columns
    assert rms_ratio(basis, again) < 0.15
    gram = again.mT @ again
    assert_close("norms", torch.ones(2, 16), gram.diagonal(dim1=-2, dim2=-1), 1e-5)
    # what is left for the residual's norm |G - basis low|: nothing in the mean
    grad = random(2, d, 300, seed=1)
    low = again.mT @ grad
    short = grad.norm(dim=(1, 2)).square() - low.norm(dim=(1, 2)).square()
    assert_close("residual", (grad - again @ low).norm(dim=(1, 2)).square(), short, 0.02)


@pytest.mark.parametrize("check", CONTRACTS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("options", SMALL_STATE, ids=["bfloat16", "int8"])
def test_contract(check, options):
    if check.__name__ == "check_equals_adamw_without_projection":
        return  # an average kept in few bits is not AdamW to rounding
    check(shrink(FiraConfig(), **options, lazy_overlap=0.5))


@pytest.mark.parametrize("options", SMALL_STATE, ids=["bfloat16", "int8"])
def test_few_bits_train_as_float32_does(options):
    losses = {}
    for name, chosen in (("float32", {}), ("small", options)):
        model = TinyModel()
        config = shrink(FiraConfig(), refresh_steps=20, **chosen)
        losses[name] = sum(train(model, config.build(config.groups(model)), 150)[-20:])
    assert losses["small"] == pytest.approx(losses["float32"], rel=0.1)


def test_bytes_at_rank_512():
    """8-bit moments and a packed basis take less than 0.55 of a state in bfloat16."""
    shapes = {f"blocks.{i}": shape for i, shape in enumerate([(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)])}
    half, few = (
        FiraConfig(rank=512, state_dtype=a, basis_dtype=b).state_bytes(shapes)
        for a, b in (("bfloat16", "bfloat16"), ("int8", "int4"))
    )
    assert half == sum(2 * 512 * (min(s) + 2 * max(s)) + 8 for s in shapes.values())
    assert few < 0.5 * half
    groups = GaLoreConfig(rank=8).bytes_by_group({**shapes, "head": (100, 2048), "blocks.norm": (2048,)})
    assert set(groups) == {"low_rank", "decay", "no_decay"}
    assert groups["decay"] == 4 * (2 * 100 * 2048 + 1)


def test_state_in_another_format_is_refused():
    optimizers = []
    for state_dtype in ("float32", "bfloat16"):
        model = TinyModel()
        optimizers.append(Fira(param_groups(model, min_dim=4), rank=4, state_dtype=state_dtype))
        train(model, optimizers[-1], 1)
    with pytest.raises(CheckpointError) as error:
        optimizers[1].load_state_dict(
            optimizers[0].state_dict() | {"param_groups": optimizers[1].state_dict()["param_groups"]}
        )
    assert str(error.value) == (
        "optimizer state 'exp_avg' of blocks.0.up is float32, but needs bfloat16; "
        "load it with the state_dtype, basis_dtype and other_dtype of its run"
    )


@pytest.mark.parametrize("shape", [(300, 20), (7, 40, 30), (5000,), ()])
@pytest.mark.parametrize("other_dtype", ["float32", "bfloat16", "int8"])
def test_an_embedding_stepped_by_rows_gets_the_bits_of_one_stepped_whole(shape, other_dtype, monkeypatch):
    found = []
    for most in (1 << 24, 1000):
        monkeypatch.setattr(others, "PIECE_ELEMENTS", most)
        embed, matrix = (torch.nn.Parameter(random(*s).bfloat16()) for s in (shape, (8, 6)))
        groups = [{"params": [matrix], "rank": 2}, {"params": [embed]}]
        optimizer = Fira(groups, lr=0.1, weight_decay=0.1, other_dtype=other_dtype)
        for step in range(3):
            for param in (embed, matrix):
                param.grad = random(*param.shape, seed=step).bfloat16()
            optimizer.step()
        assert optimizer.state[embed]["step"].item() == 3
        found.append([embed, *optimizer.state[embed].values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], random(*shape).bfloat16())


def test_a_gradient_scaler_is_honoured():
    """Scaled gradients give the same step; with an overflow found nothing moves, and the host reads nothing."""
    plain, scaled = TinyModel(), TinyModel()
    optimizers = [Fira(param_groups(m, min_dim=4), rank=4, weight_decay=0.1) for m in (plain, scaled)]

    def give(model, factor, seed):
        for i, param in enumerate(model.parameters()):
            param.grad = random(*param.shape, seed=100 * seed + i) * factor

    for seed in range(4):
        for model, factor, optimizer in zip((plain, scaled), (1.0, 1024.0), optimizers, strict=True):
            give(model, factor, seed)
            optimizer.grad_scale = torch.tensor([factor])
            optimizer.found_inf = torch.zeros(1)
            optimizer.step()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a, b)
    before = {name: p.clone() for name, p in scaled.named_parameters()}
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizers[1].state.items()}
    give(scaled, 1.0, 9)
    scaled.scale.grad = torch.tensor(float("inf"))
    optimizers[1].found_inf = torch.ones(1)
    with no_host_reads():
        optimizers[1].step()
    assert all(torch.equal(p, before[name]) for name, p in scaled.named_parameters())
    assert all(torch.equal(v, state[p][k]) for p, s in optimizers[1].state.items() for k, v in s.items())


def test_lazy_refreshes_wait_where_the_subspace_stays():
    """One matrix whose gradient keeps its subspace, one whose turns: the gap of the first doubles up to 8."""
    still, moving = (nn.Parameter(torch.zeros(20, 30)) for _ in range(2))
    optimizer = Fira([{"params": [still, moving], "rank": 3}], refresh_steps=2, lazy_overlap=0.8, stagger=False)
    fixed = random(20, 3) @ random(3, 30, seed=1)
    fits = {still: 0, moving: 0}
    for step in range(64):
        still.grad = fixed.clone()
        moving.grad = random(20, 3, seed=2 * step + 50) @ random(3, 30, seed=2 * step + 51)
        before = {p: optimizer.state[p]["basis"].clone() for p in fits if optimizer.state[p]}
        optimizer.step()
        for p in before:
            fits[p] += not torch.equal(before[p], optimizer.state[p]["basis"])
    assert optimizer.state[still]["refresh_gap"].item() == 8
    assert optimizer.state[moving]["refresh_gap"].item() == 1
    assert fits[moving] == 31
    assert fits[still] <= 8


PLANS = [AdamWConfig(), *(FiraConfig(rank=16, **options) for options in ({}, *SMALL_STATE))]


@pytest.mark.parametrize("config", PLANS, ids=["adamw", "float32", "bfloat16", "int8"])
def test_memory_is_what_was_planned(config):
    with torch.device("meta"):
        shape_only = nn.ModuleDict({"blocks": nn.Linear(300, 200), "head": nn.Linear(200, 90)})
    planned = memory_report(shape_only, config).planned
    model = nn.ModuleDict({"blocks": nn.Linear(300, 200), "head": nn.Linear(200, 90)})
    optimizer = config.build(config.groups(model))
    assert set(memory_report(model, config, optimizer).measured.values()) == {0}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    report = memory_report(model, config, optimizer)
    assert report.measured == report.planned == planned
    total = sum(planned.values()) / 2**20
    assert str(report).splitlines()[-1].split() == ["all", f"{total:.2f}", "MiB", f"{total:.2f}", "MiB"]


def test_memory_of_other_groups_is_refused_by_name():
    model = nn.ModuleDict({"blocks": nn.Linear(300, 200)})
    optimizer = Fira([{"params": [model["blocks"].weight], "rank": 16}])
    with pytest.raises(ConfigError) as error:
        memory_report(model, FiraConfig(rank=16), optimizer)
    assert str(error.value) == (
        "optimizer has a group named None, but this report is of low_rank, no_decay; "
        "build it by config.build(config.groups(model))"
    )
