"""Row-local selection on a GPU: nothing waits for the device, and no tensor holds queries by keys."""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from whimbrel.attend.kernels import hopper_launch
from whimbrel.attend.plan import Grid, Plan
from whimbrel.sparse.blocks import per_million
from whimbrel.sparse.kernels.choose import choose, compact
from whimbrel.sparse.kernels.estimate import block_lse, masses, whole_lse

UNIT_BITS = 30
"""Masses are whole numbers of 2^-30: rounding down loses 4e-6 of a row of 4096 blocks, and a sum fits 32 bits."""
MOST_SLOTS = 16
"""Sampled queries in a tile at most."""
PROGRAM_ROWS = 128
"""Queries of all heads and tiles that a program multiplies with the keys it reads."""
RUN = 16
"""Key blocks that are taken together."""
HOPPER_ROWS = 256
"""The same of the kernel for Hopper."""
HOPPER_RUN = 32
"""Key blocks that one of its programs takes: many, since it reads its queries first, but enough programs for a card."""
HOPPER_STAGES = 4
"""Key blocks that are in shared memory at a time."""
LEAST_SCRATCH, MOST_SCRATCH = 1 << 23, 40 << 20
"""Bytes for the statistics of the query blocks that are under way, between which they are a fifteenth of q's and k's:
with the plan, less than a twentieth of q, k, v and y together."""
WAITING_BYTES = 1 << 28
"""From here on a plan's indices are allocated once their number is known, which waits for the device; below, room for
every causal block is cheaper."""


def sampled_plan(
    q: Tensor,
    k: Tensor,
    grid: Grid,
    *,
    probe_rows: int,
    coverage: float,
    row_share: float,
    least: int,
    most: int | None,
    scale: float,
) -> Plan:
    """The plan for q [B, Tq, H, D] and k [B, Tk, Hkv, D] from the exact masses of sampled queries.

    `least` and `most` are blocks per row. A row is chosen alike, to the bit, whatever follows it and wherever, on a
    block border, the prompt is cut.
    """
    batch, _, heads, _ = q.shape
    positions = sample_positions(grid, probe_rows, q.device)
    rows, pairs, blocks = grid.query_blocks, batch * heads, grid.key_blocks
    words, width = triton.cdiv(blocks, 32), max(32, triton.next_power_of_2(blocks))
    bits = torch.empty(pairs, rows, words, dtype=torch.int32, device=q.device)
    counts = torch.empty(pairs, rows, dtype=torch.int64, device=q.device)
    # Coverage 1 keeps all blocks, whatever rounding does to sums.
    wanted = 2**31 - 1 if coverage >= 1 else math.ceil(coverage * 2**UNIT_BITS)
    scratch = min(MOST_SCRATCH, max(LEAST_SCRATCH, (q.numel() + k.numel()) * q.element_size() // 15))
    step = max(1, scratch // (4 * pairs * blocks * positions.shape[1]))
    step -= step % 16 if step > 16 else 0  # programs take up to 16 query blocks
    for first in range(0, rows, step):
        part = positions[first : first + step]
        mass, shares = tile_shares(q, k, grid, part, first_block=grid.first_block + first, scale=scale)
        tiles, slots = shares.shape[2], min(part.shape[1], MOST_SLOTS)
        choose[(len(part), pairs)](
            part, mass, shares, bits, counts, tiles, len(part), mass.shape[-1], first, rows, words, grid.first_block,
            wanted, per_million(row_share), least, 2**31 - 1 if most is None else most,
            HKV=k.shape[2], GROUP=heads // k.shape[2], P=slots, S=part.shape[1] // slots, N=width, UNIT_BITS=UNIT_BITS,
            BUDGET=least > 0 or most is not None, num_warps=max(1, min(16, width * slots // 2048)),
        )  # fmt: skip
        del mass, shares  # or the next ones would lie beside them
    return _plan(bits, counts, grid, batch, most)


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


def tile_mass(q: Tensor, k: Tensor, grid: Grid, positions: Tensor, *, first_block: int, scale: float) -> Tensor:
    """The first of `tile_shares`."""
    return tile_shares(q, k, grid, positions, first_block=first_block, scale=scale)[0]


def tile_shares(
    q: Tensor, k: Tensor, grid: Grid, positions: Tensor, *, first_block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Exact mass of key blocks for the queries at `positions`, in units of 2^-UNIT_BITS: the mean, int32
    [B, H, rows, first_block + rows], and each query's, int32 as `estimate.masses` leaves it.

    positions int32 [rows, slots], absolute, -1 for none, slots a power of two or a multiple of MOST_SLOTS; row i lies
    in block first_block + i.
    """
    batch, _, heads, dim = q.shape
    kv_heads, rows = k.shape[2], len(positions)
    blocks = first_block + rows
    if not q.is_cuda and q.dtype == torch.bfloat16:
        q, k = q.float(), k.float()  # products in bf16 are wrong in Triton's interpreter
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    group, slots = heads // kv_heads, min(positions.shape[1], MOST_SLOTS)
    sub = positions.shape[1] // slots
    tiles, together = rows * sub, max(1, PROGRAM_ROWS // (group * slots))
    lse = torch.empty(batch, kv_heads, tiles, blocks, group * slots, dtype=torch.float32, device=q.device)
    whole = torch.empty(batch, kv_heads, tiles, group * slots, dtype=torch.float32, device=q.device)
    mass = torch.empty(batch, heads, rows, blocks, dtype=torch.int32, device=q.device)
    block_dim, packed = (max(16, triton.next_power_of_2(x)) for x in (dim, group * slots * together))
    counts = grid.offset, tiles, blocks, first_block
    if group * slots <= HOPPER_ROWS and hopper_launch.fits(q, q, grid.block_size):
        _block_lse_on_hopper(q, k, positions, lse, counts, scale * math.log2(math.e), slots, sub)
    else:
        block_lse[(triton.cdiv(tiles, together), triton.cdiv(blocks, RUN), batch * kv_heads)](
            q, k, positions, lse, *q.stride()[:3], *k.stride()[:3], grid.offset, grid.k_len, tiles, blocks,
            first_block, scale * math.log2(math.e),
            HKV=kv_heads, GROUP=group, P=slots, S=sub, Q=together, M=packed, D=dim, BD=block_dim, SIZE=grid.block_size,
            RUN=RUN, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=8, num_stages=2,
        )  # fmt: skip
    whole_lse[(tiles, batch * kv_heads)](
        lse,
        whole,
        tiles,
        blocks,
        first_block,
        S=sub,
        MP=group * slots,
        M=triton.next_power_of_2(group * slots),
        RUN=RUN,
    )
    masses[(rows, batch * kv_heads)](
        positions, lse, whole, mass, tiles, rows, blocks, first_block,
        GROUP=group, G=triton.next_power_of_2(group), P=slots, S=sub, RUN=4 * RUN, UNIT=2**UNIT_BITS,
    )  # fmt: skip
    return mass, lse.view(torch.int32)


def _block_lse_on_hopper(
    q: Tensor, k: Tensor, at: Tensor, lse: Tensor, counts: tuple[int, int, int, int], scale: float, slots: int, sub: int
) -> None:
    """`block_lse` for blocks of 128; counts: queries start at this key, tiles, key blocks, block of the first tile."""
    from whimbrel.sparse.kernels import hopper

    before, tiles, blocks, first_block = counts
    batch, k_len, kv_heads, dim = k.shape
    group = q.shape[2] // kv_heads
    together = HOPPER_ROWS // (group * slots)
    groups, runs = triton.cdiv(tiles, together), triton.cdiv(blocks, HOPPER_RUN)
    keys, k_row, k_col = hopper_launch.matrix(k.flatten(0, 1), hopper_launch.BLOCK)
    hopper.block_lse[(batch * kv_heads * groups * runs,)](
        q, keys, at, lse, *q.stride()[:3], before, k_len, k_row, k_col, tiles, blocks, first_block, groups, runs, scale,
        HKV=kv_heads, GROUP=group, P=slots, S=sub, Q=together, D=dim, RUN=HOPPER_RUN, STAGES=HOPPER_STAGES, num_warps=4,
    )  # fmt: skip


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
