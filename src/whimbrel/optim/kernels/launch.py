"""A step of B matrices by the kernels, without host reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from whimbrel.launches import launch
from whimbrel.optim import counter, lowrank
from whimbrel.optim.amp import GradScale
from whimbrel.optim.kernels import passes
from whimbrel.optim.kernels.tables import Batch, Table
from whimbrel.optim.layout import BASIS_GROUP, MOMENT_BLOCK
from whimbrel.optim.sharding import Message

TILE_ELEMENTS = 1 << 11
"""Elements that a program of the low-rank kernels holds of each tensor."""
HOPPER_RANK = 512
"""Largest rank of the kernels for Hopper: 128 rows of a factor stay in shared memory."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}


class Tile(NamedTuple):
    """Two sides of a program's tile of the gradient, columns of the basis, warps and the depth of the pipeline."""

    one: int
    other: int
    columns: int
    warps: int
    stages: int


class Rule(NamedTuple):
    """What a method makes of the norms of a step: its numbers, and names of its scalars in the state."""

    factors: lowrank.Factors
    scalars: Sequence[str]


class Settings(NamedTuple):
    """Options of a group that every method has; `stochastic`: of the rounding of weights in bfloat16."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    stochastic: bool


def fused_step(
    batch: Batch,
    rule: Rule,
    settings: Settings,
    amp: GradScale,
    *,
    lr: float | Tensor,
    bases: Tensor,
    drawn: Tensor | None,
    square: Tensor | None = None,
) -> Generator[Message, Any]:
    """Step matrices of one shape, dtype and layout in place: weights, moments, step and the method's scalars.

    The matrices are whole or with whole slices here, or their slices shared out among processes. Where anything is
    elsewhere the step pauses for what its processes have to tell each other: it yields a message, the same on all of
    them but for its content, and wants the answer, [..., n] as the content, which lies anywhere.
    bases [B]: `counter.base` words of the matrices. drawn [B]: words from which the bases are drawn, None where the
    states hold them. square: a scalar to which the squared norm of the gradients' slices here, unscaled, is added.
    """
    step, shared = _Step(batch, drawn, amp), batch.matrices[0].spread.shares_slices
    step.project()
    if shared:
        step.take_share((yield Message("scatter", step.parts())))
    if square is not None:
        step.note(square)
    if step.total is not None:
        step.total.copy_((yield Message("sum", step.own_sums().sum(-1))))
    step.settle(bases, settings.betas)
    step.adam(settings)
    if step.total is not None and rule.factors.measures:
        step.measured = step.measure(rule.factors)
        step.measured.copy_((yield Message("sum", step.measured.flatten().clone())).view_as(step.measured))
    step.coefficients(rule, lr, settings.weight_decay)
    inside, outside = rule.factors.inside is not None, rule.factors.outside is not None
    if inside:
        step.blend(has_low=outside)
    if shared:
        step.take_all((yield Message("gather", step.found(inside, outside))), inside, outside)
    step.write(has_inside=inside, has_grad=outside, stochastic=settings.stochastic)


class _Step:
    """The tensors of a batch's step, and its passes."""

    def __init__(self, batch: Batch, drawn: Tensor | None, amp: GradScale) -> None:
        self.batch, self.amp = batch, amp
        one = batch.matrices[0]
        self.weight, self.grad, self.spread = one.weight, one.grad, one.spread
        self.first_row, self.first_column = one.first
        self.first_slice = 0 if self.spread.owned is None else self.spread.owned.start
        self.coded = "exp_avg_scale" in one.state
        self.moment = one.state["exp_avg"]
        self.number, device, (self.s, self.r) = len(batch.matrices), self.weight.device, self.moment.shape
        self.across, self.along = (1, 0) if batch.left else (0, 1)
        self.d = self.weight.shape[self.along]
        # slices that are read and written here, of which s are stepped
        self.here = self.weight.shape[self.across]
        self.dot = torch.bfloat16 if self.grad.dtype == torch.bfloat16 else torch.float32
        number, s, r = self.number, self.s, self.r

        self.grads = batch.table("grad", [matrix.grad for matrix in batch.matrices])
        self.weights = batch.table("weight", [matrix.weight for matrix in batch.matrices])
        aligned = min(self.grads.alignment, self.weights.alignment)
        hopper = batch.hopper and r % 8 == 0 and r <= HOPPER_RANK and aligned == 16
        self._made, self.bases = _bases(batch, drawn, (number, self.d, r), self.dot, hopper)
        self.hopper = hopper and self.bases.alignment == 16
        self.types: dict[str, Any] = {
            "GRAD": _DTYPES[self.grad.dtype],
            "BASIS": _DTYPES[self.bases.lowest.dtype],
            "DOT": _DTYPES[self.dot],
            "PRECISION": "tf32x3" if self.dot == torch.float32 else "tf32",
            "ALIGN": min(aligned, self.bases.alignment),
        }
        self.low, self.direction = torch.empty(2, number, s, r, dtype=self.dot, device=device).unbind()
        self.projected, self.inside = self.low, self.direction
        if self.spread.shares_slices:
            self.projected = torch.empty(number, self.here, r, dtype=self.dot, device=device)
        # each begins at a multiple of 16 bytes, as kept launches want it
        for_slices = torch.empty(6, -(-number * s // 4) * 4, device=device).unbind()
        self.sums, self.grad_norms, self.low_norms, self.direction_norms, self.on_low, self.on_grad = for_slices
        self.squares = torch.empty(number, self.here, device=device) if self.spread.shares_slices else self.sums
        self.factors = self.on_grad
        self.keys, words = torch.empty(2, number + number % 2, dtype=torch.int64, device=device).unbind()
        for_matrices = torch.empty(3, -(-number // 4) * 4, device=device).unbind()
        self.correction, self.on_direction, self.shares = for_matrices
        self.active = torch.empty(number, dtype=torch.bool, device=device)
        # of all processes' slices, where some are elsewhere
        self.total = torch.empty(number, device=device) if self.spread.split else None
        self.measured: Tensor | None = None
        rows = self.weight.shape[0] if self.hopper else 0
        self.row_words = torch.empty(number, rows, dtype=torch.int32, device=device)
        self.column_words = words.view(torch.int32)
        # where a process holds no slice there is nothing to launch, but sums to join
        self.held = number if s else 0
        # a program for each matrix has little to do but to wait, so it asks for all at once
        self.each = min(8192, max(256, _power(max(s, 1))))
        self.wide = max(16, _power(r))
        self.rows = max(1, TILE_ELEMENTS // self.wide)
        self.slices = (_cdiv(s, self.rows), number)

    def scale(self) -> Tensor:
        """That of the gradients, or any tensor where there is none."""
        return self.correction if self.amp.grad_scale is None else self.amp.grad_scale

    def project(self) -> None:
        """The gradients in the coordinates of the bases, and the squares of their slices."""
        if self.hopper:
            _project_hopper(self.batch, self.grads, self.bases, self.projected, self.squares, self.d)
        elif self.here:
            tile = _project_tile(self.dot, self.r)
            launch(
                passes.project,
                (_cdiv(self.here, tile.one), _cdiv(self.r, tile.columns), self.number),
                self.grads.places,
                self.bases.places,
                self.projected,
                self.squares,
                self.here,
                self.d,
                self.r,
                self.grad.stride(self.across),
                self.grad.stride(self.along),
                **self.types,
                BS=tile.one,
                BD=tile.other,
                BR=tile.columns,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )

    def own_sums(self) -> Tensor:
        """The squared norms [B, s] of the slices that are stepped here."""
        return self.sums[: self.number * self.s].view(self.number, self.s)

    def note(self, square: Tensor) -> None:
        """Add the squared norm of these slices, unscaled, to `square`."""
        here, scale = self.own_sums().sum(), self.amp.grad_scale
        square += here if scale is None else here / scale.reshape(()).square()

    def parts(self) -> Tensor:
        """What is found of all slices, by the processes that step them: [processes, n]."""
        both = torch.cat([self.projected.float(), self.squares[..., None]], -1)
        share, (number, here, width) = self.spread.share, both.shape
        processes = dist.get_world_size(self.spread.holders[0])
        padded = F.pad(both, (0, 0, 0, share * processes - here))
        return padded.view(number, processes, share, width).transpose(0, 1).reshape(processes, -1)

    def take_share(self, found: Tensor) -> None:
        """Take what all processes have found of the slices that are stepped here."""
        both = found.reshape(self.number, self.spread.share, self.r + 1)[:, : self.s]
        self.low.copy_(both[..., :-1])
        self.own_sums().copy_(both[..., -1])

    def found(self, has_inside: bool, has_grad: bool) -> Tensor:
        """What the update is made of, of the slices that are stepped here."""
        both = [self.direction.float()] if has_inside else []
        if has_grad:
            both.append(self.on_grad[: self.number * self.s].view(self.number, self.s, 1))
        return F.pad(torch.cat(both, -1), (0, 0, 0, self.spread.share - self.s)).flatten()

    def take_all(self, found: Tensor, has_inside: bool, has_grad: bool) -> None:
        """Take what the update is made of, of all slices."""
        width = self.r * has_inside + has_grad
        parts = found.reshape(len(found), self.number, self.spread.share, width).transpose(0, 1)
        both = parts.reshape(self.number, -1, width)[:, : self.here]
        if has_inside:
            self.inside = both[..., : self.r].to(self.dot).contiguous()
        if has_grad:
            self.factors = both[..., -1].contiguous()

    def settle(self, bases: Tensor, betas: tuple[float, float]) -> None:
        """Which matrices are stepped, the norms of their slices, the count of the step, and its words."""
        found_inf, sums = self.amp.found_inf, self.sums
        launch(
            passes.settle,
            self.number,
            sums,
            sums if self.total is None else self.total,
            self.grad_norms,
            self.active,
            self.batch.state("step").places,
            bases,
            self.keys,
            self.correction,
            self.row_words,
            self.column_words,
            self.scale(),
            self.correction if found_inf is None else found_inf,
            self.s,
            self.weight.shape[0],
            counter.WEIGHTS + self.first_row,
            counter.COLUMNS,
            *(math.log(beta) if beta > 0 else -math.inf for beta in betas),
            HAS_SCALE=self.amp.grad_scale is not None,
            HAS_FOUND=found_inf is not None,
            HAS_TOTAL=self.total is not None,
            HAS_WORDS=self.hopper,
            BS=self.each,
            num_warps=8,
        )

    def adam(self, settings: Settings) -> None:
        """The moments after the step, the direction, and the norms of slices of both."""
        means, squares = (self.batch.state(name) for name in ("exp_avg", "exp_avg_sq"))
        if not self.held:
            return
        launch(
            passes.adam,
            self.slices,
            self.low,
            self.scale(),
            self.direction,
            self.low_norms,
            self.direction_norms,
            means.places,
            self.batch.state("exp_avg_scale").places if self.coded else means.places,
            squares.places,
            self.batch.state("exp_avg_sq_scale").places if self.coded else squares.places,
            self.active,
            self.keys,
            self.s,
            self.r,
            *settings.betas,
            settings.eps,
            counter.MEANS + self.first_slice,
            counter.SQUARES + self.first_slice,
            counter.COLUMNS,
            HAS_SCALE=self.amp.grad_scale is not None,
            MOMENT=_DTYPES[self.moment.dtype],
            ALIGN=min(means.alignment, squares.alignment),
            BLOCK=min(MOMENT_BLOCK, self.wide),
            BS=self.rows,
            BR=self.wide,
        )

    def measure(self, factors: lowrank.Factors) -> Tensor:
        """What the limiter and one ratio for all slices need of the slices here, [B, 3]."""
        measured = torch.empty(self.number, 3, device=self.weight.device)
        launch(
            passes.measure,
            self.number,
            self.grad_norms,
            self.low_norms,
            self.direction_norms,
            measured,
            self.s,
            float(factors.kept),
            MATRIX=factors.matrix,
            BS=self.each,
            num_warps=8,
        )
        return measured

    def coefficients(self, rule: Rule, lr: float | Tensor, weight_decay: float) -> None:
        """The factors of the update, by the kernel."""
        factors = rule.factors
        launch(
            passes.coefficients,
            self.number,
            self.grad_norms,
            self.low_norms,
            self.direction_norms,
            self.direction_norms if self.measured is None else self.measured,
            self.correction,
            self.active,
            self.batch.state(rule.scalars[0]).places if rule.scalars else self.keys,
            self.on_direction,
            self.on_low,
            self.on_grad,
            self.shares,
            lr if isinstance(lr, Tensor) else self.correction,
            self.scale(),
            self.s,
            0.0 if isinstance(lr, Tensor) else float(lr),
            float(weight_decay),
            float(factors.inside or 0),
            float(factors.outside or 0),
            float(factors.kept),
            float(factors.gamma),
            RATE=isinstance(lr, Tensor),
            HAS_SCALE=self.amp.grad_scale is not None,
            HAS_MEASURES=self.measured is not None,
            HAS_INSIDE=factors.inside is not None,
            HAS_GRAD=factors.outside is not None,
            EARLY=factors.early,
            MATRIX=factors.matrix,
            BS=self.each,
            num_warps=8,
        )

    def blend(self, *, has_low: bool) -> None:
        """What the bases are multiplied with, in place of the direction."""
        if not self.held:
            return
        launch(
            passes.blend,
            self.slices,
            self.direction,
            self.low,
            self.on_direction,
            self.on_low,
            self.active,
            self.s,
            self.r,
            HAS_LOW=has_low,
            BS=self.rows,
            BR=self.wide,
        )

    def write(self, *, has_inside: bool, has_grad: bool, stochastic: bool) -> None:
        """The weights after the update and the decay."""
        if self.hopper and has_inside:
            _write_hopper(self, has_grad=has_grad, stochastic=stochastic)
        elif self.weight.numel():
            (m, n), tile = self.weight.shape, _write_tile(self.dot, self.r)
            launch(
                passes.write,
                (_cdiv(n, tile.other), _cdiv(m, tile.one), self.number),
                self.weights.places,
                self.grads.places,
                self.bases.places,
                self.inside,
                self.factors,
                self.shares,
                self.active,
                self.keys,
                m,
                n,
                self.r,
                *self.weight.stride(),
                *self.grad.stride(),
                counter.WEIGHTS + self.first_row,
                self.first_column,
                counter.COLUMNS,
                LEFT=self.batch.left,
                WEIGHT=_DTYPES[self.weight.dtype],
                HAS_INSIDE=has_inside,
                HAS_GRAD=has_grad,
                STOCHASTIC=stochastic and self.weight.dtype == torch.bfloat16,
                **self.types,
                BM=tile.one,
                BN=tile.other,
                BR=tile.columns,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def _bases(
    batch: Batch, drawn: Tensor | None, shape: tuple[int, int, int], dot: torch.dtype, hopper: bool
) -> tuple[Tensor | None, Table]:
    """Where the bases [B, d, r] lie: in the states, or in a tensor, drawn, opened or narrowed for the step.

    Of slices that are split the rows that belong to what is here; drawn or opened they are made whole.
    """
    state, depth = batch.matrices[0].state, batch.matrices[0].spread.depth
    number, d, r = shape
    if drawn is None and "basis_scale" not in state and (state["basis"].dtype == dot or not hopper):
        return None, batch.state("basis")
    narrows, first = drawn is None and "basis_scale" not in state, 0
    if depth.part is not None and not narrows:
        d, first = depth.count, depth.part.start
    bases = torch.empty(number, d, r, dtype=dot, device=batch.matrices[0].weight.device)
    grid = (_cdiv(d * r, TILE_ELEMENTS), number)
    if drawn is not None:
        launch(passes.draw, grid, bases, drawn, d * r, r**-0.5, BLOCK=TILE_ELEMENTS)
    elif not narrows:
        codes, scales = batch.state("basis"), batch.state("basis_scale")
        launch(passes.unpack, grid, bases, codes.places, scales.places, d, r, GROUP=BASIS_GROUP, BLOCK=TILE_ELEMENTS)
    else:
        launch(passes.narrow, grid, bases, batch.state("basis").places, d * r, BLOCK=TILE_ELEMENTS)
    return bases, batch.adjoining(bases, places=not hopper, first=first)


def _project_hopper(batch: Batch, grads: Table, bases: Table, low: Tensor, sums: Tensor, d: int) -> None:
    from whimbrel.optim.kernels import hopper

    (m, n), (number, _, r) = batch.matrices[0].weight.shape, low.shape
    columns = min(256, max(64, _power(r)))
    fold = 1 if batch.left else batch.fold
    bands = _cdiv(n, 128) if batch.left else _cdiv(m // fold, 128)
    jobs = number * fold * bands * _cdiv(r, columns)
    programs = min(jobs, _multiprocessors(low.device))
    steps = _cdiv(d + (7 if fold > 1 else 0), 64)
    factors = bases.blocks(d, r, 1, (64, columns))
    after = grads.units, bases.units, low, sums, jobs, programs, bands, steps, m, n
    constants = {"R": r, "BR": columns, "STAGES": 4 if columns == 256 else 6, "num_warps": 4}
    if batch.left and batch.fold > 1:
        launch(hopper.project_unaligned, programs, *batch.memory("grad"), factors, *after, **constants)
    else:
        blocks = grads.blocks(m, n, fold, (64, 64))
        launch(hopper.project, programs, blocks, factors, *after, LEFT=batch.left, FOLD=fold, **constants)


def _write_hopper(step: _Step, *, has_grad: bool, stochastic: bool) -> None:
    from whimbrel.optim.kernels import hopper

    batch, bases, r = step.batch, step.bases, step.r
    (m, n), fold = step.weight.shape, batch.fold
    stages, slots, held = _write_stages(r, left=batch.left)
    bands, tiles = _cdiv(m // fold, 128), _cdiv(n + (7 if fold > 1 else 0), 128)
    most = _multiprocessors(step.weight.device)
    segments = min((1, 2, 4, 8), key=lambda x: _cdiv(step.number * fold * bands * x, most) * (-(-tiles // x) + 0.5))
    jobs = step.number * fold * bands * segments
    programs = min(jobs, most)
    own = batch.adjoining(step.inside, places=False)
    rows, columns = (bases, own) if batch.left else (own, bases)
    launch(
        hopper.write,
        programs,
        step.weights.blocks(m, n, fold, (64, 128)),
        step.grads.blocks(m, n, fold, (64, 128)),
        rows.blocks(m, r, fold, (64, 64)),
        columns.blocks(n, r, 1, (128, 64)),
        *batch.memory("weight"),
        step.weights.units,
        step.grads.units,
        rows.units,
        columns.units,
        step.active,
        step.factors,
        step.shares,
        step.row_words,
        step.column_words,
        jobs,
        programs,
        bands,
        tiles,
        m,
        n,
        step.first_column,
        R=r,
        SEGMENTS=segments,
        LEFT=batch.left,
        FOLD=fold,
        HAS_GRAD=has_grad,
        STOCHASTIC=stochastic,
        STAGES=stages,
        SLOTS=slots,
        HELD=held,
        num_warps=4,
    )


def _write_stages(rank: int, *, left: bool) -> tuple[int, int, int]:
    """Places of 16 KB for the streamed factor, for weights and gradients, and chunks of the other one in registers.

    The more of the factor that stays are in registers, the more places are left for the streamed one, which comes too
    late with few; on the left, where factors of the gradient differ by column, there are fewer registers to spare.
    """
    chunks = _cdiv(rank, 64)
    # the second is a multiple of 4: a place that both warpgroups used in turn could be taken for filled before it is,
    # as copies may overtake each other by more than one phase of its barrier
    if chunks <= 2:
        return 4, 8, 0
    held = max(0, chunks - (6 if left else 4))
    return 10 - (chunks - held), 4, held


def _project_tile(dot: torch.dtype, rank: int) -> Tile:
    columns = max(16, _power(rank))
    if dot == torch.float32:
        return Tile(64, 32, min(64, columns), 4, 2)
    return Tile(128, 64, min(256, columns), 8, 3)


def _write_tile(dot: torch.dtype, rank: int) -> Tile:
    columns = max(16, _power(rank))
    if dot == torch.float32:
        return Tile(64, 64, min(32, columns), 4, 2)
    # at a low rank two smaller programs a multiprocessor hide each other's loads; at a high one factors are read often
    return Tile(64, 128, min(64, columns), 4, 3) if columns <= 128 else Tile(128, 128, 64, 8, 3)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(x: int) -> int:
    """The next power of two, without the work that Triton's own does for a call."""
    return 1 << (x - 1).bit_length()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
