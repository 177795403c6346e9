"""FlexPrefill: the corrected mode keeps the paper's promise, the official mode breaks it as the authors' code
does."""

from __future__ import annotations

import re

import pytest
import torch

from whimbrel.attend import Grid
from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.sparse import FlexPrefillConfig
from whimbrel.sparse.blocks import block_mass, cover_rows, heads_first
from whimbrel.sparse.coverage import coverage
from whimbrel.sparse.flex_prefill import flex_prefill, official
from whimbrel.sparse.flex_prefill.corrected import probe_start, slash_mass
from whimbrel.sparse.flex_prefill.divergence import js_distance, js_distance_official
from whimbrel.testing import selectors
from whimbrel.testing.budget import assert_close
from whimbrel.testing.heads import blocky, diffuse, gaussian, local, mixed, scattered, slashes, structured

TOKENS = 16_384


def plan_of(q, k, **settings):
    return FlexPrefillConfig(**settings).build()(q, k)


def on_probe(q, k, plan):
    """Coverage of the probe's queries, [B, H, R]."""
    grid = plan.grid
    rows = torch.arange(max(probe_start(grid), grid.offset), grid.k_len) - grid.offset
    return coverage(q, k, plan, rows=rows)


def probe_coverage(q, k, plan):
    """Mean coverage over the probe, per head."""
    return on_probe(q, k, plan).mean(-1)


def row_coverage(q, k, plan):
    """Mean coverage over every fourth query of every sixth query block: [B, H, blocks]."""
    blocks = torch.arange(5, plan.grid.query_blocks, 6)
    rows = (blocks[:, None] * plan.block_size + torch.arange(3, plan.block_size, 4)).flatten()
    return coverage(q, k, plan, rows=rows).unflatten(-1, (len(blocks), -1)).mean(-1)


@pytest.mark.parametrize("asked", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("q_len", [1000, 300, 9])
@pytest.mark.parametrize("tau", [0.0, 0.1, 9.0])
def test_corrected_covers_the_probe_as_asked(asked, q_len, tau):
    for q, k, _ in (
        structured(1, tokens=1000),
        mixed(2, tokens=1000, heads=8, kv_heads=2, dim=64, batch=2, dtype=torch.float32),
    ):
        part = q[:, -q_len:]
        plan = plan_of(part, k, coverage=asked, tau=tau, min_budget=0, block_size=32)
        covered = (on_probe(part, k, plan) >= asked - 1e-5).double().mean(-1)
        assert (covered >= 0.95).all()


def test_corrected_keeps_the_asked_coverage_in_95_of_100_rows_of_structured_heads():
    q, k, _ = structured(31, tokens=TOKENS)
    rows = torch.arange(3, TOKENS, 29)
    kept = {mode: coverage(q, k, plan_of(q, k, mode=mode), rows=rows)[0] for mode in ("corrected", "official")}
    assert ((kept["corrected"] >= 0.95 - 1e-5).double().mean(-1) >= 0.95).all()
    assert ((kept["official"] >= 0.95 - 1e-5).double().mean(-1) < 0.7).sum() >= 3


@pytest.mark.parametrize("mode", ["corrected", "official"])
def test_heads_that_pooling_describes_are_query_aware(mode):
    for make, same_as in ((blocky, 9.0), (slashes, 0.0)):
        q, k, _ = make(17, tokens=4096)
        settings = {"coverage": 0.8, "min_budget": 128, "mode": mode}
        masks = {tau: plan_of(q, k, tau=tau, **settings).to_mask() for tau in (0.0, 0.1, 9.0)}
        assert torch.equal(masks[0.1], masks[same_as])
        goes_on = {tau: mask[..., 1:, 1:] | mask[..., 1:, :-1] for tau, mask in masks.items()}
        ends = {tau: (mask[..., :-1, :-1] & ~goes_on[tau]).any() for tau, mask in masks.items()}
        assert not ends[0.0], "without query-aware heads every block lies on a whole column or a whole diagonal"
        assert ends[9.0], "query-aware rows choose for themselves"


def test_corrected_skips_what_it_need_not_read():
    q, k, _ = local(3, tokens=4096)
    plan = plan_of(q, k, coverage=0.95)
    assert 0.3 < plan.mean_density() < 0.65
    plan = plan_of(q, k, coverage=0.5, min_budget=0)
    assert plan.mean_density() < 0.25


def test_defects_a_and_b_a_token_count_taken_for_a_block_count():
    q, k, _ = scattered(4, tokens=TOKENS)
    asked = 0.95
    bad, good = plan_of(q, k, coverage=asked, mode="official"), plan_of(q, k, coverage=asked)
    # 200 columns lie in about 100 of 128 blocks, and all but the floor of 8 are lost.
    assert probe_coverage(q, k, bad) < 0.92
    assert row_coverage(q, k, bad).mean() < 0.8
    assert row_coverage(q, k, bad).min() < 0.7
    assert probe_coverage(q, k, good) >= asked
    assert row_coverage(q, k, good).min() >= asked
    # 300 needed tokens are 3 blocks whether a block holds 128 tokens or 32.
    distribution = torch.full((1, 1, 600), 1 / 600)
    assert official._block_budget(distribution, 0.5 - 1e-4).item() == 300 // 128 + 1


def test_defect_c_half_of_a_token_diagonal_lies_in_the_next_block_diagonal():
    q, k, _ = slashes(5, tokens=TOKENS)
    asked = 0.95
    bad, good = plan_of(q, k, coverage=asked, mode="official"), plan_of(q, k, coverage=asked)
    assert probe_coverage(q, k, bad) < 0.8
    assert row_coverage(q, k, bad).mean() < 0.5
    assert probe_coverage(q, k, good) >= asked
    assert row_coverage(q, k, good).min() >= asked


def test_defect_d_the_diagonal_grid_of_the_authors_moves_with_the_length():
    q, k, _ = slashes(6, tokens=4096 + 64)
    coverages = []
    for tokens in (4096, 4096 + 64):
        part = q[:, :tokens], k[:, :tokens]
        offsets = plan_of(*part, coverage=0.9, mode="official", min_budget=128).to_mask()[0, 0, 31, :32]
        coverages.append(offsets)
    assert not torch.equal(*coverages)


def test_defect_e_one_threshold_for_all_rows_leaves_flat_rows_bare():
    q, k, _ = blocky(7, tokens=TOKENS)
    settings = {"coverage": 0.9, "min_budget": 128}
    bad, good = plan_of(q, k, **settings, mode="official"), plan_of(q, k, **settings)
    low, high = row_coverage(q, k, bad), row_coverage(q, k, good)
    assert (low < 0.9).float().mean() > 0.25
    assert low.min() < 0.7
    assert (high >= 0.9 - 0.02).all()


def test_defect_f_the_entry_that_crosses_the_threshold_is_dropped():
    rows = torch.tensor([[1.0, 0.0], [0.5, 0.5]])[None, None]
    kept = official.cover_globally(rows, 0.9)
    assert (rows * kept).sum() < 0.9 * 2
    allowed = torch.ones(2, 2, dtype=torch.bool).tril()
    better = cover_rows(rows[..., None, :], 0.9, 1.0, allowed=allowed, forced=~torch.ones_like(allowed))
    assert ((rows * better).sum(-1) >= 0.9).all()
    # On a whole head: the only row that must give way for the others' sake is the one asked about.
    q, k, _ = diffuse(8, tokens=TOKENS)
    bad, good = plan_of(q, k, mode="official"), plan_of(q, k)
    assert row_coverage(q, k, bad).min() < 0.5
    assert row_coverage(q, k, good).min() >= 0.95 - 2e-3


def test_defect_g_a_zero_probability_makes_the_divergence_not_a_number():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.4, 0.6, 0.0], [0.3, 0.3, 0.4]], dtype=torch.float64)
    bad, good = js_distance_official(p, q), js_distance(p, q)
    assert bad[0].isnan()
    assert good.isfinite().all()
    assert_close("distance", bad[1], good[1], 1e-6)
    assert js_distance(p, p).tolist() == [0, 0]
    apart = js_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert apart.item() == pytest.approx(0.6931471805599453**0.5, rel=1e-6)


def test_defect_m_the_official_selection_ignores_the_scale():
    q, k, _ = structured(9, tokens=1000)
    select = FlexPrefillConfig(mode="official", min_budget=32, block_size=32).build()
    assert torch.equal(select(q, k).to_mask(), select(q, k, scale=0.001).to_mask())


def official_by_hand(q, k, coverage, floor):
    """The authors' vertical-slash choice for one head [T, D] at block 128, written out in loops and sets."""
    tokens, size = len(q), 128
    blocks = -(-tokens // size)
    logits = (q[-size:] * q.shape[1] ** -0.5) @ k.T
    for r in range(size):
        logits[r, tokens - size + r + 1 :] = -torch.inf
    attention = logits.softmax(-1)
    vertical, slash = attention.mean(0), torch.zeros(tokens)
    for r in range(size):
        position = tokens - size + r
        slash[tokens - 1 - position :] += attention[r, : position + 1] / size
    chosen = torch.zeros(blocks, blocks, dtype=torch.bool)
    for name, mass, kept in (("vertical", vertical, 0), ("slash", slash, blocks - 1)):
        needed = int((mass.sort(descending=True).values.cumsum(0) <= coverage).sum()) + 1
        count = max(floor, needed // 128 + 1)
        pooled = torch.stack([part.sum() for part in mass.split(size)])
        pooled[kept] = torch.inf
        for block in pooled.argsort(descending=True)[:count].tolist():
            for row in range(blocks):
                key = block if name == "vertical" else row - (blocks - 1 - block)
                if 0 <= key <= row:
                    chosen[row, key] = True
    return chosen


@pytest.mark.parametrize("tokens", [1024, 1000])
def test_official_equals_a_plain_writing_of_its_rules(tokens):
    for seed, make in enumerate((scattered, slashes, local)):
        q, k, _ = make(seed, tokens=tokens)
        got = plan_of(q, k, coverage=0.9, tau=0.0, min_budget=256, mode="official").to_mask()[0, 0]
        assert torch.equal(got, official_by_hand(q[0, :, 0], k[0, :, 0], 0.9, 2))


@pytest.mark.parametrize(("tokens", "dense"), [(256, True), (257, True), (512, True), (1500, False)])
def test_official_is_dense_up_to_its_budget(tokens, dense):
    q, k, _ = local(10, tokens=tokens, decay=3.0)
    plan = plan_of(q, k, coverage=0.5, min_budget=500 if tokens > 256 else 1, mode="official")
    assert (plan.mean_density() == 1) == dense


def test_official_keeps_the_contract_where_it_can():
    config = FlexPrefillConfig(mode="official", block_size=16, min_budget=32)
    selectors.check_plans(config, chunks=False)
    selectors.check_one_sequence_at_a_time(config)
    selectors.check_monotone(config)
    selectors.check_refuses(config)


def test_official_refuses_a_prompt_in_chunks():
    q, k, v = gaussian(11, tokens=64, q_len=32)
    message = "flex_prefill.mode = 'official' needs as many queries as keys, got 32 and 64; use mode='corrected'"
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        flex_prefill(q, k, v, mode="official")


def test_probe_is_the_last_complete_block_and_what_follows():
    starts = {tokens: probe_start(Grid(16, tokens, tokens)) for tokens in (5, 16, 31, 32, 33, 47, 48)}
    assert starts == {5: 0, 16: 0, 31: 0, 32: 16, 33: 16, 47: 16, 48: 32}


def test_slash_mass_is_exact_for_the_probe():
    q, k, _ = gaussian(12, tokens=75)
    at = torch.arange(48, 75)
    mass = block_mass(heads_first(q)[:, :, 48:], heads_first(k), at, block_size=16, scale=0.125)
    want = torch.zeros(5)
    for r, position in enumerate(at.tolist()):
        for block in range(5):
            if block <= position // 16:
                want[position // 16 - block] += mass[0, 0, r, block] / len(at)
    assert_close("slash", want, slash_mass(mass, at // 16)[0, 0].mean(0), 1e-6)


def test_one_token_more_does_not_move_the_corrected_grid():
    q, k, _ = slashes(13, tokens=2049)
    plans = [plan_of(q[:, :n], k[:, :n], coverage=0.9, min_budget=0).to_mask()[0, 0, :16, :16] for n in (2048, 2049)]
    assert (plans[0] == plans[1]).float().mean() > 0.95


def test_budgets_bound_every_row():
    q, k, _ = structured(14, tokens=1000)
    loose = plan_of(q, k, coverage=0.1, min_budget=200, block_size=32).counts()
    assert (loose >= torch.arange(1, 33).clamp_max(7)).all()
    tight = plan_of(q, k, coverage=0.999, min_budget=0, max_budget=200, block_size=32).counts()
    assert (tight <= 7).all()
    capped = plan_of(q, k, coverage=0.999, min_budget=0, max_budget=128, mode="official", block_size=32)
    free = plan_of(q, k, coverage=0.999, min_budget=0, mode="official", block_size=32)
    assert capped.mean_density() < free.mean_density()


def test_within_the_least_budget_all_is_dense():
    q, k, v = gaussian(15, tokens=1000, heads=4, kv_heads=2)
    out = flex_prefill(q, k, v)
    assert (out.density == 1).all()
    assert_close("y", selectors.causal_attention(q, k, v), out.y, 1e-6)


def test_the_suffix_changes_earlier_rows():
    """The limit that row-local selection removes: the probe sits at the end of the prompt."""
    q, k, _ = structured(16, tokens=1024)
    longer = q.clone()
    longer[:, 992:] = -longer[:, 992:]
    settings = {"coverage": 0.7, "min_budget": 0, "block_size": 32}
    one, other = (plan_of(x, k, **settings).to_mask()[:, :, :31] for x in (q, longer))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"coverage": 0.0}, "flex_prefill.coverage = 0.0 is not allowed; use a share above 0 and up to 1"),
        ({"row_share": 0.0}, "flex_prefill.row_share = 0.0 is not allowed; use a share above 0 and up to 1"),
        ({"mode": "paper"}, "flex_prefill.mode = 'paper' is not allowed; use 'corrected' or 'official'"),
        ({"tau": -0.1}, "flex_prefill.tau = -0.1 is not allowed; use 0 (no query-aware head) or a positive"),
        ({"min_budget": -1}, "flex_prefill.min_budget = -1 is not allowed; use 0 or more tokens"),
        (
            {"max_budget": 512},
            "flex_prefill.max_budget = 512 is not allowed; use None or at least min_budget = 1024 tokens",
        ),
        ({"block_size": 0}, "flex_prefill.block_size = 0 is not allowed; use a positive number of tokens"),
    ],
)
def test_refuses(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        FlexPrefillConfig(**setting)
    with pytest.raises(ConfigError, match=re.escape(message)):
        flex_prefill(*gaussian(1, tokens=8), **setting)
