"""The kernel against the fp64 reference: interpreted at small sizes, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from whimbrel.attend import Plan, attend, attend_packed, merge_parts
from whimbrel.attend.test_attend import packed, random_plan, split
from whimbrel.testing.budget import assert_close
from whimbrel.testing.gpu import need_memory
from whimbrel.testing.heads import gaussian, mixed
from whimbrel.testing.selectors import causal_attention

pytest.importorskip("triton")
from whimbrel.attend.kernels import launch

BUDGET = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


class PoisonedTorch:
    """torch, but for new tensors: what a kernel leaves unwritten is NaN, or a large number."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*size, dtype, **kwargs):
        return torch.full(size, torch.nan if dtype.is_floating_point else 1 << 30, dtype=dtype, **kwargs)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    monkeypatch.setattr(launch, "torch", PoisonedTorch())


def compare(inputs, plan, *, scale=None, budget=None):
    q, k, v = inputs
    want = attend(q, k, v, plan, scale=scale, impl="reference")
    got = attend(q, k, v, plan, scale=scale, impl="triton")
    budget = budget or BUDGET[q.dtype]
    assert got.y.dtype == q.dtype
    assert torch.equal(want.lse == -torch.inf, got.lse == -torch.inf)
    assert_close("y", want.y.double(), got.y, budget)
    # bf16 logits of exact products: only the sums round, and lse is fp32.
    assert_close("lse", want.lse.clamp_min(-99), got.lse.clamp_min(-99), 1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 64},
        {"tokens": 83, "heads": 6, "kv_heads": 2, "batch": 2},
        {"tokens": 83, "q_len": 29, "heads": 4, "kv_heads": 4},
        {"tokens": 96, "q_len": 32, "heads": 4, "kv_heads": 1, "batch": 2},
        {"tokens": 7, "heads": 2, "kv_heads": 1},
        {"tokens": 49, "q_len": 1, "heads": 2, "kv_heads": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("block_size", [16, 64])
def test_equals_the_reference(sizes, block_size):
    inputs = gaussian(1, dim=16, **sizes)
    compare(inputs, random_plan(inputs.q, inputs.k, block_size=block_size), scale=0.4)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (96, 96), (128, 128), (256, 256), (24, 40)])
def test_head_sizes(dim, value_dim):
    q, k, _ = gaussian(2, tokens=50, heads=2, dim=dim)
    v = gaussian(3, tokens=50, dim=value_dim).v
    compare((q, k, v), random_plan(q, k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    inputs = gaussian(4, tokens=83, heads=2, dim=32, dtype=dtype)
    compare(inputs, random_plan(inputs.q, inputs.k))


def test_several_tiles_in_a_block():
    inputs = gaussian(5, tokens=290, q_len=270, dim=16)
    assert launch.tiles(256, 16, 2).queries == 128
    compare(type(inputs)(*(x.half() for x in inputs)), random_plan(inputs.q, inputs.k, block_size=256))
    compare(inputs, random_plan(inputs.q, inputs.k, block_size=128))


def test_parts_without_diagonals_or_blocks():
    q, k, v = gaussian(6, tokens=83, q_len=60, batch=2, heads=4, kv_heads=2, dim=16)
    plan = random_plan(q, k)
    parts = split(plan)
    for part in parts:
        compare((q, k, v), part)
    merged = merge_parts([attend(q, k, v, part, impl="triton") for part in parts])
    assert_close("y", attend(q, k, v, plan, impl="reference").y, merged.y, 2e-6)


def test_packed_sequences():
    tensors, _, plans = packed(7, [(50, 50), (1, 33), (40, 97), (16, 16)], heads=4, kv_heads=2, dim=16)
    want = attend_packed(*tensors, plans, impl="reference")
    got = attend_packed(*tensors, plans, impl="triton")
    assert_close("y", want.y, got.y, 2e-6)
    assert_close("lse", want.lse, got.lse, 2e-6)


def test_tensors_are_read_where_they_lie():
    q, k, v = gaussian(8, tokens=50, heads=4, kv_heads=2, dim=16)
    want = attend(q, k, v, random_plan(q, k), impl="triton")
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(want.y, attend(*heads_first, random_plan(q, k), impl="triton").y)
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)]
    assert torch.equal(want.y, attend(*strided, random_plan(q, k), impl="triton").y)


def test_nothing_is_read_that_is_not_selected_nor_behind_the_sequence():
    q, k, v = gaussian(9, tokens=83, heads=2, kv_heads=2, dim=16)
    plan = random_plan(q, k, share=0.2)
    want = attend(q, k, v, plan, impl="triton")
    mask = plan.to_mask()
    mask[..., 2] = False
    mask[:, :, 2, 2] = True
    less = Plan.from_mask(mask, block_size=16, q_len=83, k_len=83)
    want_less = attend(q, k, v, less, impl="triton")
    k[:, 32:48], v[:, 32:48] = torch.nan, torch.nan
    got = attend(q, k, v, less, impl="triton")
    other = torch.arange(83) // 16 != 2
    assert torch.equal(want_less.y[:, other], got.y[:, other])
    assert got.y[:, ~other].isnan().all()
    q, k, v = gaussian(9, tokens=83, heads=2, kv_heads=2, dim=16)
    room = torch.cat([plan.indices, plan.indices.new_full((5,), 1 << 30)])
    roomy = Plan(plan.offsets, room, 16, 83, 83, num_heads=2, batch=1)
    assert torch.equal(want.y, attend(q, k, v, roomy, impl="triton").y)


def test_large_logits_neither_overflow_nor_vanish():
    q, k, v = gaussian(10, tokens=83, dim=16)
    compare((30 * q, k, v), random_plan(q, k), budget=2e-5)


def test_two_runs_give_equal_bits():
    q, k, v = gaussian(11, tokens=83, heads=2, dim=16)
    one, two = (attend(q, k, v, random_plan(q, k), impl="triton") for _ in range(2))
    assert torch.equal(one.y, two.y)
    assert torch.equal(one.lse, two.lse)


def test_heaviest_rows_are_taken_first(monkeypatch):
    taken = []
    monkeypatch.setattr(launch, "forward", {(12,): lambda *args, **kwargs: taken.append(args[5])})
    q, k, v = gaussian(12, tokens=96, heads=2, dim=16)
    attend(q, k, v, Plan.dense(batch=1, num_heads=2, block_size=16, q_len=96, k_len=96), impl="triton")
    assert taken[0].tolist() == [5, 11, 4, 10, 3, 9, 2, 8, 1, 7, 0, 6]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from whimbrel.attend.kernels.forward import forward
from whimbrel.attend.kernels.launch import tiles

types = dict.fromkeys("q k v y".split(), "*bf16") | dict.fromkeys("work owner indices".split(), "*i32")
types |= dict.fromkeys("table starts stops".split(), "*i64") | {"lse": "*fp32", "scale": "fp32"}
types |= dict.fromkeys("q_time q_head k_time k_head v_time v_head".split(), "i32")
even = "q k v y indices q_time q_head k_time k_head v_time v_head".split()
for dim, size in ((128, 128), (64, 128), (96, 128), (256, 128), (128, 64)):
    block = max(16, triton.next_power_of_2(dim))
    cut = tiles(size, block, 2)
    constants = dict(H=32, GROUP=4, D=dim, V=dim, BD=block, BV=block, SIZE=size, BM=cut.queries, BN=cut.keys)
    constants["PRECISION"] = "tf32"
    signature = {n: "constexpr" if n in constants else types[n] for n in forward.arg_names}
    attrs = {(forward.arg_names.index(n),): [["tt.divisibility", 16]] for n in even}
    source = ASTSource(forward, signature, constants, attrs)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in made.asm["ptx"]
    assert "cp.async" in made.asm["ptx"]
    room = made.metadata.shared
    assert room <= 232448, f"d {dim}, blocks of {size}: {room} bytes of shared memory, of 232448"
    print(dim, size, room)
"""


def test_compiles_for_hopper_without_a_gpu():
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]


SHAPES = [
    ({"tokens": 4103, "heads": 8, "kv_heads": 2, "dim": 128}, 128),
    ({"tokens": 2000, "q_len": 777, "heads": 4, "kv_heads": 1, "dim": 64, "batch": 2}, 128),
    ({"tokens": 1999, "heads": 4, "kv_heads": 4, "dim": 96}, 128),
    ({"tokens": 1500, "heads": 2, "kv_heads": 2, "dim": 256}, 128),
    ({"tokens": 1500, "heads": 4, "kv_heads": 2, "dim": 128}, 64),
    ({"tokens": 1500, "heads": 4, "kv_heads": 2, "dim": 128}, 256),
    ({"tokens": 300, "heads": 4, "kv_heads": 2, "dim": 128}, 16),
    ({"tokens": 3000, "q_len": 1, "heads": 4, "kv_heads": 2, "dim": 128}, 128),
]


def on_gpu(inputs):
    return type(inputs)(*(x.cuda() for x in inputs))


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "block_size"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiled_equals_the_reference(sizes, block_size, dtype):
    inputs = gaussian(13, dtype=dtype, **sizes)
    plan = random_plan(inputs.q, inputs.k, block_size=block_size)
    plan = Plan.from_mask(plan.to_mask().cuda(), block_size=block_size, q_len=plan.q_len, k_len=plan.k_len)
    compare(on_gpu(inputs), plan, budget=1e-5 if dtype == torch.float32 else None)


@pytest.mark.gpu
def test_compiled_all_selected_is_dense_attention():
    q, k, v = on_gpu(mixed(14, tokens=3001, heads=4, kv_heads=2))
    plan = Plan.dense(batch=1, num_heads=4, block_size=128, q_len=3001, k_len=3001, device=q.device)
    got = attend(q, k, v, plan, impl="triton")
    assert_close("y", causal_attention(q.cpu(), k.cpu(), v.cpu()), got.y, 6e-3)


@pytest.mark.gpu
def test_compiled_parts_and_packed():
    lengths = [(1500, 1500), (1, 900), (700, 2100)]
    tensors, made, plans = packed(15, lengths, heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16)
    tensors = [x.cuda() for x in tensors]
    moved = [Plan.from_mask(p.to_mask().cuda(), block_size=p.block_size, q_len=p.q_len, k_len=p.k_len) for p in plans]
    want = attend_packed(*tensors, moved, impl="reference")
    got = attend_packed(*tensors, moved, impl="triton")
    assert_close("y", want.y.double(), got.y, 6e-3)
    assert_close("lse", want.lse, got.lse, 1e-5)
    inputs = on_gpu(made[2])
    for part in split(plans[2]):
        here = Plan(*(x.cuda() for x in (part.offsets, part.indices)), 16, 700, 2100, 4, 1, is_part=True)
        compare(inputs, here)


@pytest.mark.gpu
def test_compiled_two_runs_give_equal_bits():
    inputs = on_gpu(gaussian(16, tokens=3000, heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16))
    plan = Plan.dense(batch=1, num_heads=8, block_size=128, q_len=3000, k_len=3000, device=inputs.q.device)
    one, two = (attend(*inputs, plan, impl="triton") for _ in range(2))
    assert torch.equal(one.y, two.y)
    assert torch.equal(one.lse, two.lse)


@pytest.mark.gpu
def test_compiled_flex_equals_the_reference():
    inputs = on_gpu(gaussian(17, tokens=2000, q_len=777, heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16))
    q, k, v = inputs
    plan = random_plan(q.cpu(), k.cpu(), block_size=128)
    plan = Plan.from_mask(plan.to_mask().cuda(), block_size=128, q_len=777, k_len=2000)
    want, got = (attend(q, k, v, plan, impl=impl) for impl in ("reference", "flex"))
    assert_close("y", want.y.double(), got.y, 6e-3)
    assert_close("lse", want.lse, got.lse, 1e-4)


@pytest.mark.gpu
def test_compiled_past_two_billion_elements():
    """The last of two sequences, whose queries begin behind 2^31 elements, equals itself alone."""
    need_memory(32 * 2**30)
    length, heads = 66_000, 256
    random = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, length, heads, 128, generator=random, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, length, 1, 128, generator=random, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert q[0].numel() > 2**31
    rows = 2 * heads * 516
    own = torch.arange(516, dtype=torch.int32, device="cuda").repeat(2 * heads)
    offsets = torch.arange(rows + 1, device="cuda")
    plan = Plan(offsets, own, 128, length, length, num_heads=heads, batch=2)
    alone = Plan(offsets[: rows // 2 + 1], own[: rows // 2], 128, length, length, num_heads=heads, batch=1)
    whole = attend(q, k, v, plan, impl="triton").y[1:]
    assert torch.equal(whole, attend(q[1:], k[1:], v[1:], alone, impl="triton").y)
