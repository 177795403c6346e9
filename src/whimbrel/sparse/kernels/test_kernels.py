"""The kernels of selection against PyTorch: interpreted at small sizes, compiled on a GPU."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from whimbrel.attend import Grid, Plan
from whimbrel.attend.kernels.test_kernel import PoisonedTorch
from whimbrel.attend.test_plan import random_mask
from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.sparse import RowLocalConfig
from whimbrel.sparse.blocks import always_kept, block_mass, cover_rows, heads_first, margin, per_million, within_budget
from whimbrel.sparse.row_local.select import _sample
from whimbrel.testing.heads import gaussian, local, mixed, slashes, structured

pytest.importorskip("triton")
from whimbrel.sparse.kernels import launch
from whimbrel.sparse.kernels.choose import choose

UNIT = 2**launch.UNIT_BITS
DEFAULTS = {"coverage": 0.95, "row_share": 0.95, "least": 0, "most": None}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    monkeypatch.setattr(launch, "torch", PoisonedTorch())
    monkeypatch.setattr(launch, "_selections", {})


@pytest.mark.parametrize(("q_len", "k_len", "size", "probe"), [(391, 391, 32, 5), (77, 200, 16, 16), (3, 40, 128, 16)])
def test_positions_are_those_of_the_slow_path(q_len, k_len, size, probe):
    grid = Grid(size, q_len, k_len)
    got = launch.sample_positions(grid, probe, torch.device("cpu"))
    assert got.shape[1] in (1, 2, 4, 8, 16, 32)
    for row in range(grid.query_blocks):
        first, stop = grid.query_span(row)
        want = _sample(torch.arange(first, stop) + grid.offset, size, probe)
        assert got[row][got[row] >= 0].tolist() == want.tolist()


@pytest.mark.parametrize(
    ("probe", "dtype", "rows"),
    [
        (1, torch.float32, 128),
        (4, torch.float32, 128),
        (32, torch.float32, 128),
        (32, torch.float16, 16),
        (4, torch.bfloat16, 48),
    ],
)
def test_masses_are_exact(probe, dtype, rows, monkeypatch):
    monkeypatch.setattr(launch, "PROGRAM_ROWS", rows)
    q, k, _ = gaussian(1, tokens=150, q_len=100, batch=2, heads=6, kv_heads=2, dim=24, dtype=dtype)
    check_masses(3 * q, k, probe, 1e-6, block_size=32)


def check_masses(q, k, probe, error, *, block_size):
    """What kernels sum up for every sampled query and key block, as shares, against the definition."""
    grid = Grid(block_size, q.shape[1], k.shape[1])
    if not q.is_cuda and q.dtype == torch.bfloat16:
        q, k = q.float(), k.float()  # as `sampled_plan` does
    selection = launch.Selection(q, k, grid, probe_rows=probe, **DEFAULTS, scale=0.2)
    positions, memory = selection.at, selection.memory(q, k)
    group, slots = selection.group, min(positions.shape[1], launch.MOST_SLOTS)
    selection.score(memory, positions, 0, grid.query_blocks, grid.key_blocks)
    sizes = len(q) * k.shape[2], grid.query_blocks, positions.shape[1] // slots, grid.key_blocks, group, slots
    sums = memory.sums[: math.prod(sizes)].view(sizes).double()
    sums = sums.permute(0, 4, 1, 2, 5, 3).flatten(3, 4).reshape(len(q), -1, *positions.shape, grid.key_blocks)
    for row in range(grid.query_blocks):
        there = positions[row] >= 0
        at = positions[row][there].long()
        keys = heads_first(k[:, : int(at[-1]) + 1])
        want = block_mass(heads_first(q[:, at - grid.offset]), keys, at, block_size=block_size, scale=0.2)
        found = sums[:, :, row, there, : want.shape[-1]]
        assert (found / found.sum(-1, keepdim=True) - want).abs().max() < error


@pytest.mark.parametrize(
    ("coverage", "row_share", "least", "most"),
    [(0.3, 0.95, 0, None), (0.9, 0.5, 0, None), (0.5, 0.7, 9, None), (0.99, 1.0, 0, 6), (1.0, 0.5, 0, None)],
)
@pytest.mark.parametrize("tiles_of_a_row", [1, 2])
def test_choice_is_that_of_the_slow_path(coverage, row_share, least, most, tiles_of_a_row):
    """Made-up sums of 8 queries of two heads, many of them equal and some queries missing."""
    grid, heads, slots = Grid(16, 16 * 3, 16 * 40), 2, 4
    rows, blocks, all_slots = grid.query_blocks, grid.key_blocks, tiles_of_a_row * 4
    g = torch.Generator().manual_seed(2)
    causal, forced = grid.causal(), always_kept(grid, torch.device("cpu"))
    sums = torch.rand(heads, rows, all_slots, blocks, generator=g).pow(6)
    sums[..., ::3] = 2.0**-7
    sums *= torch.rand(heads, rows, all_slots, 1, generator=g) * causal[:, None]
    at = torch.zeros(rows, all_slots, dtype=torch.int32)
    at[1, 2:] = -1
    alone = (sums / sums.sum(-1, keepdim=True)).double()
    alone[:, 1, 2:] = 0
    want = torch.stack(
        [
            cover_rows(alone[:, i, at[i] >= 0], coverage, row_share, allowed=causal[i], forced=forced[i])
            for i in range(rows)
        ],
        1,
    )
    want = within_budget(want, alone.sum(2), allowed=causal, forced=forced, least=least, most=most)
    sums[:, 1, 2:] = torch.nan  # nobody writes the sums of queries that are not there
    sums = sums.unflatten(2, (tiles_of_a_row, slots)).permute(1, 2, 4, 0, 3).contiguous()  # tiles, blocks, group, P
    bits = torch.full((heads, rows, 2), -1, dtype=torch.int32)
    counts = torch.full((heads, rows), -1, dtype=torch.int32)
    wanted = 2**31 - 1 if coverage >= 1 else math.ceil(coverage * UNIT)
    choose[(rows, heads)](
        at, sums, sums.view(torch.int32), bits, counts, at, at, at, rows, rows, 0, blocks, 2, grid.first_block, wanted,
        per_million(row_share), least, most or 2**31 - 1, 0,
        LISTED=False, PILOT=False, HKV=1, GROUP=heads, P=slots, S=tiles_of_a_row, N=64, UNIT=UNIT,
        UNIT_BITS=launch.UNIT_BITS, SHIFT=1 + tiles_of_a_row, BUDGET=least > 0 or most is not None,
    )  # fmt: skip
    got = (bits[..., None] >> torch.arange(32) & 1).flatten(-2)[..., :blocks].bool()
    assert torch.equal(got, want)
    assert torch.equal(counts, want.sum(-1).int())
    offsets = torch.empty(heads * rows + 1, dtype=torch.int64)
    indices = launch._write(bits, counts, offsets, None, 2, blocks, packed=True)
    plan = Plan(offsets, indices, 16, grid.q_len, grid.k_len, heads, 1).check()
    assert torch.equal(plan.to_mask()[0], want)


def test_early_rows_leave_nothing_in_the_words_of_late_blocks():
    q, k, _ = gaussian(3, tokens=16 * 40, heads=1, dim=16)
    selection = launch.Selection(q, k, Grid(16, 640, 640), probe_rows=4, **DEFAULTS, scale=1.0)
    memory = selection.memory(q, k)
    selection.score(memory, selection.at, 0, 3, 3)
    selection.choose(memory, selection.at, 0, 3, 3, 0.95)
    assert memory.bits[:6].tolist() == [1, 0, 3, 0, 7, 0]


def test_a_mask_becomes_a_plan():
    grid = Grid(16, 100, 300)
    mask = random_mask(grid)
    plan = launch.plan_of_mask(mask, grid)
    assert len(plan.indices) > int(plan.offsets[-1])
    assert torch.equal(plan.check().to_mask(), mask)


@pytest.mark.parametrize("waiting", [0, 1 << 28])
def test_plans_are_those_of_the_slow_path(waiting, monkeypatch):
    monkeypatch.setattr(launch, "WAITING_BYTES", waiting)
    monkeypatch.setattr(launch, "MOST_SCRATCH", 4 * 4 * 7 * 16 * 3)  # three query blocks at a time
    q, k, _ = structured(3, tokens=200)
    settings = {"coverage": 0.9, "block_size": 32, "probe_rows": 4, "max_budget": 96}
    slow, fast = (RowLocalConfig(impl=impl, **settings).build()(q, k) for impl in ("torch", "triton"))
    assert torch.equal(slow.to_mask(), fast.check().to_mask())
    assert (len(fast.indices) == int(fast.offsets[-1])) == (waiting == 0)


def test_second_looks_are_those_of_the_slow_path(monkeypatch):
    """Sharp diagonals need them, local decay does not, all at once, or some at a time after a wait."""
    heads = slashes(3, tokens=200, period=67), local(3, tokens=200, decay=10)
    q, k = (torch.cat(parts, 2) for parts in list(zip(*heads, strict=True))[:2])
    q = q.repeat_interleave(2, 2)
    settings = {"coverage": 0.9, "block_size": 16}
    slow = RowLocalConfig(impl="torch", **settings).build()(q, k).to_mask()
    few = RowLocalConfig(impl="torch", probe_rows=4, coverage=0.9 + margin(0.9), block_size=16).build()(q, k).to_mask()
    assert not torch.equal(slow[:, :2], few[:, :2])
    assert torch.equal(slow[:, 2:, :-1], few[:, 2:, :-1])  # the last block is cut, and looked at again
    for scratch, looks in ((1 << 23, 4), (4 * 4 * 13 * 16 * 4, 0)):
        monkeypatch.setattr(launch, "MOST_SCRATCH", scratch)
        monkeypatch.setattr(launch, "MOST_LOOKS", looks)
        launch._selections.clear()
        fast = RowLocalConfig(impl="triton", **settings).build()(q, k).check().to_mask()
        assert torch.equal(slow, fast)


def test_rows_do_not_depend_on_cuts_or_on_what_follows():
    q, k, _ = gaussian(4, tokens=140, heads=2, dim=16)
    q = 4 * q
    select = RowLocalConfig(coverage=0.7, block_size=16, probe_rows=4, impl="triton").build()
    whole = select(q, k).to_mask()
    assert 0.3 < whole.sum() / whole.shape[1] / 45 < 0.9
    for start, stop in itertools.pairwise((0, 48, 96, 140)):
        part = select(q[:, start:stop], k[:, :stop]).to_mask()
        rows = slice(start // 16, -(-stop // 16))
        assert torch.equal(part, whole[:, :, rows, : -(-stop // 16)])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda q, k: (q.double(), k.double(), 16), "the inputs are torch.float64, and they take bf16, fp16 or fp32"),
        (lambda q, k: (q, k, 24), "block_size = 24, and they take 16, 32, 64, 128 or 256"),
        (lambda q, k: (q.repeat(1, 1, 1, 5), k.repeat(1, 1, 1, 5), 16), "heads have 320 elements, of which they take"),
    ],
)
def test_kernels_are_refused_by_name(change, why):
    q, k, size = change(*gaussian(5, tokens=20)[:2])
    select = RowLocalConfig(block_size=size, impl="triton").build()
    with pytest.raises(UnsupportedError, match=re.escape(f"row_local: impl='triton' cannot run here: {why}")):
        select(q, k)
    assert RowLocalConfig(block_size=size).build()(q, k).mean_density() == 1


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, _ = gaussian(5, tokens=20)
    with pytest.raises(UnsupportedError, match="the tensors are on cpu, not on a CUDA device; use impl='auto'"):
        RowLocalConfig(impl="triton").build()(q, k)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"impl": "cuda"}, "row_local.impl = 'cuda' is not allowed; use one of 'auto', 'torch', 'triton'"),
        (
            {"impl": "triton", "estimate": "mean"},
            "row_local.impl = 'triton' is not allowed; use 'auto' or 'torch': estimate='mean' has no kernels",
        ),
    ],
)
def test_settings_without_kernels(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RowLocalConfig(**settings)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from whimbrel.sparse.kernels import choose, estimate

types = dict.fromkeys("at shares bits counts units filled wanting chosen indices".split(), "*i32")
types |= {"q": "*bf16", "k": "*bf16", "offsets": "*i64", "scale": "fp32"}
types |= dict.fromkeys(("out", "sums"), "*fp32")
flags = dict(LISTED=False, PILOT=True, HKV=8, GROUP=4, P=4, S=1, Q=8, M=128, D=128, BD=128, SIZE=128, RUN=16)
flags |= dict(PRECISION="tf32", BUDGET=True, N=1024, UNIT=2**30, UNIT_BITS=30, SHIFT=2, PACKED=True)
for function in (estimate.scores, choose.choose, choose.place, choose.compact):
    constants = {n: v for n, v in flags.items() if n in function.arg_names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in function.arg_names}
    even = [n for n in "q k out sums q_time q_head k_time k_head".split() if n in function.arg_names]
    attrs = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in even}
    source = ASTSource(function, signature, constants, attrs)
    compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
"""


def test_compile_for_hopper_without_a_gpu():
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mixed", "structured"])
@pytest.mark.parametrize("settings", [{}, {"probe_rows": 16}, {"estimate": "exact", "coverage": 0.9}], ids=str)
def test_compiled_plans_are_those_of_the_slow_path(settings, kind):
    """But for entries at the threshold, where rounding decides."""
    if kind == "mixed":
        q, k, _ = (x.cuda() for x in mixed(6, tokens=5000, heads=8, kv_heads=2))
    else:
        q, k, _ = (x.cuda() for x in structured(6, tokens=5000, dim=128, dtype=torch.bfloat16))
    slow, fast = (RowLocalConfig(impl=impl, **settings).build()(q, k).check().to_mask() for impl in ("torch", "triton"))
    assert (slow != fast).sum() <= 2e-3 * slow.sum()


@pytest.mark.gpu
def test_compiled_rows_do_not_depend_on_cuts():
    q, k, _ = (x.cuda() for x in mixed(7, tokens=9000, heads=8, kv_heads=2))
    select = RowLocalConfig(coverage=0.9, impl="triton").build()
    whole = select(q, k).to_mask()
    for start, stop in itertools.pairwise((0, 2048, 4096, 8192, 9000)):
        part = select(q[:, start:stop], k[:, :stop]).to_mask()
        assert torch.equal(part, whole[:, :, start // 128 : -(-stop // 128), : -(-stop // 128)])


@pytest.mark.gpu
def test_compiled_selection_never_waits_for_the_device():
    q, k, _ = (x.cuda() for x in mixed(8, tokens=5000, heads=8, kv_heads=2))
    select = RowLocalConfig(coverage=0.9, impl="triton").build()
    select(q, k)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select(q, k).density()
    finally:
        torch.cuda.set_sync_debug_mode("default")
