"""Context parallelism: recurrences over sequences that several processes share, each holding one stretch of each.

Process r of n holds tokens [B, T_r, ...], its stretch, which follows that of process r - 1; stretches may differ in
length and may be empty. Only states [B, HV, K, V] pass between processes, whatever the length.

The state at the end of a stretch is M @ (state at its start) + (its end from a start of zero). M, the product of the
tokens' transitions, depends on keys and gates alone; for a rule that adds it is the product of the decays, a number.
Where a second state is fitted to what the first leaves over, the clip between them makes the pair nonlinear, but each
is as above once the one before is known. Two schedules follow:

"rounds": one exchange of (M, end from zero) for each state, the first state first, tells every process where it
    starts; going back, one exchange for each state in the other order, with M transposed, tells it the cotangents of
    its ends. A message holds K (K + V) numbers for each value head, between two processes K V. In the middle a stretch
    is run more than once, since a process must tell what it adds before it knows where it starts; the first process
    knows its starts and the last its cotangents, so these run theirs once. The backward runs the stretch forward once
    more, so that only its arguments are kept, and activation checkpointing works.
"rounds" in kernels for Hopper, with the delta rule: these cut a stretch into stretches of their own, which tell each
    other the same. So the messages go between those, nothing is run twice, all processes are at work at a time, and
    what is kept is what the kernels keep. A process without tokens, or with `recompute`, sends the same messages.
"chain": a process waits for the states of the one before it, runs its stretch once and hands its own on. Nothing is
    computed twice. The waiting is short since rows or heads are handed on in `PARTS` parts: while the next process
    works on one, this one works on the one after it.

The time until the last process is done, in runs of one stretch forward (f) or backward (b), with p parts; one process
with the whole sequences takes n f and n b:

| processes | rounds, forward | rounds, backward | chain |
|---|---|---|---|
| n, in kernels for Hopper, delta rule | f | b | as below |
| n = 2 | 2 f | 2 b + f | (1 + 1 / p) f or b |
| n > 2, RDN / RLA | 3.6 f / 3 f | 3 b + f | (1 + (n - 1) / p) f or b |
| n > 2, delta / decay scan | 3 f / 2 f | 2 b + f | (1 + (n - 1) / p) f or b |

so "auto" takes rounds in these kernels, and else the chain up to n = 2 p and rounds beyond. Source: derived here;
README.md of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.scan.base import Out
from whimbrel.scan.common import check_choice, check_inputs, checked_scale, choose, compute_dtype, needs_grad
from whimbrel.scan.decay import op as decay
from whimbrel.scan.delta import op as delta

if TYPE_CHECKING:
    from whimbrel.scan.kernels.shared import Neighbours, Walk

# torch 2.13 renamed it
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

SCHEDULES = ("auto", "rounds", "chain")

PARTS = 4
"""Parts in which a chain hands states on: more of them wait less, fewer fill a device better."""

Group = dist.ProcessGroup | DeviceMesh | None


def decay_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    group: Group = None,
    schedule: str = "auto",
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Out:
    """`whimbrel.scan.decay_scan` over this process's stretch of every sequence; the rest as `delta_scan` here."""
    return _one_state(
        "decay_scan", q, k, v, log_decay, beta, state, group, schedule, cu_seqlens, scale=scale, impl=impl
    )


def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    group: Group = None,
    schedule: str = "auto",
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Out:
    """`whimbrel.scan.delta_scan` over this process's stretch of every sequence.

    Tensors and options are those of `whimbrel.scan.delta_scan`; all processes of the group call it together, with
    equal shapes but for T, which may be 0, and take part in the backward together.

    group: the processes that share the sequences, in their order: a process group, one dim of a device mesh, or None
        for all processes (one, where `torch.distributed` was not initialised).
    schedule: "rounds" or "chain", as the module describes; "auto" for the cheaper one at this number of processes.
    state: [B, HV, K, V] at the start of the sequences, in the first process only; None for zero.
    cu_seqlens: None; packed sequences cannot be shared by processes yet.

    Returns Out(y of this stretch, state at its end). The last process has the final state. Gradients are those of one
    process with the whole sequences, through the state of every process as well.

    Raises ConfigError where the arguments do not fit together, UnsupportedError for cu_seqlens.
    """
    return _one_state(
        "delta_scan", q, k, v, log_decay, beta, state, group, schedule, cu_seqlens, scale=scale, impl=impl
    )


def _one_state(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    group: Group,
    schedule: str,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> Out:
    run = delta.delta_scan if op == "delta_scan" else decay.decay_scan
    line = line_of(op, group)
    if line.world == 1:
        return run(q, k, v, log_decay, beta, state=state, cu_seqlens=cu_seqlens, **options)
    line.check(op, state, cu_seqlens)
    check_inputs(op, q, k, v, {"log_decay": log_decay, "beta": beta}, {"state": state}, None)

    def on_stretch(tensors: Sequence[Tensor], starts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(run(*tensors, state=starts[0], **options))

    scale = checked_scale(op, options["scale"], q.shape[3])
    walk = None
    if op == "delta_scan" and choose(op, options["impl"], q, v, log_decay, beta, state) == "triton":
        walk = walk_of(q, v, two=False, gated=True, decayed=False, clip=None, scale=scale)
    rule = Rule(on_stretch, delta=op == "delta_scan", impl=options["impl"], walk=walk)
    y, end = over_stretches(op, rule, line, schedule, (q, k, v, log_decay, beta), None if state is None else (state,))
    return Out(y, end)


class Rule(NamedTuple):
    """A recurrence with as many states as rates, each of which reads at most those before it."""

    run: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
    """(q, k, v, log_decay, *rates), starts -> y, *ends."""
    delta: bool
    """The states obey the delta rule, else they add. The first is that of `delta_scan` or `decay_scan`."""
    impl: str
    walk: Callable[[torch.Size, torch.Size, torch.device], Walk] | None = None
    """Shapes of q and v, device -> kernels that hand states on between their stretches, where they take any time."""

    def first_end(self, tensors: Sequence[Tensor], start: Tensor) -> Tensor:
        """What the first state becomes over a stretch, without the rest of the recurrence."""
        _, k, v, log_decay, rate, *_ = tensors
        scan = delta.delta_scan if self.delta else decay.decay_scan
        return scan(k, k, v, log_decay, rate, scale=1.0, state=start, impl=self.impl).state

    def transitions(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """M of every state over a stretch: [B, HV, K, K], or [B, HV, 1, 1] where it is a number."""
        _, k, _, log_decay, *rates = tensors
        if not self.delta:
            return [log_decay.sum(1, dtype=torch.float64).exp().to(dtype)[..., None, None]] * len(rates)
        # The delta rule without values carries the identity to M. All rates at once, as value heads of the same keys.
        count, (batch, time, _, dim), heads = len(rates), k.shape, log_decay.shape[2]
        identity = torch.eye(dim, dtype=dtype, device=k.device).repeat(batch, count * heads, 1, 1)
        m = delta.delta_scan(
            k,
            k,
            k.new_zeros(batch, time, count * heads, dim),
            log_decay.repeat_interleave(count, 2),
            torch.stack(rates, -1).flatten(2),
            scale=1.0,
            state=identity,
            impl=self.impl,
        ).state
        return list(m.unflatten(1, (heads, count)).unbind(2))


def walk_of(
    q: Tensor, v: Tensor, *, two: bool, gated: bool, decayed: bool, clip: float | None, scale: float
) -> Callable[[torch.Size, torch.Size, torch.device], Walk] | None:
    """`Rule.walk` of a call by the delta rule that takes kernels."""
    from whimbrel.scan.kernels.hopper_launch import fits_any_time
    from whimbrel.scan.kernels.launch import Flags
    from whimbrel.scan.kernels.shared import walk_over

    if not fits_any_time(q, v):
        return None
    return partial(walk_over, flags=Flags(True, two, gated, decayed, clip is not None), clip=clip, scale=scale)


class Line(NamedTuple):
    """The processes in the order of their stretches, and the place of this one."""

    group: dist.ProcessGroup | None
    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Whether the sequences start here."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether the sequences end here."""
        return self.rank == self.world - 1

    @property
    def between(self) -> bool:
        """Whether there are processes in the middle, which must tell what they make of a start they do not know."""
        return self.world > 2

    def check(self, op: str, state: Any, cu_seqlens: Tensor | None) -> None:
        """Refuse what only makes sense in one process, or in the first."""
        if cu_seqlens is not None:
            raise UnsupportedError(
                f"{op}: cu_seqlens is not supported over {self.world} processes; give every sequence its own batch row"
            )
        if state is not None and not self.first:
            raise ConfigError(
                f"{op}: state is given in process {self.rank} of the group; only process 0 holds the start of the "
                "sequences, give None in the others"
            )

    def pass_on(self, state: Tensor, across: Tensor | None, *, back: bool) -> Tensor | None:
        """Tell what the state is at the end of this stretch, or going back, the cotangent at its start.

        Returns the state at its start, or the cotangent at its end; None where there is no stretch before, or behind.
        Where there is nobody in between, `state` may be written to. across: M where there is, else None.
        """
        if across is None:
            state = state.contiguous()
            dist.broadcast(state, self._name(int(back)), group=self.group)
            return state if self.rank != int(back) else None
        found = self.gather(state, across.mT if back else across)
        return _carry(found[: self.rank : -1] if back else found[: self.rank])

    def gather(self, *parts: Tensor) -> list[list[Tensor]]:
        """What every process gives, in their order; shapes and dtypes are the same in all of them."""
        flat = torch.cat([x.flatten() for x in parts])
        room = flat.new_empty(self.world, flat.numel())
        _all_gather(room.view(-1), flat, group=self.group)
        return [_unflat(row, parts) for row in room]

    def send(self, to: int, parts: Sequence[Tensor]) -> _Sent:
        """Start sending to another process of the line."""
        flat = torch.cat([x.flatten() for x in parts])
        return _Sent(dist.isend(flat, self._name(to), group=self.group), flat)

    def receive(self, sender: int, like: Sequence[Tensor]) -> list[Tensor]:
        """What another process sends: tensors like these."""
        flat = torch.cat([x.flatten() for x in like])
        dist.recv(flat, self._name(sender), group=self.group)
        return _unflat(flat, like)

    def _name(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class _Sent(NamedTuple):
    """A message under way."""

    work: Any
    flat: Tensor
    """Held until the message has left."""


def _unflat(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [x.view(y.shape) for x, y in zip(flat.split([y.numel() for y in like]), like)]


def line_of(op: str, group: Group) -> Line:
    """This process's place in the group."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ConfigError(
                f"{op}: group is a mesh of {group.ndim} dims {group.mesh_dim_names}; give one of them, mesh['name']"
            )
        group = group.get_group()
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return Line(None, 0, 1)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ConfigError(
            f"{op}: process {dist.get_rank()} is not in group; call it in the processes of the group only"
        )
    return Line(group, rank, dist.get_world_size(group))


def over_stretches(
    op: str, rule: Rule, line: Line, schedule: str, tensors: Sequence[Tensor], state: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """(y, *ends) of this process's stretch, from checked tensors q, k, v, log_decay, *rates and the first starts."""
    check_choice(op, "schedule", schedule, SCHEDULES)
    q, k, v, _, *rates = tensors
    dtype = compute_dtype(*tensors)
    if state is not None:
        state = [s.to(dtype) for s in state]
    parts = min(PARTS, max(q.shape[0], q.shape[2]))
    if schedule == "auto":
        schedule = "chain" if rule.walk is None and line.world <= 2 * parts else "rounds"
    if schedule == "rounds" and rule.walk is not None and q.shape[0] * q.shape[1] > 0:
        return _walked(rule.walk(q.shape, v.shape, q.device), line, tensors, state)
    if state is None:
        shape = (*v.shape[:1], *v.shape[2:3], k.shape[3], v.shape[3])
        state = [q.new_zeros(shape, dtype=dtype) for _ in rates]
    if schedule == "chain":
        return _chain(rule, line, tensors, state, parts)
    return _Rounds.apply(rule, line, len(tensors), *tensors, *state)


class _Rounds(torch.autograd.Function):
    """The schedule "rounds". The backward runs the stretch again, so that nothing but its arguments is kept."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, line: Line, count: int, *args: Tensor) -> tuple[Tensor, ...]:
        tensors, starts = args[:count], list(args[count:])
        between = not (line.first or line.last)
        through: list[Tensor | None] = [None] * len(starts)
        if between:
            through = [*rule.transitions(tensors, starts[0].dtype)]
        elif line.between:
            size = starts[0].shape[2] if rule.delta else 1
            through = [starts[0].new_zeros(*starts[0].shape[:2], size, size)] * len(starts)
        outputs = rule.run(tensors, starts) if line.first else None
        for n in range(len(starts)):
            if outputs is not None:
                end = outputs[1 + n]
            elif line.last:
                end = torch.zeros_like(starts[n])
            else:
                end = rule.first_end(tensors, starts[0]) if n == 0 else rule.run(tensors, starts)[1 + n]
            told = line.pass_on(end, through[n], back=False)
            starts[n] = starts[n] if told is None else told
        ctx.rule, ctx.line, ctx.count = rule, line, count
        ctx.save_for_backward(*tensors, *starts, *through)
        return rule.run(tensors, starts) if outputs is None else outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        # Read before the first message: under activation checkpointing this runs the forward with its messages again.
        saved = ctx.saved_tensors
        dy, *dends = grad_outputs
        line, count, states = ctx.line, ctx.count, len(dends)
        leaves = [x.detach().requires_grad_() for x in saved[: count + states]]
        through = saved[count + states :]
        with torch.enable_grad():
            outputs = ctx.rule.run(leaves[:count], leaves[count:])

        def pull(wanted: list[Tensor], *, again: bool) -> list[Tensor]:
            return list(torch.autograd.grad(outputs, wanted, (dy, *dends), retain_graph=again, materialize_grads=True))

        gradients = pull(leaves, again=False) if line.last else None
        for n in reversed(range(states)):
            if gradients is not None:
                start = gradients[count + n]
            elif line.first:
                start = torch.zeros_like(dends[n])
            else:
                (start,) = pull([leaves[count + n]], again=True)
            told = line.pass_on(start, through[n], back=True)
            dends[n] = dends[n] if told is None else dends[n] + told
        if gradients is None:
            gradients = pull(leaves, again=False)
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *(x if need else None for x, need in zip(gradients, needs))


def _carry(stretches: list[list[Tensor]]) -> Tensor | None:
    """The state after stretches of (end, M), of which the first tells its true end; None after none.

    In fp64, so that the precision set for products in fp32 does not matter: the products are few and small.
    """
    if not stretches:
        return None
    (end, _), *others = stretches
    at = end.double()
    for end, m in others:
        at = (m.double() @ at if m.shape[3] > 1 else m * at) + end
    return at.to(end.dtype)


def _walked(walk: Walk, line: Line, tensors: Sequence[Tensor], starts: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """The schedule "rounds" in kernels that hand states on between their own stretches, and here between processes.

    A process tells what its stretches tell each other anyway, so it runs them once.
    """
    from whimbrel.scan.kernels.launch import stacked

    start = None if starts is None else stacked(starts)
    q, k, v, log_decay, *rates = (x.contiguous() for x in tensors)
    first = rates[0] if len(rates) > 1 else None
    save = needs_grad(*tensors, start)
    y, ends = _Walked.apply(walk, line, save, q, k, v, log_decay, first, rates[-1], start)
    return y, *ends[-len(rates) :].unbind()


class _Walked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: Walk, line: Line, save: bool, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        y, ends, kept = walk.forward(inputs, _neighbours(line), save=save)
        ctx.set_materialize_grads(False)
        ctx.walk, ctx.line, ctx.dtypes = walk, line, [None if x is None else x.dtype for x in inputs[3:]]
        ctx.save_for_backward(*inputs[:3], *kept)
        return y, ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        # Read before the first message: under activation checkpointing this runs the forward with its messages again.
        q, k, v, *kept = ctx.saved_tensors
        dy, dends = grad_outputs
        dy = torch.zeros_like(v) if dy is None else dy.contiguous()
        dends = None if dends is None else dends.contiguous()
        *found, dlog, dfirst, dsecond, dstart = ctx.walk.backward(
            dy, dends, q, k, v, tuple(kept), _neighbours(ctx.line)
        )
        rest = (dlog, dfirst, dsecond, dstart)
        return None, None, None, *found, *(None if t is None else x.to(t) for x, t in zip(rest, ctx.dtypes))


def _neighbours(line: Line) -> Neighbours:
    from whimbrel.scan.kernels.shared import Neighbours

    return Neighbours(
        tuple(line),
        tells=(not line.last, not line.first),
        asks=(not line.first, not line.last),
        between=line.between,
        exchange=partial(_exchange, line),
    )


def _exchange(line: Line, state: Tensor, across: Tensor | None, *, back: bool) -> None:
    told = line.pass_on(state, across, back=back)
    if told is not None and told is not state:
        state.copy_(told)


def _chain(
    rule: Rule, line: Line, tensors: Sequence[Tensor], state: Sequence[Tensor], parts: int
) -> tuple[Tensor, ...]:
    """The schedule "chain": parts of the rows or heads, each from the process before and on to the next."""
    q, *_ = tensors
    rows = q.shape[0] >= parts
    whole = q.shape[0] if rows else q.shape[2]

    def in_parts(x: Tensor, head_dim: int) -> tuple[Tensor, ...]:
        dim = 0 if rows else head_dim
        # Value heads stay with their q/k heads.
        return x.tensor_split([whole * n // parts * (x.shape[dim] // whole) for n in range(1, parts)], dim)

    post = _Post(line)
    pieces = zip(*(in_parts(x, 2) for x in tensors))
    states = zip(*(in_parts(x, 1) for x in state))
    done = []
    for number, (piece, starts) in enumerate(zip(pieces, states)):
        if not line.first:
            starts = _Receive.apply(post, number == 0, starts, *piece)
        outputs = rule.run(piece, starts)
        done.append(outputs if line.last else _Send.apply(post, number == parts - 1, *outputs))
    y, *ends = zip(*done)
    return torch.cat(y, 0 if rows else 2), *(torch.cat(end, 0 if rows else 1) for end in ends)


class _Post:
    """Messages of one call of a chain."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.sent: list[_Sent] = []

    def send(self, to: int, parts: Sequence[Tensor]) -> None:
        """Start sending."""
        self.sent.append(self.line.send(to, parts))

    def settle(self) -> None:
        """Return when every message has left; on CUDA only the stream waits."""
        for message in self.sent:
            message.work.wait()
        self.sent.clear()


class _Receive(torch.autograd.Function):
    """The starts of a part, from the process before; their cotangents go back to it."""

    @staticmethod
    def forward(ctx: Any, post: _Post, final: bool, like: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        # The inputs are here for autograd alone: where one needs a gradient, the process before waits for cotangents.
        ctx.post, ctx.final = post, final
        return tuple(post.line.receive(post.line.rank - 1, like))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        ctx.post.send(ctx.post.line.rank - 1, grad_outputs)
        if ctx.final:
            ctx.post.settle()
        return (None,) * len(ctx.needs_input_grad)


class _Send(torch.autograd.Function):
    """The ends of a part, on to the next process; its cotangents are added to those that the ends have here."""

    @staticmethod
    def forward(ctx: Any, post: _Post, final: bool, y: Tensor, *ends: Tensor) -> tuple[Tensor, ...]:
        ctx.post = post
        post.send(post.line.rank + 1, ends)
        if final:
            post.settle()
        ctx.save_for_backward(y.new_empty(0))
        return y.view_as(y), *(end.view_as(end) for end in ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore [bad-override]
        # Under activation checkpointing this runs the forward with its messages again, before any message goes back.
        _ = ctx.saved_tensors
        dy, *dends = grad_outputs
        later = ctx.post.line.receive(ctx.post.line.rank + 1, dends)
        return None, None, dy, *(here + there for here, there in zip(dends, later))
