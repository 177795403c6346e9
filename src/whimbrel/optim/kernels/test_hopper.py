"""The two passes for Hopper: their logic emulated on the CPU in fp32, compiled without a GPU, and run on one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from whimbrel.optim import Apollo, Fira, GaLore, counter
from whimbrel.optim.kernels.test_passes import BITS, check_one_step, compare, run, states
from whimbrel.testing.budget import rms_ratio
from whimbrel.testing.gluon import Blocks, emulated

pytest.importorskip("triton.experimental.gluon")
ROOM = 24
"""Elements between matrices that lie anywhere."""


class Stack:
    """B matrices with memory of NaN behind each, and their descriptor."""

    def __init__(self, number, rows, columns, generator):
        self.size, self.shape = rows * columns, (number, rows, columns)
        self.flat = torch.full((number, self.size + ROOM), torch.nan)
        self.flat[:, : self.size].normal_(generator=generator)

    def values(self):
        return self.flat[:, : self.size].view(self.shape).clone()

    def blocks(self, fold, block):
        number, rows, columns = self.shape
        strides = self.size + ROOM, fold * columns, 1
        return Blocks(self.flat.view(-1), (number, rows // fold, fold * columns), strides, (1, *block))


def words(x):
    return torch.where(x > 0x7FFFFFFF, x - (1 << 32), x).int().contiguous()


# tall, wide, and rows that do not begin at multiples of 16 bytes
EMULATED = [(200, 136, 64), (136, 200, 144), (136, 205, 96), (264, 133, 80), (72, 205, 200)]


@pytest.mark.parametrize(("m", "n", "rank"), EMULATED)
def test_both_passes_in_emulation(m, n, rank):
    generator, number = torch.Generator().manual_seed(0), 2
    left = m < n
    (d, s), fold = (m, n) if left else (n, m), 1 if n % 8 == 0 else 8
    weights, grads = (Stack(number, m, n, generator) for _ in range(2))
    bases, inside = Stack(number, d, rank, generator), Stack(number, s, rank, generator)
    at = torch.arange(number, dtype=torch.int32)
    with emulated("whimbrel.optim.kernels.hopper"):
        from whimbrel.optim.kernels import hopper

        g = grads.values().mT if left else grads.values()
        low, sums = torch.full((number, s, rank), torch.nan), torch.full((number, s), torch.nan)
        columns = 64 if rank <= 64 else 128
        bands = -(-n // 128) if left else -(-m // fold // 128)
        jobs = number * (1 if left else fold) * bands * -(-rank // columns)
        after = bases.blocks(1, (64, columns)), at, at, low, sums, jobs, 3, bands, -(-(d + 7) // 64), m, n
        sizes = {"R": rank, "BR": columns, "STAGES": 3, "num_warps": 4}
        if left and fold > 1:
            hopper.project_unaligned[(3,)](grads.flat, 0, grads.size + ROOM, *after, **sizes)
        else:
            hopper.project[(3,)](grads.blocks(fold, (64, 64)), *after, LEFT=left, FOLD=fold, **sizes)
        assert rms_ratio(g @ bases.values(), low) < 1e-6
        assert rms_ratio(g.square().sum(-1), sums) < 1e-6
        on_grad, keys = torch.rand(number, s, generator=generator), torch.arange(1, number + 1) * 99999
        rows = words(counter.words(keys, m, first=counter.WEIGHTS))
        starts = words(counter.words(keys, 1, first=counter.COLUMNS)).view(-1)
        update = g * on_grad[..., None] + inside.values() @ bases.values().mT
        old = weights.values()
        want = (old - (update.mT if left else update)) * 0.9
        a, b = (bases, inside) if left else (inside, bases)
        bits = counter.lattice(keys, m, n, first=counter.WEIGHTS)
        for stochastic in (False, True):
            weights.flat[:, : weights.size] = old.flatten(1)
            bands, segments = -(-m // fold // 128), 2
            hopper.write[(3,)](
                weights.blocks(fold, (64, 128)), grads.blocks(fold, (64, 128)), a.blocks(fold, (64, 64)),
                b.blocks(1, (128, 64)), weights.flat, 0, weights.size + ROOM, at, at, at, at,
                torch.tensor([True, False]), on_grad, torch.full((number,), 0.1), rows, starts,
                number * fold * bands * segments, 3, bands, -(-(n + 7) // 128), m, n, 0, R=rank, SEGMENTS=segments,
                LEFT=left, FOLD=fold, HAS_GRAD=True, STOCHASTIC=stochastic, STAGES=3, SLOTS=4,
                HELD=max(0, -(-rank // 64) - 2), num_warps=4,
            )  # fmt: skip
            got = weights.values()
            assert torch.equal(got[1], old[1])  # not active
            if stochastic:
                rounded = counter.round_to_bfloat16(want[0], bits[0]).float()
                assert (got[0] != rounded).float().mean() < 1e-3
            else:
                assert rms_ratio(want[0], got[0]) < 1e-6
            assert weights.flat[:, weights.size :].isnan().all()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from whimbrel.optim.kernels import hopper, launch

def blocks(rows, columns):
    return f"tensordesc<bf16[1,{rows},{columns}],{gl.NVMMASharedLayout(128, 16, 3)!r}>"

numbers = dict.fromkeys(("on_grad", "shares", "sums"), "*fp32") | {"actives": "*i1", "low": "*bf16", "memory": "*bf16"}
numbers |= dict.fromkeys(("w_at", "g_at", "a_at", "b_at", "p_at", "row_words", "column_words"), "*i32")
for rank, left, fold in ((128, False, 8), (512, True, 1)):
    stages, slots, held = launch._write_stages(rank, left=left)
    columns = min(256, rank)
    shared = {"R": rank, "LEFT": left, "FOLD": fold}
    for function, types, constants in (
        (hopper.project, {"g": blocks(64, 64), "p": blocks(64, columns)}, {"BR": columns, "STAGES": 4}),
        (hopper.project_unaligned, {"p": blocks(64, columns)}, {"BR": columns, "STAGES": 4}),
        (
            hopper.write,
            {"w": blocks(64, 128), "g": blocks(64, 128), "a": blocks(64, 64), "b": blocks(128, 64)},
            {"SEGMENTS": 2, "HAS_GRAD": True, "STOCHASTIC": True, "STAGES": stages, "SLOTS": slots, "HELD": held},
        ),
    ):
        constants = {n: v for n, v in (constants | shared).items() if n in function.arg_names}
        types |= numbers
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in function.arg_names}
        source = GluonASTSource(function, signature, constants)
        made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert "wgmma" in made.asm["ptx"] and "cp.async.bulk.tensor" in made.asm["ptx"]
        assert made.metadata.shared <= 232448, (rank, made.metadata.shared)
"""


def test_compiles_for_hopper_without_a_gpu():
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "rank", "mode"),
    [
        ((384, 512), 128, "official"),
        ((333, 520), 8, "official"),
        ((520, 333), 72, "paper"),
        ((2048, 5461), 128, "official"),
        ((1368, 513), 128, "paper"),
    ],
    ids=str,
)
def test_compiled_equals_fp64(shape, rank, mode):
    check_one_step(shape, rank, 0.02, dtype=torch.bfloat16, device="cuda", mode=mode)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((640, 512), 136), ((2048, 2048), 256), ((1024, 1001), 264), ((512, 2733), 392), ((2048, 2048), 512)],
    ids=str,
)
def test_compiled_equals_fp64_at_high_ranks(shape, rank):
    check_one_step(shape, rank, 0.02, dtype=torch.bfloat16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [Fira, GaLore, Apollo])
@pytest.mark.parametrize(("state_dtype", "basis_dtype"), BITS)
def test_compiled_equals_the_eager_step(cls, state_dtype, basis_dtype):
    """Both round by the same words; what parts them are products of bfloat16 beside float32 ones."""
    options = {"state_dtype": state_dtype, "basis_dtype": basis_dtype, "group": {"rank": 96}, "refresh_steps": 3}
    shapes = [(512, 768), (768, 512), (512, 512), (520, 333), (333, 520), (328, 2731)] * 2
    compare(cls, 0.05, shapes, device="cuda", dtype=torch.bfloat16, weight_decay=0.1, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "rank"), [((512, 768), 128), ((520, 333), 256), ((512, 2731), 512)], ids=str)
def test_compiled_many_times_gives_equal_bits(shape, rank):
    """Races show as rare differences; memory of before holds NaN."""
    results = []
    for _ in range(6):
        poison = torch.full((1 << 27,), torch.nan, device="cuda")
        del poison
        options = {"state_dtype": "bfloat16", "basis_dtype": "bfloat16", "group": {"rank": rank}, "weight_decay": 0.1}
        optimizer, moved = run(Fira, "triton", [shape] * 40, dtype=torch.bfloat16, device="cuda", **options)
        results.append([*moved, *(value for state in states(optimizer) for value in state.values())])
    assert all(torch.isfinite(x).all() for x in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 768), (520, 333), (512, 2731)], ids=str)
def test_compiled_leaves_bad_and_empty_gradients_and_memory_around_alone(shape):
    m, n = shape
    room = 8
    flat = torch.full((4, m * n + room), 7.0, device="cuda", dtype=torch.bfloat16)
    params = [nn.Parameter(row[: m * n].view(m, n)) for row in flat]
    with torch.no_grad():
        for param in params:
            param.normal_()
    optimizer = Fira([{"params": params, "rank": 64}], lr=0.05, impl="triton", weight_decay=0.1)
    for step in range(4):
        for i, param in enumerate(params):
            param.grad = torch.randn_like(param)
            if step == 3 and i < 2:
                param.grad.mul_(0) if i else param.grad[-1, -1].fill_(torch.nan)
        before = [param.detach().clone() for param in params]
        optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, params, strict=True)] == [True, True, False, False]
    assert all(torch.isfinite(param).all() for param in params)
    assert (flat[:, m * n :] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cls", "options"),
    [(Fira, {}), (Fira, {"state_dtype": "int8", "basis_dtype": "int4"}), (GaLore, {}), (Apollo, {})],
    ids=str,
)
def test_replayed_steps_equal_launched_ones(cls, options, monkeypatch):
    """Bit for bit, with refreshes between, another rate in each step, and gradients that move in some."""
    from whimbrel.optim.kernels import replay

    shapes, results = [(256, 384)] * 3 + [(384, 256), (333, 520)], []
    for replays in (False, True):
        if not replays:
            monkeypatch.setattr(replay.Replay, "run", lambda self, known, device, step: [say() for say in step()])
        else:
            monkeypatch.undo()
        generator = torch.Generator(device="cuda").manual_seed(0)
        params = [nn.Parameter(torch.zeros(shape, device="cuda", dtype=torch.bfloat16)) for shape in shapes]
        optimizer = cls(
            [{"params": params, "rank": 32, "refresh_steps": 12}], weight_decay=0.1, impl="triton", **options
        )
        for step in range(30):
            for param in params:
                grad = torch.randn(param.shape, device="cuda", generator=generator).bfloat16()
                if param.grad is None or step in (7, 8, 20):
                    param.grad = grad
                else:
                    param.grad.copy_(grad)
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append([*params, *(value for state in states(optimizer) for value in state.values())])
        recorded = [plan.fused.replay.ready for plans in optimizer._plans.values() for plan in plans]
        assert recorded == [replays]
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(a.float()).all()
        assert torch.equal(a, b)
