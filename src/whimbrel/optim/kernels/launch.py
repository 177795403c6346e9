"""A step of B matrices by the kernels, without host reads, and what of it stays from step to step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from whimbrel.launches import Address, Blocks, launch
from whimbrel.optim import counter, lowrank, storage
from whimbrel.optim.device import to_device
from whimbrel.optim.groups import resolve_side
from whimbrel.optim.kernels import passes
from whimbrel.optim.layout import BASIS_GROUP, MOMENT_BLOCK
from whimbrel.optim.matrix import Matrix

SCRATCH = 1 << 28
"""Most bytes that a batch holds during its step beside the state."""
SCRATCH_SHARE = 23
"""A batch holds at most this part of the bytes of the state, so that with a refresh a step needs less than a tenth."""
FEW = 1 << 24
"""A batch may always hold so many bytes, since small batches leave a GPU idle between them."""
TILE_ELEMENTS = 1 << 11
"""Elements that a program of the low-rank kernels holds of each tensor."""
HOPPER_RANK = 512
"""Largest rank of the kernels for Hopper: 128 rows of a factor stay in shared memory."""

ALLOCATED = 1 << 9
"""Bytes of which addresses of tensors are multiples, but for views."""
LAST = (1 << 31) - 2
"""Units that a table may count: 1 TiB where they are multiples of ALLOCATED, so that tensors may move."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}
_HAS_GLUON = find_spec("triton.experimental.gluon") is not None


class Tile(NamedTuple):
    """Two sides of a program's tile of the gradient, columns of the basis, warps and the depth of the pipeline."""

    one: int
    other: int
    columns: int
    warps: int
    stages: int


class Table(NamedTuple):
    """Where B tensors of one shape begin; it holds none of them.

    places [B], int64, on the device: addresses, each a multiple of `alignment` bytes, 16 or 1. units [B], int32, on the
    device: the same in units of `unit` bytes from `lowest` on, the last of which may be `last`.
    """

    places: Tensor
    alignment: int
    units: Tensor
    unit: int
    lowest: Address
    last: int

    def blocks(self, rows: int, columns: int, fold: int, block: tuple[int, int]) -> Blocks:
        """All tensors [rows, columns], `fold` rows side by side, as one of which kernels copy blocks."""
        shape, step = (self.last + 1, rows // fold, columns * fold), self.unit // self.lowest.dtype.itemsize
        return Blocks(self.lowest, shape, (step, columns * fold, 1), (1, *block))

    def refill(self, found: list[int]) -> bool:
        """Write other addresses in place of these, for kernels that were launched with this table; whether they fit."""
        apart = [divmod(place - self.lowest.place, self.unit) for place in found]
        if self.alignment < 16 or any(rest or not 0 <= units <= self.last for units, rest in apart):
            return False
        both = torch.tensor([*found, *(units for units, _ in apart)], dtype=torch.int64)
        for there, value in zip((self.places, self.units), to_device(both, self.places.device).chunk(2), strict=True):
            there.copy_(value)
        return True


class Batch:
    """Matrices of one shape, dtype and layout that are stepped together, and their addresses, sent where one moves."""

    def __init__(self, matrices: Sequence[Matrix], side: str) -> None:
        self.matrices = matrices
        self.left = side == "left"
        weight, grad = matrices[0].weight, matrices[0].grad
        m, n = weight.shape
        self.fold = 8 // math.gcd(n, 8)
        """Rows that lie side by side to be a multiple of 16 bytes apart from the next ones."""
        self.hopper = (
            _is_hopper(weight.device)
            and weight.dtype == grad.dtype == torch.bfloat16
            and weight.stride() == grad.stride() == (n, 1)
            and m % self.fold == 0
            and 0 < weight.numel() < 1 << 31
        )
        """Whether the kernels for Hopper may read the weights and gradients."""
        self._tables: dict[str, tuple[list[int], Table]] = {}
        self._moves = 0
        self._numbers = torch.arange(len(matrices), device=weight.device)
        self._units = self._numbers.int()

    def adjoining(self, stack: Tensor, *, places: bool) -> Table:
        """The table of a stack of B tensors, of which the host need not send the places."""
        size = stack[0].nbytes
        address = Address(stack.data_ptr(), stack.dtype, stack.device)
        found = self._numbers * size + stack.data_ptr() if places else self._numbers
        return Table(found, 16 if size % 16 == 0 else 1, self._units, size, address, len(stack) - 1)

    def table(self, role: str, tensors: Sequence[Tensor]) -> Table:
        """The table of tensors on one device; role says which."""
        found = [tensor.data_ptr() for tensor in tensors]
        held = self._tables.get(role)
        if held is None or held[0] != found:
            if held is not None and held[1].refill(found):
                table = held[1]
            else:
                table = _tabulate(found, tensors)
                self._moves += 1
            held = self._tables[role] = found, table
        return held[1]

    def memory(self, role: str) -> tuple[Tensor, int, int]:
        """For kernels that read or write elements of gradients ("grad") or weights ("weight") by their units.

        A tensor, elements from where it begins to where the table does, and elements of a unit.
        """
        first = min((getattr(matrix, role) for matrix in self.matrices), key=Tensor.data_ptr)
        table = self._tables[role][1]
        size = first.element_size()
        return first, (table.lowest.place - first.data_ptr()) // size, table.unit // size

    def moves(self) -> int:
        """How often these matrices or their states have been found where their tables do not reach."""
        self.table("grad", [matrix.grad for matrix in self.matrices])
        self.table("weight", [matrix.weight for matrix in self.matrices])
        for name in self.matrices[0].state:
            self.state(name)
        return self._moves

    def state(self, name: str) -> Table:
        """The table of one entry of the states."""
        return self.table(name, [matrix.state[name] for matrix in self.matrices])


class Replay:
    """The launches of a step, replayed as a CUDA graph where steps before were the same.

    Where what a step reads has moved, tables say. Its scratch stays allocated. The n-th recording, which takes as long
    as some steps, waits for 2^(n - 1) equal steps.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self._known: object = None
        self._equal = 0
        self._patience = 1

    def run(self, known: object, device: torch.device, step: Callable[[], None]) -> None:
        """Take a step, of which `known` says all that its launches depend on."""
        if known != self._known:
            self._known, self._equal, self.graph = known, 0, None
        if self.graph is None and self._equal < self._patience:
            self._equal += 1
            step()
            return
        if self.graph is None:
            self._patience *= 2
            self.graph = _record(device, step)
        self.graph.replay()


def _record(device: torch.device, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph


def _tabulate(found: list[int], tensors: Sequence[Tensor]) -> Table:
    lowest = min(found)
    apart = [place - lowest for place in found]
    bits = functools.reduce(int.__or__, apart, ALLOCATED)
    unit = bits & -bits
    units = [x // unit for x in apart]
    fits = unit >= 16 and max(units) <= LAST
    both = torch.tensor([*found, *(units if fits else apart)], dtype=torch.int64)
    places, where = to_device(both, tensors[0].device).chunk(2)
    # what is not aligned is read element by element
    alignment = 16 if fits and lowest % 16 == 0 else 1
    return Table(places, alignment, where.int(), unit, Address(lowest, tensors[0].dtype, tensors[0].device), LAST)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(x: int) -> int:
    """The next power of two, without the work that Triton's own does for a call."""
    return 1 << (x - 1).bit_length()


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return _HAS_GLUON and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused_step(
    batch: Batch,
    *,
    bases: Tensor,
    drawn: Tensor | None,
    factors: lowrank.Factors,
    coefficients: Callable[[lowrank.Slices, Tensor, Tensor], tuple[lowrank.Coefficients, list[Tensor]]],
    scalars: Sequence[str],
    betas: tuple[float, float],
    eps: float,
    lr: float | Tensor,
    weight_decay: float,
    stochastic: bool,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    square: Tensor | None = None,
) -> None:
    """Step matrices of one shape, dtype and layout in place: weights, moments, step and the method's scalars.

    The matrices are whole or with whole slices here. bases [B]: `counter.base` words of the matrices. drawn [B]: words
    from which the bases are drawn, None where the states hold them. factors: the method's numbers; coefficients: its
    factors from (slices, correction [B], active [B]) and its scalars [B] after the step, asked where slices are split
    over processes, which then add up sums. found_inf, grad_scale: what a gradient scaler has left. square: a scalar to
    which the squared norm of the gradients' slices here, unscaled, is added.
    """
    matrices, left = batch.matrices, batch.left
    states, spread, (first_row, first_column) = [x.state for x in matrices], matrices[0].spread, matrices[0].first
    weight, grad, moment = matrices[0].weight, matrices[0].grad, states[0]["exp_avg"]
    number, device, (s, r) = len(matrices), weight.device, moment.shape
    across, along = (1, 0) if left else (0, 1)
    (m, n), d = weight.shape, weight.shape[along]
    dot = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32

    grads_at = batch.table("grad", [matrix.grad for matrix in matrices])
    weights_at = batch.table("weight", [matrix.weight for matrix in matrices])
    hopper = batch.hopper and r % 8 == 0 and r <= HOPPER_RANK and min(grads_at.alignment, weights_at.alignment) == 16
    _made, bases_at = _bases(batch, drawn, (number, d, r), dot, hopper)
    hopper = hopper and bases_at.alignment == 16
    types = {
        "GRAD": _DTYPES[grad.dtype],
        "BASIS": _DTYPES[bases_at.lowest.dtype],
        "DOT": _DTYPES[dot],
        "PRECISION": "tf32x3" if dot == torch.float32 else "tf32",
        "ALIGN": min(grads_at.alignment, weights_at.alignment, bases_at.alignment),
    }
    low, direction = torch.empty(2, number, s, r, dtype=dot, device=device).unbind()
    # each begins at a multiple of 16 bytes, as kept launches want it
    for_slices = torch.empty(6, -(-number * s // 4) * 4, device=device).unbind()
    sums, grad_norms, low_norms, direction_norms, on_low, on_grad = for_slices
    keys, words = torch.empty(2, number + number % 2, dtype=torch.int64, device=device).unbind()
    correction, on_direction, shares = torch.empty(3, -(-number // 4) * 4, device=device).unbind()
    active = torch.empty(number, dtype=torch.bool, device=device)
    row_words = torch.empty(number, m if hopper else 0, dtype=torch.int32, device=device)
    column_words = words.view(torch.int32)
    # where a process holds no slice there is nothing to launch, but sums to join
    held = number if s else 0
    # a program for each matrix has little to do but to wait, so it asks for all at once
    each = min(8192, max(256, _power(max(s, 1))))
    if hopper:
        _project_hopper(batch, grads_at, bases_at, low, sums, d)
    elif held:
        tile = _project_tile(dot, r)
        launch(
            passes.project,
            (_cdiv(s, tile.one), _cdiv(r, tile.columns), number),
            grads_at.places,
            bases_at.places,
            low,
            sums,
            s,
            d,
            r,
            grad.stride(across),
            grad.stride(along),
            **types,
            BS=tile.one,
            BD=tile.other,
            BR=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if square is not None:
        here = sums[: number * s].sum()
        square += here if grad_scale is None else here / grad_scale.reshape(()).square()
    total = spread.total(sums[: number * s].view(number, s)) if spread.split else sums
    launch(
        passes.settle,
        number,
        sums,
        total,
        grad_norms,
        active,
        batch.state("step").places,
        bases,
        keys,
        correction,
        row_words,
        column_words,
        correction if grad_scale is None else grad_scale,
        correction if found_inf is None else found_inf,
        s,
        m,
        counter.WEIGHTS + first_row,
        counter.COLUMNS,
        *(math.log(beta) if beta > 0 else -math.inf for beta in betas),
        HAS_SCALE=grad_scale is not None,
        HAS_FOUND=found_inf is not None,
        HAS_TOTAL=spread.split,
        HAS_WORDS=hopper,
        BS=each,
        num_warps=8,
    )
    wide = max(16, _power(r))
    rows = max(1, TILE_ELEMENTS // wide)
    slices = (_cdiv(s, rows), number)
    means, squares = (batch.state(name) for name in ("exp_avg", "exp_avg_sq"))
    coded = "exp_avg_scale" in states[0]
    first_slice = first_column if left else first_row
    if held:
        launch(
            passes.adam,
            slices,
            low,
            correction if grad_scale is None else grad_scale,
            direction,
            low_norms,
            direction_norms,
            means.places,
            batch.state("exp_avg_scale").places if coded else means.places,
            squares.places,
            batch.state("exp_avg_sq_scale").places if coded else squares.places,
            active,
            keys,
            s,
            r,
            *betas,
            eps,
            counter.MEANS + first_slice,
            counter.SQUARES + first_slice,
            counter.COLUMNS,
            HAS_SCALE=grad_scale is not None,
            MOMENT=_DTYPES[moment.dtype],
            ALIGN=min(means.alignment, squares.alignment),
            BLOCK=min(MOMENT_BLOCK, wide),
            BS=rows,
            BR=wide,
        )
    inside, outside = factors.inside is not None, factors.outside is not None
    if spread.split:
        whole = [x[: number * s].view(number, s) for x in (grad_norms, low_norms, direction_norms)]
        norms = lowrank.Slices(whole[0], whole[1], whole[2], spread)
        on, after = coefficients(norms, correction[:number], active)
        for name, value in zip(scalars, after, strict=True):
            storage.store(states, name, value)
        if on.on_direction is not None:
            on_direction[:number].copy_(on.on_direction)
        for there, value in ((on_low, on.on_low), (on_grad, on.on_grad)):
            if value is not None:
                there[: number * s].view(number, s).copy_(value)
        if grad_scale is not None:
            on_grad.div_(grad_scale)
        shares[:number].copy_(lr * weight_decay * active)
    else:
        launch(
            passes.coefficients,
            number,
            grad_norms,
            low_norms,
            direction_norms,
            correction,
            active,
            batch.state(scalars[0]).places if scalars else keys,
            on_direction,
            on_low,
            on_grad,
            shares,
            lr if isinstance(lr, Tensor) else correction,
            correction if grad_scale is None else grad_scale,
            s,
            0.0 if isinstance(lr, Tensor) else float(lr),
            float(weight_decay),
            float(factors.inside or 0),
            float(factors.outside or 0),
            float(factors.kept),
            float(factors.gamma),
            RATE=isinstance(lr, Tensor),
            HAS_SCALE=grad_scale is not None,
            HAS_INSIDE=inside,
            HAS_GRAD=outside,
            EARLY=factors.early,
            MATRIX=factors.matrix,
            BS=each,
            num_warps=8,
        )
    if inside and held:
        launch(
            passes.blend,
            slices,
            direction,
            low,
            on_direction,
            on_low,
            active,
            s,
            r,
            HAS_LOW=outside,
            BS=rows,
            BR=wide,
        )
    if hopper and inside:
        _write_hopper(
            batch, weights_at, grads_at, bases_at, direction, active, on_grad, shares, row_words, column_words,
            first_column, d, has_grad=outside, stochastic=stochastic,
        )  # fmt: skip
    elif held:
        tile = _write_tile(dot, r)
        launch(
            passes.write,
            (_cdiv(n, tile.other), _cdiv(m, tile.one), number),
            weights_at.places,
            grads_at.places,
            bases_at.places,
            direction,
            on_grad,
            shares,
            active,
            keys,
            m,
            n,
            r,
            *weight.stride(),
            *grad.stride(),
            counter.WEIGHTS + first_row,
            first_column,
            counter.COLUMNS,
            LEFT=left,
            WEIGHT=_DTYPES[weight.dtype],
            HAS_INSIDE=inside,
            HAS_GRAD=outside,
            STOCHASTIC=stochastic and weight.dtype == torch.bfloat16,
            **types,
            BM=tile.one,
            BN=tile.other,
            BR=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _bases(
    batch: Batch, drawn: Tensor | None, shape: tuple[int, int, int], dot: torch.dtype, hopper: bool
) -> tuple[Tensor | None, Table]:
    """Where the bases lie: in the states, or in a tensor, drawn, opened or narrowed for the time of the step."""
    state = batch.matrices[0].state
    number, d, r = shape
    if drawn is None and "basis_scale" not in state and (state["basis"].dtype == dot or not hopper):
        return None, batch.state("basis")
    bases = torch.empty(shape, dtype=dot, device=batch.matrices[0].weight.device)
    grid = (_cdiv(d * r, TILE_ELEMENTS), number)
    if drawn is not None:
        launch(passes.draw, grid, bases, drawn, d * r, r**-0.5, BLOCK=TILE_ELEMENTS)
    elif "basis_scale" in state:
        codes, scales = batch.state("basis"), batch.state("basis_scale")
        launch(passes.unpack, grid, bases, codes.places, scales.places, d, r, GROUP=BASIS_GROUP, BLOCK=TILE_ELEMENTS)
    else:
        launch(passes.narrow, grid, bases, batch.state("basis").places, d * r, BLOCK=TILE_ELEMENTS)
    return bases, batch.adjoining(bases, places=not hopper)


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


def _write_hopper(
    batch: Batch,
    weights: Table,
    grads: Table,
    bases: Table,
    inside: Tensor,
    active: Tensor,
    on_grad: Tensor,
    shares: Tensor,
    row_words: Tensor,
    column_words: Tensor,
    first_column: int,
    d: int,
    *,
    has_grad: bool,
    stochastic: bool,
) -> None:
    from whimbrel.optim.kernels import hopper

    (m, n), (number, _, r), fold = batch.matrices[0].weight.shape, inside.shape, batch.fold
    stages, slots, held = _write_stages(r, left=batch.left)
    bands, tiles = _cdiv(m // fold, 128), _cdiv(n + (7 if fold > 1 else 0), 128)
    most = _multiprocessors(inside.device)
    segments = min((1, 2, 4, 8), key=lambda x: _cdiv(number * fold * bands * x, most) * (-(-tiles // x) + 0.5))
    jobs = number * fold * bands * segments
    programs = min(jobs, most)
    own = batch.adjoining(inside, places=False)
    rows, columns = (bases, own) if batch.left else (own, bases)
    launch(
        hopper.write,
        programs,
        weights.blocks(m, n, fold, (64, 128)),
        grads.blocks(m, n, fold, (64, 128)),
        rows.blocks(m, r, fold, (64, 64)),
        columns.blocks(n, r, 1, (128, 64)),
        *batch.memory("weight"),
        weights.units,
        grads.units,
        rows.units,
        columns.units,
        active,
        on_grad,
        shares,
        row_words,
        column_words,
        jobs,
        programs,
        bands,
        tiles,
        m,
        n,
        first_column,
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


def _scratch(matrix: Matrix, rank: int) -> int:
    """Bytes that the step of a matrix needs beside its state: two low-rank tensors, and its basis if it is formed."""
    size = 2 if matrix.grad.dtype == torch.bfloat16 else 4
    basis, low = matrix.state.get("basis"), matrix.state["exp_avg"].numel()
    formed = basis is None or basis.element_size() != size
    return max(1, size * (2 * low + (min(matrix.shape) * rank if formed else 0)))


def batches(matrices: Sequence[Matrix], rank: int, side: str) -> list[Batch]:
    """What one `fused_step` each takes, none above the limits unless it is a single matrix."""
    equal: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        weight, grad = matrix.weight, matrix.grad
        kind = (matrix.shape, weight.dtype, weight.device, weight.stride(), grad.dtype, grad.stride(), matrix.spread)
        equal.setdefault(kind, []).append(matrix)
    found = []
    state = sum(x.nbytes for matrix in matrices for x in matrix.state.values())
    most = min(SCRATCH, max(FEW, state // SCRATCH_SHARE))
    for members in equal.values():
        count = -(-len(members) // max(1, most // _scratch(members[0], rank)))
        # of equal size, as a small one does not fill a GPU
        size = -(-len(members) // count)
        chosen = resolve_side(side, members[0].shape)
        found += [Batch(members[i : i + size], chosen) for i in range(0, len(members), size)]
    return found


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
