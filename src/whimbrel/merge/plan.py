"""What to read and where to write it: extents in file order, cut into pieces. No torch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from whimbrel.checkpoint.tensorfile import ITEM_BYTES
from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError, nearest
from whimbrel.merge.blocks import FLOATS, SUMS
from whimbrel.merge.sources import OPTIMIZER, TRAIN, Box, Source, Stored

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
EXACT = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
Policy = Literal["average", "equal", "newest", "max"]
# Biases that balance the load of experts: buffers that the trainer moves by a fixed amount each step.
_ROUTER_BIAS = r"(^|\.)(expert_bias|e_score_correction_bias)$"
# Moments of optimizers that are linear in the gradient or its square, so that their average means something.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the tensors of a merge are treated; the weights of the sources are another matter."""

    dtype: str | None = None
    """Type of the averaged floats: float64, float32, float16 or bfloat16; default: the sources'."""
    accumulate: str = "float64"
    """Type of the sums: float64, exact for 16-bit sources, or float32, as an average kept during training may use."""
    format: Literal["safetensors", "dcp"] = "safetensors"
    """What to write: safetensors with an index, as Hugging Face lays it out, or a distributed checkpoint of torch."""
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of names that are one weight, beside those that the checkpoints tell by themselves."""
    rename: tuple[tuple[str, str], ...] = ()
    """Regular expressions and replacements for the names of weights, applied in turn to all sources."""
    newest: tuple[str, ...] = ()
    """Regular expressions of names that are copied from the newest source, not averaged."""
    integers: Literal["equal", "newest", "max"] = "equal"
    """Integers and booleans must be equal in all sources, or come from the newest, or are the largest of all."""
    router_bias: Literal["average", "newest"] = "average"
    """Balancing biases of mixture-of-experts routers (expert_bias, e_score_correction_bias)."""
    optimizer: Literal["average", "newest", "reset"] | None = None
    """State of the optimizer: left out, averaged with the same weights, the newest source's, or none yet (reset)."""

    def __post_init__(self) -> None:
        choices = {
            "dtype": (None, *DTYPES),
            "accumulate": tuple(SUMS),
            "format": ("safetensors", "dcp"),
            "integers": ("equal", "newest", "max"),
            "router_bias": ("average", "newest"),
            "optimizer": (None, "average", "newest", "reset"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                known = [choice for choice in allowed if choice is not None]
                raise ConfigError(
                    f"merge.{name} = '{value}' is not known{nearest(str(value), known)}; use {', '.join(known)}"
                )
        for pattern in self.newest:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"merge.newest = '{pattern}' is no regular expression: {error}") from None


class Item(NamedTuple):
    """A tensor of the result, and where each source keeps it."""

    name: str
    dtype: str
    out_dtype: str
    shape: tuple[int, ...]
    policy: Policy
    stored: tuple[Stored, ...]


class Slot(NamedTuple):
    """Whole rows of a tensor of the result, written in one place."""

    item: Item
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int


class Extent(NamedTuple):
    """Slots that lie one after the other in every source and in the result; a single slot where they do not."""

    slots: tuple[Slot, ...]
    starts: tuple[int, ...]
    """First byte of each slot's source data, counted from that of the first slot."""
    size: int
    """Bytes of source data."""
    number: int
    """Number of the first slot."""

    @property
    def item(self) -> Item:
        """The first tensor; all of an extent have its types and policy."""
        return self.slots[0].item


class Read(NamedTuple):
    """Bytes of one source for one piece."""

    path: Path
    start: int
    size: int
    into: tuple[slice, ...] | None
    """Part of the piece's box that they fill; None: the whole piece, or `offset` on."""
    sizes: tuple[int, ...]
    offset: int
    box: int
    """Number of the stored box."""
    at: int
    """Where they begin in that box's bytes."""


class Piece(NamedTuple):
    """Bytes [start, stop) of an extent's source data, and a box of the slot where they are not plain."""

    extent: Extent
    start: int
    stop: int
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def list_items(
    sources: Sequence[Source], rules: Rules, tied: Sequence[tuple[str, str]]
) -> tuple[list[Item], list[Item]]:
    """The weights of the result, and the tensors of its training state, after a check that the sources agree."""
    newest = sources[-1]
    partner = {a: b for pair in tied for a, b in (pair, pair[::-1])}
    for pattern in rules.newest:
        if not any(re.search(pattern, name) for name in newest.tensors):
            raise ConfigError(f"merge.newest = '{pattern}' matches no tensor of {newest.path}; leave it out or mend it")
    for pair in tied:
        if not any(name in newest.tensors for name in pair):
            raise ConfigError(f"merge.tied names '{pair[0]}' and '{pair[1]}', but {newest.path} has neither")
    _check_names(sources, partner)
    weights = []
    for name in newest.tensors:
        stored = tuple(source.tensors[stored_name(source, name, partner)] for source in sources)
        weights.append(_item(name, stored, sources, rules, _weight_policy(name, stored[-1].dtype, rules)))
    return weights, _training_items(sources, rules)


def _training_items(sources: Sequence[Source], rules: Rules) -> list[Item]:
    newest = sources[-1]
    if rules.optimizer is None:
        return []
    if not newest.training and newest.optimizer is None:
        raise CheckpointError(
            f"{newest.path} holds no state of an optimizer (a folder {TRAIN}/, {OPTIMIZER}, or entries of a distributed"
            " checkpoint); leave merge.optimizer out (--optimizer)"
        )
    _check_format(newest, rules)
    if rules.optimizer == "average":
        _check_groups(sources)
    items = []
    for name, stored in newest.training.items():
        kind = training_kind(name)
        if kind == "state" and rules.optimizer == "reset":
            continue
        policy: Policy = "newest"
        if kind == "state" and rules.optimizer == "average" and stored.dtype in FLOATS and _key(name) != "step":
            if _key(name) not in _MOMENTS:
                raise UnsupportedError(
                    f"optimizer state '{name}' of {newest.path} cannot be averaged (known are {', '.join(_MOMENTS)});"
                    " use merge.optimizer = newest or reset"
                )
            policy = "average"
        others = []
        for source in sources:
            if name not in source.training and policy == "average":
                raise CheckpointError(f"optimizer state '{name}' is in {newest.path} but not in {source.path}")
            others.append(source.training.get(name, stored))
        # What comes from the newest source need not be in the others, nor have the same shape there.
        if policy == "newest":
            others = [stored] * len(sources)
        items.append(_item(name, tuple(others), sources, Rules(), policy))
    return items


def _check_format(newest: Source, rules: Rules) -> None:
    """State of an optimizer is written as the newest source has it, or nothing would read it."""
    distributed = newest.folder is None and newest.dcp is not None
    if distributed and rules.format == "safetensors":
        raise ConfigError(
            f"{newest.path} keeps weights and optimizer in one distributed checkpoint, so with merge.optimizer the"
            " result is one too: give merge.format = dcp (--format dcp), or leave merge.optimizer out for safetensors"
        )
    if not distributed and rules.format == "dcp":
        raise ConfigError(
            f"{newest.path} keeps its optimizer beside the weights, and so does the result: leave merge.format = dcp"
            " (--format dcp) or merge.optimizer out"
        )


def _check_groups(sources: Sequence[Source]) -> None:
    """Where state goes by the numbers of parameters, they must mean the same ones in all sources."""
    newest = sources[-1]
    if newest.optimizer is None:
        return
    wanted = [group.get("params") for group in newest.optimizer.value["param_groups"]]
    for source in sources[:-1]:
        found = source.optimizer
        if found is not None and [group.get("params") for group in found.value["param_groups"]] != wanted:
            raise CheckpointError(
                f"{source.path / OPTIMIZER} has other groups of parameters than {newest.path / OPTIMIZER}; their states"
                " cannot be averaged, use merge.optimizer = newest or reset"
            )


def training_kind(name: str) -> Literal["state", "other"]:
    """Whether a tensor of the training state belongs to a parameter's optimizer state."""
    if re.search(r"(^|[./])param_groups([./]|$)", name):
        return "other"
    return "state" if re.match(r"(optim[a-z]*|state)[./]", name) or _key(name) in _MOMENTS else "other"


def _key(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _weight_policy(name: str, dtype: str, rules: Rules) -> Policy:
    if any(re.search(pattern, name) for pattern in rules.newest):
        return "newest"
    if rules.router_bias == "newest" and re.search(_ROUTER_BIAS, name):
        return "newest"
    return rules.integers if dtype in EXACT else "average"


def stored_name(source: Source, name: str, partner: Mapping[str, str]) -> str:
    """The name under which `source` holds the tensor: its own or that of its tied partner."""
    return name if name in source.tensors else partner.get(name, name)


def _check_names(sources: Sequence[Source], partner: Mapping[str, str]) -> None:
    newest = sources[-1]
    for source in sources[:-1]:
        for one, other in ((newest, source), (source, newest)):
            for name in one.tensors:
                if stored_name(other, name, partner) not in other.tensors:
                    raise CheckpointError(f"tensor '{name}' is in {one.path} but not in {other.path}")


def _item(name: str, stored: tuple[Stored, ...], sources: Sequence[Source], rules: Rules, policy: Policy) -> Item:
    last, newest = stored[-1], sources[-1]
    for source, other in zip(sources, stored, strict=True):
        if other.shape != last.shape:
            raise CheckpointError(
                f"tensor '{name}' has shape {list(other.shape)} in {source.path},"
                f" but {list(last.shape)} in {newest.path}"
            )
        if other.dtype != last.dtype:
            raise CheckpointError(
                f"tensor '{name}' is {other.dtype} in {source.path}, but {last.dtype} in {newest.path};"
                " convert one of them first"
            )
    if last.dtype not in (*FLOATS, *EXACT, "C64"):
        raise UnsupportedError(
            f"tensor '{name}' in {newest.path} is {last.dtype}, whose codes cannot be averaged;"
            " merge a copy of the checkpoint in bfloat16 or wider"
        )
    out = (
        DTYPES[rules.dtype] if rules.dtype is not None and last.dtype in FLOATS and policy == "average" else last.dtype
    )
    return Item(name, last.dtype, out, last.shape, policy, stored)


def make_extents(slots: Sequence[Slot]) -> list[Extent]:
    """The slots in the order given, those that go on where the one before ends joined to it."""
    extents: list[Extent] = []
    for number, slot in enumerate(slots):
        size = math.prod(slot.sizes) * ITEM_BYTES[slot.item.dtype]
        if size == 0:
            continue
        last = extents[-1] if extents else None
        if last is not None and _goes_on(last, slot):
            joined = last._replace(slots=(*last.slots, slot), starts=(*last.starts, last.size), size=last.size + size)
            extents[-1] = joined
        else:
            extents.append(Extent((slot,), (0,), size, number))
    return extents


def _goes_on(extent: Extent, slot: Slot) -> bool:
    one, other = extent.slots[0], slot
    a, b = one.item, other.item
    if (a.dtype, a.out_dtype, a.policy, one.file) != (b.dtype, b.out_dtype, b.policy, other.file):
        return False
    if not (is_plain(one) and is_plain(other)):
        return False
    if other.start != one.start + extent.size // ITEM_BYTES[a.dtype] * ITEM_BYTES[a.out_dtype]:
        return False
    for before, after in zip(a.stored, b.stored, strict=True):
        first, second = before.boxes[0], after.boxes[0]
        if first.crc is not None or second.crc is not None:
            return False
        if first.path != second.path or second.start != first.start + extent.size:
            return False
    return True


def is_plain(slot: Slot) -> bool:
    """Whether every source stores the slot's box as it is, in one piece."""
    return all(
        len(stored.boxes) == 1 and (stored.boxes[0].offsets, stored.boxes[0].sizes) == (slot.offsets, slot.sizes)
        for stored in slot.item.stored
    )


def cut(extents: Sequence[Extent], piece_bytes: int) -> Iterator[Piece]:
    """All pieces, in order, each of at most `piece_bytes` bytes of a source."""
    for extent in extents:
        slot, width = extent.slots[0], ITEM_BYTES[extent.item.dtype]
        if is_plain(slot):
            count = max(-(-extent.size // piece_bytes), 1)
            step = -(-extent.size // count // width) * width
            for start in range(0, extent.size, step):
                yield Piece(extent, start, min(start + step, extent.size))
            continue
        start = 0
        for offsets, sizes in _cut_box(slot.sizes, piece_bytes // width):
            stop = start + math.prod(sizes) * width
            yield Piece(extent, start, stop, tuple(a + b for a, b in zip(slot.offsets, offsets, strict=True)), sizes)
            start = stop


def _cut_box(sizes: tuple[int, ...], most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of at most `most` elements that follow each other row by row: offsets and sizes."""
    inner = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    axis = next((k for k in range(len(sizes)) if inner[k] <= most), len(sizes) - 1)
    if not sizes:
        yield (), ()
        return
    step = max(most // inner[axis], 1)
    for prefix in itertools.product(*map(range, sizes[:axis])):
        for start in range(0, sizes[axis], step):
            rows = min(step, sizes[axis] - start)
            rest = sizes[axis + 1 :]
            yield (*prefix, start, *(0 for _ in rest)), (*(1 for _ in prefix), rows, *rest)


def reads(piece: Piece, source: int) -> list[Read]:
    """What to read of a source for a piece."""
    extent, size = piece.extent, piece.stop - piece.start
    stored = extent.item.stored[source]
    if not piece.sizes and is_plain(extent.slots[0]):
        box = stored.boxes[0]
        return [Read(box.path, box.start + piece.start, size, None, (), 0, 0, piece.start)]
    width = ITEM_BYTES[extent.item.dtype]
    found = []
    for number, box in enumerate(stored.boxes):
        read = _overlap(piece, box, number, width)
        if read is not None:
            found.append(read)
    return found


def _overlap(piece: Piece, box: Box, number: int, width: int) -> Read | None:
    low = [max(a, b) for a, b in zip(piece.offsets, box.offsets, strict=True)]
    high = [min(a + m, b + n) for a, m, b, n in zip(piece.offsets, piece.sizes, box.offsets, box.sizes, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    sizes = tuple(b - a for a, b in zip(low, high, strict=True))
    at = _flat_index([a - b for a, b in zip(low, box.offsets, strict=True)], box.sizes) * width
    inside = [a - b for a, b in zip(low, piece.offsets, strict=True)]
    size = math.prod(sizes) * width
    # Pieces reach over whole trailing axes of the tensor, so the overlap is one stretch of the stored box; in the piece
    # it is one only where it fills all axes behind its first one.
    leading = next((k for k, n in enumerate(sizes) if n != 1), len(sizes))
    plain = sizes[leading + 1 :] == piece.sizes[leading + 1 :]
    into = None if plain else tuple(slice(a, a + n) for a, n in zip(inside, sizes, strict=True))
    return Read(box.path, box.start + at, size, into, sizes, _flat_index(inside, piece.sizes) * width, number, at)


def _flat_index(index: Sequence[int], sizes: Sequence[int]) -> int:
    flat = 0
    for i, n in zip(index, sizes, strict=True):
        flat = flat * n + i
    return flat
