"""Kernels for Hopper that hand states on to those of other processes, here threads, against the whole sequence."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from whimbrel.scan.kernels.test_hopper import hopper  # noqa: F401 - a fixture
from whimbrel.scan.parallel import Line, Rule, over_stretches
from whimbrel.testing.budget import assert_close
from whimbrel.testing.recurrence import RECURRENCES, Shape, make_inputs

pytest.importorskip("triton.experimental.gluon")


class Table:
    """Where threads put what they tell each other. One of them is at work: Triton's interpreter has room for one."""

    def __init__(self, world: int) -> None:
        self.told: list[list[Tensor]] = [[] for _ in range(world)]
        self.barrier, self.turn = threading.Barrier(world, timeout=120), threading.Lock()

    def exchange(self, rank: int, parts: list[Tensor]) -> list[list[Tensor]]:
        self.told[rank] = [x.detach().clone() for x in parts]
        self.turn.release()
        try:
            self.barrier.wait()
            found = list(self.told)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return found


class Threads(Line):
    """Processes of a line that are threads; the table stands in the place of the group."""

    def pass_on(self, state: Tensor, across: Tensor | None, *, back: bool) -> Tensor | None:
        if across is not None:
            return super().pass_on(state, across, back=back)
        others = self.gather(state)
        return others[back][0] if self.rank != back else None

    def gather(self, *parts: Tensor) -> list[list[Tensor]]:
        return self.group.exchange(self.rank, list(parts))  # pyrefly: ignore [missing-attribute]


@pytest.mark.parametrize(
    ("name", "lengths"), [("delta", (70, 1)), ("rdn", (5, 70)), ("rdn", (66, 3, 70))], ids=["delta", "rdn", "three"]
)
def test_stretches_of_several_processes_equal_the_whole(hopper, name: str, lengths, monkeypatch):  # noqa: F811
    monkeypatch.setattr(hopper, "fits_any_time", lambda *_: True)
    from whimbrel.scan.kernels.launch import Flags
    from whimbrel.scan.kernels.shared import Walk

    recurrence, two, world = RECURRENCES[name], name == "rdn", len(lengths)
    inputs = make_inputs(recurrence, Shape(1, sum(lengths), 1, 2, 64, 64), dtype=torch.float32)
    clip = 1.0 if two else None
    random = torch.Generator().manual_seed(1)
    weight, *end_weights = (torch.randn(x.shape, generator=random) for x in (inputs.tensors[2], *inputs.states))
    edges = [0, *accumulate(lengths)]

    def pulled(y: Tensor, ends: list[list[Tensor]], leaves: list[Tensor], part: slice) -> list[Tensor]:
        """y, and gradients of a sum in which it counts, and the states that each process ends with."""
        total = (y * weight[:, part].to(y.dtype)).sum()
        total = total + torch.stack([(s * w).sum() for end in ends for s, w in zip(end, end_weights)]).sum()
        return [y.detach(), *torch.autograd.grad(total, leaves, allow_unused=True)]

    exact = [x.double().requires_grad_() for x in (*inputs.tensors, *inputs.states)]
    sequence, starts = exact[: len(inputs.tensors)], exact[len(inputs.tensors) :]
    found = [recurrence([x[:, :edge] for x in sequence], starts, impl="chunked") for edge in edges[1:]]
    want = pulled(found[-1][0], [list(ends) for _, ends in found], exact, slice(None))

    table = Table(world)
    rule = Rule(
        lambda *_: (),
        delta=True,
        impl="triton",
        walk=partial(Walk, flags=Flags(True, two, True, False, two), clip=clip, scale=64**-0.5),
    )

    def process(rank: int) -> list[Tensor]:
        part = slice(*list(pairwise(edges))[rank])
        line = Threads(table, rank, world)  # pyrefly: ignore [bad-argument-type]
        tensors = [x[:, part].clone().requires_grad_() for x in inputs.tensors]
        states = [x.clone().requires_grad_() for x in inputs.states]
        with table.turn:
            y, *ends = over_stretches(name, rule, line, "rounds", tensors, states if line.first else None)
            return pulled(y, [ends], [*tensors, *states], part)

    with ThreadPoolExecutor(world) as pool:
        found = list(pool.map(process, range(world)))
    names = ["y", *"qkv", "log_decay", *recurrence.rates]
    for n, what in enumerate(names):
        assert_close(what, want[n], torch.cat([one[n] for one in found], 1), 2e-5)
    for n, state in enumerate(want[len(names) :]):
        assert_close(f"state {n}", state, found[0][len(names) + n], 2e-5)
