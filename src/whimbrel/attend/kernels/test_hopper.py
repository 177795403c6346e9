"""The kernel for Hopper against the fp64 reference: its logic on the CPU in fp32, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from whimbrel.attend import Plan, attend, attend_packed, merge_parts
from whimbrel.attend.kernels.test_kernel import compare
from whimbrel.attend.test_attend import packed, random_plan, split
from whimbrel.testing.budget import assert_close
from whimbrel.testing.gluon import emulated
from whimbrel.testing.heads import gaussian, mixed

pytest.importorskip("triton.experimental.gluon")
from whimbrel.attend.kernels import hopper_launch


@pytest.fixture
def hopper(monkeypatch):
    """All calls go to the kernel for Hopper, in two programs."""
    monkeypatch.setattr(hopper_launch, "fits", lambda q, v, block_size: True)
    with emulated("whimbrel.attend.kernels.hopper"):
        yield


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 128},
        {"tokens": 700, "heads": 4, "kv_heads": 2, "batch": 2},
        {"tokens": 700, "q_len": 333, "heads": 2, "kv_heads": 1, "batch": 2},
        {"tokens": 513, "q_len": 1, "heads": 2, "kv_heads": 2},
        {"tokens": 5, "heads": 2, "kv_heads": 1},
        {"tokens": 260, "dim": 128},
        {"tokens": 700, "dim": 256, "heads": 2, "kv_heads": 1},
        {"tokens": 450, "q_len": 333, "dim": 256, "heads": 2, "kv_heads": 2},
        {"tokens": 5, "dim": 256},
    ],
    ids=str,
)
def test_equals_the_reference(hopper, sizes):
    inputs = gaussian(1, **{"dim": 64} | sizes)
    compare(inputs, random_plan(inputs.q, inputs.k, block_size=128), scale=0.3)


def test_parts_without_diagonals_or_blocks(hopper):
    q, k, v = gaussian(2, tokens=900, q_len=600, heads=2, kv_heads=1, dim=64)
    plan = random_plan(q, k, block_size=128)
    parts = split(plan)
    for part in parts:
        compare((q, k, v), part)
    merged = merge_parts([attend(q, k, v, part, impl="triton") for part in parts])
    assert_close("y", attend(q, k, v, plan, impl="reference").y, merged.y, 2e-6)


def test_wide_heads_packed_and_in_parts(hopper):
    """Blocks are taken in halves: two parts of a diagonal, and values behind a sequence in either."""
    lengths = [(130, 130), (1, 260), (60, 190), (64, 64)]
    tensors, _, plans = packed(12, lengths, heads=2, kv_heads=1, dim=256, block_size=128)
    want = attend_packed(*tensors, plans, impl="reference")
    got = attend_packed(*tensors, plans, impl="triton")
    assert_close("y", want.y, got.y, 2e-6)
    assert_close("lse", want.lse, got.lse, 2e-6)
    q, k, v = gaussian(13, tokens=400, q_len=300, heads=2, kv_heads=1, dim=256)
    plan = random_plan(q, k, block_size=128)
    for part in split(plan):
        compare((q, k, v), part)


@pytest.mark.parametrize("value_dim", [96, 128])
def test_heads_between_its_sizes_are_padded(monkeypatch, value_dim):
    q, k, v = gaussian(11, tokens=300, heads=2, kv_heads=1, dim=96)
    v = torch.cat([v, v], -1)[..., :value_dim].contiguous()
    monkeypatch.setattr(hopper_launch, "_suits", lambda q, block_size: True)
    assert not hopper_launch.fits(q, v, 128)
    assert hopper_launch.fits_padded(q, v, 128)
    assert not hopper_launch.fits_padded(q, v[..., :64], 128)
    with emulated("whimbrel.attend.kernels.hopper"):
        compare((q, k, v), random_plan(q, k, block_size=128))


def test_packed_sequences_cannot_see_one_another(hopper):
    lengths = [(200, 200), (1, 333), (140, 397), (16, 16)]
    tensors, _, plans = packed(3, lengths, heads=4, kv_heads=2, dim=64, block_size=128)
    want = attend_packed(*tensors, plans, impl="reference")
    for broken in (None, 1, 2):
        q, k, v = (x.clone() for x in tensors)
        keys, queries = [0, 200, 533, 930, 946], [0, 200, 201, 341, 357]
        if broken is not None:
            for x in (k, v):
                x[:, keys[broken] : keys[broken + 1]] = torch.nan
        got = attend_packed(q, k, v, plans, impl="triton")
        for i in range(4):
            if i != broken:
                here = slice(queries[i], queries[i + 1])
                assert_close("y", want.y[:, here], got.y[:, here], 2e-6)
                assert_close("lse", want.lse[:, here], got.lse[:, here], 2e-6)


def test_short_sequences_one_after_another(hopper):
    """One warpgroup may be a sequence ahead of the other."""
    tensors, _, plans = packed(10, [(9, 9)] * 12, heads=2, kv_heads=1, dim=64, block_size=128)
    want = attend_packed(*tensors, plans, impl="reference")
    assert_close("y", want.y, attend_packed(*tensors, plans, impl="triton").y, 2e-6)


def test_tensors_are_read_where_they_lie(hopper):
    q, k, v = gaussian(4, tokens=300, heads=4, kv_heads=2, dim=64)
    plan = random_plan(q, k, block_size=128)
    want = attend(q, k, v, plan, impl="triton")
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    row, column = hopper_launch.matrix(heads_first[0][0], 64)[1:]
    assert (row, column) == (300, 0)
    assert torch.equal(want.y, attend(*heads_first, plan, impl="triton").y)
    cached = [torch.cat([x, x.new_full((1, 84, x.shape[2], 64), torch.nan)], 1) for x in (k, v)]
    cached = [x.transpose(1, 2).contiguous().transpose(1, 2)[:, :300] for x in cached]
    assert torch.equal(want.y, attend(q, *cached, plan, impl="triton").y)
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)]
    assert torch.equal(want.y, attend(*strided, plan, impl="triton").y)


def test_heads_that_share_keys_run_together_and_the_last_blocks_first():
    table = hopper_launch._jobs(((384, 384), (200, 300)), 4, 2, torch.device("cpu")).tolist()
    assert [row[5:7] for row in table[:8]] == [[2, 0], [2, 1], [1, 0], [1, 1], [0, 0], [0, 1], [2, 2], [2, 3]]
    number, t, valid, first, key, own, h, _ = table[12]
    assert (number, t, valid, first, key, own, h) == (12 + 2, 156, 44, 384 + 156, 384, 2, 0)
    assert sorted(row[0] for row in table) == list(range(24))
    table = hopper_launch._jobs(((384, 384), (200, 300)), 4, 2, torch.device("cpu"), packed=True).tolist()
    assert sorted(row[0] for row in table) == [*range(12), *range(13, 25)]


def test_two_runs_give_equal_bits(hopper):
    q, k, v = gaussian(5, tokens=400, heads=2, dim=64)
    one, two = (attend(q, k, v, random_plan(q, k, block_size=128), impl="triton") for _ in range(2))
    assert torch.equal(one.y, two.y)
    assert torch.equal(one.lse, two.lse)


def test_what_it_takes(monkeypatch):
    q = torch.empty(4, 2, 128, dtype=torch.bfloat16)
    assert not hopper_launch.fits(q, q, 128)
    monkeypatch.setattr(hopper_launch, "_suits", lambda q, block_size: True)
    assert hopper_launch.fits(q, q, 128)
    # The result of a row takes the place of its queries.
    assert not hopper_launch.fits(q, q[..., :64], 128)
    assert not hopper_launch.fits(q[..., :48], q[..., :48], 128)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from whimbrel.attend.kernels.hopper import forward

tile = gl.NVMMASharedLayout(128, 16, 2)
dim, keys, slots = NUMBERS
matrix = "tensordesc<bf16[{},{}],{!r}>"
types = dict.fromkeys(("q", "to_y"), matrix.format(64, dim, tile))
types |= dict.fromkeys("kv", matrix.format(keys, dim, tile))
types |= {"y": "*bf16", "lse": "*fp32", "offsets": "*i64", "scale": "fp32"}
types |= dict.fromkeys(("table", "indices", "taken"), "*i32")
constants = {"H": 32, "GROUP": 4, "D": dim, "V": dim, "STAGES": 2, "KEYS": keys, "SLOTS": slots}
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in forward.arg_names}
source = GluonASTSource(forward, signature, constants)
made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
assert "wgmma" in made.asm["ptx"]
assert "cp.async.bulk.tensor" in made.asm["ptx"]
assert made.metadata.shared <= 232448, made.metadata.shared
"""


@pytest.mark.parametrize("numbers", [(128, 128, 2), (256, 64, 1)])
def test_compiles_for_hopper_without_a_gpu(numbers):
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.replace("NUMBERS", str(numbers))], capture_output=True, text=True, env=plain
    )
    assert done.returncode == 0, done.stderr[-2000:]


def on_gpu(inputs):
    return type(inputs)(*(x.cuda() for x in inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 4096, "heads": 8, "kv_heads": 2, "dim": 128},
        {"tokens": 4103, "heads": 8, "kv_heads": 2, "dim": 128, "batch": 2},
        {"tokens": 2000, "q_len": 777, "heads": 4, "kv_heads": 1, "dim": 64, "batch": 2},
        {"tokens": 3000, "q_len": 1, "heads": 4, "kv_heads": 2, "dim": 128},
        {"tokens": 100, "heads": 2, "kv_heads": 2, "dim": 128},
        {"tokens": 1000, "q_len": 500, "heads": 4, "kv_heads": 2, "dim": 96},
        {"tokens": 4103, "heads": 8, "kv_heads": 4, "dim": 256, "batch": 2},
        {"tokens": 2000, "q_len": 777, "heads": 4, "kv_heads": 1, "dim": 256},
    ],
    ids=str,
)
def test_compiled_equals_the_reference(sizes, dtype):
    inputs = on_gpu(gaussian(6, dtype=dtype, **sizes))
    assert hopper_launch.fits(inputs.q, inputs.v, 128) != hopper_launch.fits_padded(inputs.q, inputs.v, 128)
    plan = random_plan(inputs.q.cpu(), inputs.k.cpu(), block_size=128)
    plan = Plan.from_mask(plan.to_mask().cuda(), block_size=128, q_len=plan.q_len, k_len=plan.k_len)
    compare(inputs, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 256])
def test_compiled_many_times_gives_equal_bits(dim):
    """Races show as rare differences: many rows, and other work beside them."""
    q, k, v = on_gpu(mixed(7, tokens=8192, heads=32, kv_heads=8, dim=dim))
    plan = random_plan(torch.empty(1, 8192, 32, 1), torch.empty(1, 8192, 1, 1), block_size=128)
    plan = Plan.from_mask(plan.to_mask().cuda(), block_size=128, q_len=8192, k_len=8192)
    want = attend(q, k, v, plan, impl="triton")
    for _ in range(20):
        got = attend(q, k, v, plan, impl="triton")
        assert torch.equal(want.y, got.y)
        assert torch.equal(want.lse, got.lse)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 256])
def test_compiled_packed_and_heads_first(dim):
    lengths = [(1500, 1500), (1, 900), (700, 2100)]
    tensors, _, plans = packed(8, lengths, heads=4, kv_heads=2, dim=dim, dtype=torch.bfloat16, block_size=128)
    q, k, v = (x.cuda() for x in tensors)
    moved = [Plan.from_mask(p.to_mask().cuda(), block_size=128, q_len=p.q_len, k_len=p.k_len) for p in plans]
    want = attend_packed(q, k, v, moved, impl="reference")
    broken = [torch.cat([x, torch.full_like(x[:, :128], torch.nan)], 1)[:, : x.shape[1]] for x in (k, v)]
    for keys, values in ((k, v), broken, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]):
        got = attend_packed(q, keys, values, moved, impl="triton")
        assert_close("y", want.y.double(), got.y, 6e-3)
        assert_close("lse", want.lse, got.lse, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 256])
def test_compiled_parts(dim):
    inputs = on_gpu(gaussian(9, tokens=2100, q_len=700, heads=4, kv_heads=2, dim=dim, dtype=torch.bfloat16))
    for part in split(random_plan(inputs.q.cpu(), inputs.k.cpu(), block_size=128)):
        here = Plan(*(x.cuda() for x in (part.offsets, part.indices)), 128, 700, 2100, 4, 1, is_part=True)
        compare(inputs, here)
