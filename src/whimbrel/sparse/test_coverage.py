"""Coverage and the selector call: exact against the definition, refusals."""

from __future__ import annotations

import re

import pytest
import torch

from whimbrel.attend import Plan, attend
from whimbrel.attend.reference import token_mask
from whimbrel.attend.test_attend import random_plan
from whimbrel.errors import ConfigError
from whimbrel.sparse import RowLocalConfig, Target, WindowConfig, apply_selector
from whimbrel.sparse.blocks import always_kept
from whimbrel.sparse.coverage import bounds, coverage, lacking
from whimbrel.testing.budget import assert_close
from whimbrel.testing.heads import STRUCTURED, gaussian, structured
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


@pytest.mark.parametrize("q_len", [300, 200])
@pytest.mark.parametrize("options", [{}, {"impl": "blocks"}, {"audit_rows": 8}])
def test_short_calls_can_stay_dense(q_len, options):
    q, k, v = gaussian(8, tokens=300, q_len=q_len, batch=2, heads=4, kv_heads=2, dim=16)
    selector = WindowConfig(window_tokens=16, block_size=16).build()
    whole = apply_selector(q, k, v, selector, dense_below=301, scale=0.3, **options)
    assert_close("y", causal_attention(q * 0.3 * 4, k, v), whole.y, 1e-6)
    assert (whole.density == 1).all()
    if "audit_rows" in options:
        assert whole.audit.achieved.min() > 1 - 1e-5
    assert apply_selector(q, k, v, selector, dense_below=300).density.max() < 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_calls_on_a_gpu_equal_dense_attention(dtype):
    heads = gaussian(9, tokens=1001, heads=4, kv_heads=2, dim=128, dtype=dtype)
    out = apply_selector(*(x.cuda() for x in heads), WindowConfig(window_tokens=128).build(), dense_below=2000)
    want = causal_attention(*(x.double() for x in heads))
    assert_close("y", want, out.y.cpu(), 6e-3 if dtype == torch.bfloat16 else 1e-5)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("q_len", [203, 70])
@pytest.mark.parametrize("factor", [0.2, 3.0])
def test_bounds_hold_on_both_sides(q_len, factor):
    q, k, v = gaussian(6, tokens=203, q_len=q_len, batch=2, heads=4, kv_heads=2, dim=8, dtype=torch.float64)
    q = q * factor
    plan = random_plan(q, k)
    lse = attend(q, k, v, plan).lse.double()
    exact = coverage(q, k, plan)
    low, high = bounds(q, k, plan, lse)
    assert (low <= exact + 1e-6).all()
    assert (high >= exact - 1e-6).all()
    assert ((exact < 0.9) & (low > 0.3 * exact)).any(), "the bounds say something"
    rows = torch.arange(0, q_len, 7)
    for whole, some in zip((low, high), bounds(q, k, plan, lse, rows=rows)):
        assert_close("rows", whole[..., rows], some, 1e-9)


def test_bounds_meet_where_the_keys_of_a_block_are_equal():
    q, k, v = gaussian(7, tokens=256, dim=16, dtype=torch.float64)
    k = k[:, ::16].repeat_interleave(16, 1)
    plan = random_plan(q, k)
    low, high = bounds(q, k, plan, attend(q, k, v, plan).lse.double())
    assert_close("low", coverage(q, k, plan), low, 1e-5)
    assert_close("high", coverage(q, k, plan), high, 1e-5)


def test_a_repaired_plan_keeps_what_was_asked():
    q, k, v = structured(8, tokens=1000)
    narrow = WindowConfig(window_tokens=64, sink_tokens=32, block_size=32).build()
    out = apply_selector(q, k, v, narrow, repair=Target(0.9, audit_rows=32), audit_rows=1000)
    before = narrow(q, k)
    assert (out.plan.to_mask() | ~before.to_mask()).all()
    for head, share in enumerate(((coverage(q, k, before) >= 0.9).double().mean(-1))[0]):
        assert share < 0.5, f"{list(STRUCTURED)[head]} needs no repair, so it shows none"
    assert ((out.audit.achieved >= 0.9 - 1e-5).double().mean(-1) >= 0.95).all()
    assert 0.5 < out.repaired <= 1
    assert_close("y", attend(q, k, v, out.plan, impl="reference").y, out.y, 1e-5)
    assert out.audit.summary()["p5"] >= 0.9 - 1e-5
    assert (out.audit.certified <= out.audit.achieved + 1e-5).all()


def test_what_needs_no_repair_gets_none():
    q, k, v = structured(9, tokens=700)
    exact = RowLocalConfig(estimate="exact", block_size=32)
    out = apply_selector(q, k, v, exact.build(), repair=Target(0.5))
    assert (out.repaired, out.audit) == (0.0, None)
    assert lacking(q, k, out.plan, coverage=0.5) is None
    assert torch.equal(out.plan.to_mask(), exact.build()(q, k).to_mask())


def test_a_repair_is_the_same_in_chunks():
    q, k, v = structured(10, tokens=640)
    narrow = WindowConfig(window_tokens=32, sink_tokens=32, block_size=32).build()
    target = Target(0.9, audit_rows=8)
    whole = apply_selector(q, k, v, narrow, repair=target)
    assert not always_kept(whole.plan.grid, q.device).equal(whole.plan.to_mask()[0, 0])
    for start in range(0, 640, 128):
        stop = start + 128
        part = apply_selector(q[:, start:stop], k[:, :stop], v[:, :stop], narrow, repair=target)
        rows = slice(start // 32, stop // 32)
        assert torch.equal(part.plan.to_mask(), whole.plan.to_mask()[:, :, rows, : stop // 32])
        assert_close("y", whole.y[:, start:stop], part.y, 1e-5)
