"""Coverage and the selector call: exact against the definition, refusals."""

from __future__ import annotations

import re

import pytest
import torch

from whimbrel.attend import Plan
from whimbrel.attend.reference import token_mask
from whimbrel.attend.test_attend import random_plan
from whimbrel.errors import ConfigError
from whimbrel.sparse import WindowConfig, apply_selector
from whimbrel.sparse.coverage import coverage
from whimbrel.testing.budget import assert_close
from whimbrel.testing.heads import gaussian
from whimbrel.testing.selectors import causal_attention


def brute_coverage(q, k, plan):
    group = q.shape[2] // k.shape[2]
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(group, 2)) * q.shape[-1] ** -0.5
    causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    mass = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    return (mass * token_mask(plan)).sum(-1)


@pytest.mark.parametrize("q_len", [203, 70, 1])
def test_coverage_is_the_mass_inside_the_plan(q_len):
    q, k, _ = gaussian(1, tokens=203, q_len=q_len, batch=2, heads=4, kv_heads=2)
    plan = random_plan(q, k)
    want = brute_coverage(q, k, plan)
    assert_close("coverage", want, coverage(q, k, plan), 1e-6)
    rows = torch.arange(0, q_len, 3)
    assert_close("sampled", want[..., rows], coverage(q, k, plan, rows=rows), 1e-6)
    assert_close("scaled", brute_coverage(2 * q, k, plan), coverage(q, k, plan, scale=0.25), 1e-6)


def test_a_dense_plan_covers_all():
    q, k, _ = gaussian(2, tokens=75)
    plan = Plan.dense(batch=1, num_heads=1, block_size=16, q_len=75, k_len=75)
    assert_close("coverage", torch.ones(1, 1, 75), coverage(q, k, plan), 1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 75]), "rows runs from 0 to 75; give ascending indices from 0 to 74"),
        (torch.tensor([-1, 5]), "rows runs from -1 to 5; give ascending"),
        (torch.tensor([5, 4]), "rows runs from 4 to 5; give ascending indices"),
        (torch.tensor([0.5]), "rows is torch.float32 of shape (1,); give a list of at least one int64 index"),
        (torch.tensor([], dtype=torch.int64), "rows is torch.int64 of shape (0,); give a list of at least one"),
    ],
)
def test_rows_are_checked(rows, message):
    q, k, _ = gaussian(3, tokens=75)
    plan = Plan.dense(batch=1, num_heads=1, block_size=16, q_len=75, k_len=75)
    with pytest.raises(ConfigError, match=re.escape(message)):
        coverage(q, k, plan, rows=rows)


def test_coverage_refuses_a_plan_of_other_tensors():
    q, k, _ = gaussian(4, tokens=75)
    plan = Plan.dense(batch=1, num_heads=2, block_size=16, q_len=75, k_len=75)
    with pytest.raises(ConfigError, match=r"plan.num_heads = 2 does not fit q and k, which have 1"):
        coverage(q, k, plan)


def test_apply_selector():
    q, k, v = gaussian(5, tokens=75, q_len=40, heads=4, kv_heads=2)
    out = apply_selector(q, k, v, WindowConfig(window_tokens=75, block_size=16).build(), scale=0.3)
    assert_close("y", causal_attention(q * 0.3 * 8, k, v), out.y, 1e-5)
    assert torch.equal(out.density, out.plan.density())
    with pytest.raises(ConfigError, match="v has shape"):
        apply_selector(q, k, v[:, 1:], WindowConfig().build())


def test_short_calls_can_stay_dense():
    q, k, v = gaussian(8, tokens=300, q_len=200, heads=2, dim=16)
    selector = WindowConfig(window_tokens=16, block_size=16).build()
    whole = apply_selector(q, k, v, selector, dense_below=301)
    assert_close("y", causal_attention(q, k, v), whole.y, 1e-6)
    assert (whole.density == 1).all()
    assert apply_selector(q, k, v, selector, dense_below=300).density.max() < 0.9
