"""The kernels of the recurrences against the fp64 reference: interpreted at small sizes, compiled on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from whimbrel._lazy import load_object
from whimbrel.scan.base import State
from whimbrel.testing.budget import assert_close
from whimbrel.testing.gpu import need_memory
from whimbrel.testing.recurrence import RECURRENCES, Recurrence, Shape, compare, make_inputs, outputs_and_gradients

pytest.importorskip("triton")
every = pytest.mark.parametrize("recurrence", RECURRENCES.values(), ids=list(RECURRENCES))
two_states = pytest.mark.parametrize("recurrence", [RECURRENCES["rla"], RECURRENCES["rdn"]], ids=["rla", "rdn"])
OPTIONS = [
    {"combine": "sum"},
    {"residual": "decayed"},
    {"combine": "sum", "residual": "decayed", "clip": None},
    {"clip": 0.25, "scale": 0.7},
]
HALF = {"": 0.008, "y": 0.005, "state 0": 0.005, "state 1": 0.005, "log_decay": 0.02}
HALF |= {"gradient of k": 0.02, "gradient of v": 0.03, "gradient of beta": 0.02}
"""The budget of a run in bf16, RMS ratios to fp64; k, v and beta as in `whimbrel.scan.bench.BUDGET`."""


def check(recurrence: Recurrence, shape: Shape, dtype: torch.dtype, budget, *, device="cpu", floor=0.0, **kwargs):
    sequences = kwargs["cu_seqlens"].numel() - 1 if "cu_seqlens" in kwargs else None
    decay = kwargs.pop("strongest_decay", 0.3)
    given = make_inputs(recurrence, shape, seed=7, dtype=dtype, strongest_decay=decay, sequences=sequences)
    given = type(given)(*([x.to(device) for x in part] for part in given))
    wanted = type(given)(*([x.double() for x in part] for part in given))
    compare(recurrence, wanted, given, budget, floor=floor, impl="triton", **kwargs)


@every
@pytest.mark.parametrize("time", [1, 31, 70])
def test_equals_the_reference(recurrence: Recurrence, time: int):
    check(recurrence, Shape(2, time, 1, 2, 24, 40), torch.float32, 2e-6, floor=2e-6)


@every
def test_half_precision_inputs(recurrence: Recurrence):
    check(recurrence, Shape(1, 40, 1, 1, 16, 16), torch.float16, 0.004, floor=2e-3)


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """PyTorch fills what `torch.empty` and its like give out."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was)


@every
def test_nothing_is_read_that_was_not_written(recurrence: Recurrence):
    edges = torch.tensor([0, 3, 3, 36])
    inputs = make_inputs(recurrence, Shape(1, 36, 1, 1, 16, 16), dtype=torch.float32, sequences=3)
    plain = outputs_and_gradients(recurrence, inputs, impl="triton", cu_seqlens=edges)
    with new_memory_is_nan():
        found = outputs_and_gradients(recurrence, inputs, impl="triton", cu_seqlens=edges)
    for one, other in zip(plain, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@two_states
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(recurrence: Recurrence, options):
    check(recurrence, Shape(1, 45, 1, 1, 16, 16), torch.float32, 2e-6, floor=2e-6, **options)


@every
def test_packed_sequences(recurrence: Recurrence):
    edges = torch.tensor([0, 5, 5, 40, 72], dtype=torch.int32)
    check(recurrence, Shape(1, 72, 1, 2, 16, 16), torch.float32, 2e-6, floor=2e-6, cu_seqlens=edges)


@every
@pytest.mark.parametrize("strongest_decay", [0.0, 30.0])
def test_gates_at_their_ends(recurrence: Recurrence, strongest_decay: float):
    shape = Shape(1, 40, 1, 1, 16, 16)
    check(recurrence, shape, torch.float32, 1e-5, floor=1e-5, strongest_decay=strongest_decay)


@every
def test_the_gradient_of_strong_decays_keeps_its_digits(recurrence: Recurrence):
    """Differences of sums over pairs of tokens had 0.006 here; their terms are rounded to fp16, at 0.0005."""
    inputs = make_inputs(recurrence, Shape(1, 64, 1, 1, 16, 16), seed=3, dtype=torch.float16, strongest_decay=4.0)
    exact = type(inputs)(*([x.double() for x in part] for part in inputs))
    wanted = outputs_and_gradients(recurrence, exact, impl="reference")[1]
    found = outputs_and_gradients(recurrence, inputs, impl="triton")[1]
    assert_close("log_decay", wanted["log_decay"], found["log_decay"], 0.001)


def test_empty_batch_and_no_state():
    for recurrence in RECURRENCES.values():
        inputs = make_inputs(recurrence, Shape(0, 4, 1, 1, 16, 16), dtype=torch.float32)
        y, states = recurrence(inputs.tensors, None, impl="triton")
        assert y.shape == (0, 4, 1, 16)
        assert all(s.shape == (0, 1, 16, 16) for s in states)


def test_calls_alike_share_what_was_worked_out():
    from whimbrel.scan.kernels.launch import Flags, _scan_of

    q, v, edges = torch.zeros(2, 70, 1, 16), torch.zeros(2, 70, 2, 16), torch.tensor([0, 9, 70])
    flags = Flags(True, True, True, False, True)
    given = q, v, None, flags, 1.0, 0.25, True
    scan = _scan_of(*given)
    assert _scan_of(q.clone(), v.clone(), None, Flags(*flags), 1.0, 0.25, True) is scan
    others = [
        {0: q[:, 1:], 1: v[:, 1:]}, {1: v[:, :, :1]}, {0: q.half(), 1: v.half()}, {0: q.to("meta"), 1: v.to("meta")},
        {0: q[:1], 1: v[:1], 2: edges}, {3: flags._replace(GATED=False)}, {4: 0.5}, {5: 0.5}, {6: False},
    ]  # fmt: skip
    found = [_scan_of(*(change.get(n, x) for n, x in enumerate(given))) for change in others]
    assert len({id(x) for x in (scan, *found)}) == 1 + len(others)
    assert _scan_of(q[:1], v[:1], torch.tensor([0, 70, 70]), *given[3:]) is found[4]


@every
def test_calls_alike_through_one_plan(recurrence: Recurrence):
    """Other values, and memory that earlier calls held, through the same object and through new ones."""
    from whimbrel.scan.kernels.launch import Recurrence as Kernels

    def results(run, seed):
        inputs = make_inputs(recurrence, Shape(2, 40, 1, 2, 16, 16), seed=seed, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in (*inputs.tensors, *inputs.states)]
        tensors, states = leaves[: len(inputs.tensors)], tuple(leaves[len(inputs.tensors) :])
        rates = tensors[4:] if recurrence.states == 2 else [None, *tensors[4:]]
        found = run(*tensors[:4], *rates, states=states, cu_seqlens=None)
        gradients = torch.autograd.grad(sum(x.square().sum() for x in found), leaves)
        return [*(x.detach() for x in found), *gradients]

    def new():
        return Kernels(delta=recurrence.target.endswith(("delta_scan", "rdn")), two=recurrence.states == 2, scale=0.25)

    run = new()
    for seed in (0, 1, 0):
        for a, b in zip(results(run, seed), results(new(), seed), strict=True):
            assert torch.equal(a, b)


def test_parts_of_an_allocation_lie_apart():
    from whimbrel.scan.kernels.room import BOUNDARY, Room

    room = Room(
        torch.device("cpu"),
        a=((3, 5), torch.bfloat16),
        none=((0,), torch.float32),
        b=((2, 2), torch.float32),
        c=((7,), torch.int8),
    )
    memory = room.new()
    parts = room.parts_of(memory)
    assert [(x.shape, x.dtype) for x in parts] == [
        ((3, 5), torch.bfloat16), ((0,), torch.float32), ((2, 2), torch.float32), ((7,), torch.int8),
    ]  # fmt: skip
    for n, x in enumerate(parts):
        x.fill_(n)
    assert all((x == n).all() for n, x in enumerate(parts))
    assert all((x.data_ptr() - memory.data_ptr()) % BOUNDARY == 0 for x in parts if x.numel())


@every
def test_a_second_derivative_is_refused(recurrence: Recurrence):
    inputs = make_inputs(recurrence, Shape(1, 9, 1, 1, 16, 16), dtype=torch.float32)
    leaf = inputs.tensors[0].requires_grad_()
    y, _ = recurrence(inputs.tensors, None, impl="triton")
    (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [(1, 2, 4, 5), (2, 2, 40, 24)], ids=str)
def test_stretches_are_handed_on_and_back(shape: tuple[int, ...]):
    from whimbrel.scan.kernels.stretches import carry

    sequences, heads, key_dim, value_dim = shape
    random = torch.Generator().manual_seed(0)
    local = torch.randn(3 * sequences, heads, key_dim, value_dim, generator=random)
    maps = torch.randn(3 * sequences, heads, key_dim, key_dim, generator=random) / key_dim**0.5
    given = torch.randn(sequences, heads, key_dim, value_dim, generator=random)
    close = {"rtol": 1e-5, "atol": 1e-5}
    out = torch.full_like(local, torch.nan)
    carry(local, maps, given, 3, back=False, out=out)
    torch.testing.assert_close(out[::3], given)
    torch.testing.assert_close(out[1::3], maps[::3] @ given + local[::3], **close)
    torch.testing.assert_close(out[2::3], maps[1::3] @ out[1::3] + local[1::3], **close)
    out = torch.full_like(local, torch.nan)
    carry(local, maps, given, 3, back=True, out=out)
    torch.testing.assert_close(out[2::3], given)
    torch.testing.assert_close(out[1::3], maps[2::3].mT @ given + local[2::3], **close)
    torch.testing.assert_close(out[::3], maps[1::3].mT @ out[1::3] + local[1::3], **close)
    carry(local, maps, None, 3, back=False, out=out)
    assert out[::3].abs().max() == 0
    torch.testing.assert_close(out[1::3], local[::3])
    torch.testing.assert_close(out[2::3], maps[1::3] @ out[1::3] + local[1::3], **close)


COMPILE = """
import os
os.environ.pop("TRITON_INTERPRET", None)
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from whimbrel.scan.kernels.hopper_adding import backward_adding as adding
from whimbrel.scan.kernels.hopper_backward import backward_stream as backward, reach
from whimbrel.scan.kernels.hopper_ends import stretch_ends as ends
from whimbrel.scan.kernels.hopper_forward import forward_stream as forward, forward_streams as both
from whimbrel.scan.kernels.hopper_prepare import prepare_delta as prepare
from whimbrel.scan.kernels.hopper_sums import stretch_sums as sums

def block(rows, columns):
    return f"tensordesc<bf16[{rows}, {columns}],{gl.NVMMASharedLayout(128, 16, 2)!r}>"

kinds = dict.fromkeys("tokens chunks stretches parts H HV".split(), "i32")
kinds |= dict.fromkeys("scale clip below".split(), "fp32")
kinds |= dict.fromkeys("stretch_start stretch_end stretch_chunk chunk_start chunk_end".split(), "*i32")
kinds |= dict.fromkeys("y_memory residual_memory dresidual clipped dx_memory dq_memory dk_memory".split(), "*bf16")
flags = dict(K=128, V=128, FIRST=True, DELTA=True, TWO=True, GATED=True, DECAYED=False, CLIP=True, FROM=True)
flags |= dict(SAVE=True, GATHER=False, MAPS=True, KEPT=False, BACK=True)
rla, one = dict(DELTA=False, GATED=False, DECAYED=True), dict(FIRST=False, TWO=False)
for function, changes in (
    (forward, {}), (forward, rla), (forward, one), (forward, dict(FIRST=False)),
    (ends, {}), (ends, one), (ends, dict(FIRST=False, MAPS=False)), (reach, {}),
    (sums, {}), (sums, dict(BACK=False)),
    (both, {}), (both, rla | dict(SAVE=False)), (both, dict(K=64, V=64)),
    (backward, {}), (backward, one), (backward, dict(FIRST=False)), (backward, dict(K=64)),
    (backward, dict(FIRST=False, KEPT=True)), (backward, dict(V=64, FIRST=False)),
    (adding, {}), (adding, rla), (adding, one), (adding, dict(K=64)), (adding, dict(V=64, FIRST=False)),
    (prepare, {}), (prepare, dict(K=64, TWO=False)),
):
    constants = {n: v for n, v in (flags | changes).items() if n in function.arg_names}
    key, value = (constants["K"], constants["V"]) if function in (backward, adding) else (64, 64)
    blocks = dict.fromkeys("q k dq dk".split(), block(64, key)) | dict.fromkeys("a b z".split(), block(64, 64))
    blocks |= dict.fromkeys("x y residual".split(), block(64, value))
    blocks |= dict(dy=block(64, value), dx=block(64, value), tiles=block(64, 64), saved=block(key, value))
    signature = {n: "constexpr" if n in constants else (kinds | blocks).get(n, "*fp32") for n in function.arg_names}
    source = GluonASTSource(function, signature, constants)
    warps = 8 if function in (backward, adding) else 4
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    most = 232448 if function in (backward, adding, both) else 76458 if function is ends else 115712
    room = made.metadata.shared
    assert "wgmma" in made.asm["ptx"]
    assert room <= most, f"{function.__name__} with {changes} takes {room} bytes of shared memory, of {most}"
"""


def test_kernels_for_hopper_compile_without_a_gpu():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@every
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 1003, 2, 4, 128, 128),
        Shape(1, 1, 2, 2, 128, 128),
        Shape(2, 333, 2, 2, 64, 128),
        Shape(2, 200, 1, 2, 32, 96),
        Shape(1, 4103, 1, 2, 128, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_equals_the_reference(recurrence: Recurrence, shape: Shape, dtype: torch.dtype):
    check(recurrence, shape, dtype, HALF, device="cuda", floor=2e-2 if shape.time == 1 else 1e-6)


@pytest.mark.gpu
@every
@pytest.mark.parametrize("edges", [[0, 1, 64, 64, 200, 777, 1003], [0, 3, 1500, 4103]], ids=["many", "in stretches"])
def test_compiled_packed(recurrence: Recurrence, edges: list[int]):
    cu_seqlens = torch.tensor(edges, device="cuda")
    shape = Shape(1, edges[-1], 1, 2, 64, 128)
    check(recurrence, shape, torch.bfloat16, HALF, device="cuda", cu_seqlens=cu_seqlens)


@pytest.mark.gpu
@two_states
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_options(recurrence: Recurrence, options):
    check(recurrence, Shape(2, 500, 1, 2, 128, 128), torch.bfloat16, HALF, device="cuda", **options)


@pytest.mark.gpu
@every
@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 200, 1, 2, 128, 128), "float32"), ((1, 130, 1, 1, 256, 256), "bfloat16")]
)
def test_kernels_that_run_anywhere(recurrence: Recurrence, shape, dtype: str):
    budget = 1e-4 if dtype == "float32" else HALF
    check(recurrence, Shape(*shape), getattr(torch, dtype), budget, device="cuda", floor=1e-4)


@pytest.mark.gpu
@every
def test_two_runs_give_equal_bits(recurrence: Recurrence):
    inputs = make_inputs(recurrence, Shape(1, 3000, 2, 2, 128, 128), dtype=torch.bfloat16)
    inputs = type(inputs)(*([x.cuda() for x in part] for part in inputs))
    first, second = (outputs_and_gradients(recurrence, inputs, impl="triton") for _ in range(2))
    for one, other in zip(first, second):
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.gpu
def test_more_than_two_billion_elements():
    """B T H K past 2^31: the last sequence equals itself alone."""
    from whimbrel.mixers.rdn import rdn

    need_memory(24 * 2**30)
    batch, time, heads = 33, 32768, 16
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device="cuda", dtype=torch.bfloat16)

    q = normal(batch, time, heads, 128).mul_(0.088)
    v = normal(batch, time, heads, 128)
    assert q.numel() > 2**31
    gates = [normal(batch, time, heads).float() for _ in range(3)]
    gates = [-gates[0].abs() * 0.1, gates[1].sigmoid(), gates[2].sigmoid()]
    whole = rdn(q, q, v, *gates, impl="triton")
    alone = rdn(*(x[-1:].clone() for x in (q, q, v, *gates)), impl="triton")
    # Fewer heads go through stretches, which round differently.
    torch.testing.assert_close(whole.y[-1:].float(), alone.y.float(), rtol=0.05, atol=0.02)
    assert isinstance(whole.state, State)


def check_compiled(recurrence: Recurrence, shape: Shape, dtype: torch.dtype, device: str, backend: str):
    inputs = make_inputs(recurrence, shape, dtype=dtype)
    tensors = [x.to(device).requires_grad_() for x in inputs.tensors]
    function = load_object(recurrence.target)
    compiled = torch.compile(lambda *tensors: function(*tensors, impl="triton").y, fullgraph=True, backend=backend)
    wanted, found = function(*tensors, impl="triton").y, compiled(*tensors)
    assert torch.equal(wanted, found)
    for one, other in zip(torch.autograd.grad(wanted.sum(), tensors), torch.autograd.grad(found.sum(), tensors)):
        assert torch.equal(one, other)


@every
def test_traces_as_a_whole(recurrence: Recurrence):
    check_compiled(recurrence, Shape(1, 20, 1, 1, 16, 16), torch.float32, "cpu", "aot_eager")


@pytest.mark.gpu
@every
def test_compiles_as_a_whole(recurrence: Recurrence):
    check_compiled(recurrence, Shape(2, 256, 2, 2, 128, 128), torch.bfloat16, "cuda", "inductor")
