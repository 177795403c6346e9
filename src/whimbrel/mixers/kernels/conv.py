"""Triton: causal depthwise convolution with SiLU, and optionally unit length for every head of the result.

The tokens of all sequences lie in a line of rows, which is cut into runs of at most ROWS rows of one sequence. A
program takes RUNS runs by a block of channels and walks along all of them at once, so that a row read once meets every
tap in registers. A run at the start of its sequence begins with the state where others have the rows before them.

The backward forms the pre-activations anew and walks SIZE - 1 rows further than its run, since rows act on those
behind them. It also finishes the SIZE - 1 rows before the run: at the start of a sequence those are the state.
"""

# ruff: noqa: RUF005 - Triton does not know starred expressions.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.launches import launch

_TILE = 1024
"""Elements of RUNS rows: 8 for each thread, in 16-bit types one load of 16 bytes."""
_AHEAD = 2
"""Rows that are on their way from memory while one is worked on."""


@triton.jit
def _find(table, runs, time, RUNS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr):
    """First row of each run, edges of its sequence, number of that, and whether the run is the first of it."""
    run = (tl.program_id(0) // BLOCKS).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    known = run < runs
    if PACKED:
        start = tl.load(table + run, mask=known, other=0)
        begin = tl.load(table + runs + run, mask=known, other=0)
        end = tl.load(table + 2 * runs + run, mask=known, other=0)
        sequence = tl.load(table + 3 * runs + run, mask=known, other=-1)
    else:
        each = (time + ROWS - 1) // ROWS
        sequence = tl.where(known, run // each, -1)
        begin = sequence * time
        start = begin + (run - sequence * each) * ROWS
        end = tl.where(known, begin + time, begin)
    return start, begin, end, sequence, (start == begin) & (sequence >= 0)


@triton.jit
def _channels(CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The program's channels, and which of them there are."""
    lane = tl.arange(0, BLOCK)
    channel = (tl.program_id(0) % BLOCKS) * WIDTH + lane
    return channel, (lane < WIDTH) & (channel < CHANNELS)


@triton.jit
def _load_rows(x, row, begin, end, channel, live, CHANNELS: tl.constexpr):
    known = ((row >= begin) & (row < end))[:, None] & live[None, :]
    return tl.load(x + row[:, None] * CHANNELS + channel[None, :], mask=known, other=0.0)


@triton.jit
def _load_taps(weight, channel, live, SIZE: tl.constexpr):
    """[1, channels] for every tap, that of the row itself first."""
    taps = ()
    for back in tl.static_range(SIZE):
        tap = tl.load(weight + channel * SIZE + (SIZE - 1 - back), mask=live, other=0.0)
        taps = taps + (tap.to(tl.float32)[None, :],)
    return taps


@triton.jit
def _load_past(
    x, state, state_stride, start, begin, end, sequence, fresh, channel, live,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The SIZE - 1 rows before each run, the latest first."""
    past = ()
    for back in tl.static_range(1, SIZE):
        rows = _load_rows(x, start - back, begin, end, channel, live, CHANNELS).to(tl.float32)
        if STATE:
            at = sequence[:, None] * state_stride + channel[None, :] * (SIZE - 1) + (SIZE - 1 - back)
            rows += tl.load(state + at, mask=fresh[:, None] & live[None, :], other=0.0).to(tl.float32)
        past = past + (rows,)
    return past


@triton.jit
def _activate(window, taps, eps, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """(result, factor that gives it its length, slope of silu) from a row and those before it."""
    pre = window[0] * taps[0]
    for back in tl.static_range(1, SIZE):
        pre += window[back] * taps[back]
    gate = tl.sigmoid(pre)
    y = pre * gate
    slope = gate * (1 + pre - y)
    inverse = 1.0
    if UNIT:
        inverse = tl.rsqrt(tl.sum(y * y, 1) + eps)[:, None]
        y *= inverse
    return y, inverse, slope


@triton.jit(do_not_specialize=["runs", "time", "state_stride"])
def _forward(
    x, weight, state, state_stride, table, y, runs, time, eps,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    RUNS: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    start, begin, end, sequence, fresh = _find(table, runs, time, RUNS, ROWS, BLOCKS, PACKED)
    channel, live = _channels(CHANNELS, WIDTH, BLOCK, BLOCKS)
    taps = _load_taps(weight, channel, live, SIZE)
    past = _load_past(
        x, state, state_stride, start, begin, end, sequence, fresh, channel, live, CHANNELS, SIZE, STATE
    )  # fmt: skip
    end = tl.minimum(end, start + ROWS)
    ahead = ()
    for step in tl.static_range(AHEAD):
        ahead = ahead + (_load_rows(x, start + step, begin, end, channel, live, CHANNELS),)
    for step in range(ROWS):
        row = start + step
        window = (ahead[0].to(tl.float32),) + past
        ahead = ahead[1:] + (_load_rows(x, row + AHEAD, begin, end, channel, live, CHANNELS),)
        past = window[: SIZE - 1]
        result, _, _ = _activate(window, taps, eps, SIZE, UNIT)
        at = row[:, None] * CHANNELS + channel[None, :]
        tl.store(y + at, result.to(y.dtype.element_ty), mask=(row < end)[:, None] & live[None, :])


@triton.jit(do_not_specialize=["runs", "time", "state_stride"])
def _backward(
    dy, x, weight, state, state_stride, table, dx, dstate, dtaps, runs, time, eps,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    RUNS: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    start, begin, end, sequence, fresh = _find(table, runs, time, RUNS, ROWS, BLOCKS, PACKED)
    channel, live = _channels(CHANNELS, WIDTH, BLOCK, BLOCKS)
    taps = _load_taps(weight, channel, live, SIZE)
    past = _load_past(
        x, state, state_stride, start, begin, end, sequence, fresh, channel, live, CHANNELS, SIZE, STATE
    )  # fmt: skip
    zero = tl.zeros((RUNS, BLOCK), tl.float32)
    # `due` holds what the rows before the present one have of their dx so far, the latest first.
    due, sums = (), (zero,)
    for _ in tl.static_range(1, SIZE):
        due = due + (zero,)
        sums = sums + (zero,)
    ahead, grad_ahead = (), ()
    for step in tl.static_range(AHEAD):
        ahead = ahead + (_load_rows(x, start + step, begin, end, channel, live, CHANNELS),)
        grad_ahead = grad_ahead + (_load_rows(dy, start + step, begin, end, channel, live, CHANNELS),)
    for step in range(ROWS + SIZE - 1):
        row = start + step
        window = (ahead[0].to(tl.float32),) + past
        grad = grad_ahead[0].to(tl.float32)
        ahead = ahead[1:] + (_load_rows(x, row + AHEAD, begin, end, channel, live, CHANNELS),)
        grad_ahead = grad_ahead[1:] + (_load_rows(dy, row + AHEAD, begin, end, channel, live, CHANNELS),)
        past = window[: SIZE - 1]
        y, inverse, slope = _activate(window, taps, eps, SIZE, UNIT)
        if UNIT:
            grad = inverse * (grad - y * tl.sum(grad * y, 1)[:, None])
        grad *= slope
        own = tl.where(step < ROWS, grad, 0.0)
        added, finished = (), (grad * taps[0],)
        for back in tl.static_range(SIZE):
            added = added + (sums[back] + own * window[back],)
        for back in tl.static_range(1, SIZE):
            finished = finished + (due[back - 1] + grad * taps[back],)
        sums, due = added, finished[: SIZE - 1]
        row -= SIZE - 1
        known = ((row >= start) & (row < end))[:, None] & live[None, :]
        at = row[:, None] * CHANNELS + channel[None, :]
        tl.store(dx + at, finished[SIZE - 1].to(dx.dtype.element_ty), mask=known)
        if STATE:
            known = (fresh & (step < SIZE - 1))[:, None] & live[None, :]
            at = (sequence[:, None] * CHANNELS + channel[None, :]) * (SIZE - 1) + step
            tl.store(dstate + at, finished[SIZE - 1].to(dstate.dtype.element_ty), mask=known)
    for back in tl.static_range(SIZE):
        at = ((tl.program_id(0) // BLOCKS).to(tl.int64) * SIZE + SIZE - 1 - back) * CHANNELS + channel
        tl.store(dtaps + at, tl.sum(sums[back], 0), mask=live)


def forward(
    x: Tensor, weight: Tensor, state: Tensor | None, table: Tensor | None, rows: int, head: int, eps: float
) -> Tensor:
    """y [B, T, C]; arguments as in `ops.short_conv`."""
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    sizes, runs, tiles = _sizes(x, weight, table, rows, head)
    launch(
        _forward, tiles * sizes["BLOCKS"],
        x, weight.contiguous(), *_state(state), table, y, runs, x.shape[1], eps,
        **sizes, STATE=state is not None, AHEAD=_AHEAD,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    table: Tensor | None,
    rows: int,
    head: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and state (empty without a state), each in its dtype."""
    dy, x = dy.contiguous(), x.contiguous()
    sizes, runs, tiles = _sizes(x, weight, table, rows, head)
    dx = torch.empty_like(x)
    dstate = x.new_empty(0) if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    # Each program leaves its share of the weight's gradient; added here, their order is always the same.
    dtaps = x.new_empty(tiles, sizes["SIZE"], sizes["CHANNELS"], dtype=torch.float32)
    launch(
        _backward, tiles * sizes["BLOCKS"],
        dy, x, weight.contiguous(), *_state(state), table, dx, dstate, dtaps, runs, x.shape[1], eps,
        **sizes, STATE=state is not None, AHEAD=_AHEAD,
    )  # fmt: skip
    return dx, dtaps.sum(0).t().unsqueeze(1).to(weight.dtype, memory_format=torch.contiguous_format), dstate


def _state(state: Tensor | None) -> tuple[Tensor | None, int]:
    """`state` with every row contiguous, and the distance between its rows."""
    if state is None:
        return None, 0
    if state.stride()[1:] != (state.shape[2], 1):
        state = state.contiguous()
    return state, state.stride(0)


def _sizes(
    x: Tensor, weight: Tensor, table: Tensor | None, rows: int, head: int
) -> tuple[dict[str, int | bool], int, int]:
    """Constants of the kernels, the number of runs, and that of their tiles."""
    batch, time, channels = x.shape
    width = head or min(128, channels)
    block = triton.next_power_of_2(width)
    sizes = {
        "CHANNELS": channels,
        "SIZE": weight.shape[2],
        "WIDTH": width,
        "BLOCK": block,
        "BLOCKS": triton.cdiv(channels, width),
        "RUNS": max(1, _TILE // block),
        "ROWS": rows,
        "UNIT": head > 0,
        "PACKED": table is not None,
    }
    runs = batch * triton.cdiv(time, rows) if table is None else table.shape[1]
    return sizes, runs, triton.cdiv(runs, sizes["RUNS"])
