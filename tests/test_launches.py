"""Launching what has been seen: the same results, from other tensors, alignments and sizes."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from whimbrel import launches  # noqa: E402
from whimbrel.mixers.rdn.op import rdn  # noqa: E402
from whimbrel.testing.budget import assert_close  # noqa: E402
from whimbrel.testing.recurrence import RECURRENCES, Shape, make_inputs  # noqa: E402


class Kernel:
    """Stands for a JITFunction: compiles at each ordinary call, and notes what reaches its launcher."""

    def __init__(self) -> None:
        self.params = [SimpleNamespace(is_constexpr=name.isupper()) for name in ("a", "b", "n", "scale", "SIZE")]
        self.compiled, self.launched = 0, []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.compiled += 1
            return SimpleNamespace(
                run=lambda *given: self.launched.append(given), function=7, packed_metadata=("m",), **constants
            )

        return launch


@pytest.fixture
def kernel(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 3)
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launches, "JITFunction", Kernel)
    monkeypatch.setattr(launches, "_ready", {})
    return Kernel()


def tensors(dtype=torch.float32, offset=0):
    return torch.zeros(64, dtype=dtype)[offset:], torch.zeros(64)


def test_what_was_seen_goes_to_the_launcher(kernel):
    for _ in range(3):
        a, b = tensors()
        launches.launch(kernel, 5, a, b, 40, 0.5, SIZE=8)
    assert kernel.compiled == 1
    assert kernel.launched[1] == (5, 1, 1, 3, 7, ("m",), None, None, None, a.data_ptr(), b.data_ptr(), 40, 0.5, None)


def test_what_compiles_to_another_kernel_is_compiled(kernel):
    calls = [((40, 0.5), 8), ((40, 0.5), 16), ((1, 0.5), 8), ((48, 0.5), 8), ((2**31, 0.5), 8)]
    for number, (rest, size) in enumerate(calls, start=1):
        for _ in range(2):
            launches.launch(kernel, 5, *tensors(), *rest, SIZE=size)
        assert (kernel.compiled, len(kernel.launched)) == (number, number)
    launches.launch(kernel, 5, *tensors(torch.float16), 40, 0.5, SIZE=8)
    assert kernel.compiled == len(calls) + 1


def test_kernels_are_compiled_side_by_side_and_hold_no_memory(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(launches, "_compiled_ahead", {})
    monkeypatch.setattr(launches.Matrix, "descriptor", lambda self: self)
    meet, done = Barrier(2, timeout=20), []

    def warmup(*arguments, grid, **constants):
        meet.wait()  # for the other compiler
        done.append(arguments)

    kernels = kernel, Kernel()
    for each in kernels:
        each.warmup = warmup  # pyrefly: ignore [missing-attribute]
    monkeypatch.setattr(launches, "_get_ready", lambda *_: None)
    a = tensors()[0]
    given = a, _matrix(), 40, 0.5
    with launches.compiling_ahead():
        for each in (*kernels, kernel):
            launches.launch(each, 5, *given, SIZE=8)
        launches.replay("key", (a,), lambda: launches.launch(kernel, 5, *given, SIZE=8))
        assert kernel.compiled == 0
        assert len(launches._compiled_ahead) == 2
    for each in kernels:
        launches.launch(each, 5, *given, SIZE=8)
        assert each.compiled == 1
        assert not each.launched
    assert not launches._compiled_ahead
    assert [(x[0], x[1].data.device.type, *x[2:]) for x in done] == 2 * [(torch.float32, "meta", 40, 0.5)]


def test_kernels_of_one_kind_of_call_are_compiled_together_once(kernel):
    made = []
    for kind in ("some", "others", "some"):

        def make(kind=kind):
            made.append(kind)
            launches.launch(kernel, 5, *tensors(), 40, 0.5, SIZE=8)

        launches.compile_together((test_kernels_of_one_kind_of_call_are_compiled_together_once, kind), make)
    assert made == ["some", "others"]
    assert not kernel.launched


def test_what_cannot_be_compiled_ahead_is_compiled_later(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with launches.compiling_ahead():  # this kernel has no `warmup`
        launches.launch(kernel, 5, *tensors(), 40, 0.5, SIZE=8)
    launches.launch(kernel, 5, *tensors(), 40, 0.5, SIZE=8)
    assert kernel.compiled == 1


def test_an_address_off_alignment_goes_tritons_way(kernel):
    launches.launch(kernel, 5, *tensors(), 40, 0.5, SIZE=8)
    for _ in range(2):
        launches.launch(kernel, 5, *tensors(offset=1), 40, 0.5, SIZE=8)
    assert (kernel.compiled, len(kernel.launched)) == (3, 0)


def test_whoever_watches_launches_sees_them(kernel, monkeypatch):
    launches.launch(kernel, 5, *tensors(), 40, 0.5, SIZE=8)
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[print]), launch_exit_hook=None)
    monkeypatch.setattr(launches, "knobs", SimpleNamespace(runtime=hooks))
    launches.launch(kernel, 5, *tensors(), 40, 0.5, SIZE=8)
    assert (kernel.compiled, kernel.launched) == (2, [])


def test_a_launcher_of_another_build_keeps_its_descriptors(kernel):
    matrix = launches.Matrix(torch.zeros(64, 64), 64, 64, 64)
    compiled = SimpleNamespace(run=SimpleNamespace(launch=print), function=7, packed_metadata=())
    assert launches._get_ready(kernel, compiled, (matrix,)) is None


def test_the_launcher_below_takes_descriptors_encoded(kernel):
    def launcher(*given):
        pass

    def known(launcher=launcher):
        tensordesc_indices, tensordesc_meta = {0}, [{"swizzle": 3}]

        def inner(*given):
            return launcher, tensordesc_indices, tensordesc_meta

        return inner

    run = SimpleNamespace(launch=known())
    ready = launches._get_ready(kernel, SimpleNamespace(run=run, function=7, packed_metadata=()), (_matrix(),))
    assert ready.run.launch is launcher
    assert run.launch is not launcher
    assert ready.layouts == {0: {"swizzle": 3}}


def test_a_descriptor_is_encoded_once_for_an_address_and_a_shape(kernel, monkeypatch):
    launched = []
    monkeypatch.setattr(launches, "_descriptors", {})
    numbers = count()

    def encode(x, layout):
        made = launches._descriptors
        return made[x.key()] if x.key() in made else made.setdefault(x.key(), [layout, next(numbers)])

    monkeypatch.setattr(launches, "_encode", encode)
    layouts = {0: "first", 1: "second"}
    ready = launches._Ready(lambda *given: launched.append(given[9:]), 7, (), (None,), layouts, kernel)
    monkeypatch.setattr(launches, "_get_ready", lambda *_: ready)
    monkeypatch.setattr(launches.Matrix, "descriptor", lambda self: self)
    held = torch.zeros(128, 64)
    for x in (held, held, held[:64], held[64:], held.view(-1, 128)):
        launches.launch(kernel, 1, _matrix(x), _matrix(held), 40, SIZE=8)
    assert launched == [
        ("second", 0, "second", 0, 40, None),
        ("first", 1, "second", 0, 40, None),
        ("first", 2, "second", 0, 40, None),
        ("first", 3, "second", 0, 40, None),
    ]


@pytest.fixture
def tape(kernel, monkeypatch):
    """replay() of two launches on tensors (a, b): the second takes the back half of a, and b as a matrix."""
    monkeypatch.setattr(launches, "_tapes", {})
    monkeypatch.setattr(launches, "_descriptors", {})

    def encode(x, _):
        return launches._descriptors.setdefault(x.key(), ["map", x.data.data_ptr()])

    monkeypatch.setattr(launches, "_encode", encode)
    monkeypatch.setattr(launches.Matrix, "descriptor", lambda self: self)
    ready = launches._Ready(lambda *given: kernel.launched.append(given[9:]), 7, (), (None,), {0: "", 1: ""}, kernel)
    monkeypatch.setattr(launches, "_get_ready", lambda *_: ready)
    made = []

    def run(a, b, n=40, key="key"):
        def make():
            made.append(key)
            launches.launch(kernel, 5, a, b, n, 0.5, SIZE=8)
            launches.launch(kernel, 6, a[32:], _matrix(b), n, 0.5, SIZE=8)

        launches._replay((key, n), (a, None, b), make, 0)
        got = kernel.launched[-2:]
        kernel.launched.clear()
        return got, len(made)

    return run


def squares():
    return torch.zeros(64, 64), torch.zeros(64, 64)


def test_launches_are_made_again_with_other_addresses(tape):
    held = [squares() for _ in range(4)]
    wanted = [
        [(a.data_ptr(), b.data_ptr(), 40, 0.5, None), (a[32:].data_ptr(), "map", b.data_ptr(), 40, 0.5, None)]
        for a, b in held
    ]
    for number, (a, b) in enumerate(held, start=1):  # compiled, noted, then made for want of b's descriptor
        got, made = tape(a, b)
        assert made == number
        assert number == 1 or got == wanted[number - 1]
    for (a, b), calls in zip(held[1:], wanted[1:]):
        assert tape(a, b) == (calls, 4)


def test_launches_for_addresses_that_came_before_are_kept(tape, monkeypatch):
    (a, b), (c, d) = squares(), squares()
    for _ in range(3):
        first = tape(a, b)[0]
    tape(c, d)  # made for want of d's descriptor
    second = tape(c, d)[0]
    assert first != second
    with monkeypatch.context() as patch:
        patch.setattr(launches, "_calls", None)  # neither is put together again
        launches._descriptors.clear()
        assert tape(a, b) == (first, 3)
        assert tape(c, d) == (second, 3)
    (sequence,) = launches._tapes.values()
    assert len(sequence.ready) == 2
    monkeypatch.setattr(launches, "MOST_CALLS", 2)
    tape(a, d)
    tape(a, d)
    assert list(sequence.ready) == [(3, a.data_ptr(), 0, d.data_ptr())]


def test_a_launcher_that_only_hands_on_is_left_out():
    class Launcher:
        """As Triton's."""

        global_scratch_size, profile_scratch_size = 0, 0

        def __init__(self):
            self.got, self.called = [], 0
            self.launch = lambda *given: self.got.append(given)

        def __call__(self, *given):
            self.called += 1
            self.launch(*given, "cooperative")

    run = Launcher()
    call, arguments = launches._below(run, (1, 2))
    assert not run.got
    call(*arguments)
    assert (run.called, run.got) == (0, [(1, 2, "cooperative")])
    run.global_scratch_size = 8  # memory of which is found for each launch
    assert launches._below(run, (1, 2)) == (run, (1, 2))
    assert launches._below(print, (1, 2)) == (print, (1, 2))


def test_launches_are_of_their_stream(tape, monkeypatch):
    a, b = squares()
    for stream in (3, 3, 3, 4, 4, 3):
        monkeypatch.setattr(launches.driver.active, "get_current_stream", lambda device, stream=stream: stream)
        tape(a, b)
    (sequence,) = launches._tapes.values()
    assert [place[0] for place in sequence.ready] == [3, 4]
    for place, calls in sequence.ready.items():
        assert [arguments[3] for _, arguments in calls] == [place[0]] * 2


def test_a_tape_is_of_its_key(tape):
    a, b = squares()
    for n in (40, 40, 40, 41, 41):
        got, made = tape(a, b, n)
        assert not got or got[0][2] == n
    assert made == 3  # two for 40, and one for 41, whose kernel was compiled by then
    assert tape(a, b, 40)[0][1][3] == 40


def test_tensors_that_share_memory_make_no_tape(tape):
    a, b = squares()
    for _ in range(4):
        made = tape(a, a)[1]
    assert made == 4
    for _ in range(3):
        got, made = tape(a, b)
    assert made == 5
    assert got[0][:2] == (a.data_ptr(), b.data_ptr())
    assert tape(a, a)[0][0][:2] == (a.data_ptr(), a.data_ptr())


def test_an_address_off_alignment_is_not_replayed(tape):
    a, b = squares()
    for _ in range(3):
        tape(a, b)
    assert tape(torch.zeros(64 * 64 + 1)[1:].view(64, 64), b)[1] == 3


def test_what_stands_between_launches_is_done_again(tape, kernel):
    """In its place, with the tensors of each call; not where kernels are only compiled."""

    def call(a):
        def make():
            launches.launch(kernel, 5, a, a[32:], 40, 0.5, SIZE=8)
            launches.pause(lambda tensors: kernel.launched.append(tensors[0].data_ptr()), (a,))
            launches.launch(kernel, 6, a, a[32:], 40, 0.5, SIZE=8)
            made.append(a)

        kernel.launched.clear()
        launches._replay("pause", (a,), make, 0)
        return [x if isinstance(x, int) else x[0] for x in kernel.launched], len(made)

    made = []
    held = [torch.zeros(64, 64) for _ in range(4)]
    call(held[0])
    for number, a in enumerate(held[1:]):
        assert call(a) == ([a.data_ptr()] * 3, 2), number
    with launches.compiling_ahead():
        launches.pause(made.append, ())
    assert len(made) == 2


def test_memory_from_elsewhere_makes_no_tape(tape, kernel):
    a, b = squares()
    tape(a, b)
    for _ in range(3):
        launches._replay("other", (a,), lambda: launches.launch(kernel, 5, a, b, 40, 0.5, SIZE=8), 0)
    assert "other" not in launches._tapes


def _matrix(x=None):
    x = torch.zeros(64, 64) if x is None else x
    return launches.Matrix(x, x.shape[-1], 64, 64)


@triton.jit
def _add(a, b, n, scale, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(b + at, tl.load(a + at, mask=at < n) * scale + n, mask=at < n)


@pytest.mark.gpu
def test_launches_on_a_device_and_in_a_graph():
    launches._ready.clear()
    for offset in (0, 1, 4, 0):
        for n in (1, 32, 61, 61):
            a, b = torch.randn(64 + offset, device="cuda")[offset:], torch.zeros(64, device="cuda")
            launches.launch(_add, 8, a, b, n, 0.5, SIZE=8)
            assert torch.equal(b[:n], a[:n] * 0.5 + n)
            assert not b[n:].any()
    assert launches._ready
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches.launch(_add, 8, a, b, 61, 2.0, SIZE=8)
    a.normal_()
    graph.replay()
    assert torch.equal(b[:61], a[:61] * 2 + 61)


@pytest.mark.gpu
@pytest.mark.parametrize("time", [130, 2100])
def test_inputs_off_alignment_and_changing_addresses(time):
    """Equal results from inputs anywhere, with descriptors of earlier calls about; equal bits from equal places."""
    inputs = make_inputs(RECURRENCES["rdn"], Shape(1, time, 1, 2, 64, 64), seed=3, dtype=torch.bfloat16)
    results = []
    for offset in (0, 1, 8, 0):
        held = [torch.empty(x.numel() + offset, dtype=x.dtype, device="cuda") for x in inputs.tensors]
        moved = [h[offset:].view(x.shape).copy_(x).requires_grad_() for h, x in zip(held, inputs.tensors)]
        y = rdn(*moved, impl="triton").y
        results.append([y, *torch.autograd.grad(y, moved, torch.ones_like(y))])
    for other in results[1:]:
        for number, (a, b) in enumerate(zip(results[0], other)):
            assert_close(str(number), a, b, 2e-3)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(RECURRENCES))
@pytest.mark.parametrize("time", [130, 2100])
def test_replayed_launches_give_what_new_ones_do(name, time, monkeypatch):
    """Fresh inputs in fresh places, bit for bit."""
    recurrence = RECURRENCES[name]
    monkeypatch.setattr(launches, "_tapes", {})
    held = [make_inputs(recurrence, Shape(1, time, 1, 2, 64, 64), seed=n, dtype=torch.bfloat16) for n in range(5)]

    def results(inputs):
        moved = [x.detach().cuda().requires_grad_() for x in inputs.tensors]
        y = recurrence(moved, None, impl="triton")[0]
        return [y.detach(), *torch.autograd.grad(y, moved, torch.ones_like(y)), *moved]

    found = [results(inputs) for inputs in held]
    assert len(launches._tapes) == 2
    with monkeypatch.context() as patch:
        patch.setattr(launches, "_replay", lambda key, tensors, make, device: make())
        wanted = [results(inputs) for inputs in held]
    for a, b in zip(found, wanted):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(RECURRENCES))
@pytest.mark.parametrize("time", [130, 2100])
def test_on_another_stream_and_in_a_graph(name, time):
    """Forward and backward, bit for bit: on the usual stream, beside it, and captured, then replayed on new inputs."""
    recurrence = RECURRENCES[name]
    held = [make_inputs(recurrence, Shape(1, time, 1, 2, 64, 64), seed=n, dtype=torch.bfloat16) for n in range(2)]
    held = [[x.cuda() for x in inputs.tensors] for inputs in held]
    leaves = [x.clone().requires_grad_() for x in held[0]]
    weight = torch.randn_like(leaves[2])

    def run():
        y = recurrence(leaves, None, impl="triton")[0]
        return [y.detach(), *torch.autograd.grad(y, leaves, weight)]

    def put(tensors):
        with torch.no_grad():
            for leaf, x in zip(leaves, tensors):
                leaf.copy_(x)

    def same(found, wanted):
        return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))

    wanted = []
    for tensors in held:
        put(tensors)
        wanted.append([x.clone() for x in run()])
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            found = run()
    torch.cuda.current_stream().wait_stream(beside)
    assert same(found, wanted[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensors, want in zip(held, wanted):
        put(tensors)
        graph.replay()
        assert same(captured, want)
    assert same(run(), wanted[1])


@pytest.mark.gpu
def test_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    inputs = make_inputs(RECURRENCES["rdn"], Shape(1, 700, 1, 2, 64, 64), seed=3, dtype=torch.bfloat16)
    for _ in range(2):
        first, second = (rdn(*(x.to(f"cuda:{i}") for x in inputs.tensors), impl="triton").y for i in range(2))
        assert torch.equal(first.cpu(), second.cpu())
