"""Launching Triton kernels without what Triton works out anew for every call.

`kernel[grid](...)` binds arguments, looks at each of them and encodes every descriptor again: some 100 microseconds of
Python, longer than many kernels here run. What comes of it depends on little, so it is kept: the compiled kernel by
types and constants, a descriptor by its address. A call that has been seen goes to Triton's launcher at once. Where
several launches belong together, `replay` keeps even their arguments, and puts in addresses alone.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16
"""Bytes: Triton compiles a kernel of its own for addresses that are not a multiple; such calls go its way."""
MOST = 1 << 14
"""Descriptors kept, of some 300 bytes each; when there are more, all are forgotten."""
MOST_TAPES = 1 << 8
"""Sequences of launches kept, of some 10 KB each."""
MOST_CALLS = 1 << 8
"""Sets of addresses for which a sequence is kept ready, of some 1 KB a launch each: the layers of a model, for one."""


class Matrix(NamedTuple):
    """A contiguous tensor as a matrix of which kernels copy blocks: what Triton's TensorDescriptor is made of."""

    data: Tensor
    width: int
    """Elements of a row."""
    rows: int
    columns: int
    """Of a block."""
    step: int = 0
    """Elements from one row to the next, where data is no contiguous tensor but a matrix of other strides."""

    def kind(self) -> tuple[Any, ...]:
        """What kernels are compiled for."""
        return self.data.dtype, self.rows, self.columns

    def key(self) -> tuple[Any, ...]:
        """All that a descriptor says."""
        data, *sizes = self
        return data.data_ptr(), data.numel(), data.dtype, *sizes

    def descriptor(self) -> Any:
        """The same as Triton wants it."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = gl.NVMMASharedLayout(128, 16, 2)
        flat = self.data if self.step else self.data.view(-1, self.width)
        return TensorDescriptor.from_tensor(flat, [self.rows, self.columns], layout)


class Address(NamedTuple):
    """Where a tensor lies, without holding it."""

    place: int
    dtype: torch.dtype
    device: torch.device

    def data_ptr(self) -> int:
        """As a tensor's."""
        return self.place


class Blocks(NamedTuple):
    """Memory of which kernels copy blocks of more than two dimensions: as `Matrix`, with all that a descriptor says."""

    data: Address
    """The lowest address; a descriptor reaches as far beyond as its shape says."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def kind(self) -> tuple[Any, ...]:
        """What kernels are compiled for."""
        return self.data.dtype, self.block

    def key(self) -> tuple[Any, ...]:
        """All that a descriptor says."""
        return self.data.data_ptr(), self.data.dtype, *self[1:]

    def descriptor(self) -> Any:
        """The same as Triton wants it."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = gl.NVMMASharedLayout(128, 16, len(self.block))
        return TensorDescriptor(self.data, list(self.shape), list(self.strides), list(self.block), layout)


_DESCRIBED = (Matrix, Blocks)


class _Ready(NamedTuple):
    """A compiled kernel on one device."""

    run: Callable[..., Any]
    function: int
    metadata: Any
    constants: tuple[None, ...]
    """What stands for the constants, which the launcher skips."""
    layouts: dict[int, Any]
    """How the matrices lie in shared memory, by the number of the argument, as Triton's launcher has it."""
    kernel: Any
    """Held, since its id is in the key."""


class _Move(NamedTuple):
    """A launch on a tape."""

    ready: _Ready
    grid: tuple[int, ...]
    arguments: list[Any]
    """As the launcher takes them, with anything where an address belongs."""
    pointers: list[tuple[int, int, int]]
    """Place in the arguments, number of the tensor, bytes from its start."""
    descriptors: list[tuple[int, int, int, int, tuple[Any, ...]]]
    """First place and the one behind the last, number of the tensor, bytes from its start, and what a descriptor says
    besides its address."""


class _Sequence(NamedTuple):
    """Launches to make again, and as they are for addresses that came before: memory is given out in turns."""

    moves: list[_Move | Pause]
    ready: dict[tuple[int, ...], list[_Call]]
    """By stream and addresses."""


class _Tape:
    """Launches as they are made, with each address as a place in one of `tensors`."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        spans = [
            (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), number)
            for number, x in enumerate(tensors)
            if x is not None and x.numel()
        ]
        self.spans = sorted(spans)
        self.moves: list[_Move | Pause] = []
        # Where two share memory, the next call may have two in their place.
        self.holds = all(a[1] <= b[0] for a, b in pairwise(self.spans)) and not any(x[0] % ALIGNMENT for x in spans)

    def add(self, ready: _Ready, grid: tuple[int, ...], arguments: tuple[Any, ...], flat: list[Any]) -> None:
        pointers, descriptors, place = [], [], 0
        for x in arguments:
            end = place + 1
            if type(x) in _DESCRIBED:
                address, *rest = x.key()
                found = _descriptors.get((address, *rest), [])
                end = place + len(found)
                descriptors.append((place, end, *self.find(address), tuple(rest)))
            elif isinstance(x, Tensor) and x.numel():
                pointers.append((place, *self.find(x.data_ptr())))
            place = end
        if place != len(flat):
            self.holds = False  # its descriptors were forgotten meanwhile
        self.moves.append(_Move(ready, grid, flat, pointers, descriptors))

    def find(self, address: int) -> tuple[int, int]:
        """Number of the tensor that an address lies in, and bytes from its start."""
        for first, end, number in self.spans:
            if first <= address < end:
                return number, address - first
        self.holds = False
        return 0, 0


Pause = Callable[[Sequence[Any]], None]
"""What a call does between its launches, with the tensors of the call."""
_Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""What to call with what; a pause, with the tensors, where there is nothing."""

_ready: dict[Any, _Ready] = {}
_descriptors: dict[Any, list[Any]] = {}
_tapes: dict[Any, _Sequence] = {}
_recording = threading.local()
_begun: set[Any] = set()
"""Kinds of calls whose kernels were compiled, or are being compiled side by side."""
_compiled_ahead: dict[Any, threading.Thread] = {}
"""Who compiles a kernel that nobody has launched yet, by what `_ready` knows it by."""


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Launches in here, by this thread, launch nothing: each compiles its kernel in a thread of its own.

    A call that begins with one kernel and ends with another waits for one compiler after the other; most of what
    they do leaves the interpreter free, so they can work side by side. A launch waits for the thread of its kernel, and
    so does the end of the program, which would otherwise tear the compiler down at work.
    """
    _recording.ahead = True
    try:
        yield
    finally:
        _recording.ahead = False


def compile_together(kind: Any, make: Callable[[], None]) -> None:
    """Have what make() launches compiled side by side, the first time that this `kind` is named."""
    if kind not in _begun:
        _begun.add(kind)
        with compiling_ahead():
            make()


def _compile(kernel: Any, arguments: list[Any], grid: tuple[int, ...], constants: dict[str, Any], device: int) -> None:
    with torch.cuda.device(device), suppress(Exception):  # who launches it will hear of what is wrong
        kernel.warmup(*arguments, grid=grid, **constants)


def replay(key: Any, tensors: Sequence[Tensor | None], make: Callable[[], None]) -> None:
    """make(), or from its third call with this `key` on the launches it made, without making them.

    key: decides, with the device, all about the launches but addresses.
    tensors: in the same order for one key; all memory that the launches take lies in them, and they do nothing else.
    """
    place = tensors[0].device  # pyrefly: ignore [missing-attribute]
    if getattr(_recording, "ahead", False):
        make()
    elif place.type == "cuda" and place.index == driver.active.get_current_device():
        _replay((key, place.index), tensors, make, place.index)
    else:
        make()


def pause(what: Pause, tensors: Sequence[Any]) -> None:
    """what(tensors), between two launches of a `replay` with these tensors, and again whenever they are replayed.

    For what is no launch, such as a message to another process. It must not hold tensors itself.
    """
    if getattr(_recording, "ahead", False):
        return
    if (tape := getattr(_recording, "tape", None)) is not None:
        tape.moves.append(what)
    what(tensors)


def _replay(key: Any, tensors: Sequence[Tensor | None], make: Callable[[], None], device: int) -> None:
    sequence = _tapes.get(key)
    if sequence is not None:
        if not _play(sequence, tensors, device):
            make()
        return
    tape = _recording.tape = _Tape(tensors)
    try:
        make()
    finally:
        _recording.tape = None
    if tape.holds:
        if len(_tapes) >= MOST_TAPES:
            _tapes.clear()
        _tapes[key] = _Sequence(tape.moves, {})


def _play(sequence: _Sequence, tensors: Sequence[Tensor | None], device: int) -> bool:
    """Whether all was launched; otherwise nothing was."""
    if _watched():
        return False
    stream = driver.active.get_current_stream(device)
    place = (stream, *[0 if x is None else x.data_ptr() for x in tensors])
    calls = sequence.ready.get(place)
    if calls is None:
        calls = _calls(sequence.moves, stream, place[1:])
        if calls is None:
            return False
        if len(sequence.ready) >= MOST_CALLS:
            sequence.ready.clear()
        sequence.ready[place] = calls
    for run, arguments in calls:
        run(*(arguments or (tensors,)))
    return True


def _calls(moves: list[_Move | Pause], stream: int, addresses: Sequence[int]) -> list[_Call] | None:
    """Launches with these addresses in them; None where one is off alignment or a descriptor is not known yet."""
    if any(address % ALIGNMENT for address in addresses):
        return None
    calls: list[_Call] = []
    for move in moves:
        if not isinstance(move, _Move):
            calls.append((move, ()))
            continue
        ready, grid, arguments, pointers, descriptors = move
        flat = arguments.copy()
        for place, number, offset in pointers:
            flat[place] = addresses[number] + offset
        for place, end, number, offset, rest in descriptors:
            found = _descriptors.get((addresses[number] + offset, *rest))
            if found is None:
                return None
            flat[place:end] = found
        calls.append(_below(ready.run, _given(ready, grid, stream, flat)))
    return calls


def _below(run: Any, given: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """run(*given) as a call of what Triton's launcher calls in the end, where it does no more than hand that on."""
    scratch = [getattr(run, name, None) for name in ("global_scratch_size", "profile_scratch_size")]
    if not hasattr(run, "launch") or scratch != [0, 0]:
        return run, given
    seen: list[tuple[Any, ...]] = []
    handing_on = copy.copy(run)
    handing_on.launch = lambda *given: seen.append(given)
    handing_on(*given)
    return run.launch, seen[0]


def _given(ready: _Ready, grid: tuple[int, ...], stream: int, flat: list[Any]) -> tuple[Any, ...]:
    """What Triton's launcher is called with."""
    return (*(*grid, 1, 1)[:3], stream, ready.function, ready.metadata, None, None, None, *flat, *ready.constants)


def launch(
    kernel: Any,
    programs: int | tuple[int, ...],
    *arguments: Tensor | Matrix | Blocks | int | float | None,
    **constants: Any,
) -> None:
    """kernel[programs](*arguments, **constants), on the device of the first argument.

    programs: of one dimension, or of each. arguments: all that is not a constant, in the order of the kernel's
    parameters, with a Matrix or Blocks for a descriptor.
    constants: constants and options such as num_warps.
    """
    first = arguments[0]
    device = (first.data if type(first) in _DESCRIBED else first).device  # pyrefly: ignore [missing-attribute]
    grid = (programs,) if isinstance(programs, int) else programs
    if not isinstance(kernel, JITFunction):  # interpreted
        if getattr(_recording, "ahead", False):
            return
        with torch.no_grad():  # it writes by operators
            kernel[grid](*_as_triton_has_them(arguments), **constants)
    elif device.type != "cuda" or device.index == driver.active.get_current_device():
        _launch(kernel, grid, arguments, constants)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, arguments, constants)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    current = driver.active.get_current_device()
    kinds: list[Any] = [id(kernel), current]
    flat: list[Any] = []
    unknown: list[tuple[int, int]] = []
    addresses = 0
    for number, x in enumerate(arguments):
        kind = type(x)
        if kind is int:
            kinds.append((x == 1, x % ALIGNMENT == 0, x.bit_length() > 31))
            flat.append(x)
        elif kind is float:
            kinds.append(float)
            flat.append(x)
        elif kind in _DESCRIBED:
            kinds.append(x.kind())
            known = _descriptors.get(x.key())
            if known is None:
                unknown.append((len(flat), number))
            else:
                flat += known
        elif x is None:
            kinds.append(None)
            flat.append(None)
        else:
            address = x.data_ptr()
            kinds.append(x.dtype)
            flat.append(address)
            addresses |= address
    key = (*kinds, *constants.items())
    ready = None if addresses % ALIGNMENT or _watched() else _ready.get(key)
    tape = getattr(_recording, "tape", None)
    if getattr(_recording, "ahead", False):
        if ready is None and key not in _compiled_ahead:
            given = kernel, _as_kinds(arguments), grid, constants, current
            _compiled_ahead[key] = threading.Thread(target=_compile, args=given, daemon=False)
            _compiled_ahead[key].start()
        return
    if ready is None:
        if (thread := _compiled_ahead.pop(key, None)) is not None:
            thread.join()
        if tape is not None:
            tape.holds = False
        compiled = kernel[grid](*_as_triton_has_them(arguments), **constants)
        if not addresses % ALIGNMENT and (ready := _get_ready(kernel, compiled, arguments)) is not None:
            _ready[key] = ready
        return
    for place, number in reversed(unknown):
        flat[place:place] = _encode(arguments[number], ready.layouts[number])
    if tape is not None:
        tape.add(ready, grid, arguments, flat)
    ready.run(*_given(ready, grid, driver.active.get_current_stream(current), flat))


def _as_triton_has_them(arguments: tuple[Any, ...]) -> list[Any]:
    return [x.descriptor() if type(x) in _DESCRIBED else x for x in arguments]


def _as_kinds(arguments: tuple[Any, ...]) -> list[Any]:
    """The same for a compiler alone: nothing in it holds memory."""
    found = []
    for x in arguments:
        if type(x) is Matrix:
            x = x._replace(data=torch.empty_like(x.data, device="meta"))
        found.append(x.dtype if isinstance(x, Tensor) else x)
    return _as_triton_has_them(tuple(found))


def _watched() -> bool:
    """Whether somebody wants to hear of every launch, such as a profiler of kernels."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _encode(matrix: Matrix | Blocks, layout: Any) -> list[Any]:
    """What Triton's launcher makes of a descriptor, kept from now on."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    if len(_descriptors) >= MOST:
        _descriptors.clear()
    found = _descriptors[matrix.key()] = make_tensordesc_arg(matrix.descriptor(), layout)
    return found


def _get_ready(kernel: Any, compiled: Any, arguments: tuple[Any, ...]) -> _Ready | None:
    """None where this Triton's launcher is not built as those known here: then it does all of its work again."""
    count = len(arguments)
    assert not any(x.is_constexpr for x in kernel.params[:count]), f"{kernel.__name__}: constants come last"
    run, metadata = compiled.run, {}
    if any(type(x) in _DESCRIBED for x in arguments):
        # This launcher would encode descriptors for every call; the one below it takes them encoded.
        inside = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(run.launch) else {}
        if not inside.keys() >= {"launcher", "tensordesc_indices", "tensordesc_meta"}:
            return None
        run = copy.copy(run)
        run.launch = inside["launcher"]
        metadata = dict(zip(sorted(inside["tensordesc_indices"]), inside["tensordesc_meta"], strict=True))
    nothing = (None,) * (len(kernel.params) - count)
    return _Ready(run, compiled.function, compiled.packed_metadata, nothing, metadata, kernel)
