"""What the kernels for Hopper share, in Gluon: products of tiles, copies of ragged ones, a chunk's gates and states."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Triton 3.7 renamed it."""
NOTHING = gl.constexpr(-32.0)
"""log2 of a decay that leaves nothing."""
ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def product(a, b, KT: gl.constexpr, ACC: gl.constexpr, a0=0, b0=0, B_T: gl.constexpr = False):
    """sum over KT tiles of a[a0 + i] @ b[b0 + i], started but not waited for; B_T takes b's tiles transposed."""
    acc = gl.zeros([64, 64], gl.float32, ACC)
    for i in gl.static_range(KT):
        y = b.index(b0 + i)
        if B_T:
            y = y.permute((1, 0))
        acc = warpgroup_mma(a.index(a0 + i), y, acc, use_acc=i > 0, is_async=True)
    return acc


@gluon.jit
def opaque(x):
    """x, of which the compiler knows nothing: what is computed from it is computed where it is used.

    Without it the addresses of all tiles are computed before a loop and kept, which is more than there are registers.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def widen(x):
    """x in fp32. Of bf16, whose bits are the upper half of an fp32's, the compiler takes three instructions a pair."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2
        )
    return x.to(gl.float32)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def new_barrier():
    """A barrier for one copy at a time, in a place of its own."""
    place = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(place.index(0), count=1)
    return place.index(0)


@gluon.jit
def publish():
    """Make what the threads stored in shared memory visible to the matrix units and the copy engine."""
    fence_async_shared()
    barrier()


@gluon.jit
def keep_rows(tile, rows, WARPS: gl.constexpr):
    """Zeros in the rows of a tile [64, N] from `rows` on: they hold another sequence, or nothing."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, L))
    x = tile.load(L)
    tile.store(gl.where((row < rows)[:, None], x, 0.0).to(x.dtype))


@gluon.jit
def put(tile, matrix, memory, first, column, rows, stride, N: gl.constexpr, WARPS: gl.constexpr):
    """A tile [64, N] to the rows from `first` on, or as many as there are; `matrix` is the descriptor of `memory`."""
    if rows >= 64:
        tma.async_copy_shared_to_global(matrix, [first, column], tile)
    else:
        L: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
        row = gl.arange(0, 64, gl.SliceLayout(1, L))
        col = gl.arange(0, N, gl.SliceLayout(0, L))
        place = (first + row)[:, None].to(gl.int64) * stride + column + col[None, :]
        gl.store(memory + place, tile.load(L), mask=(row < rows)[:, None])


@gluon.jit
def load_state(states, at, V: gl.constexpr, KT: gl.constexpr, FROM: gl.constexpr, ACC: gl.constexpr):
    """The two halves of a state along K, [64, 64] each; the second is unused where K is 64."""
    x0 = gl.zeros([64, 64], gl.float32, ACC)
    x1 = gl.zeros([64, 64], gl.float32, ACC)
    if FROM:
        x0 = gl.load(states + at)
        if KT == 2:
            x1 = gl.load(states + 64 * V + at)
    return x0, x1


@gluon.jit
def store_state(states, at, x0, x1, V: gl.constexpr, KT: gl.constexpr):
    gl.store(states + at, x0)
    if KT == 2:
        gl.store(states + 64 * V + at, x1)


@gluon.jit
def load_gates(gate_row, rate_row, first, end, L: gl.constexpr):
    """Of a chunk: the decay summed until and before each token, the rate, and the sum over the chunk."""
    row = gl.arange(0, 64, L)
    ok = first + row < end
    last = gl.load(gate_row + gl.maximum(gl.minimum(first + 64, end) - 1, 0))
    until = gl.load(gate_row + first + row, mask=ok, other=0.0)
    before = gl.load(gate_row + first + row - 1, mask=ok & (row > 0), other=0.0)
    rate = gl.load(rate_row + first + row, mask=ok, other=0.0)
    return gl.where(ok, until, last), gl.where(ok, before, last), rate, last, gl.where(ok, 1.0, 0.0)


@gluon.jit
def count_chunks(gate_row, start, end, n, BACK: gl.constexpr):
    """How many of n chunks matter, from the last one on or with BACK from the first, and the log2 decay over them.

    Those do not that lie behind a decay to nothing.
    """
    L: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    place = gl.arange(0, 64, L)
    count = 0
    decay = 0.0
    while (count < n) & (decay > NOTHING):
        c = count + place
        chunk = c if BACK else n - 1 - c
        total = gl.load(gate_row + gl.minimum(start + chunk * 64 + 64, end) - 1, mask=c < n, other=0.0)
        matters = (c < n) & (decay + gl.associative_scan(total, 0, add) - total > NOTHING)
        count += gl.sum(gl.where(matters, 1, 0), axis=0)
        decay += gl.sum(gl.where(matters, total, 0.0), axis=0)
    return count, decay
