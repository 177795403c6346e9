"""The kernels against the step in fp64 and against the eager step: interpreted at small sizes, compiled on a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from whimbrel.optim import Apollo, Fira, GaLore, lowrank, storage
from whimbrel.testing.budget import rms_ratio

pytest.importorskip("triton")

SHAPES = [(37, 21), (21, 37), (17, 17)]
BITS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int4")]


def run(cls, impl, shapes, *, steps=6, dtype=torch.float32, device="cpu", change=None, **options):
    """Steps under seeded gradients; returns the optimizer and how far each weight has moved, in fp64."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    start = [param.detach().double() for param in params]
    optimizer = cls([{"params": params, "rank": 5, **options.pop("group", {})}], lr=0.05, impl=impl, **options)
    for step in range(steps):
        for i, (param, shape) in enumerate(zip(params, shapes, strict=True)):
            g = torch.randn(shape, generator=generator)
            param.grad = (g if change is None else change(step, i, g)).to(device, dtype)
        optimizer.step()
    return optimizer, [param.detach().double() - s for param, s in zip(params, start, strict=True)]


def compare(cls, budget, shapes=SHAPES, **options):
    ours, moved = run(cls, "triton", shapes, **options)
    theirs, wanted = run(cls, "eager", shapes, **options)
    for got, want in zip(moved, wanted, strict=True):
        assert want.abs().max() > 0
        assert rms_ratio(want, got) <= budget
    return ours, theirs


def states(optimizer):
    return [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]


@pytest.mark.parametrize("cls", [Fira, GaLore])
@pytest.mark.parametrize("side", ["std", "reverse_std"])
def test_equals_the_eager_step(cls, side):
    ours, theirs = compare(cls, 1e-5, side=side, weight_decay=0.1, refresh_steps=3, on_refresh="rotate")
    for mine, other in zip(states(ours), states(theirs), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step", *cls.scalars):
            assert rms_ratio(other[key], mine[key]) <= 1e-4, key


@pytest.mark.parametrize("options", [{}, {"scaling": "matrix", "alpha": 128.0, "group": {"rank": 1}}], ids=str)
def test_apollo_draws_the_bases_of_the_eager_step(options):
    ours, _ = compare(Apollo, 1e-5, refresh_steps=2, **options)
    assert all("basis" not in state for state in states(ours))


@pytest.mark.parametrize("mode", ["official", "paper"])
@pytest.mark.parametrize("scaling", ["column", "matrix"])
def test_modes_of_fira(mode, scaling):
    compare(Fira, 1e-5, residual_mode=mode, scaling=scaling, alpha=0.3)


@pytest.mark.parametrize(("state_dtype", "basis_dtype"), BITS)
@pytest.mark.parametrize("rank", [5, 13])
def test_formats_of_the_state(state_dtype, basis_dtype, rank):
    """Both round by the same words, so codes agree but for a few that lie on an edge."""
    ours, theirs = compare(
        Fira, 2e-2, group={"rank": rank}, state_dtype=state_dtype, basis_dtype=basis_dtype, refresh_steps=3
    )
    for mine, other in zip(states(ours), states(theirs), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert (mine[key] != other[key]).float().mean() < 0.03 or state_dtype == "float32", key
            want, got = (storage.read_moment([x], key) for x in (other, mine))
            assert rms_ratio(want, got) <= 1e-2


def test_blocks_of_a_wide_rank():
    """Above 256 columns a slice has several scales."""
    ours, _ = compare(
        Fira, 2e-2, [(258, 257)], steps=1, group={"rank": 257}, state_dtype="int8", basis_dtype="int4", alpha=0.3
    )
    assert states(ours)[0]["exp_avg_scale"].shape == (258, 2)


def check_one_step(shape, rank, budget, *, dtype=torch.float32, device="cpu", mode="official"):
    """One step from given moments against the formulas in fp64, in which the residual is formed."""
    generator = torch.Generator().manual_seed(0)
    force = torch.randn(shape, generator=generator)
    weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
    options = {"alpha": 0.25, "residual_mode": mode, "weight_decay": 0.2, "impl": "triton"}
    optimizer = Fira([{"params": [weight], "rank": rank}], lr=0.1, **options)
    for _ in range(4):
        state = {key: value.double().clone() for key, value in optimizer.state[weight].items()}
        with torch.no_grad():
            weight.zero_()
        weight.grad = (force + 0.5 * torch.randn(shape, generator=generator)).to(device, dtype)
        optimizer.step()
    left = shape[0] < shape[1]
    g, p = (weight.grad.double().T if left else weight.grad.double()), state["basis"]
    low = g @ p
    m, v = 0.9 * state["exp_avg"] + 0.1 * low, 0.999 * state["exp_avg_sq"] + 0.001 * low**2
    correction = float(lowrank.bias_correction(torch.tensor(4.0), (0.9, 0.999)))
    n = m / (v.sqrt() + 1e-6) * (correction if mode == "paper" else 1.0)
    kept = 0.25 if mode == "official" else 1.0
    residual = (g - kept * low @ p.T) * (n.norm(dim=1) / (low.norm(dim=1) + 1e-8))[:, None]
    residual *= min(1.0, 1.01 * (float(state["limiter_norm"]) + 1e-8) / float(residual.norm()))
    change = correction * (0.25 * n @ p.T + residual) if mode == "official" else 0.25 * (n @ p.T + residual)
    want = -0.1 * change * (1 - 0.1 * 0.2)
    assert rms_ratio(want.T if left else want, weight.detach().double()) <= budget
    after = optimizer.state[weight]
    assert float(after["limiter_norm"]) == pytest.approx(float(residual.norm()), rel=budget)
    assert rms_ratio(m, after["exp_avg"]) <= budget
    assert rms_ratio(v, after["exp_avg_sq"]) <= 2 * budget


@pytest.mark.parametrize("shape", [(33, 18), (18, 33)])
@pytest.mark.parametrize("mode", ["official", "paper"])
def test_equals_fp64(shape, mode):
    check_one_step(shape, 4, 1e-5, mode=mode)


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_bad_and_empty_gradients_leave_a_matrix_alone(state_dtype):
    def change(step, i, grad):
        if step == 4 and i < 2:
            return grad * float("nan") if i else grad * 0
        return grad

    options = {"state_dtype": state_dtype, "weight_decay": 0.1, "group": {"rank": 5, "refresh_steps": 50}}
    before, _ = run(Fira, "triton", SHAPES, steps=4, **options)
    after, _ = run(Fira, "triton", SHAPES, steps=5, change=change, **options)
    for i, (a, b) in enumerate(zip(states(before), states(after), strict=True)):
        assert all(torch.equal(a[key], b[key]) for key in a) == (i < 2)
    old, new = (x.param_groups[0]["params"] for x in (before, after))
    assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [True, True, False]


def test_a_gradient_scaler_is_honoured():
    def scaled(factor, found):
        param = nn.Parameter(torch.zeros(20, 30))
        optimizer = Fira([{"params": [param], "rank": 4}], impl="triton")
        optimizer.report_grad_norm()
        for seed in range(3):
            param.grad = factor * torch.randn(20, 30, generator=torch.Generator().manual_seed(seed))
            optimizer.grad_scale, optimizer.found_inf = (
                torch.tensor([factor]),
                torch.tensor([float(found and seed == 2)]),
            )
            optimizer.step()
        return optimizer, param.detach()

    one, plain = scaled(1.0, False)
    other, large = scaled(512.0, False)
    stopped, _ = scaled(512.0, True)
    assert rms_ratio(plain, large) < 1e-6
    assert states(stopped)[0]["step"].item() == 2
    norm = torch.randn(20, 30, generator=torch.Generator().manual_seed(2)).norm()
    for optimizer in (one, other, stopped):
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)


def test_layouts_of_weights_and_gradients():
    """Transposed in memory, weights, gradients or both; and gradients that move from step to step."""
    want = run(Fira, "eager", [(12, 20)] * 4)[1]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(12, 20, generator=generator) for _ in range(4)]
    params = [nn.Parameter(x.T.contiguous().T if i % 2 else x.clone()) for i, x in enumerate(start)]
    optimizer = Fira([{"params": params, "rank": 5}], lr=0.05, impl="triton")
    for _ in range(6):
        for i, param in enumerate(params):
            grad = torch.randn(12, 20, generator=generator)
            param.grad = grad.T.contiguous().T if i > 1 else grad
        optimizer.step()
    for param, s, w in zip(params, start, want, strict=True):
        assert rms_ratio(w, param.detach().double() - s.double()) <= 1e-5


def test_batches_of_any_size_give_the_same_step(monkeypatch):
    from whimbrel.optim.kernels import tables

    whole = run(Fira, "triton", [(20, 30)] * 3, state_dtype="bfloat16")[1]
    monkeypatch.setattr(tables, "SCRATCH", 1)
    for a, b in zip(whole, run(Fira, "triton", [(20, 30)] * 3, state_dtype="bfloat16")[1], strict=True):
        assert torch.equal(a, b)


def test_tables_reach_tensors_that_move_upwards():
    """Kernels that were launched with a table then find them in it."""
    from whimbrel.optim.kernels import tables

    flat = torch.zeros(4096)
    tensors = [flat[1024:1034], flat[512:522]]
    table = tables._tabulate([x.data_ptr() for x in tensors], tensors)
    lowest = tensors[1].data_ptr()
    assert (table.unit, table.units.tolist(), table.lowest.place) == (512, [4, 0], lowest)
    assert table.refill([lowest + 512, lowest + 5 * 512])
    assert table.units.tolist() == [1, 5]
    assert table.places.tolist() == [lowest + 512, lowest + 5 * 512]
    for place in (lowest - 512, lowest + 16, lowest + 512 * (tables.LAST + 1)):
        assert not table.refill([lowest, place])
    assert table.units.tolist() == [1, 5]


COMPILE = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from whimbrel.optim.kernels import launch, passes

types = dict.fromkeys("s d m n r weight_m weight_n grad_s grad_d grad_m grad_n first_column".split(), "i32")
types |= dict.fromkeys("first_mean first_square columns_at first_row".split(), "u32")
types |= dict.fromkeys("grads bases weights keys means mean_scales squares square_scales".split(), "*i64")
types |= dict.fromkeys("steps base_words limiter_norms stored".split(), "*i64")
types |= dict.fromkeys("row_words column_words".split(), "*i32")
types |= dict.fromkeys("lr weight_decay inside outside kept gamma".split(), "fp32")
types |= dict.fromkeys("beta1 beta2 eps log_beta1 log_beta2".split(), "fp32") | dict(actives="*i1", codes="*i64")
types |= dict(scales="*i64")
shared = dict(ALIGN=16, HAS_INSIDE=True, HAS_GRAD=True, HAS_LOW=True, HAS_SCALE=True, HAS_FOUND=True, GROUP=128)
shared |= dict(HAS_TOTAL=True, HAS_WORDS=True, RATE=True, EARLY=True, MATRIX=False, HAS_MEASURES=True)
for dtype, kind, rank in ((torch.bfloat16, tl.bfloat16, 512), (torch.float32, tl.float32, 64)):
    shared |= dict(WEIGHT=kind, GRAD=kind, BASIS=kind, DOT=kind, PRECISION="tf32x3", STOCHASTIC=kind == tl.bfloat16)
    types |= dict.fromkeys(("direction", "inside", "low"), "*bf16" if kind == tl.bfloat16 else "*fp32")
    slices = dict(MOMENT=tl.uint8, BLOCK=min(256, rank), BS=launch.TILE_ELEMENTS // rank, BR=rank)
    opening = passes.unpack, passes.draw, passes.narrow
    project, write = launch._project_tile(dtype, rank), launch._write_tile(dtype, rank)
    for function, tile, sizes in (
        (passes.project, project, dict(BS=project.one, BD=project.other, BR=project.columns)),
        (passes.write, write, dict(BM=write.one, BN=write.other, BR=write.columns, LEFT=False)),
        (passes.write, write, dict(BM=write.one, BN=write.other, BR=write.columns, LEFT=True)),
        (passes.adam, None, slices), (passes.blend, None, slices), (passes.settle, None, dict(BS=8192)),
        (passes.unpack, None, dict(BLOCK=2048)), (passes.draw, None, dict(BLOCK=2048)),
        (passes.narrow, None, dict(BLOCK=2048)), (passes.coefficients, None, dict(BS=8192)),
        (passes.measure, None, dict(BS=8192)),
    ):
        given = shared | sizes
        constants = {n: v for n, v in given.items() if n in function.arg_names}
        own = types | (dict(bases="*bf16", scales="*i64") if function in opening else {})
        own |= dict(inside="fp32") if function is passes.coefficients else {}
        signature = {n: "constexpr" if n in constants else own.get(n, "*fp32") for n in function.arg_names}
        if function in (passes.draw, passes.narrow):
            signature |= {n: t for n, t in dict(count="i32", size="fp32").items() if n in function.arg_names}
        source = ASTSource(function, signature, constants)
        options = {} if tile is None else dict(num_warps=tile.warps, num_stages=tile.stages)
        made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.metadata.shared <= 232448, (function.__name__, rank, made.metadata.shared)
"""


def test_kernels_for_hopper_compile_without_a_gpu():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


GPU_SHAPES = [(512, 384), (384, 512), (256, 256), (333, 521), (1365, 512), (512, 1365)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("rank", [16, 100, 256])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"])
def test_compiled_equals_fp64(shape, rank, dtype, budget):
    check_one_step(shape, rank, budget, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("state_dtype", "basis_dtype"), BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_formats(state_dtype, basis_dtype, dtype):
    options = {"state_dtype": state_dtype, "basis_dtype": basis_dtype, "group": {"rank": 300}, "refresh_steps": 3}
    compare(Fira, 0.05, [(512, 768), (768, 512), (512, 512)] * 2, device="cuda", dtype=dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "basis_dtype": "int4", "lazy_overlap": 0.5}], ids=str)
@pytest.mark.parametrize("cls", [Fira, GaLore, Apollo])
def test_steps_and_refreshes_make_the_host_wait_for_nothing(cls, options):
    params = [nn.Parameter(torch.zeros(256, 384, device="cuda", dtype=torch.bfloat16)) for _ in range(6)]
    other = nn.Parameter(torch.zeros(384, device="cuda"))
    groups = [{"params": params, "rank": 32}, {"params": [other]}]
    if cls is Apollo:
        options = {key: value for key, value in options.items() if key != "lazy_overlap"}
    else:
        options = {"on_refresh": "rotate", **options}
    optimizer = cls(groups, refresh_steps=4, weight_decay=0.1, impl="triton", **options)
    grads = [[torch.randn_like(param) for param in (*params, other)] for _ in range(10)]
    for step, given in enumerate(grads):
        for param, grad in zip((*params, other), given, strict=True):
            param.grad = grad
        torch.cuda.synchronize()
        # the first step reads which matrices have a gradient
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(param).all() and param.any() for param in params)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "basis_dtype": "int4"}], ids=str)
def test_a_captured_step_equals_others(options):
    results = []
    for captured in (False, True):
        generator = torch.Generator(device="cuda").manual_seed(0)
        params = [nn.Parameter(torch.zeros(256, 384, device="cuda", dtype=torch.bfloat16)) for _ in range(4)]
        for param in params:
            param.grad = torch.zeros_like(param)
        rate = torch.tensor(0.01, device="cuda")
        group = {"params": params, "rank": 32, "refresh_steps": 1000, "stagger": False}
        optimizer = Fira([group], lr=rate, impl="triton", **options)

        def step(params=params, generator=generator, call=optimizer.step):
            for param in params:
                param.grad.normal_(generator=generator)
            call()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()

            def step(params=params, generator=generator, call=graph.replay):
                for param in params:
                    param.grad.normal_(generator=generator)
                call()

        for _ in range(5):
            step()
        torch.cuda.synchronize()
        results.append([param.detach().clone() for param in params])
    for a, b in zip(*results, strict=True):
        assert a.any()
        assert torch.equal(a, b)
