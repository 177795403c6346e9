"""The two passes over the gradient on Hopper, in Gluon: the mathematics of `passes.project` and `passes.write`.

One program stays on each multiprocessor and takes one job after another. Warps of their own bring tiles in through the
copy engine; two warpgroups multiply 64 rows each, and beside their products do what is left to do with each element.

Matrices lie anywhere: one descriptor of three dimensions, of which the first counts units of memory from the lowest
address on, reaches all of them, and a table [B] holds the unit at which each begins.

A matrix whose rows are not a multiple of 16 bytes apart is seen with FOLD rows side by side, [m / FOLD, FOLD n], whose
rows are. A tile then takes rows FOLD apart: row a of tile (q, first) is row FOLD (first + a) + q of the matrix. Since
copies begin at multiples of 16 bytes, columns of such a tile begin up to 7 earlier, at which the row before ends.
"""

# ruff: noqa: RUF005 - Triton does not know starred expressions.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Triton 3.7 renamed it."""
SOLID = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))
"""A tile as descriptors of three dimensions have it, with a first dimension of 1."""


@gluon.jit
def copy(source, place, full, tile, R: gl.constexpr, C: gl.constexpr):
    """Begin to copy a block [1, R, C] to a tile [R, C]."""
    tma.async_copy_global_to_shared(source, place, full, tile._reinterpret(tile.dtype, [1, R, C], SOLID))


@gluon.jit
def place_of(job, bands, COLUMNS: gl.constexpr, FOLD: gl.constexpr):
    """Matrix, row class, band within the class and column block of a job; `bands` are those of a class."""
    column = job % COLUMNS
    job = job // COLUMNS
    band = job % bands
    job = job // bands
    return job // FOLD, job % FOLD, band, column


@gluon.jit
def bring_gradients(
    g, p, g_at, p_at, g_s, p_s, full, free, jobs, programs, pid, bands, steps, n, R: gl.constexpr, BR: gl.constexpr,
    LEFT: gl.constexpr, FOLD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = (R + BR - 1) // BR
    turn = 0
    for job in range(pid, jobs, programs):
        i, q, band, column = place_of(job, bands, COLUMNS, FOLD)
        at = gl.load(g_at + i)
        basis = gl.load(p_at + i)
        for step in range(steps):
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * (128 * 64 + 64 * BR))
            k = step * 64 - q * n % 8
            for half in gl.static_range(2):
                slices = band * 128 + half * 64
                spot = [at, k, slices] if LEFT else [at, slices, q * n + k]
                copy(g, spot, full.index(stage), g_s.index(stage * 2 + half), 64, 64)
            copy(p, [basis, k, column * BR], full.index(stage), p_s.index(stage), 64, BR)
            turn += 1


@gluon.jit
def prefetch(places):
    """Have what lies at these places brought to the second-level cache."""
    text: gl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(text, "=r,l", [places.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_gradients(
    memory, shift, unit, p, g_at, p_at, sums, g_s, p_s, full, free, jobs, programs, pid, bands, steps, m, n,
    R: gl.constexpr, BR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What copies cannot bring: rows that begin anywhere, by way of registers.

    Each tile is asked for one turn early, and three turns early by the second-level cache: more does not fit registers.
    """
    FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    COLUMNS: gl.constexpr = (R + BR - 1) // BR
    SECTORS: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, FLAT))
    ahead = gl.arange(0, 64, gl.SliceLayout(1, SECTORS))
    turn = 0
    for job in range(pid, jobs, programs):
        i, _, band, column = place_of(job, bands, COLUMNS, 1)
        sector = gl.minimum(band * 128 + 127 * gl.arange(0, 8, gl.SliceLayout(0, SECTORS)) // 7, n - 1)
        at = band * 128 + gl.arange(0, 128, gl.SliceLayout(0, FLAT))
        held = (at < n)[None, :]
        start = memory + (gl.load(g_at + i).to(gl.int64) * unit + shift)
        basis = gl.load(p_at + i)
        spot = row[:, None] * n + at[None, :]
        following = gl.load(start + spot, mask=(row < m)[:, None] & held, other=0.0)
        squares = gl.zeros([128], gl.float32, gl.SliceLayout(0, FLAT))
        for step in range(steps):
            x = following
            later = row + (step + 1) * 64
            following = gl.load(start + (later[:, None] * n + at[None, :]), mask=(later < m)[:, None] & held, other=0.0)
            prefetch(start + (gl.minimum(ahead + (step + 3) * 64, m - 1)[:, None] * n + sector[None, :]))
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * 64 * BR)
            copy(p, [basis, step * 64, column * BR], full.index(stage), p_s.index(stage), 64, BR)
            g_s.index(stage).store(x)
            fence_async_shared()
            barrier()
            mbarrier.arrive(full.index(stage))
            if column == 0:
                wide = x.to(gl.float32)
                squares += gl.sum(wide * wide, 0)
            turn += 1
        if column == 0:
            gl.store(sums + (i * n + at), squares, mask=at < n)


@gluon.jit
def multiply_gradients(
    low, sums, g_s, p_s, full, free, jobs, programs, pid, bands, steps, m, n, R: gl.constexpr, BR: gl.constexpr,
    LEFT: gl.constexpr, FOLD: gl.constexpr, LOADED: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """low and sums of 64 slices of each job; the latter are left to `load_gradients` where it is at work."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BR, 16])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ALONG: gl.constexpr = 0 if LEFT else 1
    COLUMNS: gl.constexpr = (R + BR - 1) // BR
    turn = 0
    for job in range(pid, jobs, programs):
        i, q, band, column = place_of(job, bands, COLUMNS, FOLD)
        acc = gl.zeros([64, BR], gl.float32, ACC)
        squares = gl.zeros([64, 64], gl.float32, FLAT)
        for step in range(steps):
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            if LOADED:
                tile = g_s.index(stage).slice(HALF * 64, 64, 1)
            else:
                tile = g_s.index(stage * 2 + HALF)
            if LEFT:
                acc = warpgroup_mma(tile.permute((1, 0)), p_s.index(stage), acc, is_async=True)
            else:
                acc = warpgroup_mma(tile, p_s.index(stage), acc, is_async=True)
            if not LOADED and column == 0:
                x = tile.load(FLAT).to(gl.float32)
                if FOLD > 1:
                    # around a row lie others
                    k = step * 64 - q * n % 8 + gl.arange(0, 64, gl.SliceLayout(0, FLAT))
                    x = gl.where(((k >= 0) & (k < n))[None, :], x, 0.0)
                squares += x * x
            # a product that outlived this turn of the loop would be waited for in each of its parts
            acc = warpgroup_mma_wait(0, deps=(acc,))
            # what threads have read comes before what the copy engine writes
            fence_async_shared()
            barrier()
            mbarrier.arrive(free.index(stage))
            turn += 1
        at = band * 128 + HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        flat = band * 128 + HALF * 64 + gl.arange(0, 64, gl.SliceLayout(ALONG, FLAT))
        if LEFT:
            count = n
        else:
            count = m
            at = at * FOLD + q
            flat = flat * FOLD + q
        j = column * BR + gl.arange(0, BR, gl.SliceLayout(0, ACC))
        spot = (i * count + at).to(gl.int64)[:, None] * R + j[None, :]
        held = (at < count)[:, None]
        if R % BR:
            held = held & (j < R)[None, :]
        gl.store(low + spot, acc.to(gl.bfloat16), mask=held)
        if not LOADED and column == 0:
            gl.store(sums + (i * count + flat), gl.sum(squares, ALONG), mask=flat < count)


@gluon.jit(do_not_specialize=["jobs", "programs", "bands", "steps", "m", "n"])
def project(
    g, p, g_at, p_at, low, sums, jobs, programs, bands, steps, m, n, R: gl.constexpr, BR: gl.constexpr,
    LEFT: gl.constexpr, FOLD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """low [B, s, R] = gradients times bases, and sums [B, s] of squares of the slices.

    g, p: descriptors of blocks [1, 64, 64] and [1, 64, BR]; g_at, p_at int32 [B]. A job is 128 slices of a matrix and
    BR columns of its basis; bands: such jobs of a row class (of the matrix, where columns are slices); steps: blocks of
    64 along a slice. FOLD is 1 where LEFT.
    """
    g_s = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, 64, 64], gl.NVMMASharedLayout(128, 16, 2))
    p_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, BR], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    barrier()
    pid = gl.program_id(0)
    gl.warp_specialize(
        [
            (
                multiply_gradients,
                (
                    low, sums, g_s, p_s, full, free, jobs, programs, pid, bands, steps, m, n, R, BR, LEFT, FOLD, False,
                    STAGES, gl.constexpr(0),
                ),
            ),
            (
                multiply_gradients,
                (
                    low, sums, g_s, p_s, full, free, jobs, programs, pid, bands, steps, m, n, R, BR, LEFT, FOLD, False,
                    STAGES, gl.constexpr(1),
                ),
            ),
            (
                bring_gradients,
                (
                    g, p, g_at, p_at, g_s, p_s, full, free, jobs, programs, pid, bands, steps, n, R, BR, LEFT, FOLD,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["shift", "unit", "jobs", "programs", "bands", "steps", "m", "n"])
def project_unaligned(
    memory, shift, unit, p, g_at, p_at, low, sums, jobs, programs, bands, steps, m, n, R: gl.constexpr,
    BR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `project` where columns are slices, and rows begin anywhere.

    g_at counts units of `unit` elements from `shift` elements behind memory on.
    """
    g_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 128], gl.NVMMASharedLayout(128, 16, 2))
    p_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, BR], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(free.index(i), count=2)
    barrier()
    pid = gl.program_id(0)
    gl.warp_specialize(
        [
            (
                multiply_gradients,
                (
                    low, sums, g_s, p_s, full, free, jobs, programs, pid, bands, steps, m, n, R, BR, True, 1, True,
                    STAGES, gl.constexpr(0),
                ),
            ),
            (
                multiply_gradients,
                (
                    low, sums, g_s, p_s, full, free, jobs, programs, pid, bands, steps, m, n, R, BR, True, 1, True,
                    STAGES, gl.constexpr(1),
                ),
            ),
            (
                load_gradients,
                (
                    memory, shift, unit, p, g_at, p_at, sums, g_s, p_s, full, free, jobs, programs, pid, bands, steps,
                    m, n, R, BR, STAGES,
                ),
            ),
        ],
        [4, 4],
        [168, 176],
    )  # fmt: skip


@gluon.jit
def bring_rows(
    a, rows, band, q, a_s, full, free, turn, FIRST: gl.constexpr, COUNT: gl.constexpr, R: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    """COUNT chunks of 128 rows of the factor that stays."""
    mbarrier.wait(free.index(0), (turn & 1) ^ 1)
    mbarrier.expect(full.index(0), 2 * 128 * 64 * COUNT)
    for half in gl.static_range(2):
        for c in gl.static_range(COUNT):
            spot = [rows, band * 128 + half * 64, q * R + (FIRST + c) * 64]
            copy(a, spot, full.index(0), a_s.index(half * PLACES + c), 64, 64)


@gluon.jit
def bring_factors(
    a, b, a_at, b_at, actives, a_s, b_s, a_full, a_free, b_full, b_free, jobs, programs, pid, bands, tiles, n,
    R: gl.constexpr, SEGMENTS: gl.constexpr, FOLD: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    CHUNKS: gl.constexpr = (R + 63) // 64
    PLACES: gl.constexpr = CHUNKS - HELD
    turn = 0
    step = 0
    for job in range(pid, jobs, programs):
        i, q, band, segment = place_of(job, bands, SEGMENTS, FOLD)
        if gl.load(actives + i) != 0:
            rows = gl.load(a_at + i)
            columns = gl.load(b_at + i)
            if HELD:
                bring_rows(a, rows, band, q, a_s, a_full, a_free, turn, 0, HELD, R, PLACES)
                turn += 1
            bring_rows(a, rows, band, q, a_s, a_full, a_free, turn, HELD, PLACES, R, PLACES)
            turn += 1
            skew = q * n % 8
            each = (tiles + SEGMENTS - 1) // SEGMENTS
            for tile in range(segment * each, gl.minimum(tiles, segment * each + each)):
                for chunk in range(CHUNKS):
                    stage = step % STAGES
                    mbarrier.wait(b_free.index(stage), ((step // STAGES) & 1) ^ 1)
                    mbarrier.expect(b_full.index(stage), 2 * 128 * 64)
                    copy(b, [columns, tile * 128 - skew, chunk * 64], b_full.index(stage), b_s.index(stage), 128, 64)
                    step += 1


@gluon.jit
def bring_weights(
    w, g, w_at, g_at, actives, x_s, full, free, jobs, programs, pid, bands, tiles, n, SEGMENTS: gl.constexpr,
    FOLD: gl.constexpr, HAS_GRAD: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    turn = 0
    for job in range(pid, jobs, programs):
        i, q, band, segment = place_of(job, bands, SEGMENTS, FOLD)
        if gl.load(actives + i) != 0:
            weights = gl.load(w_at + i)
            grads = gl.load(g_at + i)
            each = (tiles + SEGMENTS - 1) // SEGMENTS
            for tile in range(segment * each, gl.minimum(tiles, segment * each + each)):
                for half in gl.static_range(2):
                    row = band * 128 + half * 64
                    column = q * n - q * n % 8 + tile * 128
                    if HAS_GRAD:
                        slot = turn % SLOTS
                        mbarrier.wait(free.index(slot), ((turn // SLOTS) & 1) ^ 1)
                        mbarrier.expect(full.index(slot), 2 * 64 * 128)
                        copy(g, [grads, row, column], full.index(slot), x_s.index(slot), 64, 128)
                        turn += 1
                    slot = turn % SLOTS
                    mbarrier.wait(free.index(slot), ((turn // SLOTS) & 1) ^ 1)
                    mbarrier.expect(full.index(slot), 2 * 64 * 128)
                    copy(w, [weights, row, column], full.index(slot), x_s.index(slot), 64, 128)
                    turn += 1


@gluon.jit
def send(w, matrix, row, column, value, tile):
    """Copy values [64, 128] to the weights by way of a tile."""
    tile.store(value.to(gl.bfloat16))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(w, [matrix, row, column], tile._reinterpret(gl.bfloat16, [1, 64, 128], SOLID))
    tma.store_wait(0)


@gluon.jit
def write_rows(
    w, memory, shift, unit, w_at, actives, on_grad, shares, row_words, column_words, a_s, b_s, x_s, a_full, a_free,
    b_full, b_free, full, free, jobs, programs, pid, bands, tiles, m, n, first_column, R: gl.constexpr,
    SEGMENTS: gl.constexpr, LEFT: gl.constexpr, FOLD: gl.constexpr, HAS_GRAD: gl.constexpr,
    STOCHASTIC: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, HELD: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """64 rows of each job."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    CHUNKS: gl.constexpr = (R + 63) // 64
    PLACES: gl.constexpr = CHUNKS - HELD
    TILES: gl.constexpr = 4 if HAS_GRAD else 2
    a_turn = 0
    turn = 0
    step = 0
    for job in range(pid, jobs, programs):
        i, q, band, segment = place_of(job, bands, SEGMENTS, FOLD)
        if gl.load(actives + i) != 0:
            share = gl.load(shares + i)
            weights = gl.load(w_at + i)
            at = (band * 128 + HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, ACC))) * FOLD + q
            word = gl.load(row_words + i * m + at, mask=at < m, other=0)
            start = gl.load(column_words + i) + first_column
            if HAS_GRAD and not LEFT:
                factor = gl.load(on_grad + i * m + at, mask=at < m, other=0.0)[:, None]
            each = (tiles + SEGMENTS - 1) // SEGMENTS
            kept = ()
            if HELD:
                mbarrier.wait(a_full.index(0), a_turn & 1)
                for c in gl.static_range(HELD):
                    kept = kept + (a_s.index(HALF * PLACES + c).load(gl.DotOperandLayout(0, ACC, 2)),)
                fence_async_shared()
                barrier()
                mbarrier.arrive(a_free.index(0))
                a_turn += 1
            mbarrier.wait(a_full.index(0), a_turn & 1)
            for tile in range(segment * each, gl.minimum(tiles, segment * each + each)):
                acc = gl.zeros([64, 128], gl.float32, ACC)
                for c in gl.static_range(CHUNKS):
                    stage = (step + c) % STAGES
                    mbarrier.wait(b_full.index(stage), ((step + c) // STAGES) & 1)
                    part = kept[c] if c < HELD else a_s.index(HALF * PLACES + c - HELD)
                    acc = warpgroup_mma(part, b_s.index(stage).permute((1, 0)), acc, use_acc=c > 0, is_async=True)
                    if c > 0:
                        acc = warpgroup_mma_wait(1, deps=(acc,))
                        barrier()
                        mbarrier.arrive(b_free.index((step + c - 1) % STAGES))
                first = tile * 128 - q * n % 8
                column = first + gl.arange(0, 128, gl.SliceLayout(0, ACC))
                if HAS_GRAD and LEFT:
                    factor = gl.load(on_grad + i * n + column, mask=(column >= 0) & (column < n), other=0.0)[None, :]
                acc = warpgroup_mma_wait(0, deps=(acc,))
                barrier()
                mbarrier.arrive(b_free.index((step + CHUNKS - 1) % STAGES))
                step += CHUNKS
                here = turn + HALF * (TILES // 2)
                if HAS_GRAD:
                    slot = here % SLOTS
                    mbarrier.wait(full.index(slot), (here // SLOTS) & 1)
                    acc += x_s.index(slot).load(ACC).to(gl.float32) * factor  # pyrefly: ignore [unbound-name]
                    fence_async_shared()
                    barrier()
                    mbarrier.arrive(free.index(slot))
                    here += 1
                slot = here % SLOTS
                mbarrier.wait(full.index(slot), (here // SLOTS) & 1)
                value = x_s.index(slot).load(ACC).to(gl.float32) - acc
                value -= share * value
                if STOCHASTIC:
                    bits = word[:, None] ^ ((start + column) * -1640531527)[None, :]
                    bits = ((bits * -2048144789) >> 16) & 0xFFFF
                    raised = (value.to(gl.int32, bitcast=True) + bits) & -65536
                    # NaN's bits may run over
                    value = gl.where(value == value, raised.to(gl.float32, bitcast=True), value)
                row = band * 128 + HALF * 64
                if FOLD == 1:
                    send(w, weights, row, first, value, x_s.index(slot))
                elif (first >= 0) & (first + 128 <= n):
                    send(w, weights, row, q * n + first, value, x_s.index(slot))
                else:
                    # around a row lie others
                    there = memory + (weights.to(gl.int64) * unit + shift)
                    held = (at < m)[:, None] & ((column >= 0) & (column < n))[None, :]
                    gl.store(there + at[:, None] * n + column[None, :], value.to(gl.bfloat16), mask=held)
                    fence_async_shared()
                barrier()
                mbarrier.arrive(free.index(slot))
                turn += TILES
            a_turn += 1
            barrier()
            mbarrier.arrive(a_free.index(0))


@gluon.jit(do_not_specialize=["shift", "unit", "jobs", "programs", "bands", "tiles", "m", "n", "first_column"])
def write(
    w, g, a, b, memory, shift, unit, w_at, g_at, a_at, b_at, actives, on_grad, shares, row_words, column_words, jobs,
    programs, bands, tiles, m, n, first_column, R: gl.constexpr, SEGMENTS: gl.constexpr, LEFT: gl.constexpr,
    FOLD: gl.constexpr, HAS_GRAD: gl.constexpr, STOCHASTIC: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    HELD: gl.constexpr,
):  # fmt: skip
    """W - a b^T - on_grad G, then less its share of decay, of matrices that are active.

    w, g: descriptors of blocks [1, 64, 128]; a, b: of the two factors, [m, R] and [n, R], blocks [1, 64, 64] and
    [1, 128, 64]; x_at int32 [B], of which w_at counts units of `unit` elements from `shift` elements behind memory on.
    on_grad [B, s]; actives, shares, column_words [B]; row_words [B, m], int32. A job is 128 rows of a matrix and the
    tiles of one of SEGMENTS along them; bands: such rows of a row class; tiles: of 128 columns. HELD chunks of 64
    columns of a stay in registers, the others in shared memory.
    """
    CHUNKS: gl.constexpr = (R + 63) // 64
    FLAT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_s = gl.allocate_shared_memory(gl.bfloat16, [2 * (CHUNKS - HELD), 64, 64], FLAT)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 64], FLAT)
    x_s = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, 64, 128], FLAT)
    a_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    a_free = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    b_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    b_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(a_full.index(0), count=1)
    mbarrier.init(a_free.index(0), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(b_full.index(i), count=1)
        mbarrier.init(b_free.index(i), count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    barrier()
    pid = gl.program_id(0)
    gl.warp_specialize(
        [
            (
                write_rows,
                (
                    w, memory, shift, unit, w_at, actives, on_grad, shares, row_words, column_words, a_s, b_s, x_s,
                    a_full, a_free, b_full, b_free, full, free, jobs, programs, pid, bands, tiles, m, n, first_column,
                    R, SEGMENTS, LEFT, FOLD, HAS_GRAD, STOCHASTIC, STAGES, SLOTS, HELD, gl.constexpr(0),
                ),
            ),
            (
                write_rows,
                (
                    w, memory, shift, unit, w_at, actives, on_grad, shares, row_words, column_words, a_s, b_s, x_s,
                    a_full, a_free, b_full, b_free, full, free, jobs, programs, pid, bands, tiles, m, n, first_column,
                    R, SEGMENTS, LEFT, FOLD, HAS_GRAD, STOCHASTIC, STAGES, SLOTS, HELD, gl.constexpr(1),
                ),
            ),
            (
                bring_factors,
                (
                    a, b, a_at, b_at, actives, a_s, b_s, a_full, a_free, b_full, b_free, jobs, programs, pid, bands,
                    tiles, n, R, SEGMENTS, FOLD, STAGES, HELD,
                ),
            ),
            (
                bring_weights,
                (
                    w, g, w_at, g_at, actives, x_s, full, free, jobs, programs, pid, bands, tiles, n, SEGMENTS, FOLD,
                    HAS_GRAD, SLOTS,
                ),
            ),
        ],
        [4, 1, 1],
        [224, 40, 40],
    )  # fmt: skip
