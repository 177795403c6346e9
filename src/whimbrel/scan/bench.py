"""What the benchmarks of all recurrences share: inputs, checks, and the shapes that are timed.

Two kinds of cases: `recurrence_cases` set the chunked form against the token-by-token reference in fp32, as it is used
on a CPU; `kernel_cases` and `step_cases` set kernels against other people's on CUDA, in bf16, and the portable forms
against each other elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from whimbrel.bench.case import Case, Rival
from whimbrel.scan import one_state, rivals
from whimbrel.scan.base import Out, State
from whimbrel.scan.decay.op import decay_scan
from whimbrel.scan.delta.op import delta_scan
from whimbrel.testing.budget import assert_close, rms_ratio

BATCH, HEADS, KEY_DIM, VALUE_DIM = 1, 4, 64, 64

ARGUMENTS = ("q", "k", "v", "log_decay", "beta", "gamma")
BUDGET = {"y": 5e-3, "q": 8e-3, "k": 3e-2, "v": 4e-2, "log_decay": 5e-2, "beta": 3e-2, "gamma": 1e-2}
"""RMS ratios to fp64 that bf16 kernels here may reach, for y and the gradients; a rival may reach four times them.

Those of k, v and beta leave room for residuals that rounding takes over the bound of the clip, whose gradient is then
another: some in 10,000, but each by its whole size.
"""

JUDGED = ((16, 2048), (1, 16_384), (1, 32_768), (1, 131_072))
"""Batch and time of the CUDA cases that have every rival."""
BETWEEN = ((8, 4096), (4, 8192), (2, 16_384), (1, 65_536))
"""Those that complete time against length: 32,768 tokens, or one longer sequence."""
PLAIN = JUDGED[:2]
"""Those in which plain PyTorch takes part; in the others it needs up to a second a call."""
BATCHES = (1, 64, 256)
"""Sequences that are decoded at once."""


def recurrence_cases(
    name: str, op: Callable[..., Any], *, rates: int, device: str, quick: bool, lengths: Sequence[int] = (1024, 4096)
) -> list[Case]:
    """The token-by-token reference (fp64 inside) against the chunked form, in fp32, forward and with backward.

    op: called as op(q, k, v, log_decay, *rates, impl=...), and returns (y, state).
    rates: tensors like beta and gamma that it takes.
    """
    found = []
    for length in (100,) if quick else lengths:
        tensors = partial(make_inputs, length, rates=rates, device=device)
        params = {"B": BATCH, "T": length, "H": HEADS, "K": KEY_DIM, "V": VALUE_DIM, "dtype": "float32"}
        check = partial(_check, name, op, tensors)
        impls = ("reference", "chunked")
        forward = {impl: partial(_forward, op, tensors, impl) for impl in impls}
        both = {impl: partial(_forward_backward, op, tensors, impl) for impl in impls}
        found.append(Case(name=name, params=params, impls=forward, check=check))
        found.append(Case(name=name, params=params, impls=both, check=check, metric="forward+backward"))
    return found


def make_inputs(length: int, *, rates: int, device: str) -> list[Tensor]:
    """q, k, v, log_decay and `rates` rates: unit keys, decays of about 0.95, rates between 0 and 1."""
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(BATCH, length, HEADS, KEY_DIM, generator=generator) for _ in range(2))
    v = torch.randn(BATCH, length, HEADS, VALUE_DIM, generator=generator)
    log_decay = -0.1 * torch.rand(BATCH, length, HEADS, generator=generator)
    gates = [torch.rand(BATCH, length, HEADS, generator=generator) for _ in range(rates)]
    unit = torch.nn.functional.normalize(k, dim=-1)
    return [x.to(device) for x in (q, unit, v, log_decay, *gates)]


def _forward(op: Callable[..., Any], tensors: Callable[[], list[Tensor]], impl: str) -> Callable[[], object]:
    inputs = tensors()

    def call() -> object:
        with torch.no_grad():
            return op(*inputs, impl=impl)

    return call


def _forward_backward(op: Callable[..., Any], tensors: Callable[[], list[Tensor]], impl: str) -> Callable[[], object]:
    inputs = [x.requires_grad_() for x in tensors()]
    weight = torch.ones_like(inputs[2])

    def call() -> object:
        y, _ = op(*inputs, impl=impl)
        return torch.autograd.grad(y, inputs, weight)

    return call


def _check(name: str, op: Callable[..., Any], tensors: Callable[[], list[Tensor]]) -> None:
    """Outputs and all gradients, the chunked form in fp32 against the recurrence in fp64."""
    results = []
    for impl in ("reference", "chunked"):
        inputs = [x.requires_grad_() for x in tensors()]
        y, _ = op(*inputs, impl=impl)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    for part, reference, got in zip(("y", "q", "k", "v", "log_decay", "beta", "gamma"), *results, strict=False):
        assert_close(f"{name} {part}", reference, got, 1e-4)


@dataclass(frozen=True)
class Problem:
    """Inputs as a trained layer sees them."""

    batch: int
    time: int
    heads: int
    dim: int
    device: str
    gates: str = "layer"
    """"layer": decays as a new layer draws them, mostly slow; "fast": sigmoid(N(0, 1))."""
    truths: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict, compare=False, repr=False)
    """What has been computed in fp64."""

    @property
    def params(self) -> dict[str, str | int]:
        """As they stand in a result line."""
        sizes: dict[str, str | int] = {"B": self.batch, "T": self.time, "H": self.heads, "D": self.dim}
        return sizes if self.gates == "layer" else sizes | {"gates": self.gates}

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k and v; gates are fp32."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def inputs(self) -> list[Tensor]:
        """q and k of unit length, v = silu(N(0, 1)), log_decay, and beta and gamma = sigmoid(N(0, 1))."""
        random = torch.Generator(self.device).manual_seed(self.time)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=random, device=self.device)

        shape = (self.batch, self.time, self.heads)
        q, k = (F.normalize(normal(*shape, self.dim), dim=-1).to(self.dtype) for _ in range(2))
        v = F.silu(normal(*shape, self.dim)).to(self.dtype)
        if self.gates == "fast":
            log_decay = F.logsigmoid(normal(*shape))
        else:
            strength, time = torch.rand(2, self.heads, generator=random, device=self.device)
            step = 1e-3 * 100**time  # log-uniform from 0.001 to 0.1
            log_decay = -(1 + 15 * strength) * F.softplus(step.expm1().log() + 0.5 * normal(*shape))
        return [q, k, v, log_decay, normal(*shape).sigmoid(), normal(*shape).sigmoid()]

    def part(self, x: Tensor) -> Tensor:
        """One head of at most two sequences of x [B, T, H, ...]: they do not depend on the others."""
        return x[:: max(1, self.batch // 2), :, self.heads // 2 : self.heads // 2 + 1]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A function that is timed, and what it must be equal to."""

    call: Callable[..., Tensor]
    """From the first `takes` of q, k, v, log_decay, beta, gamma to y."""
    truth: Callable[..., Tensor]
    """The same for fp64 tensors."""
    takes: int
    longest: int | None = None
    """Tokens that the check looks at, where the truth is quadratic in time."""
    excused: tuple[str, ...] = ()
    """Gradients that are known to be wrong and do not keep it from being timed."""

    def run(self, inputs: Sequence[Tensor], weight: Tensor, *, backward: bool) -> tuple[Tensor, ...]:
        """y, and with `backward` the gradients of (y * weight).sum() with respect to the inputs."""
        with torch.set_grad_enabled(backward):
            y = self.call(*inputs)
        return (y, *torch.autograd.grad(y, inputs, weight)) if backward else (y,)

    def set_up(self, problem: Problem, *, backward: bool) -> Callable[[], object]:
        """The call to time."""
        inputs = [x.requires_grad_(backward) for x in problem.inputs()[: self.takes]]
        return partial(self.run, inputs, torch.ones_like(inputs[2]), backward=backward)

    def check(self, problem: Problem, budget: Mapping[str, float], *, backward: bool) -> str:
        """Raise AssertionError unless every result is within its RMS ratio; a remark where an excused one is not."""
        inputs = [x[:, : self.longest].requires_grad_(backward) for x in problem.inputs()[: self.takes]]
        random = torch.Generator(problem.device).manual_seed(1)
        weight = torch.randn(inputs[2].shape, generator=random, device=problem.device).to(problem.dtype)
        got = self.run(inputs, weight, backward=backward)
        key = (self.truth, backward)
        if key not in problem.truths:
            wide = [problem.part(x).detach().double().requires_grad_(backward) for x in inputs]
            truth = Contender(call=self.truth, truth=self.truth, takes=self.takes)
            wanted = truth.run(wide, problem.part(weight).double(), backward=backward)
            problem.truths[key] = tuple(x.detach().cpu() for x in wanted)
        remarks = []
        for name, want, x in zip(("y", *ARGUMENTS), problem.truths[key], got, strict=False):
            x = problem.part(x.detach()).cpu()
            if name in self.excused and (ratio := rms_ratio(want, x)) > budget[name]:
                assert torch.isfinite(x).all(), f"{name}: not finite"
                remarks.append(f"the gradient of {name} is off by {ratio:.2g}")
            else:
                assert_close(name, want, x, budget[name])
        return ", ".join(remarks)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of [B, T, H, D] by torch's own choice of code."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@cache
def outputs(op: Callable[..., Any], impl: str = "chunked", **options: int) -> Callable[..., Tensor]:
    """`op` in the named code, y alone; the same object for the same arguments."""
    return lambda *tensors: op(*tensors, impl=impl, **options).y


def _decay_without_beta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return decay_scan(q, k, v, log_decay, torch.ones_like(log_decay), impl="chunked").y


FLA_EXCUSED = ("k", "log_decay", "beta", "gamma")
"""What its issue 640 makes wrong on Hopper with Triton 3.4 to 3.7.0."""

FLA_GDN = Contender(call=rivals.fla_delta, truth=outputs(delta_scan), takes=5, excused=FLA_EXCUSED)
FLASH_QLA = Contender(call=rivals.flash_qla_delta, truth=outputs(delta_scan), takes=5)
FLA_SIMPLE_GLA = Contender(call=rivals.fla_decay, truth=_decay_without_beta, takes=4, excused=FLA_EXCUSED)
SDPA_CUDNN = Contender(call=rivals.cudnn_softmax, truth=softmax, takes=3, longest=2048)


def kernel_cases(
    name: str,
    op: Callable[..., Any],
    *,
    takes: int,
    others: Mapping[str, Contender],
    backward: bool,
    device: str,
    quick: bool = False,
    parts: int = 0,
) -> list[Case]:
    """The case NAME_fwd, or NAME_fwd_bwd with `backward`: kernel, plain PyTorch and rivals in one run.

    op: called as op(q, k, v, ..., impl=...) with the first `takes` arguments; returns (y, state).
    others: rivals by name, on CUDA.
    parts: above 0, "triton-recompute-PARTS" is the kernel with `recompute=parts`, beside that without, on CUDA.
    """
    set_up, check = partial(Contender.set_up, backward=backward), partial(Contender.check, backward=backward)
    budget = BUDGET if device == "cuda" else dict.fromkeys(BUDGET, 1e-4)
    wide = {key: 4 * ratio for key, ratio in BUDGET.items()}
    cases = []
    for problem in _problems(device, quick):
        ours = {
            impl: Contender(call=outputs(op, impl), truth=outputs(op), takes=takes) for impl in _impls(problem, quick)
        }
        present = others if device == "cuda" else {}
        if parts and "triton" in ours and (problem.batch, problem.time) not in BETWEEN:
            again = Contender(call=outputs(op, "triton", recompute=parts), truth=outputs(op), takes=takes)
            ours[f"triton-recompute-{parts}"] = again
        if (problem.batch, problem.time) in BETWEEN:
            present = {key: contender for key, contender in present.items() if contender is SDPA_CUDNN}
        cases.append(
            Case(
                name=f"{name}_fwd_bwd" if backward else f"{name}_fwd",
                params=problem.params,
                impls={key: partial(set_up, contender, problem) for key, contender in ours.items()},
                check=partial(_check_all, {key: partial(check, x, problem, budget) for key, x in ours.items()}),
                rivals={
                    key: Rival(partial(set_up, contender, problem), partial(check, contender, problem, wide))
                    for key, contender in present.items()
                },
                metric="time",
            )
        )
    return cases


def _problems(device: str, quick: bool) -> list[Problem]:
    if device != "cuda":
        return [Problem(1, 100, 2, 16, device) if quick else Problem(1, 1024, 4, 64, device)]
    if quick:
        return [Problem(1, 2048, 16, 128, device)]
    found = [Problem(batch, time, 16, 128, device) for batch, time in (*JUDGED, *BETWEEN)]
    return [*found, Problem(1, 32_768, 16, 128, device, gates="fast")]


def _impls(problem: Problem, quick: bool) -> tuple[str, ...]:
    if problem.device != "cuda":
        return "chunked", "reference"
    return ("triton", "chunked") if quick or (problem.batch, problem.time) in PLAIN else ("triton",)


def _check_all(checks: Mapping[str, Callable[[], str]]) -> None:
    for impl, check in checks.items():
        try:
            check()
        except AssertionError as error:
            raise AssertionError(f"{impl}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """One token of every sequence, as in decoding."""

    call: Callable[..., Any]
    """call(*tensors, states=[...]) -> (y, state after): tensors [B, 1, ...]; the states may be written to."""
    truth: Callable[..., Any]
    """The recurrence, called with `state` and impl="reference"."""
    takes: int
    states: int

    def inputs(self, problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors and states of one call."""
        random = torch.Generator(problem.device).manual_seed(2)
        shape = (problem.batch, problem.heads, problem.dim, problem.dim)
        held = [0.5 * torch.randn(*shape, generator=random, device=problem.device) for _ in range(self.states)]
        return problem.inputs()[: self.takes], held

    def set_up(self, problem: Problem) -> Callable[[], object]:
        """The call to time; on CUDA the replay of a graph, since a decoder launches nothing else."""
        tensors, held = self.inputs(problem)

        @torch.no_grad()
        def run() -> object:
            return self.call(*tensors, states=held)

        return _graph(run) if problem.device == "cuda" else run

    def check(self, problem: Problem) -> str:
        """Raise AssertionError unless y and the states are right."""
        tensors, held = self.inputs(problem)
        wide = [x.double() for x in held]
        state = State(*wide) if self.states == 2 else wide[0]
        want = self.truth(*(x.double() for x in tensors), state=state, impl="reference")
        with torch.no_grad():
            y, after = self.call(*tensors, states=held)
        assert_close("y", want.y, y, BUDGET["y"] if problem.device == "cuda" else 1e-5)
        pairs = zip(want.state, after) if self.states == 2 else [(want.state, after)]
        for number, (a, b) in enumerate(pairs):
            assert_close(f"state {number}", a, b, 1e-5)
        return ""


FLA_STEP = Stepper(call=rivals.fla_delta_step, truth=delta_scan, takes=5, states=1)


def step_cases(
    name: str,
    step: Callable[..., Any],
    op: Callable[..., Any],
    *,
    takes: int,
    states: int,
    others: Mapping[str, Stepper],
    device: str,
    quick: bool = False,
) -> list[Case]:
    """The case NAME_step: kernel, plain PyTorch and rivals beside a copy of the bytes that must move.

    step: `Stepper.call` with a keyword `kernel`; op: its truth, which takes and returns `states` states.
    others: rivals by name, on CUDA.
    """
    cuda = device == "cuda"
    heads, dim = (2, 16) if quick else (16, 128) if cuda else (4, 64)
    impls = ("triton", "chunked") if cuda else ("chunked",)
    ours = {x: Stepper(call=partial(step, kernel=x == "triton"), truth=op, takes=takes, states=states) for x in impls}
    copy = Stepper(call=_copy, truth=op, takes=takes, states=states)
    cases = []
    for batch in (2,) if quick else BATCHES if cuda else (4,):
        problem = Problem(batch, 1, heads, dim, device)
        cases.append(
            Case(
                name=f"{name}_step",
                params=problem.params,
                impls={impl: partial(stepper.set_up, problem) for impl, stepper in {**ours, "copy": copy}.items()},
                check=partial(_check_all, {impl: partial(x.check, problem) for impl, x in ours.items()}),
                rivals={
                    impl: Rival(partial(stepper.set_up, problem), partial(stepper.check, problem))
                    for impl, stepper in (others if cuda else {}).items()
                },
                metric="time",
                bytes=2 * states * 4 * batch * heads * dim * dim,
            )
        )
    return cases


def single_step(*tensors: Tensor, states: Sequence[Tensor], kernel: bool, delta: bool) -> Out:
    """One token of `decay_scan`, or with `delta` of `delta_scan`."""
    q, k, v, log_decay, beta = tensors
    scale = q.shape[-1] ** -0.5
    return one_state.step(q, k, v, log_decay, beta, scale=scale, delta=delta, state=states[0], kernel=kernel)


def _copy(*tensors: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x).copy_(x) for x in states]


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    # The graph reads the call's tensors where they lie, so they must live as long as it does.
    return lambda: (graph.replay(), kept, run)
