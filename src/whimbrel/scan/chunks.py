"""The chunkwise parallel form that all recurrences here share, forward and backward, in plain PyTorch.

The sequence is cut into chunks of C tokens. What does not depend on a state is computed for all chunks at once;
only the states go through the chunks one after another. Derivation and notation: README.md in this folder.

Shapes: X = chunks * value heads, C tokens in a chunk, K and V the dims of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DEFAULT_CHUNK = 32
"""Tokens in a chunk; the fastest of 16, 32, 64 and 128 on a CPU for head dims of 48 and 64."""

TILE = 1 << 18
"""Elements of a [tokens, heads, dim] tensor that are worked on at a time on a CPU: what its caches hold."""

# exp underflows to 0 in fp64 below -745, so no decay changes; without a floor, -inf would turn into NaN in G_i - G_j.
_LOG_ZERO = -1000.0
_LOG_LEAST = -60.0


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum over the last dim of x * y, without the product in memory."""
    return torch.einsum("xci,xci->xc", x, y)


@dataclass(frozen=True)
class Layout:
    """How the tokens of all sequences lie in chunks.

    Chunks are ordered by their place in the sequence, and within it by sequence, longest first. So the chunks that
    one step of the scan handles are one slice, and they belong to a leading part of the states.
    """

    batch: int
    time: int
    chunk: int
    counts: tuple[int, ...]
    """How many sequences have an n-th chunk, for every n."""
    rows: Tensor | None = None
    """Packed only: [chunks, C], the token in each place, `time` where there is none."""
    places: Tensor | None = None
    """Packed only: [T], the place of each token in `rows`, flattened."""
    order: Tensor | None = None
    """Packed only: [N], the sequences, longest first."""

    @classmethod
    def dense(cls, batch: int, time: int, chunk: int) -> Layout:
        """Every batch row is one sequence of the same length."""
        chunk = max(1, min(chunk, time))
        return cls(batch, time, chunk, (batch,) * -(-time // chunk))

    @classmethod
    def packed(cls, cu_seqlens: Tensor, chunk: int) -> Layout:
        """The sequences stand one after the other in batch row 0; cu_seqlens [N + 1] holds their edges."""
        device = cu_seqlens.device
        edges = cu_seqlens.cpu().long()
        lengths = edges.diff()
        time = int(edges[-1])
        chunk = max(1, min(chunk, int(lengths.max())))
        order = lengths.argsort(descending=True, stable=True)
        starts, left = edges[:-1][order], lengths[order]
        slots = torch.arange(chunk)
        rows, counts = [], []
        while (active := int((left > 0).sum())) > 0:
            inside = slots < left[:active, None]
            rows.append(torch.where(inside, starts[:active, None] + slots, time))
            counts.append(active)
            starts, left = starts + chunk, left - chunk
        table = torch.cat(rows) if rows else torch.empty(0, chunk, dtype=torch.long)
        places = torch.empty(time + 1, dtype=torch.long)
        places[table.flatten()] = torch.arange(table.numel())
        return cls(1, time, chunk, tuple(counts), table.to(device), places[:time].to(device), order.to(device))

    def split(self, x: Tensor, value_heads: int, dtype: torch.dtype) -> Tensor:
        """[B, T, heads, ...] -> [X, C, ...] in `dtype`, zero where there is no token, heads spread to value heads."""
        tail, chunks = x.shape[3:], sum(self.counts)
        if self.rows is None:
            missing = len(self.counts) * self.chunk - self.time
            if missing:
                x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
            x = x.unflatten(1, (len(self.counts), self.chunk)).movedim(1, 0).movedim(3, 2)
        else:
            x = torch.cat((x[0], x.new_zeros(1, *x.shape[2:])))[self.rows].unsqueeze(0).movedim(3, 2)
        group = value_heads // x.shape[2]
        shape = (*x.shape[:3], group, *x.shape[3:])
        out = torch.empty(shape, dtype=dtype, device=x.device)
        out.copy_(x.unsqueeze(3).expand(shape))
        return out.view(chunks * value_heads, self.chunk, *tail)

    def join(self, x: Tensor, heads: int, value_heads: int, dtype: torch.dtype) -> Tensor:
        """The transpose of `split`: [X, C, ...] -> [B, T, heads, ...], value heads of one group summed."""
        tail, chunks = x.shape[2:], sum(self.counts)
        x = x.reshape(chunks, heads, value_heads // heads, self.chunk, *tail)
        x = x.squeeze(2) if value_heads == heads else x.sum(2)
        x = x.transpose(1, 2)
        if self.places is not None:
            return x.flatten(0, 1)[self.places].unsqueeze(0).to(dtype)
        x = x.unflatten(0, (len(self.counts), self.batch)).transpose(0, 1)
        out = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
        return out.view(self.batch, len(self.counts) * self.chunk, heads, *tail)[:, : self.time]

    def enter(self, state: Tensor | None, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A state [N, HV, K, V] (zeros where None) as [N * HV, K, V] in the order of the scan."""
        if state is None:
            return like.new_zeros(shape).flatten(0, 1)
        state = state.to(like.dtype)
        return (state if self.order is None else state[self.order]).flatten(0, 1)

    def leave(self, state: Tensor, value_heads: int) -> Tensor:
        """The inverse of `enter`."""
        state = state.unflatten(0, (self.sequences, value_heads))
        if self.order is None:
            return state.clone()
        out = torch.empty_like(state)
        out[self.order] = state
        return out

    @property
    def sequences(self) -> int:
        """How many sequences there are, empty ones included."""
        return self.batch if self.order is None else self.order.numel()


def in_tiles(
    run: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    states: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    chunk: int,
) -> tuple[Tensor, ...]:
    """run(layout, *tensors, *states) -> (y, *states), on a CPU in parts that stay in its caches.

    `tensors` begins with q [B, T, H, K], k and v [B, T, HV, V]. Parts are batch rows, and stretches of whole chunks
    of a row, between which the states are handed on; the results are those of a single run.
    """
    q, _, v, *_ = tensors
    batch, time, value_heads = v.shape[:3]
    tokens = TILE // (value_heads * max(q.shape[3], v.shape[3], 1))
    if cu_seqlens is not None:
        return run(Layout.packed(cu_seqlens, chunk), *tensors, *states)
    if q.device.type != "cpu" or batch * time <= tokens:
        return run(Layout.dense(batch, time, chunk), *tensors, *states)
    rows, stretch = max(1, tokens // time), max(1, tokens // chunk) * chunk
    parts = []
    for n, part in enumerate(zip(*(x.split(rows) for x in tensors))):
        now = [None if s is None else s[n * rows : (n + 1) * rows] for s in states]
        outputs = []
        for piece in zip(*(x.split(stretch, 1) for x in part)):
            y, *now = run(Layout.dense(piece[0].shape[0], piece[0].shape[1], chunk), *piece, *now)
            outputs.append(y)
        parts.append((_joined(outputs, 1), *now))
    return tuple(_joined(x, 0) for x in zip(*parts))


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


class Ground(NamedTuple):
    """What all streams of one call share: keys, gates and their products within the chunks."""

    steps: list[int]
    k: Tensor
    """[X, C, K]."""
    alpha: Tensor
    """[X, C, 1]: decay of each token."""
    before: Tensor
    """[X, C, 1]: decay from the chunk's start up to, not including, the token."""
    after: Tensor
    """[X, C, 1]: decay from, not including, the token to the chunk's end."""
    whole: Tensor
    """[X, 1, 1]: decay over the chunk."""
    between: Tensor
    """[X, C, C]: decay of the tokens between j and i, both left out; 0 unless j < i."""
    keys: Tensor
    """[X, C, C]: between * (k k^T)."""
    heads: Tensor
    """[X, C, K]: before * k, which reads a chunk's start."""
    tails: Tensor
    """[X, C, K]: after * k, which writes to a chunk's end."""


def ground(layout: Layout, k: Tensor, log_decay: Tensor) -> Ground:
    """The shared quantities, from keys [X, C, K] and fp64 log_decay [X, C]."""
    value_heads = log_decay.shape[0] // max(1, sum(layout.counts))
    log_decay = log_decay.clamp(min=_LOG_ZERO)
    until = log_decay.cumsum(-1)
    before = until - log_decay
    total = until[:, -1:]
    alpha = log_decay.exp().to(k.dtype)[..., None]
    before_, after, whole = (_decay(x).to(k.dtype)[..., None] for x in (before, total - until, total))
    # Both terms of a difference grow over the chunk while it may stay small, so they come in two parts each.
    (high_i, low_i), (high_j, low_j) = _parts(before, k.dtype), _parts(until, k.dtype)
    between = (high_i[:, :, None] - high_j[:, None, :]).add_(low_i[:, :, None]).sub_(low_j[:, None, :])
    between = _decay(between).tril_(-1)
    keys = torch.bmm(k, k.mT).mul_(between)
    steps = [n * value_heads for n in layout.counts]
    return Ground(steps, k, alpha, before_, after, whole, between, keys, k * before_, k * after)


def _decay(log: Tensor) -> Tensor:
    """exp(log), and 1e-26 for anything less: subnormal factors make products 100 times slower."""
    return log.clamp(_LOG_LEAST, 0).exp_()


def _parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp64 x as a sum of two tensors of `dtype`."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)


class Stream(NamedTuple):
    """One linear state going through the chunks: S_t = alpha_t S_(t-1) + write_t k_t^T."""

    rate: Tensor
    """[X, C, 1]: how much of the error is written (beta or gamma)."""
    solve: Tensor | None
    """[X, C, C]: `resolvent`, for a stream that obeys the delta rule; None for one that adds its values."""
    values: Tensor
    """[X, C, V]."""
    write: Tensor
    """[X, C, V]: rate * values, for the delta rule rate * (values - alpha * seen)."""
    seen: Tensor | None
    """[X, C, V]: S_(t-1) k_t, the prediction at the key, before the token's own decay and write."""
    starts: Tensor
    """[X, K, V]: the state at the start of every chunk."""
    ends: Tensor
    """[X, K, V]: the state at the end of every chunk."""
    final: Tensor
    """[N * HV, K, V]: the state after the last token."""


def resolvent(g: Ground, rate: Tensor) -> Tensor:
    """Z = (I + A D)^-1 A with A = g.keys and D = diag(rate * alpha): then seen = H + Z (rate * (v - alpha * H))."""
    return torch.linalg.solve_triangular(g.keys * (rate * g.alpha).mT, g.keys, upper=False, unitriangular=True)


def scan(g: Ground, v: Tensor, rate: Tensor, state: Tensor, *, delta: bool, want_seen: bool) -> Stream:
    """Send a state [N * HV, K, V] through the chunks.

    v [X, C, V] and rate [X, C, 1]. With `delta` the delta rule corrects what is written, else v is added as it is.
    `seen` is returned where the delta rule needs it anyhow or `want_seen` asks for it.
    """
    states, blocks = _blocks(g.steps, state)
    blocks[0].copy_(state)
    nexts, whole = blocks[1:], g.whole.split(g.steps)
    if not delta:
        write = rate * v
        for now, added, decay, next_ in zip(blocks, torch.bmm(g.tails.mT, write).split(g.steps), whole, nexts):
            torch.addcmul(added, now[: len(added)], decay, out=next_)
        starts, ends, final = _read_blocks(g.steps, states, blocks)
        seen = torch.bmm(g.heads, starts).baddbmm_(g.keys, write) if want_seen else None
        return Stream(rate, None, v, write, seen, starts, ends, final)
    solve = resolvent(g, rate)
    scaled, shrink = rate * v, rate * g.alpha
    seen, write = torch.empty_like(v), torch.empty_like(v)
    parts = (x.split(g.steps) for x in (g.heads, g.tails.mT, solve, scaled, shrink, seen, write))
    for now, decay, next_, head, tail, z, want, cut, p, u in zip(blocks, whole, nexts, *parts):
        now = now[: len(head)]
        h = torch.bmm(head, now)
        torch.baddbmm(h, z, torch.addcmul(want, cut, h, value=-1), out=p)
        torch.addcmul(want, cut, p, value=-1, out=u)
        torch.mul(now, decay, out=next_).baddbmm_(tail, u)
    return Stream(rate, solve, v, write, seen, *_read_blocks(g.steps, states, blocks))


def _blocks(steps: list[int], state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Room for the states of a scan, and its parts: the initial state, then the ends of the chunks of every step.

    Sequences stand longest first, so the leading entries of a part are the starts of the next step's chunks, and
    what is left over is final.
    """
    sizes = [len(state), *steps]
    room = state.new_empty(sum(sizes), *state.shape[1:])
    return room, list(room.split(sizes))


def _read_blocks(steps: list[int], room: Tensor, blocks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The starts and the ends of the chunks, and the final states."""
    ends = room[len(blocks[0]) :]
    if len(set(steps)) <= 1 and steps[:1] == [len(blocks[0])]:
        return room[: len(ends)], ends, blocks[-1]
    counts = [*steps, 0]
    starts = torch.cat([block[:n] for block, n in zip(blocks, counts)])
    final = torch.cat([block[n:] for block, n in reversed(list(zip(blocks, counts)))])
    return starts, ends, final


class Pull(NamedTuple):
    """Cotangents of a stream."""

    write: Tensor
    """[X, C, V]."""
    seen: Tensor | None
    """[X, C, V]; None where the state was never read at a key."""
    ends: Tensor
    """[X, K, V]: of the state at the end of every chunk."""
    initial: Tensor
    """[N * HV, K, V]: of the initial state."""
    rate: Tensor
    """[X, C]."""
    level: Tensor | None
    """[X, C]: <stream.seen, seen>, the change with the logarithm of a common factor of `seen`."""


def scan_back(g: Ground, stream: Stream, write: Tensor, seen: Tensor | None, starts: Tensor, final: Tensor) -> Pull:
    """Carry cotangents back through `scan`.

    write [X, C, V], seen [X, C, V] and starts [X, K, V] are the cotangents from outside the scan, final
    [N * HV, K, V] that of the final state; write is overwritten.
    """
    room, blocks = _blocks(g.steps, final)
    for block, n in zip(blocks, [*g.steps, 0]):
        if n < len(block):
            block[n:].copy_(final[n : len(block)])
    ends, initial, whole = room[len(final) :], blocks[0], g.whole.split(g.steps)
    if stream.solve is None:
        if seen is not None:
            starts = torch.baddbmm(starts, g.heads.mT, seen)
        for now, added, decay, end in reversed(list(zip(blocks, starts.split(g.steps), whole, blocks[1:]))):
            torch.addcmul(added, end, decay, out=now[: len(added)])
        write = write.baddbmm_(g.tails, ends)
        if seen is not None:
            write = write.baddbmm_(g.keys.mT, seen)
        return _pull(stream, stream.values, write, seen, ends, initial)
    shrink = stream.rate * g.alpha
    outside = torch.zeros_like(write) if seen is None else seen
    total = torch.empty_like(write)
    parts = (x.split(g.steps) for x in (starts, g.heads.mT, g.tails, stream.solve.mT, shrink, write, outside, total))
    for now, decay, end, added, head, tail, z, cut, du, dx, dp in reversed(
        list(zip(blocks, whole, blocks[1:], *parts))
    ):
        du.baddbmm_(tail, end)
        du.baddbmm_(z, torch.addcmul(dx, cut, du, value=-1))
        torch.addcmul(dx, cut, du, value=-1, out=dp)
        torch.addcmul(added, end, decay, out=now[: len(added)]).baddbmm_(head, dp)
    assert stream.seen is not None
    error = torch.addcmul(stream.values, g.alpha, stream.seen, value=-1)
    return _pull(stream, error, write, total, ends, initial)


def _pull(stream: Stream, error: Tensor, write: Tensor, seen: Tensor | None, ends: Tensor, initial: Tensor) -> Pull:
    level = None if seen is None or stream.seen is None else row_dot(stream.seen, seen)
    return Pull(write, seen, ends, initial, row_dot(write, error), level)


class Query(NamedTuple):
    """The queries' side of the chunks."""

    q: Tensor
    """[X, C, K], scaled."""
    decayed: Tensor
    """[X, C, K]: before * q."""
    keys: Tensor
    """[X, C, C]: between * (q k^T)."""
    own: Tensor
    """[X, C, 1]: q_t . k_t."""


def query(g: Ground, q: Tensor) -> Query:
    """The products of queries [X, C, K] with the shared quantities."""
    scores = torch.bmm(q, g.k.mT)
    own = scores.diagonal(dim1=1, dim2=2).clone()[..., None]
    return Query(q, q * g.before, scores.mul_(g.between), own)


def read_before(x: Query, stream: Stream) -> Tensor:
    """S_(t-1) q_t [X, C, V]."""
    return torch.bmm(x.decayed, stream.starts).baddbmm_(x.keys, stream.write)


def read_after(g: Ground, x: Query, stream: Stream) -> Tensor:
    """S_t q_t [X, C, V]."""
    return torch.addcmul(read_before(x, stream).mul_(g.alpha), x.own, stream.write)


class Read(NamedTuple):
    """A stream, its cotangents, and the cotangent of `read_before` through which it reached the output."""

    stream: Stream
    pull: Pull
    before: Tensor


class Gradients(NamedTuple):
    """Gradients of what the streams share, in chunks."""

    q: Tensor
    k: Tensor
    log_decay: Tensor


def shared_gradients(g: Ground, x: Query, reads: Sequence[Read], own: Tensor | None, log_decay: Tensor) -> Gradients:
    """Sum the gradients of q, k and the decay over all streams before the products with q and k are formed.

    own [X, C]: cotangent of x.own, None where no stream is read after its write. log_decay [X, C]: what came
    through `alpha` itself, to which the rest is added.
    """
    scores = _sum_of_products((r.before, r.stream.write) for r in reads).mul_(g.between)
    rising = torch.zeros(scores.shape[:2], dtype=torch.float64, device=scores.device)
    falling = torch.zeros_like(rising)
    if own is not None:
        scores.diagonal(dim1=1, dim2=2).copy_(own)
        correction = own * x.own[..., 0]
        rising -= correction
        falling += correction
    dq = _sum_of_products((r.before, r.stream.starts) for r in reads).mul_(g.before).baddbmm_(scores, g.k)
    rising += row_dot(dq, x.q)
    dk = _sum_of_products((r.stream.write, r.pull.ends) for r in reads).mul_(g.after)
    dk.baddbmm_(scores.mT, x.q)
    seen = [(r.pull.seen, r.stream) for r in reads if r.pull.seen is not None]
    if seen:
        keys = _sum_of_products((d, s.write) for d, s in seen).mul_(g.between)
        dk.baddbmm_(keys + keys.mT, g.k)
        dk.addcmul_(_sum_of_products((d, s.starts) for d, s in seen), g.before)
    for r in reads:
        if r.pull.level is not None:
            rising += r.pull.level
        falling -= r.stream.rate[..., 0] * r.pull.rate
        falling[:, -1] += row_dot(r.pull.ends, r.stream.ends).sum(-1)
    # `until` of token i is the sum of log_decay up to i, `before` the same without i.
    total = rising + falling
    return Gradients(dq, dk, log_decay + total.flip(-1).cumsum(-1).flip(-1) - rising)


def _sum_of_products(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of a b^T over (a, b), each [X, C, D] or [X, K, V]."""
    total: Tensor | None = None
    for a, b in pairs:
        total = torch.bmm(a, b.mT) if total is None else total.baddbmm_(a, b.mT)
    assert total is not None
    return total


def keep(ctx: Any, *parts: tuple) -> None:
    """Save named tuples of tensors (and of plain values) for the backward of an autograd function."""
    fields = [field for part in parts for field in part]
    ctx.kept_kinds = [type(part) for part in parts]
    ctx.kept_plain = [None if isinstance(field, Tensor) else field for field in fields]
    ctx.save_for_backward(*(field if isinstance(field, Tensor) else None for field in fields))


def kept(ctx: Any) -> list[Any]:
    """The named tuples given to `keep`."""
    fields = iter([p if t is None else t for p, t in zip(ctx.kept_plain, ctx.saved_tensors)])
    return [kind(*(next(fields) for _ in kind._fields)) for kind in ctx.kept_kinds]
