"""Gluon kernels on the CPU, instruction after instruction on PyTorch tensors: their logic without a GPU.

Triton's interpreter does not run Gluon. `emulated()` puts stand-ins where kernels import Gluon from, so that modules
imported within it hold plain functions. Copies by the copy engine happen when they are asked for, shared memory starts
as NaN, barriers count phases and bytes, and partitions of a specialised program run in threads. Layouts mean nothing
here, and whatever lies between threads of one partition cannot be seen: a missing barrier or fence needs a GPU.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_GLUON = "triton.experimental.gluon"
_PATIENCE = 10.0
_current = threading.local()


class Value(Tensor):
    """What a kernel holds: `a += b` makes another, as there, and leaves alone what shares a's memory."""

    __iadd__ = Tensor.__add__
    __isub__ = Tensor.__sub__
    __imul__ = Tensor.__mul__

    def to(self, dtype: torch.dtype, *, bitcast: bool = False) -> Tensor:  # pyrefly: ignore [bad-override]
        return self.contiguous().view(dtype) if bitcast else Tensor.to(self, dtype)


def _value(x: Tensor) -> Tensor:
    return x.as_subclass(Value)


class Shared:
    """A piece of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.dtype = data.dtype

    def index(self, place: Any) -> Shared:
        return Shared(self.data[int(place)])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout: Any = None) -> Tensor:
        return _value(self.data.clone())

    def store(self, value: Tensor) -> None:
        assert value.shape == self.data.shape, f"{tuple(value.shape)} is stored to {tuple(self.data.shape)}"
        self.data.copy_(value)

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        return Shared(self.data.view(-1)[: torch.Size(shape).numel()].view(*shape))


class Barrier:
    """An mbarrier of `count` arrivals a phase, with the bytes that the phase still waits for."""

    def __init__(self) -> None:
        self.phases = 0
        self.count = self.arrivals = 1
        self.pending = 0
        self.changed = threading.Condition()

    def expect(self, count: int) -> None:
        with self.changed:
            self.pending += count
            self._arrive()

    def take(self, count: int) -> None:
        with self.changed:
            self.pending -= count
            assert self.pending >= 0, "more bytes came than the barrier expects"
            self._end()

    def arrive(self) -> None:
        with self.changed:
            self._arrive()

    def _arrive(self) -> None:
        assert self.arrivals, "a phase began before the last one ended"
        self.arrivals -= 1
        self._end()

    def _end(self) -> None:
        if not self.arrivals and not self.pending:
            self.arrivals = self.count
            self.phases += 1
            self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phases & 1 != phase, _PATIENCE):
                raise RuntimeError(f"phase {phase} of a barrier never ended")


def _set_count(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.arrivals = count


class Barriers:
    """The mbarriers of one allocation."""

    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, place: Any) -> Barrier:
        return self.barriers[int(place)]


class Pointer:
    """An address in a tensor, or a tensor of addresses."""

    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data = data
        self.offset = offset
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset - offset)

    def to(self, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(self.offset).to(dtype)


class Descriptor:
    """A matrix and the block that one copy moves."""

    def __init__(self, data: Tensor, block: Sequence[int], layout: Any = None) -> None:
        self.data, self.block, self.layout, self.dtype = data, tuple(block), layout, data.dtype

    @staticmethod
    def from_tensor(data: Tensor, block: Sequence[int], layout: Any) -> Descriptor:
        assert data.dim() == 2
        assert data.stride(1) == 1
        return Descriptor(data, block, layout)


class Blocks:
    """Memory, given as a vector, of which copies move blocks of any number of dimensions."""

    def __init__(self, data: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> None:
        self.data, self.shape, self.strides, self.block, self.dtype = data, shape, strides, tuple(block), data.dtype

    def find(self, place: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The elements of the block at a place, and which of them there are."""
        where, there = torch.zeros(self.block, dtype=torch.int64), torch.ones(self.block, dtype=torch.bool)
        for dim, (first, count, stride) in enumerate(zip(place, self.shape, self.strides, strict=True)):
            index = (int(first) + torch.arange(self.block[dim])).view([-1] + [1] * (len(self.block) - 1 - dim))
            where, there = where + index * stride, there & (index >= 0) & (index < count)
        assert int(place[-1]) * 2 % 16 == 0, f"a copy begins at column {int(place[-1])}, within 16 bytes"
        return where, there


class Kernel:
    """A function that runs for one program after another: kernel[(programs,)](...)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            names = self.function.__code__.co_varnames[: self.function.__code__.co_argcount]
            constants = {name: value for name, value in constants.items() if name in names}
            whole = [_value(torch.tensor(x)) if type(x) is int else x for x in args]
            whole = [Pointer(_memory(x)) if isinstance(x, Tensor) and x.dim() else x for x in whole]
            for program in range(grid[0]):
                _current.program = _value(torch.tensor(program))
                self.function(*whole, **constants)

        return launch


def _memory(x: Tensor) -> Tensor:
    """All that lies between the first and the last element of x, which may be a view."""
    reach = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((reach + 1,), (1,))


def _jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return Kernel if function is None else Kernel(function)


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    place = torch.as_tensor(pointer.offset)
    if mask is None:
        return _value(pointer.data[place].clone())
    mask = torch.as_tensor(mask).expand(place.shape)
    return _value(torch.where(mask, pointer.data[torch.where(mask, place, 0)], other).to(pointer.data.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    place = torch.as_tensor(pointer.offset)
    value = torch.as_tensor(value).to(pointer.data.dtype).expand(place.shape)
    mask = torch.ones_like(place, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(place.shape)
    pointer.data[place[mask]] = value[mask]


_adding = threading.Lock()


def _atomic_add(pointer: Pointer, value: int) -> Tensor:
    with _adding:
        before = pointer.data[pointer.offset].clone()
        pointer.data[pointer.offset] += value
        return _value(before)


def _copy_in(
    matrix: Descriptor | Blocks, place: Sequence[Any], barrier: Barrier, tile: Shared, pred: Any = True
) -> None:
    if not pred:
        return
    if isinstance(matrix, Blocks):
        where, there = matrix.find(place)
        tile.data.copy_(torch.where(there, matrix.data[torch.where(there, where, 0)], 0))
        barrier.take(2 * where.numel())
        return
    row, column = (int(x) for x in place)
    rows, columns = matrix.block
    tile.data.zero_()
    found = matrix.data[max(row, 0) : max(row + rows, 0), column : column + columns]
    skipped = min(max(-row, 0), rows)  # rows before the matrix are zeros, as those behind it
    tile.data[skipped : skipped + found.shape[0], : found.shape[1]] = found
    barrier.take(2 * rows * columns)


def _copy_out(matrix: Descriptor | Blocks, place: Sequence[Any], tile: Shared) -> None:
    if isinstance(matrix, Blocks):
        where, there = matrix.find(place)
        matrix.data[where[there]] = tile.data[there]
        return
    row, column = (int(x) for x in place)
    room = matrix.data[row : row + matrix.block[0], column : column + matrix.block[1]]
    room.copy_(tile.data[: room.shape[0], : room.shape[1]])


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if dtype is torch.int64:
        return Barriers(shape[0])
    poison = torch.nan if dtype.is_floating_point else 1 << 30
    return Shared(torch.full(tuple(shape), poison, dtype=dtype))


def _multiply(a: Shared | Tensor, b: Shared, sum: Tensor, use_acc: Any = True, is_async: bool = False) -> Tensor:
    left = a.data if isinstance(a, Shared) else a
    product = _value(left.float() @ b.data.float())
    return sum + product if use_acc else product


def _wait_for_products(pending: int, deps: tuple[Tensor, ...]) -> Any:
    return deps[0] if len(deps) == 1 else deps


def _scan(x: Tensor, axis: int, combine: Any, reverse: bool = False) -> Tensor:
    return x.flip(axis).cumsum(axis).flip(axis) if reverse else x.cumsum(axis)


def _specialize(partitions: Sequence[tuple[Kernel, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    program, failures = _current.program, []

    def run(function: Kernel, args: tuple[Any, ...]) -> None:
        _current.program = program
        try:
            with torch.no_grad():  # a new thread would record gradients
                function(*args)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*(torch.as_tensor(x) for x in args))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What orders threads, or names a layout."""


def _modules() -> dict[str, ModuleType]:
    def module(name: str, **members: Any) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(members)
        return made

    layouts = [
        "NVMMADistributedLayout",
        "DotOperandLayout",
        "SliceLayout",
        "BlockedLayout",
        "SwizzledSharedLayout",
        "NVMMASharedLayout",
    ]
    language = module(
        f"{_GLUON}.language",
        **dict.fromkeys(layouts, _nothing),
        constexpr=lambda value: value,
        float16=torch.float32,  # tests run in float32
        bfloat16=torch.float32,
        int8=torch.int8,
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        program_id=lambda axis: _current.program,
        load=_load,
        store=_store,
        arange=lambda first, last, layout=None: _value(torch.arange(first, last, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout=None: _value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, value, dtype, layout=None: _value(torch.full(shape, float(value)).to(dtype)),
        atomic_add=_atomic_add,
        cdiv=lambda a, b: (a + b - 1) // b,
        where=lambda mask, a, b: torch.where(torch.as_tensor(mask), a, b),
        exp2=_elementwise(torch.exp2),
        log2=_elementwise(torch.log2),
        abs=torch.abs,
        minimum=_elementwise(torch.minimum),
        maximum=_elementwise(torch.maximum),
        sum=lambda x, axis: x.sum(axis, dtype=x.dtype),
        max=lambda x, axis: x.amax(axis),
        min=lambda x, axis: x.amin(axis),
        associative_scan=_scan,
        static_range=range,
        convert_layout=lambda x, layout: x,
        inline_asm_elementwise=lambda text, constraints, args, **_: args[0],
        allocate_shared_memory=_allocate,
        barrier=_nothing,
        warp_specialize=_specialize,
    )
    mbarrier = SimpleNamespace(
        MBarrierLayout=_nothing,
        init=_set_count,
        expect=lambda barrier, count, pred=True: barrier.expect(count) if pred else None,
        arrive=lambda barrier, count=1, pred=True: barrier.arrive() if pred else None,
        wait=lambda barrier, phase, pred=True: barrier.wait(int(phase)) if pred else None,
    )
    tma = SimpleNamespace(
        async_copy_global_to_shared=_copy_in, async_copy_shared_to_global=_copy_out, store_wait=_nothing
    )
    hopper = module(
        f"{_GLUON}.language.nvidia.hopper",
        fence_async_shared=_nothing,
        mbarrier=mbarrier,
        tma=tma,
        warpgroup_mma=_multiply,
        warpgroup_mma_wait=_wait_for_products,
    )
    gluon = module(_GLUON, jit=_jit, language=language)
    parts = [
        module("triton.experimental", gluon=gluon),
        gluon,
        language,
        module(f"{_GLUON}.language.nvidia"),
        hopper,
        module(f"{_GLUON}.nvidia"),
        module(f"{_GLUON}.nvidia.hopper", TensorDescriptor=Descriptor),
    ]
    return {part.__name__: part for part in parts}


@contextmanager
def emulated(*kernels: str) -> Iterator[None]:
    """Within it the modules named `kernels`, imported anew, hold Gluon kernels as plain functions on the CPU.

    They run where they are launched: kernel[(programs,)](tensors, descriptors and numbers, num_warps=..., constants).
    Bytes are counted as if elements had two, whatever the dtype at hand, which may be fp32 for a comparison.
    """
    from triton.runtime.jit import mangle_type

    mangle_type(0)  # lets Triton look for its own Gluon, which it does once, while it can be found
    replaced = _modules()
    before = {name: sys.modules.pop(name, None) for name in (*replaced, *kernels)}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
