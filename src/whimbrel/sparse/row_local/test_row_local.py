"""Row-local selection: its promise with exact masses, its estimates, its limits, what it refuses."""

from __future__ import annotations

import re

import pytest
import torch

from whimbrel.errors import ConfigError
from whimbrel.sparse import RowLocalConfig
from whimbrel.sparse.blocks import always_kept, block_mass, heads_first
from whimbrel.sparse.coverage import coverage
from whimbrel.sparse.row_local import row_local
from whimbrel.sparse.row_local.select import _sample
from whimbrel.testing import selectors
from whimbrel.testing.budget import assert_close
from whimbrel.testing.heads import STRUCTURED, gaussian, mixed, structured


def covered(q, k, plan, asked):
    """Share of the queries of each query block that keep the asked coverage: [B, H, query blocks]."""
    found = (coverage(q, k, plan) >= asked - 1e-5).double()
    spans = [plan.grid.query_span(i) for i in range(plan.grid.query_blocks)]
    return torch.stack([found[..., first:stop].mean(-1) for first, stop in spans], -1)


@pytest.mark.parametrize("asked", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("q_len", [1000, 300])
def test_exact_masses_keep_the_promise_in_every_row(asked, q_len):
    for q, k, _ in (
        structured(1, tokens=1000),
        gaussian(2, tokens=1000, batch=2, heads=4, kv_heads=2),
        mixed(3, tokens=1000, heads=8, kv_heads=2, dim=64, dtype=torch.float32),
    ):
        plan = RowLocalConfig(coverage=asked, estimate="exact", block_size=32).build()(q[:, -q_len:], k)
        assert (covered(q[:, -q_len:], k, plan, asked) >= 0.95).all()


def test_exact_masses_keep_no_block_too_many():
    """Without the smallest block that is not kept in any case, too few queries would be covered."""
    q, k, _ = structured(4, tokens=1000)
    asked = 0.9
    plan = RowLocalConfig(coverage=asked, estimate="exact", block_size=32).build()(q, k)
    mass = block_mass(heads_first(q), heads_first(k), torch.arange(1000), block_size=32, scale=0.125)
    chosen, kept = plan.to_mask(), always_kept(plan.grid, q.device)
    seen = 0
    for row in range(plan.grid.query_blocks):
        first, stop = plan.grid.query_span(row)
        for head in range(4):
            free = chosen[0, head, row] & ~kept[row]
            if free.any():
                here = mass[0, head, first:stop]
                smallest = here.mean(0).masked_fill(~free, torch.inf).argmin()
                without = here[:, chosen[0, head, row]].sum(-1) - here[:, smallest]
                assert (without >= asked + 1e-6).double().mean() < 0.95
                seen += 1
    assert seen > 40


def test_sampled_masses_keep_the_asked_coverage_in_95_of_100_rows():
    """On heads of the four kinds at 16k tokens; of queries with hot keys of their own, 16 of 17 as the sample says."""
    for least, (q, k, _) in (
        (0.95, structured(5, tokens=16_384)),
        (0.93, mixed(5, tokens=4096, heads=8, kv_heads=2, dim=64, dtype=torch.float32)),
    ):
        rows = torch.arange(3, q.shape[1], 29)
        found = coverage(q, k, RowLocalConfig(coverage=0.95).build()(q, k), rows=rows)[0]
        assert ((found >= 0.95 - 1e-5).double().mean(-1) >= least).all()


def test_fewer_rows_may_be_asked_for():
    q, k, _ = structured(6, tokens=2048)
    half = RowLocalConfig(row_share=0.5).build()(q, k)
    most = RowLocalConfig().build()(q, k)
    assert half.mean_density() < most.mean_density()
    found = (coverage(q, k, half) >= 0.95).double().mean(-1)[0]
    assert (found > 0.5).all()
    assert found[list(STRUCTURED).index("slashes")] < 0.9


def test_mean_keys_keep_the_promise_only_where_blocks_are_smooth():
    q, k, _ = structured(5, tokens=4096)
    plan = RowLocalConfig(coverage=0.95, estimate="mean").build()(q, k)
    worst = dict(zip(STRUCTURED, coverage(q, k, plan)[0].quantile(0.05, -1).tolist(), strict=True))
    assert worst["local"] >= 0.95 - 1e-3
    assert worst["diffuse"] >= 0.95 - 2e-3
    assert worst["scattered"] < 0.8


def test_samples_lie_at_fixed_places_of_the_block():
    block = torch.arange(32, 48)
    assert _sample(block, 16, 4).tolist() == [35, 39, 43, 47]
    assert _sample(block[5:], 16, 4).tolist() == [39, 43, 47]
    assert _sample(block[:6], 16, 4).tolist() == [35, 37]
    assert _sample(block[:2], 16, 4).tolist() == [33]
    assert _sample(block, 16, 99).tolist() == block.tolist()


def test_all_rows_sampled_is_exact():
    q, k, _ = structured(6, tokens=700)
    sampled = RowLocalConfig(estimate="sampled", probe_rows=32, block_size=32).build()(q, k)
    exact = RowLocalConfig(estimate="exact", block_size=32).build()(q, k)
    assert torch.equal(sampled.to_mask(), exact.to_mask())


@pytest.mark.parametrize("estimate", ["mean", "exact", "sampled"])
def test_every_estimate_is_row_local(estimate):
    selectors.check_row_local(RowLocalConfig(coverage=0.8, estimate=estimate, block_size=16))


def test_cuts_inside_a_block_change_that_block_only():
    q, k, _ = structured(7, tokens=500)
    select = RowLocalConfig(coverage=0.8, block_size=16).build()
    whole = select(q, k).to_mask()
    cut = 16 * 10 + 5
    head = select(q[:, :cut], k[:, :cut]).to_mask()
    tail = select(q[:, cut:], k).to_mask()
    assert torch.equal(head[:, :, :10], whole[:, :, :10, :11])
    assert torch.equal(tail[:, :, 1:], whole[:, :, 11:])


def test_mean_estimate_is_exact_when_keys_of_a_block_are_equal():
    q, k, _ = gaussian(8, tokens=512, heads=2, kv_heads=2)
    k = k[:, ::16].repeat_interleave(16, 1)
    mean = RowLocalConfig(coverage=0.7, estimate="mean", block_size=16).build()(q, k)
    exact = RowLocalConfig(coverage=0.7, estimate="exact", block_size=16).build()(q, k)
    assert torch.equal(mean.to_mask(), exact.to_mask())
    assert 0.3 < mean.mean_density() < 0.9


def test_budgets_bound_every_row():
    q, k, _ = structured(9, tokens=1000)
    loose = RowLocalConfig(coverage=0.1, min_budget=200, block_size=32).build()(q, k).counts()
    assert (loose >= torch.arange(1, 33).clamp_max(7)).all()
    tight = RowLocalConfig(coverage=0.999, max_budget=200, block_size=32).build()(q, k).counts()
    assert (tight <= 7).all()
    assert (tight == 7).any()


def test_row_local_attends_over_its_plan():
    q, k, v = gaussian(10, tokens=300, q_len=200, batch=2, heads=4, kv_heads=2)
    out = row_local(q, k, v, coverage=1.0, block_size=32)
    assert_close("y", selectors.causal_attention(q, k, v), out.y, 1e-6)
    assert (out.density == 1).all()
    less = row_local(q, k, v, coverage=0.3, block_size=32, estimate="mean")
    assert less.y.shape == q.shape
    assert less.density.max() < 0.8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"coverage": 0.0}, "row_local.coverage = 0.0 is not allowed; use a share above 0 and up to 1"),
        ({"coverage": 1.2}, "row_local.coverage = 1.2 is not allowed; use a share above 0 and up to 1"),
        ({"row_share": 1.01}, "row_local.row_share = 1.01 is not allowed; use a share above 0 and up to 1"),
        (
            {"estimate": "max"},
            "row_local.estimate = 'max' is not allowed; did you mean 'mean'?; use one of 'sampled', 'mean', 'exact'",
        ),
        (
            {"estimate": "mean", "probe_rows": 4},
            "row_local.probe_rows = 4 is not allowed; use None: only estimate='sampled' samples, not 'mean'",
        ),
        ({"probe_rows": 0}, "row_local.probe_rows = 0 is not allowed; use a positive number of queries"),
        ({"min_budget": -1}, "row_local.min_budget = -1 is not allowed; use 0 or more tokens"),
        (
            {"min_budget": 64, "max_budget": 32},
            "row_local.max_budget = 32 is not allowed; use None or at least min_budget = 64 tokens, and at least 1",
        ),
        ({"max_budget": 0}, "row_local.max_budget = 0 is not allowed; use None or at least min_budget = 0 tokens"),
        ({"block_size": 0}, "row_local.block_size = 0 is not allowed; use a positive number of tokens"),
    ],
)
def test_refuses(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RowLocalConfig(**setting)
    with pytest.raises(ConfigError, match=re.escape(message)):
        row_local(*gaussian(1, tokens=8), **setting)
