"""Row-local selection on a GPU: nothing waits for the device, and no tensor holds queries by keys."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from whimbrel.attend.kernels import hopper_launch
from whimbrel.attend.plan import Grid, Plan
from whimbrel.launches import launch, replay
from whimbrel.sparse.blocks import JUDGED_AT, PILOT_ROWS, PROBE_ROWS, margin, per_million
from whimbrel.sparse.kernels.choose import choose, compact, place
from whimbrel.sparse.kernels.estimate import scores

UNIT_BITS = 30
"""Shares are whole numbers of 2^-30: rounding down loses 4e-6 of a row of 4096 blocks, and a sum fits 32 bits."""
MOST_SLOTS = 16
"""Sampled queries in a tile at most."""
PROGRAM_ROWS = 128
"""Queries of all heads and tiles that a program multiplies with the keys it reads."""
RUN = 16
"""Key blocks that are taken together."""
HOPPER_TILES = 2
"""Tiles of 64 queries that a warpgroup of the kernel for Hopper takes; it has two warpgroups."""
HOPPER_RUN = 32
"""Key blocks that one of its programs takes: many, since it reads its queries first, but fewer for enough programs."""
LEAST_RUN, ENOUGH_PROGRAMS = 8, 396
"""Down to how many, and for how many programs: three for each multiprocessor of an H100."""
HOPPER_KEYS = 2
"""Key blocks that it takes without a break."""
HOPPER_STAGES = 4
"""Key blocks that are in shared memory at a time."""
WARP_SHARES = 2048
"""Shares of queries in blocks that a warp holds while it chooses."""
LEAST_SCRATCH, MOST_SCRATCH = 1 << 23, 40 << 20
"""Bytes for the sums of the query blocks that are under way, between which they are a fifteenth of q's and k's:
with the plan, less than a twentieth of q, k, v and y together."""
WAITING_BYTES = 1 << 28
"""From here on a plan's indices are allocated once their number is known, which waits for the device; below, room for
every causal block is cheaper."""
MOST_LOOKS = 16
"""Launches for second looks, beyond which it pays to wait until their number is known: one that finds nothing to do
takes some 10 microseconds, a wait some 300."""
MOST_TOGETHER = 8192
"""Rows whose blocks are added up at a time."""
MOST_SELECTIONS = 64
"""Selections kept, by shapes and settings; when there are more, all are forgotten."""


class Memory(NamedTuple):
    """Tensors of one call, in parts that begin at multiples of 16 bytes."""

    q: Tensor
    k: Tensor
    zeros: Tensor
    """int32: what is cleared at first, in one piece."""
    others: Tensor
    """int32: what is not, in one piece."""
    bits: Tensor
    """int32 [B * H, rows, words]: chosen blocks, 32 in a word. Zeros at first: early rows are chosen in fewer words."""
    filled: Tensor
    """int32 [B * Hkv]: how many query blocks deserve a second look. Zeros at first."""
    wanting: Tensor
    """int32 [B * Hkv, rows]: of these, a bit for each head of those that share a key head. Zeros at first."""
    units: Tensor
    """int32 [B * Hkv, rows]: which they are."""
    counts: Tensor
    """int32 [B * H, rows]: how many blocks are chosen."""
    sums: Tensor
    """fp32: what sampled queries see of each block, for the query blocks that are under way."""
    offsets: Tensor
    """int64 [B * H * rows + 1]: of the plan."""
    indices: Tensor | None
    """int32: of the plan, or None where how many it needs is not known beforehand."""


class Selection:
    """How blocks are chosen for all q [B, Tq, H, D] and k [B, Tk, Hkv, D] of the same shapes and strides."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        grid: Grid,
        *,
        probe_rows: int | None,
        coverage: float,
        row_share: float,
        least: int,
        most: int | None,
        scale: float,
    ):
        self.grid = grid
        self.coverage, self.row_share, self.least, self.most = coverage, row_share, least, most
        self.scale = scale * math.log2(math.e)
        self.batch, _, self.heads, self.dim = q.shape
        self.kv_heads = k.shape[2]
        self.group = self.heads // self.kv_heads
        self.rows, self.blocks = grid.query_blocks, grid.key_blocks
        self.words = triton.cdiv(self.blocks, 32)
        self.strides = *q.stride()[:3], *k.stride()[:3]
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        self.at = sample_positions(grid, PILOT_ROWS if probe_rows is None else probe_rows, q.device)
        self.twice = probe_rows is None
        self.again = sample_positions(grid, PROBE_ROWS, q.device) if self.twice else self.at
        self.on_hopper = hopper_launch.fits(q, q, grid.block_size) and self.dim <= hopper_launch.WIDE
        elements = (q.numel() + k.numel()) * q.element_size()
        self.scratch = min(MOST_SCRATCH, max(LEAST_SCRATCH, elements // 15)) // 4
        self.strips = list(self._strips())
        self.looked_at = max(1, min(self.rows, self.scratch // (self.batch * self.heads * self.blocks * PROBE_ROWS)))
        """Query blocks whose second looks are under way together."""
        rows = self.batch * self.heads * self.rows
        self.waits = self.twice and self.rows > self.looked_at * MOST_LOOKS
        """Whether the host is to know how many second looks there are."""
        room = rows * (grid.first_block + 1 + self.blocks) // 2
        room = room if most is None else min(room, rows * max(most, 3))
        self.room = room if 4 * room <= WAITING_BYTES else None
        pairs, looks = self.batch * self.kv_heads, self.rows if self.twice else 0
        self.zeros = [_whole(n) for n in (rows * self.words, pairs, pairs * looks)]
        sums = max((stop - first) * (grid.first_block + stop) * self.at.shape[1] for first, stop in self.strips)
        if self.twice:
            sums = max(sums, self.looked_at * self.blocks * self.again.shape[1])
        self.others = [_whole(n) for n in (pairs * looks, rows)]
        self.sums = self.batch * self.heads * sums

    def memory(self, q: Tensor, k: Tensor) -> Memory:
        """New tensors for a call."""
        zeros = torch.zeros(sum(self.zeros), dtype=torch.int32, device=q.device)
        others = torch.empty(sum(self.others), dtype=torch.int32, device=q.device)
        sums = torch.empty(self.sums, dtype=torch.float32, device=q.device)
        rows = self.batch * self.heads * self.rows
        offsets = torch.empty(rows + 1, dtype=torch.int64, device=q.device)
        indices = None if self.room is None else torch.empty(self.room, dtype=torch.int32, device=q.device)
        bits, filled, wanting = zeros.split(self.zeros)
        units, counts = others.split(self.others)
        return Memory(q, k, zeros, others, bits, filled, wanting, units, counts, sums, offsets, indices)

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        """The plan for q and k."""
        memory = self.memory(q, k)
        indices = memory.indices
        if self.waits or indices is None:
            self.look(memory)
            if self.twice:
                self.look_again(memory, int(memory.filled.max()) if self.waits else self.rows)
            indices = self.write(memory)
        else:
            again = self.again if self.twice else None
            held = q, k, self.at, again, memory.zeros, memory.others, memory.sums, memory.offsets, indices
            replay(self, held, partial(self.run, memory))
        sizes = self.grid.block_size, self.grid.q_len, self.grid.k_len
        return Plan(memory.offsets, indices, *sizes, self.heads, self.batch, is_checked=True)

    def run(self, memory: Memory) -> None:
        """All launches, where nothing needs to be known in between."""
        self.look(memory)
        if self.twice:
            self.look_again(memory, self.rows)
        self.write(memory)

    def look(self, memory: Memory) -> None:
        """Choose for all rows, and where there is a second look note which rows deserve it."""
        for first, stop in self.strips:
            blocks = self.grid.first_block + stop
            self.score(memory, self.at, first, stop - first, blocks)
            choose = partial(self.choose, memory, self.at, first, stop - first, blocks)
            if not self.twice:
                choose(self.coverage)
            else:
                choose(JUDGED_AT + margin(JUDGED_AT), slack=2 * margin(JUDGED_AT))
                if self.coverage != JUDGED_AT:
                    choose(self.coverage + margin(self.coverage))

    def look_again(self, memory: Memory, most: int) -> None:
        """Choose once more where few queries do not tell: for at most so many rows of each key head."""
        for first in range(0, most, self.looked_at):
            room = min(self.looked_at, self.rows - first)
            self.score(memory, self.again, first, room, self.blocks, listed=True)
            self.choose(memory, self.again, first, room, self.blocks, self.coverage, listed=True)

    def write(self, memory: Memory) -> Tensor:
        """Offsets and indices of the plan."""
        return _write(memory.bits, memory.counts, memory.offsets, memory.indices, self.words, self.blocks, packed=True)

    def _strips(self) -> Iterator[tuple[int, int]]:
        """Rows whose sums fit the scratch at a time."""
        first = 0
        before = self.grid.first_block
        while first < self.rows:
            room = self.scratch // (self.batch * self.heads * self.at.shape[1])
            # As many rows as there may be if each holds sums for all blocks up to the last of them.
            most = int(((before + first) ** 2 + 4 * room) ** 0.5 - before - first) // 2
            most = max(1, most - most % 16 if most > 16 else most)  # programs take up to 16 query blocks and more
            yield first, min(self.rows, first + most)
            first += most

    def score(self, memory: Memory, at: Tensor, begin: int, room: int, blocks: int, *, listed: bool = False) -> None:
        """`estimate.scores` of `room` rows from `begin` on, or of so many that were noted.

        at int32 [rows, slots], slots a power of two or a multiple of MOST_SLOTS.
        """
        slots = min(at.shape[1], MOST_SLOTS)
        sub = at.shape[1] // slots
        pairs, size = self.batch * self.kv_heads, self.group * slots
        lists = (memory.units, memory.filled) if listed else (at, at)
        tensors = at, *lists, memory.sums
        numbers = self.grid.offset, self.grid.k_len, self.rows, room * sub, begin * sub, blocks, self.grid.first_block
        constants = {"LISTED": listed, "HKV": self.kv_heads, "GROUP": self.group, "P": slots, "S": sub}
        q, k = memory.q, memory.k
        if size <= 128 * HOPPER_TILES and self.on_hopper:
            from whimbrel.sparse.kernels import hopper

            together = 128 * HOPPER_TILES // size
            groups, span = triton.cdiv(room * sub, together), HOPPER_RUN
            while span > LEAST_RUN and pairs * groups * triton.cdiv(blocks, span) < ENOUGH_PROGRAMS:
                span //= 2
            runs = triton.cdiv(blocks, span)
            keys = hopper_launch.matrix(k.flatten(0, 1), hopper_launch.BLOCK)
            launch(
                hopper.scores, pairs * groups * runs, q, k, keys.matrix, *tensors, *self.strides, *numbers, groups,
                runs, span, keys.row, keys.column, self.scale, **constants, Q=together, D=self.dim, TILES=HOPPER_TILES,
                KEYS=HOPPER_KEYS, STAGES=HOPPER_STAGES, num_warps=4,
            )  # fmt: skip
            return
        together = max(1, PROGRAM_ROWS // size)
        block_dim, packed = (max(16, triton.next_power_of_2(x)) for x in (self.dim, size * together))
        launch(
            scores, (triton.cdiv(room * sub, together), triton.cdiv(blocks, RUN), pairs), q, k, *tensors, *self.strides,
            *numbers, self.scale, **constants, Q=together, M=packed, D=self.dim, BD=block_dim,
            SIZE=self.grid.block_size, RUN=RUN, PRECISION=self.precision, num_warps=8, num_stages=2,
        )  # fmt: skip

    def choose(
        self,
        memory: Memory,
        at: Tensor,
        begin: int,
        room: int,
        blocks: int,
        coverage: float,
        *,
        listed: bool = False,
        slack: float | None = None,
    ) -> None:
        """Fill `bits` and `counts` of the rows that were scored, and with `slack` note which deserve a second look."""
        slots = min(at.shape[1], MOST_SLOTS)
        sub = at.shape[1] // slots
        width = max(32, triton.next_power_of_2(blocks))
        # Coverage 1 keeps all blocks, whatever rounding does to sums.
        wanted = 2**31 - 1 if coverage >= 1 else math.ceil(coverage * 2**UNIT_BITS)
        most = 2**31 - 1 if self.most is None else self.most
        looks = (at, at, at) if not self.twice else (memory.units, memory.filled, memory.wanting)
        launch(
            choose, (room, self.batch * self.heads), at, memory.sums, memory.sums.view(torch.int32), memory.bits,
            memory.counts, *looks, self.rows, room, begin, blocks, self.words, self.grid.first_block, wanted,
            per_million(self.row_share), self.least, most, int((slack or 0) * 2**UNIT_BITS), LISTED=listed,
            PILOT=slack is not None, HKV=self.kv_heads, GROUP=self.group, P=slots, S=sub, N=width, UNIT=2**UNIT_BITS,
            UNIT_BITS=UNIT_BITS, SHIFT=(slots * sub - 1).bit_length(), BUDGET=self.least > 0 or self.most is not None,
            num_warps=max(1, min(16, width * slots // WARP_SHARES)),
        )  # fmt: skip


_selections: dict[Any, Selection] = {}


def sampled_plan(q: Tensor, k: Tensor, grid: Grid, **settings: Any) -> Plan:
    """The plan for q [B, Tq, H, D] and k [B, Tk, Hkv, D] from the exact masses of sampled queries.

    settings: as `Selection` takes them. probe_rows queries of each block are sampled, or PILOT_ROWS, and PROBE_ROWS
    where these do not tell; `least` and `most` are blocks per row. A row is chosen alike, to the bit, whatever follows
    it and wherever, on a block border, the prompt is cut.
    """
    if not q.is_cuda and q.dtype == torch.bfloat16:
        q, k = q.float(), k.float()  # products in bf16 are wrong in Triton's interpreter
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    if hopper_launch.fits_padded(q, q, grid.block_size):
        q, k = (hopper_launch.padded(x) for x in (q, k))
    key = (q.shape, k.shape, q.stride(), k.stride(), q.dtype, q.device, grid.block_size, *settings.items())
    found = _selections.get(key)
    if found is None:
        if len(_selections) >= MOST_SELECTIONS:
            _selections.clear()
        found = _selections[key] = Selection(q, k, grid, **settings)
    return found.plan(q, k)


def plan_of_mask(mask: Tensor, grid: Grid) -> Plan:
    """`Plan.from_mask` of a mask that is known to be right, without a wait for its number of blocks."""
    batch, heads, rows, blocks = mask.shape
    offsets = torch.empty(batch * heads * rows + 1, dtype=torch.int64, device=mask.device)
    room = batch * heads * rows * (grid.first_block + 1 + grid.key_blocks) // 2
    indices = torch.empty(room, dtype=torch.int32, device=mask.device) if 4 * room <= WAITING_BYTES else None
    counts = mask.sum(-1, dtype=torch.int32)
    indices = _write(mask.to(torch.int8).contiguous(), counts, offsets, indices, blocks, blocks, packed=False)
    return Plan(
        offsets, indices, grid.block_size, grid.q_len, grid.k_len, num_heads=heads, batch=batch, is_checked=True
    )


def _write(
    chosen: Tensor, counts: Tensor, offsets: Tensor, indices: Tensor | None, width: int, blocks: int, *, packed: bool
) -> Tensor:
    """Fill the offsets and indices of a plan from what `compact` takes; waits for the device without `indices`."""
    rows = len(offsets) - 1
    together = min(MOST_TOGETHER, max(32, triton.next_power_of_2(rows)))
    launch(place, 1, counts, offsets, rows, N=together, num_warps=max(1, together // 512))
    if indices is None:
        indices = torch.empty(int(offsets[-1]), dtype=torch.int32, device=offsets.device)
    launch(compact, rows, chosen, offsets, indices, width, N=max(32, triton.next_power_of_2(blocks)), PACKED=packed)
    return indices


def _whole(numbers: int) -> int:
    """So many numbers, rounded up to 16 bytes."""
    return -(-numbers // 4) * 4


@functools.lru_cache(maxsize=64)
def sample_positions(grid: Grid, probe_rows: int, device: torch.device) -> Tensor:
    """int32 [query blocks, slots]: evenly spaced positions of each query block, its last one included, -1 for none.

    They lie at fixed places of the block, whichever part of it is at hand. All layers of a model ask for the same.
    """
    size = grid.block_size
    stride = -(-size // probe_rows)
    slot = torch.arange(-(-size // stride))
    start = grid.diagonal()[:, None] * size
    last = (start + size).clamp_max(grid.k_len) - 1
    at = (start + slot * stride + stride - 1).minimum(last)
    at = at.masked_fill((start + slot * stride > last) | (at < grid.offset), -1)
    slots = min(MOST_SLOTS, triton.next_power_of_2(len(slot)))
    return torch.nn.functional.pad(at, (0, -len(slot) % slots), value=-1).int().to(device)
