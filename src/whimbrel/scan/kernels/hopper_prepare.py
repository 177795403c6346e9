"""What the states do not enter, for the delta rule on Hopper, in Gluon: `prepare`, with both streams in one program.

The inverse of a chunk's triangle is four of 16 rows, joined by products, two by two and then all. A thread solves a
column of one of them: row after row, from what is in registers, the triangle's rows read by all threads of a block at
once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from whimbrel.scan.kernels.hopper import ROWS, add, barrier, product, publish
from whimbrel.scan.kernels.prepare import COUNTS

LOG2E, LOG_LEAST = gl.constexpr(1.4426950408889634), gl.constexpr(-40.0)
"""As in `prepare`."""


@gluon.jit
def between(x_s, below_s, ACC: gl.constexpr, TWO: gl.constexpr):
    """X B X of each stream, B all that is below the diagonal, X the inverses of blocks on it.

    [[A, 0], [B, D]]^-1 has -D^-1 B A^-1 below: between two blocks that is what stands there. Elsewhere it is nothing
    of use. Factors are of order 1, and the result is rounded to fewer digits.
    """
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    x_1, b_1 = x_s.slice(0, 64, dim=0), below_s.slice(0, 64, dim=0)
    low = warpgroup_mma(x_1, b_1, zero, use_acc=False, is_async=True)
    if TWO:
        x_2, b_2 = x_s.slice(64, 64, dim=0), below_s.slice(64, 64, dim=0)
        high = warpgroup_mma(x_2, b_2, zero, use_acc=False, is_async=True)
        low, high = warpgroup_mma_wait(0, deps=(low, high))
        low = gl.convert_layout(low.to(gl.float16), LEFT)
        high = gl.convert_layout(high.to(gl.float16), LEFT)
        low = warpgroup_mma(low, x_1, zero, use_acc=False, is_async=True)
        high = warpgroup_mma(high, x_2, zero, use_acc=False, is_async=True)
        low, high = warpgroup_mma_wait(0, deps=(low, high))
    else:
        low = warpgroup_mma_wait(0, deps=(low,))
        low = gl.convert_layout(low.to(gl.float16), LEFT)
        low = warpgroup_mma(low, x_1, zero, use_acc=False, is_async=True)
        low = warpgroup_mma_wait(0, deps=(low,))
        high = low
    return low, high


@gluon.jit(do_not_specialize=COUNTS)
def prepare_delta(
    k,
    tiles,
    log_decay,
    first_rate,
    second_rate,
    gates,
    chunk_start,
    chunk_end,
    tokens,
    chunks,
    H,
    HV,
    K: gl.constexpr,
    TWO: gl.constexpr,
):
    """One chunk of one value head; grid (chunks * HV,). k and tiles are descriptors of [64, 64] blocks.

    Fills gates [3, HV, tokens] and tiles [2, HV, chunks, 64, 64], as `prepare` does.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    COL: gl.constexpr = gl.SliceLayout(0, ACC)
    LINE: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    # [block, row, column], and [block, 1, row]: what is read of the triangle. Then with four blocks of columns.
    OWN: gl.constexpr = gl.BlockedLayout([1, 16, 1], [2, 1, 16], [4, 1, 1], [1, 2, 0])
    READ: gl.constexpr = gl.BlockedLayout([1, 1, 16], [2, 16, 1], [4, 1, 1], [2, 1, 0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 16, 4, 1], [2, 1, 1, 16], [4, 1, 1, 1], [2, 1, 3, 0])
    TILE: gl.constexpr = k.layout
    KT: gl.constexpr = K // 64
    STREAMS: gl.constexpr = 2 if TWO else 1
    BLOCKS: gl.constexpr = 4 * STREAMS
    dtype: gl.constexpr = k.dtype
    pid = gl.program_id(0)
    hv, c = pid % HV, pid // HV
    start = gl.load(chunk_start + c)
    rows = gl.load(chunk_end + c) - start
    if rows > 0:
        k_s = gl.allocate_shared_memory(dtype, [2, 64, 64], TILE)
        out_s = gl.allocate_shared_memory(dtype, [2, 64, 64], TILE)
        x_s = gl.allocate_shared_memory(gl.float16, [64 * STREAMS, 64], TILE)
        until_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
        before_s = gl.allocate_shared_memory(gl.float32, [1, 64], ROWS)
        rate_s = gl.allocate_shared_memory(gl.float32, [2, 64], ROWS)
        full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        # Places that are free by then: the triangles, before the tiles; what joins blocks, behind the keys.
        triangles = out_s._reinterpret(gl.float32, [BLOCKS, 16, 16], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
        below_s = k_s._reinterpret(gl.float16, [64 * STREAMS, 64], TILE)
        mbarrier.init(full.index(0), count=1)
        barrier()
        mbarrier.expect(full.index(0), 8192 * KT)
        for j in gl.static_range(KT):
            place = [start, hv // (HV // H) * K + j * 64]
            tma.async_copy_global_to_shared(k, place, full.index(0), k_s.index(j))

        t = gl.arange(0, 64, LINE)
        ok = t < rows
        given = (start + t).to(gl.int64) * HV + hv
        log = gl.load(log_decay + given, mask=ok, other=0.0).to(gl.float32)
        second = gl.load(second_rate + given, mask=ok, other=0.0).to(gl.float32)
        log = gl.where(log < LOG_LEAST, LOG_LEAST, log) * LOG2E
        until = gl.associative_scan(log, 0, add)
        kept = gates + hv.to(gl.int64) * tokens + start + t
        plane = HV * tokens.to(gl.int64)
        gl.store(kept, until, mask=ok)
        gl.store(kept + 2 * plane, second, mask=ok)
        until_s.index(0).store(until)
        before_s.index(0).store(until - log)
        if TWO:
            first = gl.load(first_rate + given, mask=ok, other=0.0).to(gl.float32)
            gl.store(kept + plane, first, mask=ok)
            rate_s.index(0).store(first)
            rate_s.index(1).store(second)
        else:
            rate_s.index(0).store(second)

        mbarrier.wait(full.index(0), 0)
        score = product(k_s, k_s, KT, ACC, B_T=True)
        row = gl.arange(0, 64, ROW)[:, None]
        col = gl.arange(0, 64, COL)[None, :]
        score = warpgroup_mma_wait(0, deps=(score,))
        # Rows behind the end may hold another sequence; columns there are to the right of all others.
        score = gl.where((row > col) & (row < rows), score, 0.0)
        barrier()
        for stream in gl.static_range(STREAMS):
            part = score * rate_s.index(stream).load(COL)[None, :]
            own = gl.where(row // 16 == col // 16, part, 0.0)
            triangles.slice(4 * stream, 4, dim=0).store(gl.sum(own.reshape([4, 16, 4, 16]), axis=2))
            below_s.slice(64 * stream, 64, dim=0).store(part.to(gl.float16))

        barrier()
        i3 = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, OWN)))[None, :, None]
        j3 = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, OWN)))[None, None, :]
        x = gl.zeros([BLOCKS, 16, 16], gl.float32, OWN) + gl.where(i3 == j3, 1.0, 0.0)
        for i in gl.static_range(1, 16):
            line = triangles.slice(i, 1, dim=1).load(READ).permute((0, 2, 1))
            # -0.0, since the compiler takes it away from a sum.
            known = gl.sum(gl.where(i3 < i, line * x, -0.0), axis=1)
            x = gl.where(i3 == i, x - known[:, None, :], x)

        block = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WIDE))))
        quarter = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WIDE))))
        wide = gl.convert_layout(x.to(gl.float16), gl.SliceLayout(2, WIDE))[:, :, None, :]
        wide = gl.where(block[:, None, None, None] % 4 == quarter[None, None, :, None], wide, 0.0)
        x_s.store(wide.to(gl.float16).reshape([64 * STREAMS, 64]))
        publish()
        low, high = between(x_s, below_s, ACC, TWO)
        low = gl.where((row // 32 == col // 32) & (row // 16 > col // 16), low, 0.0)
        low = x_s.slice(0, 64, dim=0).load(ACC).to(gl.float32) - low
        if TWO:
            high = gl.where((row // 32 == col // 32) & (row // 16 > col // 16), high, 0.0)
            high = x_s.slice(64, 64, dim=0).load(ACC).to(gl.float32) - high
        barrier()
        x_s.slice(0, 64, dim=0).store(low.to(gl.float16))
        if TWO:
            x_s.slice(64, 64, dim=0).store(high.to(gl.float16))
        publish()
        low, high = between(x_s, below_s, ACC, TWO)
        decay = gl.exp2(gl.minimum(before_s.index(0).load(ROW)[:, None] - until_s.index(0).load(COL)[None, :], 0.0))
        decay = gl.where((row > col) & (row < rows), decay, 0.0)
        for stream in gl.static_range(STREAMS):
            change = gl.where((row >= 32) & (col < 32), low if stream == 0 else high, 0.0)
            tile = x_s.slice(64 * stream, 64, dim=0).load(ACC).to(gl.float32) - change
            out_s.index(stream).store((tile * decay).to(dtype))
        publish()
        for stream in gl.static_range(STREAMS):
            which = stream if TWO else 1
            tma.async_copy_shared_to_global(tiles, [((which * HV + hv) * chunks + c) * 64, 0], out_s.index(stream))
        tma.store_wait(0)
