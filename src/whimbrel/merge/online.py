"""The same averages while a run goes on: sums of local shards, kept beside the live weights and never in them.

A sample is added as the offline merge adds a checkpoint: in float64, with integer weights where there are some, in
the order of the samples; one division and one rounding come at the end. So the average of a full window equals
`merge_checkpoints` of checkpoints saved at the same steps bit for bit, on any device and under any sharding.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from whimbrel.checkpoint.together import on_all
from whimbrel.checkpoint.weights import save_weights, weights_of
from whimbrel.config import MergeConfig, encode, require
from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError
from whimbrel.merge.config import EMAConfig, EMACorrectedConfig, SMAConfig, WMAConfig, merge_config
from whimbrel.merge.pma import Number, Weights

ACCUMULATE = {"float64": torch.float64, "float32": torch.float32}
_EIGHT_BITS = 1
# Elements handled at a time. On a CPU sums and what they are made from stay in the last cache (from 4 Mi on it is 3
# times slower), and the thread asks for Python's lock some hundred times for a large model, not thousands of times.
_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 22}
_SLOTS = 8


class OnlineAverage:
    """A weighted average of a model's weights at every `every`-th step, in windows of `count` samples.

    model: a module (plain, DDP, FSDP2, compiled), whose parameters and persistent buffers are averaged, or named
    tensors, such as a trainer's float32 master weights, or a function that gives them, where they are replaced by
    others of the same names and shapes now and then. Only floating-point and complex tensors are averaged, each
    in its local shard, without any collective; others are not touched.
    optimizer: lets the copies to the CPU run on during the next forward and backward pass; its step waits for them.
    every: steps between samples. count: samples of a window; 0 means one window without end, for `sma`, `wma`, `ema`
    and `ema-corrected`. windows: how many windows are kept at a time, each begun count / windows samples after the
    one before it, so that from two on an average over count / 2 to count samples is always at hand, and with
    `windows=count` the last `count` samples exactly.
    method, alpha, weights: as in `merge_checkpoints`.
    device: "cpu" keeps the sums in main memory; from CUDA they are fed through `ring_bytes` of pinned memory on a
    stream and a thread of their own. "same" keeps them beside the weights. accumulate: "float64", 8 bytes for each
    element and window, equals the offline merge; "float32" takes half of it and is exact for bfloat16 and float16
    weights whose samples lie within 12 binades, otherwise rounded in the last bit of float32.

    Raises ConfigError for arguments, UnsupportedError for 8-bit floats.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]],
        optimizer: Optimizer | None = None,
        *,
        every: int = 1,
        count: int = 10,
        windows: int = 1,
        method: str | MergeConfig = "sma",
        alpha: float | None = None,
        weights: Sequence[Number] | None = None,
        device: Literal["cpu", "same"] = "cpu",
        accumulate: Literal["float64", "float32"] = "float64",
        ring_bytes: int = 512 * 2**20,
    ) -> None:
        require(every >= 1, "every", every, "a positive number of steps")
        require(count >= 0, "count", count, "a positive number of samples, or 0 for a window without end")
        require(1 <= windows <= max(count, 1), "windows", windows, f"1 to count = {count}, and 1 if that is 0")
        require(device in ("cpu", "same"), "device", device, "'cpu' or 'same'")
        require(accumulate in ACCUMULATE, "accumulate", accumulate, "'float64' or 'float32'")
        require(ring_bytes >= _SLOTS * 4096, "ring_bytes", ring_bytes, f"at least {_SLOTS * 4096} bytes")
        config = merge_config(method, alpha=alpha, weights=weights)
        self._model, self._every, self._count = model, every, count
        self._schedule = _Endless(config) if count == 0 else _Window(config.weights(count))
        kept = {"method": encode(config), "count": count, "windows": windows, "accumulate": accumulate}
        self._settings = json.dumps(kept, sort_keys=True)
        place = None if device == "same" else torch.device("cpu")
        self._sums = [
            {
                name: torch.zeros_like(_real(value), dtype=ACCUMULATE[accumulate], device=place)
                for name, value in self._tensors().items()
            }
            for _ in range(windows)
        ]
        self._taken = 0
        self._steps: deque[int] = deque(maxlen=count or 1)
        sources = [_local(value) for value in self._tensors().values()]
        offload = device == "cpu" and any(value.is_cuda for value in sources)
        self._ring = _Ring(sources[0].device, ring_bytes) if offload else None
        self._hold_late = optimizer is not None
        if optimizer is not None:
            optimizer.register_step_pre_hook(lambda *_: self._hold())

    @property
    def samples(self) -> int:
        """Samples in the average that `average` gives: those of the fullest window."""
        return max(self._samples(window) for window in range(len(self._sums)))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps in that average, oldest first; of a window without end only the newest."""
        return tuple(self._steps)[-self.samples :] if self.samples else ()

    @property
    def weights(self) -> Weights:
        """The weights of those samples, oldest first; of a window that is not full its first ones, scaled to sum 1."""
        return self._schedule.weights(self.samples)

    def update(self, step: int) -> bool:
        """Take the weights after optimizer step `step` as a sample if it is due; returns whether it was taken.

        A step that is not above the newest sampled one, as after going back to a checkpoint, is not taken again.
        """
        if step % self._every or (self._steps and step <= self._steps[-1]):
            return False
        self.wait()
        jobs: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        for name, value in self._tensors().items():
            flat = _flat(value)
            size = self._ring.slot_bytes // flat.element_size() if self._ring is not None else max(flat.numel(), 1)
            for start in range(0, flat.numel(), size):
                jobs.append((flat[start : start + size], self._adder(name, start)))
        if self._ring is None:
            for value, add in jobs:
                add(value)
        else:
            self._ring.start(jobs)
            if not self._hold_late:
                self._hold()
        self._taken += 1
        self._steps.append(step)
        return True

    def _adder(self, name: str, start: int) -> Callable[[Tensor], None]:
        """What adds a piece of the tensor `name`, beginning at element `start`, to every window that is open."""
        targets = []
        for window, sums in enumerate(self._sums):
            index = self._index(window, self._taken)
            if index is not None:
                targets.append((_flat(sums[name]), *self._schedule.term(index), index == 0))

        def add(piece: Tensor) -> None:
            for total, keep, factor, first in targets:
                _add(total[start : start + piece.numel()], piece, keep, factor, first=first)

        return add

    def _index(self, window: int, sample: int) -> int | None:
        """The place in `window` of the sample with this number since the beginning; None before it opens."""
        since = sample - window * self._count // len(self._sums)
        return None if since < 0 else since % self._count if self._count else since

    def _samples(self, window: int) -> int:
        index = self._index(window, self._taken - 1) if self._taken else None
        return 0 if index is None else index + 1

    def _hold(self) -> None:
        if self._ring is not None:
            self._ring.hold()

    def wait(self) -> None:
        """Return when every sample taken has been added; raises what went wrong while it was."""
        if self._ring is not None:
            self._ring.finish()

    def average(self) -> dict[str, Tensor]:
        """Name -> average in the weight's own dtype, rounded once, of this process's shard, on the sums' device.

        Of the fullest window, which is not full before `count` samples. Raises CheckpointError before the first
        sample, and where a tensor's average is not finite, with its name.
        """
        self.wait()
        if not self.samples:
            raise CheckpointError(f"nothing has been averaged yet; the first sample is taken at step {self._every}")
        fullest = max(range(len(self._sums)), key=self._samples)
        divisor = self._schedule.divisor(self.samples)
        result = {}
        for name, value in self._tensors().items():
            local = _local(value)
            rounded = _rounded(_local(self._sums[fullest][name]), divisor, _real(local).dtype)
            if not bool(torch.isfinite(rounded).all()):
                raise CheckpointError(
                    f"the average of '{name}' over steps {list(self.steps)} is not finite; one of these samples held"
                    " NaN or infinities, start a new average after them"
                )
            result[name] = torch.view_as_complex(rounded) if local.is_complex() else rounded
        return result

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model's weights are the average inside the block, and afterwards what they were, bit for bit.

        Needs room for one more copy of this process's shard where the sums are. Raises as `average` does, in all
        processes if in one.
        """
        live = {name: _local(value) for name, value in self._tensors().items()}
        place = {name: _local(value).device for name, value in self._sums[0].items()}
        before = {name: value.to(place[name], copy=True) for name, value in live.items()}
        self.swap_in()
        try:
            yield
        finally:
            self._reshard()
            with torch.no_grad():
                for name, value in live.items():
                    value.copy_(before[name])

    def swap_in(self) -> None:
        """Make the average the live weights, for good; raises as `average` does, in all processes if in one."""
        averages: dict[str, Tensor] = {}
        on_all(lambda: averages.update(self.average()))
        self._reshard()
        with torch.no_grad():
            for name, value in self._tensors().items():
                _local(value).copy_(averages.pop(name))

    def _reshard(self) -> None:
        """Drop whole weights that FSDP2 has gathered and kept, since their shards are about to change."""
        if isinstance(self._model, nn.Module):
            from torch.distributed.fsdp import FSDPModule

            for module in self._model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def save(self, path: str | Path) -> str:
        """Write the averaged weights as the safetensors file `path`, complete or not at all; returns its SHA-256.

        Under torch.distributed every process calls it. Raises ConfigError where named tensors are averaged.
        """
        if not isinstance(self._model, nn.Module):
            raise ConfigError("only the average of a module can be saved; write average() yourself for named tensors")
        with self.swapped():
            return save_weights(path, self._model)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, sharded as the weights are, and what has been sampled: tensors only, to be saved with the run.

        The sums are those that the next sample is added to, not copies: save them before it is taken. Read by
        `torch.distributed.checkpoint` in place, they may be saved by other processes than load them.
        """
        self.wait()
        steps = [*self._steps, *[-1] * ((self._count or 1) - len(self._steps))]
        digest = hashlib.sha256(self._settings.encode()).digest()[:7]
        state = {f"sum.{i}.{name}": total for i, sums in enumerate(self._sums) for name, total in sums.items()}
        return state | {
            "taken": torch.tensor(self._taken),
            "steps": torch.tensor(steps),
            "settings": torch.tensor(int.from_bytes(digest, "big")),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state.

        Raises CheckpointError for names or shapes of another model and for other settings; then call `reset`.
        """
        self.wait()
        own = self.state_dict()
        for name in sorted(own.keys() ^ state.keys()):
            where = "missing from" if name in own else "unknown in"
            raise CheckpointError(f"'{name}' is {where} the average's saved state; it is of another model")
        if int(state["settings"]) != int(own["settings"]):
            raise CheckpointError(
                f"the saved average was kept with other settings than {self._settings}; make it with those it was"
                " saved with, or call reset() to begin anew"
            )
        for sums in (name for name in own if name.startswith("sum.")):
            if state[sums].shape != own[sums].shape:
                raise CheckpointError(f"'{sums}' has shape {list(state[sums].shape)}, not {list(own[sums].shape)}")
            if state[sums] is not own[sums]:
                _local(own[sums]).copy_(_local(state[sums]))
        self._taken = int(state["taken"])
        self._steps.clear()
        self._steps.extend(step for step in state["steps"].tolist() if step >= 0)

    def reset(self) -> None:
        """Forget all samples."""
        self.wait()
        self._taken = 0
        self._steps.clear()

    def _tensors(self) -> dict[str, Tensor]:
        """What is averaged, by name."""
        if isinstance(self._model, nn.Module):
            found: Mapping[str, Tensor] = weights_of(self._model).tensors
        else:
            found = self._model() if callable(self._model) else self._model
        floats = {name: t.detach() for name, t in found.items() if t.is_floating_point() or t.is_complex()}
        for name, value in floats.items():
            if value.element_size() == _EIGHT_BITS:
                raise UnsupportedError(
                    f"tensor '{name}' is {value.dtype}, whose codes cannot be averaged; pass the weights in bfloat16"
                    " or wider that it was made from"
                )
        return floats


class _Window:
    """Terms of a sum whose weights are known, as the offline merge takes them."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        integers = weights.integers()
        self._factors, self._divisor = (weights.floats(), 1.0) if integers is None else (integers[0], integers[1])

    def term(self, index: int) -> tuple[float, float]:
        """What the sum so far and the sample are multiplied by."""
        return 1.0, float(self._factors[index])

    def divisor(self, samples: int) -> float:
        """What the sum is divided by."""
        full = samples == len(self._factors)
        return float(self._divisor) if full else float(math.fsum(self._factors[:samples]))

    def weights(self, samples: int) -> Weights:
        """The weights of the first `samples`, scaled to sum 1 where there are more to come."""
        if samples == len(self._factors) or not samples:
            return Weights(self._weights.values[:samples])
        values = self._weights.values[:samples]
        total = Weights(values).total
        return Weights(tuple(value / total for value in values))  # pyrefly: ignore[bad-argument-type]


class _Endless:
    """Terms of a sum that never ends, for methods with a recursion."""

    def __init__(self, config: MergeConfig) -> None:
        if not isinstance(config, (SMAConfig, WMAConfig, EMAConfig, EMACorrectedConfig)):
            raise ConfigError(
                f"count = 0, a window without end, is for sma, wma, ema and ema-corrected, not {type(config).__name__};"
                " give a count"
            )
        self._config = config
        self._alpha = Fraction(str(config.alpha)) if isinstance(config, (EMAConfig, EMACorrectedConfig)) else None

    def term(self, index: int) -> tuple[float, float]:
        if self._alpha is None:
            return 1.0, float(index + 1) if isinstance(self._config, WMAConfig) else 1.0
        first = index == 0 and isinstance(self._config, EMAConfig)
        return float(1 - self._alpha), 1.0 if first else float(self._alpha)

    def divisor(self, samples: int) -> float:
        if isinstance(self._config, EMAConfig):
            return 1.0
        if self._alpha is not None:
            return 1 - float(1 - self._alpha) ** samples
        return samples * (samples + 1) / 2 if isinstance(self._config, WMAConfig) else float(samples)

    def weights(self, samples: int) -> Weights:
        return self._config.weights(samples) if samples else Weights(())


class _Flying(NamedTuple):
    piece: Tensor
    arrived: torch.cuda.Event | None
    add: Callable[[Tensor], None]


class _Ring:
    """Brings pieces of tensors into pinned memory on a stream of its own, where one thread adds them up.

    `slot_bytes` is the most that a piece may have. Copies run ahead of the sums by the number of slots.
    """

    def __init__(self, device: torch.device, ring_bytes: int) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        self.slot_bytes = ring_bytes // _SLOTS // 16 * 16
        self._memory: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="online-average")
        self._copied = threading.Event()
        self._copied.set()
        self._last: torch.cuda.Event | None = None
        self._work_done: Future[None] | None = None

    def start(self, jobs: Sequence[tuple[Tensor, Callable[[Tensor], None]]]) -> None:
        """Begin: each tensor is copied, and its function called with the copy, in this order."""
        if not self._memory:
            largest = max((value.numel() * value.element_size() for value, _ in jobs), default=0)
            size = min(self.slot_bytes, -(-largest // 16) * 16)
            self._memory = [torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(_SLOTS)]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._copied.clear()
        self._work_done = self._thread.submit(self._work, jobs)

    def _work(self, jobs: Sequence[tuple[Tensor, Callable[[Tensor], None]]]) -> None:
        flying: deque[_Flying] = deque()
        try:
            for number, (value, add) in enumerate(jobs):
                if len(flying) == _SLOTS:
                    _land(flying.popleft())
                flying.append(self._send(value, self._memory[number % _SLOTS], add))
            self._last = flying[-1].arrived if flying else None
        finally:
            self._copied.set()
        while flying:
            _land(flying.popleft())

    def _send(self, value: Tensor, slot: Tensor, add: Callable[[Tensor], None]) -> _Flying:
        piece = slot[: value.numel() * value.element_size()].view(value.dtype)
        if self._stream is None:
            return _Flying(piece.copy_(value), None, add)
        with torch.cuda.stream(self._stream):
            piece.copy_(value, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return _Flying(piece, arrived, add)

    def hold(self) -> None:
        """Let nothing that is queued on the device from now on run before the last copy has been made."""
        self._copied.wait()
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)

    def finish(self) -> None:
        """Return when all pieces have been added; raises what the thread raised."""
        if self._work_done is not None:
            done, self._work_done = self._work_done, None
            done.result()


def _land(flying: _Flying) -> None:
    if flying.arrived is not None:
        flying.arrived.synchronize()
    flying.add(flying.piece)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _real(value: Tensor) -> Tensor:
    """A complex number is two floats, and its parts are averaged as such."""
    return torch.view_as_real(value) if value.is_complex() else value


def _flat(value: Tensor) -> Tensor:
    return _real(_local(value)).reshape(-1)


def _blocks(elements: int, device: torch.device) -> Iterator[slice]:
    size = _BLOCK.get(device.type, _BLOCK["cpu"])
    for start in range(0, elements, size):
        yield slice(start, min(start + size, elements))


def _add(total: Tensor, value: Tensor, keep: float, factor: float, *, first: bool) -> None:
    """total = total * keep + value * factor, each product and the sum rounded by itself; without `total` if first.

    `add(alpha=)` would fuse product and sum on some devices, and differ from the offline merge in the last bit.
    """
    for part in _blocks(total.numel(), total.device):
        here, term = total[part], value[part]
        if first:
            here.copy_(term)
            if factor != 1:
                here.mul_(factor)
            continue
        if keep != 1:
            here.mul_(keep)
        here.add_(term if factor == 1 else term.to(here.dtype).mul_(factor))


def _rounded(total: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    """total / divisor in `dtype`, rounded once more after the division."""
    result = torch.empty(total.shape, dtype=dtype, device=total.device)
    flat, out = total.reshape(-1), result.view(-1)
    # A tensor, since CUDA multiplies by the reciprocal of a number, which rounds once more.
    divisors = torch.tensor(divisor, dtype=total.dtype, device=total.device)
    for part in _blocks(flat.numel(), flat.device):
        out[part] = round_once(flat[part] / divisors if divisor != 1 else flat[part], dtype)
    return result


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` (float64 or float32) as the nearest number of a floating-point `dtype`, ties to even.

    torch goes from float64 to 16 bits by way of float32 and so rounds twice. Rounding to odd on that way, which
    keeps any inexact value off the half-way points of the narrower type, makes the second rounding the right one
    (S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    if value.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    single = value.to(torch.float32)
    back = single.double()
    bits = single.view(torch.int32)
    # Towards zero, then odd: of a positive or negative number alike, the magnitude is in the lower bits.
    bits = bits - (back.abs() > value.abs()).int()
    bits = torch.where(back == value, bits, bits | 1)
    return bits.view(torch.float32).to(dtype)
