"""Sequences over several processes against one process with the whole of them: outputs, states, all gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from whimbrel import scan
from whimbrel.errors import WhimbrelError
from whimbrel.mixers import parallel as mixers
from whimbrel.mixers.base import LayerState
from whimbrel.mixers.gdn.config import GDNConfig
from whimbrel.mixers.linear import one_state
from whimbrel.mixers.linear_config import LinearMixerConfig
from whimbrel.mixers.rdn.config import RDNConfig
from whimbrel.mixers.rla.config import RLAConfig
from whimbrel.mixers.sgla.config import SGLAConfig
from whimbrel.scan import parallel as scans
from whimbrel.scan.base import State
from whimbrel.testing.budget import assert_close, rms_ratio
from whimbrel.testing.recurrence import FP64, RECURRENCES, Inputs, Shape, clear_of_clip, make_inputs

WORLD = 4
PARALLEL: dict[str, Callable[..., Any]] = {
    "decay": scans.decay_scan,
    "delta": scans.delta_scan,
    "rla": mixers.rla,
    "rdn": mixers.rdn,
}
TWO_STATES = ("rla", "rdn")


class Case(NamedTuple):
    """One call, by as many processes as there are lengths."""

    op: str
    schedule: str
    lengths: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012 - read only
    shape: Shape = Shape()
    dtype: torch.dtype = torch.float64
    budget: Mapping[str, float] = {"": FP64}
    """RMS ratio against fp64 by name of the result, "" for the rest."""
    strongest_decay: float = 0.3
    with_state: bool = True
    end_of: tuple[int, ...] = ()
    """Processes whose states get cotangents beside the last one's."""
    checkpointed: bool = False
    clear: bool = False
    """Values are those of `clear_of_clip`."""
    device: str = "cpu"

    def check(self, name: str, want: Tensor, got: Tensor) -> None:
        """Raise AssertionError unless a result is within its budget."""
        assert_close(name, want, got, self.budget.get(name, self.budget[""]), floor=1e-13)

    def __str__(self) -> str:
        parts = (self.op, self.schedule, self.lengths, *self.options.items(), self.dtype)
        extra = (self.shape, self.strongest_decay, self.with_state, self.end_of, self.checkpointed, self.clear)
        return " ".join(map(str, (*parts, *(x for x, usual in zip(extra, USUAL) if x != usual))))


FP32 = {"": 1e-6, "dlog_decay": 3e-6}
BF16 = {"": 0.005, "dq": 0.008, "dk": 0.008, "dv": 0.015, "dbeta": 0.01, "dgamma": 0.01, "dlog_decay": 0.02}
USUAL = (Shape(), 0.3, True, (), False, False)
OPTIONS = [
    {"combine": combine, "residual": residual, "clip": clip}
    for combine in ("gated", "sum")
    for residual in ("undecayed", "decayed")
    for clip in (0.7, None)
]
CASES = [
    case
    for schedule in ("rounds", "chain")
    for case in (
        *(Case(op, schedule, lengths) for op in PARALLEL for lengths in ((33, 42), (40, 3, 32), (5, 33, 17, 20))),
        *(Case(op, schedule, (20, 9, 20, 13), options, end_of=(0, 1)) for op in TWO_STATES for options in OPTIONS),
        *(Case(op, schedule, (10, 0, 7, 0), {"scale": 0.4}, end_of=(2,)) for op in PARALLEL),
        *(Case(op, schedule, (0, 10, 1, 7), with_state=False) for op in PARALLEL),
        *(Case(op, schedule, (9, 9, 9), shape=Shape(5, 27, 3, 6, 4, 5)) for op in PARALLEL),
        *(Case(op, schedule, (9, 9, 9), shape=Shape(1, 27, 5, 10, 1, 3)) for op in PARALLEL),
        *(Case(op, schedule, (33, 42, 12, 8), strongest_decay=1000.0) for op in PARALLEL),
        *(Case(op, schedule, (33, 42, 12, 8), dtype=torch.float32, budget=FP32) for op in PARALLEL),
        *(Case(op, schedule, (9, 12, 8), {"impl": "reference"}) for op in PARALLEL),
        *(Case(op, schedule, (9, 12, 8), {"impl": "chunked"}, checkpointed=True) for op in PARALLEL),
        *(
            Case(op, schedule, lengths, dtype=torch.bfloat16, budget=BF16, clear=True)
            for op in TWO_STATES
            for lengths in ((40, 25), (20, 9, 33), (20, 30, 8, 20))
        ),
    )
]


LAYERS = {
    f"{config.__name__} {schedule} {lengths} {with_state}": (
        config(num_heads=2, head_dim=4, num_value_heads=4, value_head_dim=3, conv_size=size),
        schedule,
        lengths,
        with_state,
    )
    for config, schedule, lengths, size, with_state in (
        (RDNConfig, "rounds", (9, 4, 8, 5), 4, False),
        (RDNConfig, "chain", (1, 1, 0, 2), 4, True),
        (RLAConfig, "rounds", (0, 0, 2, 4), 3, True),
        (GDNConfig, "rounds", (0, 3, 0, 7), 5, False),
        (SGLAConfig, "chain", (2, 1, 4, 0), 1, True),
    )
}
"""Arguments of `check_layer`."""


def functional(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([(x.double() * w.to(x.device)).sum() for x, w in pairs]).sum()


def weights_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states_of(op: str, state: Any) -> list[Tensor]:
    return list(state) if op in TWO_STATES else [state]


def make_case(case: Case) -> Inputs:
    shape = case.shape._replace(time=sum(case.lengths))
    inputs = make_inputs(
        RECURRENCES[case.op], shape, dtype=case.dtype, strongest_decay=case.strongest_decay, seed=len(case.lengths)
    )
    return clear_of_clip(inputs, delta=case.op == "rdn") if case.clear else inputs


def whole(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[Tensor]]]:
    """One process, in fp64: y and gradients over time, gradients of the state, states at the end of every stretch."""
    inputs = make_case(case)
    leaves = [x.double().requires_grad_() for x in (*inputs.tensors, *inputs.states)]
    tensors, given = leaves[: len(inputs.tensors)], leaves[len(inputs.tensors) :]
    options = {**case.options, "impl": "chunked"}
    call = RECURRENCES[case.op]
    start = given if case.with_state else None
    y, final = call(tensors, start, **options)
    edges = list(accumulate(case.lengths))
    ends = [call([x[:, :t] for x in tensors], start, **options)[1] for t in edges[:-1]] + [final]
    pairs = [(y, weights_like(tuple(y.shape), 0))]
    for rank in (*case.end_of, len(edges) - 1):
        pairs += [(s, weights_like(tuple(s.shape), 10 + rank)) for s in ends[rank]]
    gradients = torch.autograd.grad(functional(pairs), leaves, materialize_grads=True)
    names = ["q", "k", "v", "log_decay", *call.rates]
    over_time = {"y": y.detach(), **{f"d{n}": g for n, g in zip(names, gradients)}}
    return over_time, {f"dstate {n}": g for n, g in enumerate(gradients[len(names) :])}, ends


def check(case: Case, group: dist.ProcessGroup | DeviceMesh) -> None:
    """This process's stretch against the same stretch of the whole."""
    rank, last = scans.line_of(case.op, group).rank, len(case.lengths) - 1
    inputs = make_case(case)
    stretch = slice(sum(case.lengths[:rank]), sum(case.lengths[: rank + 1]))
    tensors = [x[:, stretch].to(case.device).clone().requires_grad_() for x in inputs.tensors]
    given = [x.to(case.device).clone().requires_grad_() for x in inputs.states]
    state = None
    if rank == 0 and case.with_state:
        state = State(*given) if case.op in TWO_STATES else given[0]

    def run(*tensors: Tensor) -> Any:
        return PARALLEL[case.op](*tensors, state=state, group=group, schedule=case.schedule, **case.options)

    with torch.no_grad():
        plain = run(*tensors)
    out = checkpoint(run, *tensors, use_reentrant=False) if case.checkpointed else run(*tensors)
    ends = states_of(case.op, out.state)
    over_time, of_state, want_ends = whole(case)
    pairs = [(out.y, weights_like(tuple(over_time["y"].shape), 0)[:, stretch])]
    if rank in (*case.end_of, last):
        pairs += [(s, weights_like(tuple(s.shape), 10 + rank)) for s in ends]
    gradients = torch.autograd.grad(functional(pairs), [*tensors, *given], materialize_grads=True)
    # Nothing is judged before here: a process that stopped early would leave the others waiting.
    case.check("y without gradients", out.y, plain.y)
    got = {"y": out.y, **dict(zip(list(over_time)[1:], gradients))}
    for name, x in over_time.items():
        case.check(name, x[:, stretch], got[name])
    for n, (a, b) in enumerate(zip(want_ends[rank], ends)):
        case.check(f"end {n}", a, b)
    if rank == 0:
        for (name, x), g in zip(of_state.items(), gradients[len(tensors) :]):
            case.check(name, x, g)


def check_layer(config: LinearMixerConfig, schedule: str, lengths: tuple[int, ...], with_state: bool) -> None:
    """A layer over stretches, its convolution looking back into those before, against the same layer over the whole."""
    rank, world = dist.get_rank(), len(lengths)
    torch.manual_seed(0)
    layer = config.build(10, 1e-5).double()
    x, past = weights_like((2, sum(lengths), 10), 1), layer.conv.weight.shape[2] - 1
    probe = weights_like((2, sum(lengths), 10), 2)
    before = layer(weights_like((2, 5, 10), 3)).state
    before = LayerState(before.conv.detach(), State(*(s if s is None else s.detach() for s in before.recurrent)))
    before.conv.requires_grad_()
    stretch = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    mine = x[:, stretch].clone().requires_grad_()

    over_whole = layer.recurrence
    layer.recurrence = shared(over_whole, schedule)
    state = before if with_state and rank == 0 else LayerState(None, None)
    streams = (layer.q_proj(mine), layer.k_proj(mine), layer.v_proj(mine))
    conv = mixers.conv_start(streams, past, state.conv)
    y, after = layer(mine, LayerState(conv, state.recurrent))
    leaves = [mine, before.conv, *layer.parameters()]
    got = torch.autograd.grad((y * probe[:, stretch]).sum(), leaves, materialize_grads=True)
    for gradient in got[1:]:
        dist.all_reduce(gradient)

    layer.recurrence = over_whole
    x.requires_grad_()
    want_y, want_after = layer(x, before if with_state else None)
    want = torch.autograd.grad((want_y * probe).sum(), [x, *leaves[1:]], materialize_grads=True)
    assert_close("y", want_y[:, stretch], y, FP64)
    assert_close("dx", want[0][:, stretch], got[0], FP64)
    for name, a, b in zip(["conv", *dict(layer.named_parameters())], want[1:], got[1:]):
        assert_close(f"d{name}", a, b, FP64, floor=1e-13)
    if rank == world - 1:
        assert_close("conv after", want_after.conv, after.conv, FP64)
        assert_close("state after", want_after.recurrent.base, after.recurrent.base, FP64)


def shared(recurrence: Any, schedule: str) -> Callable[..., Any]:
    """The recurrence of a layer, over stretches."""
    others = {scan.decay_scan: scans.decay_scan, scan.delta_scan: scans.delta_scan}
    others |= {mixers.rla_whole: mixers.rla, mixers.rdn_whole: mixers.rdn}
    if recurrence.func is one_state:
        inner = partial(others[recurrence.args[0]], schedule=schedule)
        return partial(one_state, inner, **recurrence.keywords)
    return partial(others[recurrence.func], schedule=schedule, **recurrence.keywords)


WRONG = {
    "cu_seqlens": "UnsupportedError: rdn: cu_seqlens is not supported over 4 processes; "
    "give every sequence its own batch row",
    "schedule": "ConfigError: rdn: schedule = 'ring' is unknown; choose one of auto, rounds, chain",
    "clip": "ConfigError: rdn: clip = -1.0 is not allowed; give a number above 0, or None for no clipping",
    "mesh": "ConfigError: rdn: group is a mesh of 2 dims ('data', 'sequence'); give one of them, mesh['name']",
    "group": "ConfigError: rdn: process 3 is not in group; call it in the processes of the group only",
    "state": "ConfigError: rdn: state is given in process 3 of the group; only process 0 holds the start of the "
    "sequences, give None in the others",
}
"""Wrong calls, and what the last process says to them."""


def refused(few: dist.ProcessGroup, mesh: DeviceMesh) -> dict[str, str]:
    """What this process says to wrong calls, of which none sends a message."""
    inputs = make_inputs(RECURRENCES["rdn"], Shape(time=3))
    wrong = {
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 3])},
        "schedule": {"schedule": "ring"},
        "clip": {"clip": -1.0},
        "mesh": {"group": mesh},
        "group": {"group": few},
        "state": {"state": State(*inputs.states)},
    }
    said = {}
    for name, keywords in wrong.items():
        if dist.get_rank() != WORLD - 1 and name in ("group", "state"):
            continue
        try:
            mixers.rdn(*inputs.tensors, **keywords)
        except WhimbrelError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def verdict(check: Callable[..., None], *arguments: Any) -> str:
    """What is wrong, empty where nothing is."""
    try:
        check(*arguments)
    except AssertionError as error:
        return str(error) or "failed"
    return ""


def work(rank: int, folder: str) -> None:
    """Everything at once: starting processes takes longer than what they do."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    groups = {n: dist.new_group(list(range(WORLD - n, WORLD))) for n in (2, 3, 4)}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    results: dict[str, Any] = {"refused": refused(dist.new_group([0, 1, 2]), mesh)}
    for schedule in ("rounds", "chain"):
        check(Case("rdn", schedule, (7, 8)), mesh["sequence"])
    for name, arguments in LAYERS.items():
        results[name] = verdict(check_layer, *arguments)
    for case in CASES:
        if rank >= WORLD - len(case.lengths):
            results[str(case)] = verdict(check, case, groups[len(case.lengths)])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stretches")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stretches_equal_the_whole(case, results):
    found = [one.get(str(case)) for one in results]
    assert found[WORLD - len(case.lengths) :] == [""] * len(case.lengths)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_the_whole(name, results):
    assert [one[name] for one in results] == [""] * WORLD


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_named(name, results):
    assert results[WORLD - 1]["refused"][name] == WRONG[name]


def test_one_process_is_the_operation():
    """Without processes to share with, packed sequences included."""
    for name, op in PARALLEL.items():
        call = RECURRENCES[name]
        inputs = make_inputs(call, Shape(batch=1, time=9), sequences=2)
        edges = torch.tensor([0, 4, 9])
        y, states = call(inputs.tensors, inputs.states, cu_seqlens=edges)
        state = State(*inputs.states) if name in TWO_STATES else inputs.states[0]
        out = op(*inputs.tensors, state=state, cu_seqlens=edges)
        assert torch.equal(out.y, y)
        for a, b in zip(states, states_of(name, out.state)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", TWO_STATES)
def test_transitions_are_products_over_tokens(op, device):
    """Of alpha (I - rate k k^T) for the delta rule, of alpha for one that adds."""
    heads, dim = 2, 32
    tensors = make_inputs(RECURRENCES[op], Shape(2, 70, 1, heads, dim, 32), strongest_decay=0.05).tensors
    _, k, _, log_decay, *rates = tensors
    rule = scans.Rule(lambda *_: (), delta=op == "rdn", impl="auto")
    budget = FP64 if device == "cpu" else 1e-4
    moved = tensors if device == "cpu" else [x.float().to(device) for x in tensors]
    for rate, got in zip(rates, rule.transitions(moved, moved[0].dtype)):
        want = torch.eye(dim, dtype=torch.float64).expand(2, heads, dim, dim)
        for t in range(70):
            error = k[:, t, :, :, None] * k[:, t, :, None, :] * rate[:, t, :, None, None] * rule.delta
            want = log_decay[:, t, :, None, None].exp() * (want - error @ want)
        assert_close("M", want, got * torch.eye(dim, device=device) if got.shape[3] == 1 else got, budget)


def gpu_case(op: str, schedule: str, lengths: tuple[int, ...], dim: int) -> Case:
    """In bf16; the clip cuts about half of the residuals."""
    two = op in TWO_STATES
    shape = Shape(1, 0, 2, 4, dim, dim)
    return Case(op, schedule, lengths, shape=shape, dtype=torch.bfloat16, budget=BF16, clear=two, device="cuda")


def gpu_cases(world: int) -> list[Case]:
    """For as many devices."""
    lengths = [(517, 513), (700, 65)] if world == 2 else [(300, 129, 66, 600)]
    return [gpu_case(op, schedule, each, 64) for op in PARALLEL for schedule in ("rounds", "chain") for each in lengths]


def cases_on_one_gpu(world: int) -> list[Case]:
    """For as many processes of one device, which exchange nothing but rounds: gloo sends no CUDA tensor to one of them.

    Kernels that hand states on between their own stretches hold some of these processes; others hold no token.
    """
    lengths = [(700, 65), (0, 300), (130, 0)] if world == 2 else [(65, 517, 130), (300, 0, 129)]
    return [gpu_case(op, "rounds", each, dim) for op in PARALLEL for each, dim in zip(lengths, (128, 64, 64))]


@pytest.mark.parametrize("op", TWO_STATES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_clip_is_at_work_and_no_residual_is_near_it(op, world):
    """What the cases above suppose of their inputs, in fp64 and in bf16."""
    (lengths,) = {case.lengths for case in CASES if case.clear and len(case.lengths) == world}
    case = Case(op, "auto", lengths, clear=True)
    for inputs in (make_case(case), make_case(case._replace(dtype=torch.bfloat16))):
        again = clear_of_clip(inputs, delta=op == "rdn")
        assert torch.equal(again.tensors[2], inputs.tensors[2])
        y, _ = RECURRENCES[op](inputs.tensors, inputs.states)
        free, _ = RECURRENCES[op](inputs.tensors, inputs.states, clip=None)
        assert rms_ratio(free, y) > 0.1
    unmoved = make_case(case._replace(clear=False))
    assert not torch.equal(clear_of_clip(unmoved, delta=op == "rdn").tensors[2], unmoved.tensors[2])


def work_on_gpu(rank: int, folder: str, backend: str, cases: list[Case]) -> None:
    """These cases, on a device for each process or, with gloo, on one."""
    torch.cuda.set_device(rank if backend == "nccl" else 0)
    world = len(cases[0].lengths)
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    group = dist.new_group(list(range(world)))
    torch.save([verdict(check, case, group) for case in cases], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def check_on_gpu(folder: Path, backend: str, cases: list[Case]) -> None:
    """Run the cases in as many processes as they have stretches; raises AssertionError with what went wrong."""
    world = len(cases[0].lengths)
    torch.multiprocessing.spawn(work_on_gpu, (str(folder), backend, cases), nprocs=world)
    wrong = [
        f"process {rank}, {case}: {found}"
        for rank in range(world)
        for case, found in zip(cases, torch.load(folder / f"{rank}.pt"), strict=True)
        if found
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
def test_several_gpus_equal_one(world, tmp_path):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")
    check_on_gpu(tmp_path, "nccl", gpu_cases(world))


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_of_one_gpu_equal_one(world, tmp_path):
    check_on_gpu(tmp_path, "gloo", cases_on_one_gpu(world))
