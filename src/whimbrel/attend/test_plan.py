"""The plan: its grid, its rows, its density, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.attend import Grid, Plan
from whimbrel.attend.reference import token_mask
from whimbrel.errors import ConfigError


def random_mask(grid, *, batch=2, heads=3, share=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, grid.query_blocks, grid.key_blocks, generator=g) < share
    mask &= grid.causal()
    mask[:, :, torch.arange(grid.query_blocks), grid.diagonal()] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(block_size=st.integers(1, 9), q_len=st.integers(1, 40), before=st.integers(0, 40), seed=st.integers(0, 99))
def test_mask_round_trip_and_exact_density(block_size, q_len, before, seed):
    grid = Grid(block_size, q_len, q_len + before)
    mask = random_mask(grid, seed=seed)
    plan = Plan.from_mask(mask, block_size=block_size, q_len=q_len, k_len=q_len + before)
    assert torch.equal(plan.to_mask(), mask)
    assert torch.equal(plan.counts(), mask.sum(-1))
    causal = torch.ones(q_len, q_len + before, dtype=torch.bool).tril(before)
    brute = token_mask(plan).sum((2, 3)).double() / causal.sum()
    assert torch.equal(plan.density(), brute)
    assert plan.mean_density() == pytest.approx(float(brute.mean()), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(block_size=st.integers(1, 9), q_len=st.integers(1, 40), before=st.integers(0, 40))
def test_dense_is_all_causal_pairs(block_size, q_len, before):
    plan = Plan.dense(batch=2, num_heads=3, block_size=block_size, q_len=q_len, k_len=q_len + before).check()
    assert torch.equal(plan.to_mask(), plan.grid.causal().expand_as(plan.to_mask()))
    assert torch.equal(token_mask(plan)[1, 2], torch.ones(q_len, q_len + before, dtype=torch.bool).tril(before))
    assert (plan.density() == 1).all()


def test_blocks_lie_at_absolute_positions_whatever_the_chunk():
    whole, chunk = Grid(16, 100, 100), Grid(16, 30, 100)
    assert (chunk.first_block, chunk.query_blocks, chunk.key_blocks) == (4, 3, 7)
    assert torch.equal(chunk.causal(), whole.causal()[4:])
    assert [chunk.query_span(i) for i in range(3)] == [(0, 10), (10, 26), (26, 30)]


def test_plan_is_compact():
    grid = Grid(128, 524_288, 524_288)
    rows = grid.query_blocks
    assert rows == 4096
    offsets = torch.arange(rows + 1)
    plan = Plan(offsets, torch.arange(rows).int(), 128, grid.q_len, grid.k_len, num_heads=1, batch=1).check()
    assert plan.mean_density() == pytest.approx(129 / 524_289, rel=1e-12)


def plan_of(offsets, indices, **changes):
    fields = {"block_size": 4, "q_len": 8, "k_len": 12, "num_heads": 2, "batch": 1} | changes
    return Plan(torch.tensor(offsets), torch.tensor(indices, dtype=torch.int32), **fields)


def test_well_formed_rows_pass():
    plan = plan_of([0, 2, 4, 5, 7], [0, 1, 0, 2, 1, 1, 2])
    assert plan.check().is_checked
    assert not plan.is_checked


def test_room_behind_the_last_row_is_no_part_of_the_plan():
    plan, roomy = (plan_of([0, 2, 4, 5, 7], [0, 1, 0, 2, 1, 1, 2, *room]) for room in ([], [9, -9, 9]))
    assert torch.equal(roomy.check().to_mask(), plan.to_mask())
    assert torch.equal(roomy.density(), plan.density())


def test_a_part_may_lack_diagonals_and_whole_rows():
    part = plan_of([0, 1, 1, 2, 4], [0, 1, 1, 2], is_part=True).check()
    assert part.has_diagonal().tolist() == [False, False, True, True]
    brute = token_mask(part).sum((2, 3)).double() / torch.ones(8, 12).tril(4).sum()
    assert torch.equal(part.density(), brute)
    with pytest.raises(ConfigError, match="outside its causal range"):
        plan_of([0, 1, 1, 2, 4], [2, 1, 1, 2], is_part=True).check()
    assert not plan_of([0] * 5, [], is_part=True).check().has_diagonal().any()


@pytest.mark.parametrize(
    ("offsets", "indices", "message"),
    [
        (
            [0, 2, 2, 3, 5],
            [0, 1, 1, 1, 2],
            "(batch 0, head 0, query block 1) selects no key block; it may hold blocks 0",
        ),
        (
            [0, 2, 4, 5, 7],
            [0, 2, 0, 2, 1, 1, 2],
            "(batch 0, head 0, query block 0) selects a key block outside its causal range; "
            "it may hold blocks 0 to 1 and must hold the last of them",
        ),
        ([0, 2, 4, 5, 7], [-1, 1, 0, 2, 1, 1, 2], "outside its causal range"),
        (
            [0, 2, 4, 5, 8],
            [0, 1, 0, 2, 1, 1, 1, 2],
            "(batch 0, head 1, query block 1) has key blocks that are not asc",
        ),
        (
            [0, 2, 4, 5, 7],
            [0, 1, 0, 1, 1, 1, 2],
            "(batch 0, head 0, query block 1) leaves out its diagonal block",
        ),
        (
            [0, 2, 4, 5, 8],
            [0, 1, 0, 2, 1, 1, 2],
            "must rise from 0 to at most the number of indices, 7; they run from 0 to 8",
        ),
        ([0, 3, 2, 5, 7], [0, 1, 0, 2, 1, 1, 2], "smallest step -1"),
    ],
)
def test_check_names_the_row(offsets, indices, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_of(offsets, indices).check()


def test_constructor_refuses_wrong_shapes():
    with pytest.raises(
        ConfigError, match=r"plan.offsets is torch.int64 of shape \(4,\); it must be int64 of shape \(5,\)"
    ):
        plan_of([0, 1, 2, 3], [1, 2, 1])
    with pytest.raises(ConfigError, match=r"plan.indices is torch.int64 of shape .* it must be int32 of one dimension"):
        Plan(torch.arange(5), torch.arange(4), block_size=4, q_len=8, k_len=12, num_heads=2, batch=1)
    with pytest.raises(ConfigError, match="plan has batch = 0 and num_heads = 2; both must be at least 1"):
        plan_of([0], [], batch=0)
    with pytest.raises(ConfigError, match="block_size = 0 is not allowed; use a positive number of tokens"):
        plan_of([0], [], block_size=0)
    with pytest.raises(ConfigError, match="q_len = 13 with k_len = 12 is not allowed; use 1 <= q_len <= k_len"):
        plan_of([0], [], q_len=13)


def test_from_mask_refuses_what_is_no_plan():
    grid = Grid(4, 8, 12)
    sizes = {"block_size": 4, "q_len": 8, "k_len": 12}
    mask = random_mask(grid)
    with pytest.raises(
        ConfigError, match=r"must be bool, \[batch, heads, 2, 3\] for q_len = 8, k_len = 12, block_size = 4"
    ):
        Plan.from_mask(mask[..., :2], **sizes)
    with pytest.raises(ConfigError, match=r"plan mask is torch.int64 of shape \(2, 3, 2, 3\)"):
        Plan.from_mask(mask.long(), **sizes)
    future, gap = mask.clone(), mask.clone()
    future[1, 2, 0, 2] = True
    with pytest.raises(ConfigError, match=r"\(batch 1, head 2, query block 0\) selects a key block outside"):
        Plan.from_mask(future, **sizes)
    gap[1, 0, 1] = torch.tensor([True, False, False])
    with pytest.raises(ConfigError, match=r"\(batch 1, head 0, query block 1\) leaves out its diagonal block"):
        Plan.from_mask(gap, **sizes)
