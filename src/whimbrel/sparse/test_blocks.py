"""Block statistics against their definitions, and the choice of the fewest blocks against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.attend import Grid
from whimbrel.sparse import blocks
from whimbrel.testing.budget import assert_close
from whimbrel.testing.heads import gaussian


def dense_mass(q, k, positions, block_size):
    """Softmax mass per block by the definition, in fp64: [B, H, R, blocks]."""
    group = q.shape[2] // k.shape[2]
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(group, 2)) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(torch.arange(k.shape[1]) > positions[:, None], -torch.inf)
    return torch.stack([p.sum(-1) for p in logits.softmax(-1).split(block_size, -1)], -1)


@pytest.mark.parametrize("slab", [1, 1000, 1 << 23])
def test_block_mass_is_exact(slab, monkeypatch):
    monkeypatch.setattr(blocks, "_SLAB_LOGITS", slab)
    q, k, _ = gaussian(1, tokens=75, batch=2, heads=6, kv_heads=2)
    positions = torch.tensor([3, 16, 17, 60, 74])
    got = blocks.block_mass(
        blocks.heads_first(q[:, positions]), blocks.heads_first(k), positions, block_size=16, scale=0.125
    )
    assert_close("mass", dense_mass(q[:, positions], k, positions, 16), got, 1e-6)
    assert_close("row sums", torch.ones(2, 6, 5), got.sum(-1), 1e-6)


def test_block_means_count_the_short_block():
    x = torch.randn(2, 3, 37, 4, generator=torch.Generator().manual_seed(0))
    means, counts = blocks.block_means(x, 16)
    assert counts.tolist() == [16, 16, 5]
    assert_close("means", torch.stack([b.mean(2) for b in x.split(16, 2)], 2), means, 1e-6)


def test_always_kept_blocks():
    kept = blocks.always_kept(Grid(4, 9, 20), torch.device("cpu"))
    assert kept.int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]


def top_p(mass, coverage, *, allowed, forced):
    """For a single query."""
    return blocks.cover_rows(mass[None], coverage, 1.0, allowed=allowed, forced=forced)


def fewest(mass, coverage, forced):
    """Least number of entries, the forced ones among them, that sum to the coverage."""
    free = [i for i in range(len(mass)) if not forced[i]]
    base = sum(mass[i] for i in range(len(mass)) if forced[i])
    for extra in range(len(free) + 1):
        best = max((sum(mass[i] for i in c) for c in itertools.combinations(free, extra)), default=0)
        if base + best >= coverage:
            return extra + sum(forced)
    return len(mass)


@settings(max_examples=100, deadline=None)
@given(
    mass=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    coverage=st.floats(0.01, 0.99),
    forced=st.integers(0, 255),
)
def test_top_p_takes_the_fewest_that_reach_the_coverage(mass, coverage, forced):
    mass = torch.tensor(mass, dtype=torch.float64) + 1e-3
    mass /= mass.sum()
    must = torch.tensor([bool(forced >> i & 1) for i in range(len(mass))])
    keep = top_p(mass, coverage, allowed=torch.ones_like(must), forced=must)
    assert (keep | ~must).all()
    assert mass[keep].sum() >= coverage - 1e-12
    # Sums that equal the coverage but for rounding may fall either way.
    low, high = (fewest(mass.tolist(), coverage + error, must.tolist()) for error in (-1e-12, 1e-12))
    assert low <= keep.sum() <= high


def test_top_p_keeps_the_entry_that_crosses():
    mass = torch.tensor([0.5, 0.3, 0.2])
    everything, nothing = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    assert top_p(mass, 0.5, allowed=everything, forced=nothing).tolist() == [True, False, False]
    assert top_p(mass, 0.51, allowed=everything, forced=nothing).tolist() == [True, True, False]
    assert top_p(mass, 1.0, allowed=everything, forced=nothing).all()
    assert top_p(torch.tensor([1.0, 0, 0]), 1.0, allowed=everything, forced=nothing).all()


def test_top_p_never_takes_what_is_not_allowed():
    mass = torch.tensor([0.1, 0.1, 0.8])
    allowed = torch.tensor([True, True, False])
    for coverage in (0.05, 0.5, 0.99, 1.0):
        keep = top_p(mass, coverage, allowed=allowed, forced=torch.tensor([False, False, True]))
        assert not keep[2]


@pytest.mark.parametrize("row_share", [0.25, 0.5, 0.75, 1.0])
def test_so_many_queries_are_covered_and_no_block_is_too_many(row_share):
    g = torch.Generator().manual_seed(1)
    mass = torch.rand(3, 8, 20, generator=g).pow(6)
    mass /= mass.sum(-1, keepdim=True)
    allowed, forced = torch.arange(20) < 18, torch.arange(20) == 17
    keep = blocks.cover_rows(mass, 0.8, row_share, allowed=allowed, forced=forced)
    assert keep[:, 17].all()
    assert not keep[:, 18:].any()
    needed = blocks.rows_needed(8, row_share)
    assert needed == 8 * row_share
    for one, rows in zip(keep, mass):
        last = rows.mean(0).masked_fill(~one | forced, torch.inf).argmin()
        assert ((rows * one).sum(-1) >= 0.8 - 1e-9).sum() >= needed or torch.equal(one, allowed)
        assert ((rows * one).sum(-1) - rows[:, last] >= 0.8).sum() < needed


def test_the_share_of_queries_is_counted_in_whole_ones():
    assert [blocks.rows_needed(rows, 0.95) for rows in (1, 16, 20, 32, 128)] == [1, 16, 19, 31, 122]
    assert [blocks.rows_needed(rows, 1.0) for rows in (1, 256)] == [1, 256]


def test_ties_are_taken_in_order():
    mass = torch.full((6,), 1 / 6)
    keep = top_p(mass, 0.5, allowed=torch.ones(6).bool(), forced=torch.zeros(6).bool())
    assert keep.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("least", "most", "want"),
    [
        (0, None, [1, 0, 0, 0, 1, 0]),
        (1, None, [1, 0, 0, 0, 1, 0]),
        (4, None, [1, 0, 1, 1, 1, 0]),
        (9, None, [1, 1, 1, 1, 1, 0]),
        (4, 4, [1, 0, 1, 1, 1, 0]),
        (0, 1, [0, 0, 0, 0, 1, 0]),
    ],
)
def test_budgets(least, most, want):
    mass = torch.tensor([0.3, 0.05, 0.25, 0.2, 0.1, 0.9])
    keep = torch.tensor([1, 0, 0, 0, 1, 0]).bool()
    allowed = torch.tensor([1, 1, 1, 1, 1, 0]).bool()
    forced = torch.tensor([0, 0, 0, 0, 1, 0]).bool()
    got = blocks.within_budget(keep, mass, allowed=allowed, forced=forced, least=least, most=most)
    assert got.int().tolist() == want
