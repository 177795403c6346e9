"""Launching the kernel written for Hopper: which calls it takes, and the order in which rows of a plan are taken."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.launches import Matrix, launch, replay

_HAS_GLUON = find_spec("triton.experimental.gluon") is not None
BLOCK = 128
DIMS = (64, 128, 256)
"""Elements of a head."""
STAGES = 2
"""Key blocks that are in shared memory at a time; with two tiles of queries they take 192 of 227 KB. So do halves of
blocks with one tile of queries where heads have more than WIDE elements."""
WIDE = 128
Sequences = tuple[tuple[int, int], ...]
"""Queries and keys of each sequence."""


def fits(q: Tensor, v: Tensor, block_size: int) -> bool:
    """Whether the kernel takes a call: Hopper, bf16 or fp16, blocks of 128, heads of 64, 128 or 256 elements, and of as
    many values."""
    return _suits(q, block_size) and q.shape[-1] in DIMS and v.shape[-1] == q.shape[-1]


def fits_padded(q: Tensor, v: Tensor, block_size: int) -> bool:
    """Whether it takes a call once its heads, of more than 64 and fewer than 128 elements, are `padded`."""
    between = all(DIMS[0] < x.shape[-1] <= DIMS[1] for x in (q, v))
    return between and not fits(q, v, block_size) and _suits(q, block_size)


def padded(x: Tensor) -> Tensor:
    """Heads of 128 elements, with zeros behind those of x [..., D]."""
    return torch.nn.functional.pad(x, (0, DIMS[1] - x.shape[-1]))


def _suits(q: Tensor, block_size: int) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and block_size == BLOCK and _is_hopper(q.device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return _HAS_GLUON and torch.cuda.get_device_capability(device) == (9, 0)


def attend_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    sequences: Sequences,
    offsets: Tensor,
    indices: Tensor,
    scale: float,
    *,
    packed: bool,
) -> None:
    """Fill y and lse, as `attend_triton` describes them; `scale` holds log2(e).

    offsets int64: where each row's blocks begin in `indices`, and the last one's end; if `packed`, of each sequence.
    """
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    jobs = _jobs(sequences, heads, group, q.device, packed)
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)

    def run() -> None:
        from whimbrel.attend.kernels.hopper import forward

        programs = min(len(jobs), _multiprocessors(q.device))
        keys, slots = (BLOCK // 2, 1) if q.shape[2] > WIDE else (BLOCK, 2)
        found = [matrix(x, rows) for x, rows in ((q, BLOCK // 2), (k, keys), (v, keys), (y, BLOCK // 2))]
        apart = [step for x in found[:3] for step in (x.row, x.column)]
        launch(
            forward, programs, *(x.matrix for x in found), y, lse, jobs, offsets, indices, taken, len(jobs), programs,
            *apart, scale, H=heads, GROUP=group, D=q.shape[2], V=v.shape[2], STAGES=STAGES, KEYS=keys, SLOTS=slots,
            num_warps=4,
        )  # fmt: skip

    layouts = [(x.shape, x.stride(), x.dtype) for x in (q, k, v)]
    replay(("attend", sequences, packed, scale, *layouts), (q, k, v, y, lse, jobs, offsets, indices, taken), run)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.lru_cache(maxsize=64)
def _jobs(sequences: Sequences, heads: int, group: int, device: torch.device, packed: bool = False) -> Tensor:
    """The kernel's table. All layers of a model ask for the same, and a copy to a GPU is a wait.

    Heads that share keys come together, and of them the last query blocks first: what runs at a time reads the same
    keys, and what is left at the end is short, whatever the plan holds.
    """
    parts = []
    row = query = key = 0
    for q_len, k_len in sequences:
        before = k_len - q_len
        own = torch.arange(-(-k_len // BLOCK) - 1, before // BLOCK - 1, -1)
        h = torch.arange(heads).view(-1, 1, group)
        h, own = (x.flatten() for x in torch.broadcast_tensors(h, own[:, None]))
        t = own * BLOCK - before
        number = row + h * (len(own) // heads) + own - before // BLOCK
        same = torch.full_like(t, key)
        parts.append(torch.stack([number, t, q_len - t, query + t, same, own, h, torch.zeros_like(t)], 1))
        row, query, key = row + len(own) + packed, query + q_len, key + k_len
    return torch.cat(parts).int().to(device)


class Heads(NamedTuple):
    """A tensor [tokens, heads, D] as one matrix of which kernels copy blocks of one head."""

    matrix: Matrix
    row: int
    """How many rows the heads lie apart."""
    column: int
    """How many columns."""


def matrix(x: Tensor, rows: int) -> Heads:
    """Blocks of `rows` tokens of one head of x [tokens, heads, D]. Heads that are neither side by side nor whole rows
    apart are copied."""
    tokens, heads, dim = x.shape
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) > 0 and x.stride(0) * x.element_size() % 16 == 0
    beside = x.stride(1) == dim or heads == 1
    if not aligned or (not beside and x.stride(1) % x.stride(0)):
        x, beside = x.clone(memory_format=torch.contiguous_format), True
    row, column = (0, dim) if beside else (x.stride(1) // x.stride(0), 0)
    size = (tokens, heads * dim) if beside else ((heads - 1) * row + tokens, dim)
    step = x.stride(0)
    return Heads(Matrix(x.as_strided(size, (step, 1)), size[1], rows, dim, step), row, column)
