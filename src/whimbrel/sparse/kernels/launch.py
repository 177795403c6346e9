"""Row-local selection on a GPU: nothing waits for the device, and no tensor holds queries by keys."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from whimbrel.attend.kernels import hopper_launch
from whimbrel.attend.plan import Grid, Plan
from whimbrel.sparse.blocks import JUDGED_AT, PILOT_ROWS, PROBE_ROWS, margin, per_million
from whimbrel.sparse.kernels.choose import choose, compact
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
"""Key blocks that one of its programs takes: many, since it reads its queries first, but enough programs for a card."""
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
MOST_LOOKS = 4
"""Launches for second looks, beyond which it pays to wait until their number is known."""


class Looks(NamedTuple):
    """Query blocks that deserve a second look."""

    units: Tensor
    """int32 [B * Hkv, rows]: which."""
    filled: Tensor
    """int32 [B * Hkv]: how many."""
    wanting: Tensor
    """int32 [B * Hkv, rows]: a bit for each head of those that share a key head."""


class Selection:
    """A plan for q [B, Tq, H, D] and k [B, Tk, Hkv, D] in the making."""

    def __init__(
        self, q: Tensor, k: Tensor, grid: Grid, *, row_share: float, least: int, most: int | None, scale: float
    ):
        if not q.is_cuda and q.dtype == torch.bfloat16:
            q, k = q.float(), k.float()  # products in bf16 are wrong in Triton's interpreter
        self.q, self.k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        self.grid = grid
        self.row_share, self.least, self.most = row_share, least, most
        self.scale = scale * math.log2(math.e)
        self.batch, _, self.heads, self.dim = q.shape
        self.kv_heads = k.shape[2]
        self.group = self.heads // self.kv_heads
        self.rows, self.blocks = grid.query_blocks, grid.key_blocks
        size = self.batch * self.heads, self.rows
        # Zeros: early rows are chosen in fewer words.
        self.bits = torch.zeros(*size, triton.cdiv(self.blocks, 32), dtype=torch.int32, device=q.device)
        self.counts = torch.empty(*size, dtype=torch.int64, device=q.device)
        elements = (q.numel() + k.numel()) * q.element_size()
        self.scratch = min(MOST_SCRATCH, max(LEAST_SCRATCH, elements // 15)) // 4

    def look(self, probe_rows: int, coverage: float) -> None:
        """Choose for all rows from so many queries of each."""
        at = sample_positions(self.grid, probe_rows, self.q.device)
        for first, stop in self.strips(at.shape[1]):
            sums = self.scores(at, first, stop - first)
            self.choose(at, sums, first, coverage)
            del sums

    def look_twice(self, coverage: float) -> None:
        """Choose from few queries, and once more from many where few do not tell."""
        at = sample_positions(self.grid, PILOT_ROWS, self.q.device)
        pairs = self.batch * self.kv_heads
        counters = torch.zeros(pairs * (self.rows + 1), dtype=torch.int32, device=self.q.device)
        filled, wanting = counters.split([pairs, pairs * self.rows])
        looks = Looks(torch.empty_like(wanting), filled, wanting)
        for first, stop in self.strips(at.shape[1]):
            sums = self.scores(at, first, stop - first)
            self.choose(at, sums, first, JUDGED_AT + margin(JUDGED_AT), looks, slack=2 * margin(JUDGED_AT))
            if coverage != JUDGED_AT:
                self.choose(at, sums, first, coverage + margin(coverage))
            del sums  # or the next ones would lie beside them
        at = sample_positions(self.grid, PROBE_ROWS, self.q.device)
        room = max(1, min(self.rows, self.scratch // (self.batch * self.heads * self.blocks * at.shape[1])))
        most = self.rows if self.rows <= room * MOST_LOOKS else int(filled.max())
        for first in range(0, most, room):
            sums = self.scores(at, first, min(room, self.rows - first), looks)
            self.choose(at, sums, first, coverage, looks)
            del sums

    def strips(self, slots: int) -> Iterator[tuple[int, int]]:
        """Rows whose sums fit the scratch at a time."""
        first = 0
        before = self.grid.first_block
        while first < self.rows:
            room = self.scratch // (self.batch * self.heads * slots)
            # As many rows as there may be if each holds sums for all blocks up to the last of them.
            most = int(((before + first) ** 2 + 4 * room) ** 0.5 - before - first) // 2
            most = max(1, most - most % 16 if most > 16 else most)  # programs take up to 16 query blocks and more
            yield first, min(self.rows, first + most)
            first += most

    def scores(self, at: Tensor, begin: int, room: int, looks: Looks | None = None) -> Tensor:
        """`estimate.scores` of the rows from `begin` on, or of those in `looks`; at int32 [rows, slots], slots a power
        of two or a multiple of MOST_SLOTS."""
        slots = min(at.shape[1], MOST_SLOTS)
        sub = at.shape[1] // slots
        blocks = self.blocks if looks else self.grid.first_block + begin + room
        pairs, size = self.batch * self.kv_heads, self.group * slots
        sums = torch.empty(pairs, room * sub, blocks, size, dtype=torch.float32, device=self.q.device)
        lists = (looks.units, looks.filled) if looks else (at, at)
        tensors = self.q, self.k, at, *lists, sums
        strides = *self.q.stride()[:3], *self.k.stride()[:3]
        numbers = self.grid.offset, self.grid.k_len, self.rows, room * sub, begin * sub, blocks, self.grid.first_block
        constants = {"LISTED": looks is not None, "HKV": self.kv_heads, "GROUP": self.group, "P": slots, "S": sub}
        constants["D"] = self.dim
        if size <= 128 * HOPPER_TILES and hopper_launch.fits(self.q, self.q, self.grid.block_size):
            self._scores_on_hopper(tensors, strides, numbers, constants)
            return sums
        together = max(1, PROGRAM_ROWS // size)
        block_dim, packed = (max(16, triton.next_power_of_2(x)) for x in (self.dim, size * together))
        scores[(triton.cdiv(room * sub, together), triton.cdiv(blocks, RUN), pairs)](
            *tensors, *strides, *numbers, self.scale, **constants, Q=together, M=packed, BD=block_dim,
            SIZE=self.grid.block_size, RUN=RUN, PRECISION="tf32x3" if self.q.dtype == torch.float32 else "tf32",
            num_warps=8, num_stages=2,
        )  # fmt: skip
        return sums

    def _scores_on_hopper(
        self, tensors: tuple[Tensor, ...], strides: tuple[int, ...], numbers: tuple[int, ...], constants: dict[str, int]
    ) -> None:
        from whimbrel.sparse.kernels import hopper

        q, k, *others = tensors
        together = 128 * HOPPER_TILES // (self.group * constants["P"])
        *_, room, _, blocks, _ = numbers
        groups, runs = triton.cdiv(room, together), triton.cdiv(blocks, HOPPER_RUN)
        keys, k_row, k_col = hopper_launch.matrix(k.flatten(0, 1), hopper_launch.BLOCK)
        hopper.scores[(self.batch * self.kv_heads * groups * runs,)](
            q, k, keys, *others, *strides, *numbers, groups, runs, k_row, k_col, self.scale, **constants, Q=together,
            TILES=HOPPER_TILES, KEYS=HOPPER_KEYS, RUN=HOPPER_RUN, STAGES=HOPPER_STAGES, num_warps=4,
        )  # fmt: skip

    def choose(
        self,
        at: Tensor,
        sums: Tensor,
        begin: int,
        coverage: float,
        looks: Looks | None = None,
        slack: float | None = None,
    ) -> None:
        """Fill `bits` and `counts` of the rows of `sums`: of those in `looks`, or of all, and with `slack` note there
        which deserve a second look."""
        slots = min(at.shape[1], MOST_SLOTS)
        sub = at.shape[1] // slots
        room = sums.shape[1] // sub
        width = max(32, triton.next_power_of_2(sums.shape[2]))
        # Coverage 1 keeps all blocks, whatever rounding does to sums.
        wanted = 2**31 - 1 if coverage >= 1 else math.ceil(coverage * 2**UNIT_BITS)
        most = 2**31 - 1 if self.most is None else self.most
        choose[(room, self.batch * self.heads)](
            at, sums, sums.view(torch.int32), self.bits, self.counts, *(looks or (at, at, at)), self.rows, room, begin,
            sums.shape[2], self.bits.shape[2], self.grid.first_block, wanted, per_million(self.row_share), self.least,
            most, int((slack or 0) * 2**UNIT_BITS), LISTED=looks is not None and slack is None, PILOT=slack is not None,
            HKV=self.kv_heads, GROUP=self.group, P=slots, S=sub, N=width, UNIT=2**UNIT_BITS, UNIT_BITS=UNIT_BITS,
            SHIFT=(slots * sub - 1).bit_length(), BUDGET=self.least > 0 or self.most is not None,
            num_warps=max(1, min(16, width * slots // WARP_SHARES)),
        )  # fmt: skip

    def plan(self) -> Plan:
        """The plan of what was chosen."""
        return _plan(self.bits, self.counts, self.grid, self.batch, self.most)


def sampled_plan(
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
) -> Plan:
    """The plan for q [B, Tq, H, D] and k [B, Tk, Hkv, D] from the exact masses of sampled queries: so many of each
    block, or PILOT_ROWS and PROBE_ROWS where these do not tell.

    `least` and `most` are blocks per row. A row is chosen alike, to the bit, whatever follows it and wherever, on a
    block border, the prompt is cut.
    """
    selection = Selection(q, k, grid, row_share=row_share, least=least, most=most, scale=scale)
    if probe_rows is None:
        selection.look_twice(coverage)
    else:
        selection.look(probe_rows, coverage)
    return selection.plan()


def plan_of_mask(mask: Tensor, grid: Grid) -> Plan:
    """`Plan.from_mask` of a mask that is known to be right, without a wait for its number of blocks."""
    return _plan(mask.flatten(0, 1).to(torch.int8), mask.sum(-1).flatten(0, 1), grid, len(mask), None)


def _plan(chosen: Tensor, counts: Tensor, grid: Grid, batch: int, most: int | None) -> Plan:
    """The plan of blocks that are chosen as `compact` takes them, [B * H, rows, .], counts [B * H, rows]."""
    offsets = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
    rows = counts.numel()
    room = rows * (grid.first_block + 1 + grid.key_blocks) // 2
    if most is not None:
        room = min(room, rows * max(most, 3))
    if 4 * room > WAITING_BYTES:
        room = int(offsets[-1])
    indices = torch.empty(room, dtype=torch.int32, device=chosen.device)
    packed = chosen.dtype == torch.int32
    width = max(32, triton.next_power_of_2(grid.key_blocks))
    compact[(rows,)](chosen, offsets, indices, chosen.shape[-1], N=width, PACKED=packed)
    sizes = grid.block_size, grid.q_len, grid.k_len
    return Plan(offsets, indices, *sizes, num_heads=len(counts) // batch, batch=batch, is_checked=True)


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
