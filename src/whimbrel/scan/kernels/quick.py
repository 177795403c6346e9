"""Launching Triton kernels without what Triton works out anew for every call.

`kernel[grid](...)` binds arguments, looks at each of them and encodes every descriptor again: some 100 microseconds of
Python, longer than many kernels here run. What comes of it depends on little, so it is kept: the compiled kernel by
types and constants, a descriptor by its address. A call that has been seen goes to Triton's launcher at once.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
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


class Matrix(NamedTuple):
    """A contiguous tensor as a matrix of which kernels copy blocks: what Triton's TensorDescriptor is made of."""

    data: Tensor
    width: int
    """Elements of a row."""
    rows: int
    columns: int
    """Of a block."""

    def kind(self) -> tuple[Any, ...]:
        """What kernels are compiled for."""
        return self.data.dtype, self.rows, self.columns

    def key(self) -> tuple[Any, ...]:
        """All that a descriptor says."""
        data, width, rows, columns = self
        return data.data_ptr(), data.numel(), data.dtype, width, rows, columns

    def descriptor(self) -> Any:
        """The same as Triton wants it."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = gl.NVMMASharedLayout(128, 16, 2)
        return TensorDescriptor.from_tensor(self.data.view(-1, self.width), [self.rows, self.columns], layout)


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


_ready: dict[Any, _Ready] = {}
_descriptors: dict[Any, list[Any]] = {}


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
    if ready is None:
        compiled = kernel[grid](*_as_triton_has_them(arguments), **constants)
        if not addresses % ALIGNMENT and (ready := _get_ready(kernel, compiled, arguments)) is not None:
            _ready[key] = ready
        return
    for place, number in reversed(unknown):
        flat[place:place] = _encode(arguments[number], ready.layouts[number])
    stream = driver.active.get_current_stream(current)
    ready.run(*(*grid, 1, 1)[:3], stream, ready.function, ready.metadata, None, None, None, *flat, *ready.constants)


def _as_triton_has_them(arguments: tuple[Any, ...]) -> list[Any]:
    return [x.descriptor() if type(x) in _DESCRIBED else x for x in arguments]


def _watched() -> bool:
    """Whether somebody wants to hear of every launch, such as a profiler of kernels."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


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
