"""Attention over a plan against its definition, the merge of parts, and what is refused."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from whimbrel.attend import Grid, Out, Plan, attend, attend_packed, bench, choice, dense, merge_parts
from whimbrel.attend import blocks as block_path
from whimbrel.attend.flex import block_mask
from whimbrel.attend.test_plan import random_mask
from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.testing.budget import assert_close, rms_ratio
from whimbrel.testing.heads import gaussian
from whimbrel.testing.selectors import causal_attention

SIZES = [
    {"tokens": 256, "heads": 1, "kv_heads": 1},
    {"tokens": 203, "heads": 6, "kv_heads": 2, "batch": 2},
    {"tokens": 203, "q_len": 70, "heads": 4, "kv_heads": 4},
    {"tokens": 192, "q_len": 64, "heads": 4, "kv_heads": 1, "batch": 3},
    {"tokens": 7, "heads": 2, "kv_heads": 1},
    {"tokens": 99, "q_len": 1, "heads": 2, "kv_heads": 2},
]


def random_plan(q, k, *, block_size=16, share=0.3, seed=0):
    grid = Grid(block_size, q.shape[1], k.shape[1])
    mask = random_mask(grid, batch=q.shape[0], heads=q.shape[2], share=share, seed=seed)
    return Plan.from_mask(mask, block_size=block_size, q_len=grid.q_len, k_len=grid.k_len)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_blocks_equal_the_definition(sizes, scale):
    q, k, v = gaussian(1, **sizes)
    plan = random_plan(q, k)
    want = attend(q.double(), k.double(), v.double(), plan, scale=scale, impl="reference")
    got = attend(q, k, v, plan, scale=scale, impl="blocks")
    assert_close("y", want.y, got.y, 1e-6)
    assert_close("lse", want.lse, got.lse, 1e-6)
    assert got.y.dtype == torch.float32
    assert got.lse.dtype == torch.float32
    assert got.y.is_contiguous()
    assert got.lse.is_contiguous()


@pytest.mark.parametrize("sizes", SIZES)
def test_all_selected_is_dense_attention(sizes):
    q, k, v = gaussian(2, **sizes)
    dims = {"batch": q.shape[0], "num_heads": q.shape[2], "q_len": q.shape[1], "k_len": k.shape[1]}
    got = attend(q, k, v, Plan.dense(**dims, block_size=16))
    assert_close("y", causal_attention(q, k, v), got.y, 1e-6)


@pytest.mark.parametrize("slab", [1, 16 * 16 * 5, 1 << 30])
def test_slabs_do_not_change_the_result(slab, monkeypatch):
    q, k, v = gaussian(3, tokens=203, heads=6, kv_heads=2)
    plan = random_plan(q, k)
    want = attend(q, k, v, plan, impl="reference")
    monkeypatch.setattr(block_path, "_SLAB_LOGITS", slab)
    assert_close("y", want.y, attend(q, k, v, plan, impl="blocks").y, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    q, k, v = gaussian(4, tokens=203, heads=4, kv_heads=2, dtype=dtype)
    plan = random_plan(q, k)
    want = attend(q.double(), k.double(), v.double(), plan, impl="reference").y
    got = attend(q, k, v, plan, impl="blocks")
    assert got.y.dtype == dtype
    assert got.lse.dtype == torch.float32
    # One rounding of an fp32 (fp64) result to the dtype and nothing more.
    bound = 1e-13 if dtype == torch.float64 else 1.02 * rms_ratio(want, want.to(dtype)) + 1e-6
    assert_close("y", want, got.y, bound)


def test_values_may_have_their_own_size():
    q, k, _ = gaussian(5, tokens=77, heads=4, kv_heads=2)
    v = gaussian(6, tokens=77, heads=2, kv_heads=2, dim=24).v
    plan = random_plan(q, k)
    got = attend(q, k, v, plan, impl="blocks")
    assert_close("y", attend(q, k, v, plan, impl="reference").y, got.y, 1e-6)


def test_what_is_not_selected_is_not_read():
    q, k, v = gaussian(7, tokens=160, heads=2, kv_heads=2)
    mask = random_mask(Grid(16, 160, 160), batch=1, heads=2, share=0.5)
    mask[..., 4] &= torch.eye(10, dtype=torch.bool)[:, 4]
    plan = Plan.from_mask(mask, block_size=16, q_len=160, k_len=160)
    want = attend(q, k, v, plan).y
    k[:, 64:80], v[:, 64:80] = torch.nan, torch.nan
    got = attend(q, k, v, plan).y
    others = [t for t in range(160) if not 64 <= t < 80]
    assert torch.equal(got[:, others], want[:, others])


def test_sharp_logits_stay_exact():
    q, k, v = gaussian(8, tokens=203, heads=2, kv_heads=2)
    plan = random_plan(q, k)
    want = attend(q.double(), k.double(), v.double(), plan, scale=40.0, impl="reference")
    got = attend(q, k, v, plan, scale=40.0, impl="blocks")
    assert_close("y", want.y, got.y, 2e-4)
    assert_close("lse", want.lse, got.lse, 1e-6)


def test_gradients_fall_out_of_the_block_path():
    q, k, v = (x.double().requires_grad_() for x in gaussian(9, tokens=77, q_len=50, heads=4, kv_heads=2))
    plan = random_plan(q, k)
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(1, 50, 4, 64, generator=g, dtype=torch.float64)
    grads = []
    for impl in ("reference", "blocks"):
        out = attend(q, k, v, plan, impl=impl)
        grads.append(torch.autograd.grad((out.y * weight).sum() + out.lse.square().sum(), (q, k, v)))
    for name, want, got in zip("qkv", *grads, strict=True):
        assert_close(f"d{name}", want, got, 1e-6)


def partial(q, k, v, keep):
    """Attention to the keys that `keep` [Tq, Tk] marks; a query without any gets NaN and -inf."""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~keep, -torch.inf)
    y = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)
    return Out(y, logits.logsumexp(-1).transpose(1, 2).float())


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_parts_merge_to_the_whole(num_parts):
    q, k, v = (x.double() for x in gaussian(10, tokens=61, heads=3, kv_heads=3))
    causal = torch.ones(61, 61, dtype=torch.bool).tril()
    owner = torch.randint(0, num_parts, (61,), generator=torch.Generator().manual_seed(0))
    parts = [partial(q, k, v, causal & (owner == i)) for i in range(num_parts)]
    assert num_parts < 3 or any((part.lse == -torch.inf).any() for part in parts)
    whole, merged = partial(q, k, v, causal), merge_parts(parts)
    assert_close("y", whole.y, merged.y, 1e-6)
    assert_close("lse", whole.lse, merged.lse, 1e-6)


def test_a_query_without_keys_merges_to_zero():
    q, k, v = gaussian(11, tokens=5)
    none = partial(q, k, v, torch.zeros(5, 5, dtype=torch.bool))
    merged = merge_parts([none, none])
    assert (merged.y == 0).all()
    assert (merged.lse == -torch.inf).all()


def test_merge_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"merge_parts got no part; give at least one Out\(y, lse\)"):
        merge_parts([])
    q, k, v = gaussian(12, tokens=6)
    part = partial(q, k, v, torch.ones(6, 6, dtype=torch.bool))
    short = Out(part.y[:, :5], part.lse[:, :5])
    with pytest.raises(ConfigError, match=r"merge_parts got parts of shapes .* all equal"):
        merge_parts([part, short])
    with pytest.raises(ConfigError, match=r"merge_parts got parts of shapes .* all equal"):
        merge_parts([Out(part.y, part.lse[:, :5])])


def test_auto_says_once_what_it_chose(caplog):
    q, k, v = gaussian(13, tokens=20)
    plan = random_plan(q, k)
    choice._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="whimbrel.attend"):
        first, second = attend(q, k, v, plan), attend(q, k, v, plan, impl="auto")
    assert [r.message for r in caplog.records] == [
        "attend: impl='auto' runs 'blocks' and not 'triton': the tensors are on cpu, not on a CUDA device"
    ]
    assert torch.equal(first.y, second.y)
    assert torch.equal(first.y, attend(q, k, v, plan, impl="blocks").y)


def test_auto_takes_the_kernel_where_it_is_proven(monkeypatch):
    q, k, v = gaussian(14, tokens=20)
    on_gpu = type("OnGpu", (torch.Tensor,), {"is_cuda": True})
    q, k, v = (x.as_subclass(on_gpu) for x in (q, k, v))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "PROVEN_ON", ((9, 0),))
    assert choice.auto(q, k, v, 128, 1.0) == "triton"
    assert choice.auto(q.requires_grad_(), k, v, 128, 1.0) == "blocks"
    monkeypatch.setattr(choice, "PROVEN_ON", ((10, 0),))
    assert choice.auto(q.detach(), k, v, 128, 1.0) == "blocks"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double(), 16, None), "the inputs are torch.float64, and it takes"),
        (lambda q, k, v: (q, k, v, 24, None), "block_size = 24, and it takes powers of two from 16 on"),
        (lambda q, k, v: (q, k, v, 8, None), "block_size = 8, and it takes powers of two from 16 on"),
        (lambda q, k, v: (q, k, v, 16, -1.0), "scale = -1.0, and it takes no negative one"),
        (lambda q, k, v: (q.requires_grad_(), k, v, 16, None), "an input requires grad, and it has no backward"),
        (lambda q, k, v: (q, k, v.repeat(1, 1, 1, 5), 16, None), "heads have 64 and 320 elements, of which it takes"),
    ],
)
def test_the_kernel_is_refused_by_name(change, why):
    q, k, v, size, scale = change(*gaussian(14, tokens=20))
    plan = Plan.dense(batch=1, num_heads=1, block_size=size, q_len=20, k_len=20)
    with pytest.raises(UnsupportedError, match=re.escape(f"attend: impl='triton' cannot run here: {why}")):
        attend(q, k, v, plan, scale=scale, impl="triton")


def test_the_kernel_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = gaussian(14, tokens=20)
    message = "attend: impl='triton' cannot run here: the tensors are on cpu, not on a CUDA device; use impl='auto'"
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        attend(q, k, v, random_plan(q, k), impl="triton")


def test_an_unknown_choice_is_refused():
    q, k, v = gaussian(14, tokens=20)
    plan = random_plan(q, k)
    with pytest.raises(ConfigError, match="impl = 'block' is not known; did you mean 'blocks'"):
        attend(q, k, v, plan, impl="block")


def refusals():
    q, k, v = gaussian(15, tokens=20, heads=4, kv_heads=2)
    plan = random_plan(q, k)
    yield (q[0], k, v, plan), "q has shape (20, 4, 64); attention takes [batch, time, heads, dim]"
    yield (
        (q[:0], k[:0], v[:0], plan),
        "q has shape (0, 20, 4, 64), which is empty; every size must be at least 1",
    )
    yield (q, k, v.long(), plan), "v has dtype torch.int64; attention takes a floating-point dtype"
    yield (
        (q, k.double(), v, plan),
        "k is torch.float64 on cpu but q is torch.float32 on cpu; bring them to one",
    )
    yield (
        (q, k[..., :32], v, plan),
        "k has shape (1, 20, 2, 32) but q has (1, 20, 4, 64); the first and last sizes",
    )
    yield (
        (q, k, v[:, 1:], plan),
        "v has shape (1, 19, 2, 64) but k has (1, 20, 2, 64); all but the last size must",
    )
    yield (q[:, :, :3], k, v, plan), "q has 3 heads, which is not a multiple of the 2 heads of k"
    yield (
        (q, k[:, 1:], v[:, 1:], plan),
        "q has 20 positions but k has only 19; give the keys of all positions",
    )
    yield (q[:, 1:], k, v, plan), "plan.q_len = 20 does not fit q and k, which have 19; plan these tensors"
    yield (q[:, 1:], k[:, 1:], v[:, 1:], plan), "plan.q_len = 20 does not fit"
    yield (q[:, :, :2], k, v, plan), "plan.num_heads = 4 does not fit q and k, which have 2"
    yield (
        (*(x.expand(2, -1, -1, -1) for x in (q, k, v)), plan),
        "plan.batch = 1 does not fit q and k, which have 2",
    )
    bad = Plan(plan.offsets, plan.indices + 1, 16, 20, 20, num_heads=4, batch=1)
    yield (q, k, v, bad), "selects a key block outside its causal range"
    elsewhere = Plan(plan.offsets.to("meta"), plan.indices.to("meta"), 16, 20, 20, num_heads=4, batch=1)
    yield (q, k, v, elsewhere), "plan lies on meta but q on cpu; bring them to one device"


@pytest.mark.parametrize(("args", "message"), list(refusals()), ids=[m[:40] for _, m in refusals()])
def test_refuses(args, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        attend(*args)


def test_the_future_changes_no_bit():
    q, k, v = gaussian(16, tokens=100, heads=4, kv_heads=2)
    plan = random_plan(q, k)
    before = attend(q, k, v, plan, impl="blocks")
    k[:, 70:], v[:, 70:] = 5 * k[:, 70:], -9 * v[:, 70:]
    after = attend(q, k, v, plan, impl="blocks")
    assert torch.equal(before.y[:, :70], after.y[:, :70])
    assert torch.equal(before.lse[:, :70], after.lse[:, :70])
    assert not torch.equal(before.y[:, 70:], after.y[:, 70:])


@pytest.mark.parametrize("impl", ["blocks", "flex"])
def test_parts_of_a_plan_merge_to_the_whole(impl):
    q, k, v = gaussian(17, tokens=203, q_len=150, batch=2, heads=4, kv_heads=2)
    plan = random_plan(q, k)
    one, other = split(plan)
    parts = [attend(q, k, v, part, impl=impl) for part in (one, other)]
    for part, out in zip((one, other), parts):
        want = attend(q, k, v, part, impl="reference")
        assert_close("y", want.y, out.y, 1e-6)
        assert torch.equal(want.lse == -torch.inf, out.lse == -torch.inf)
        assert_close("lse", want.lse.clamp_min(-99), out.lse.clamp_min(-99), 1e-6)
    assert (parts[1].lse == -torch.inf).any()
    whole, merged = attend(q, k, v, plan, impl="reference"), merge_parts(parts)
    assert_close("y", whole.y, merged.y, 1e-6)
    assert_close("lse", whole.lse, merged.lse, 1e-6)
    pairs = one.density() + other.density()
    assert torch.allclose(pairs, plan.density(), rtol=1e-12)


def split(plan):
    """A plan's blocks shared out to two parts; the second one has no diagonal and some rows without any block."""
    mask = plan.to_mask()
    grid = plan.grid
    rest = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.4)
    rest[:, :, torch.arange(grid.query_blocks), grid.diagonal()] = False
    rest[:, 1] = False
    return tuple(part_of(chosen, plan) for chosen in (mask & ~rest, rest))


def part_of(mask, plan):
    counts = mask.sum(-1).flatten()
    return Plan(
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        mask.nonzero()[:, -1].int(),
        plan.block_size,
        plan.q_len,
        plan.k_len,
        num_heads=plan.num_heads,
        batch=plan.batch,
        is_part=True,
    ).check()


@pytest.mark.parametrize("sizes", SIZES)
def test_flex_equals_the_definition(sizes):
    q, k, v = gaussian(1, **sizes)
    plan = random_plan(q, k)
    want = attend(q, k, v, plan, scale=0.3, impl="reference")
    got = attend(q, k, v, plan, scale=0.3, impl="flex")
    assert_close("y", want.y, got.y, 1e-6)
    assert_close("lse", want.lse, got.lse, 1e-6)


def test_flex_gets_diagonal_blocks_masked_and_all_others_whole():
    q, k, _ = gaussian(18, tokens=200, q_len=120, heads=2, kv_heads=2)
    plan = random_plan(q, k)
    mask = block_mask(plan)
    assert (mask.kv_num_blocks == 1).all()
    assert (mask.full_kv_num_blocks == plan.counts() - 1).all()
    for h in range(2):
        for i in range(plan.grid.query_blocks):
            whole = mask.full_kv_indices[0, h, i, : mask.full_kv_num_blocks[0, h, i]].tolist()
            assert [*whole, int(mask.kv_indices[0, h, i, 0])] == plan.to_mask()[0, h, i].nonzero().flatten().tolist()


def packed(seed, lengths, block_size=16, **sizes):
    """Sequences with (queries, keys) of `lengths`, and their plans."""
    made = [gaussian(seed + i, tokens=k, q_len=q, **sizes) for i, (q, k) in enumerate(lengths)]
    plans = [random_plan(x.q, x.k, seed=i, block_size=block_size) for i, x in enumerate(made)]
    return [torch.cat(parts, 1) for parts in zip(*made)], made, plans


def test_packed_sequences_are_attended_to_apart():
    tensors, made, plans = packed(19, [(50, 50), (1, 33), (40, 97)], heads=4, kv_heads=2)
    out = attend_packed(*tensors, plans, scale=0.2)
    want = [attend(*x, plan, scale=0.2) for x, plan in zip(made, plans)]
    assert torch.equal(out.y, torch.cat([w.y for w in want], 1))
    assert torch.equal(out.lse, torch.cat([w.lse for w in want], 1))


def test_packed_refuses_what_does_not_fit():
    (q, k, v), _, plans = packed(20, [(20, 20), (5, 33)])
    with pytest.raises(ConfigError, match="attend_packed got no plan; give one for each sequence"):
        attend_packed(q, k, v, [])
    with pytest.raises(ConfigError, match=re.escape("q has shape (1, 24, 1, 64); packed for these plans it is [1, 25")):
        attend_packed(q[:, 1:], k, v, plans)
    with pytest.raises(ConfigError, match=re.escape("v has shape (1, 52, 1, 64); packed for these plans it is [1, 53")):
        attend_packed(q, k, v[:, 1:], plans)
    two = Plan.dense(batch=1, num_heads=1, block_size=32, q_len=5, k_len=33)
    with pytest.raises(ConfigError, match=re.escape("plans have block sizes [16, 32]; give all the same")):
        attend_packed(q, k, v, [plans[0], two])
    heads = Plan.dense(batch=1, num_heads=2, block_size=16, q_len=5, k_len=33)
    with pytest.raises(ConfigError, match=re.escape("plan.num_heads = 2 does not fit q and k, which have 1")):
        attend_packed(q, k, v, [plans[0], heads])


def test_cuda_cases_can_be_listed_anywhere_and_plans_hold_their_density():
    made = bench.cases(device="cuda")
    assert list(made[0].params) == ["T", "H", "Hkv", "D", "block", "density", "dtype"]
    assert list(made[0].rivals) == ["flex-attention", "sdpa-cudnn", "sdpa-flash"]
    for density in (1.0, 0.4, 0.1):
        assert bench.random_plan(2048, density, "cpu").mean_density() == pytest.approx(density, rel=0.1)


def test_torch_is_asked_once_whether_cudnn_takes_a_layout(monkeypatch):
    asked = []
    monkeypatch.setattr(dense.cuda, "can_use_cudnn_attention", lambda given: asked.append(given) or len(asked) == 1)
    monkeypatch.setattr(dense, "_kept", {})
    q, k, v = gaussian(1, tokens=9, heads=2, dim=8)
    for _ in range(3):
        assert dense._cudnn_takes(q, k, v)
    assert len(asked) == 1
    assert not dense._cudnn_takes(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    assert not dense._cudnn_takes(q[:, :8], k[:, :8], v[:, :8])
    with torch.no_grad():
        assert not dense._cudnn_takes(q, k, v)
    assert len(asked) == 4
