"""A step of B matrices by the kernels: what they do not do is done by torch on [B] and [B, s], without host reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.optim import counter, lowrank, storage
from whimbrel.optim.device import to_device
from whimbrel.optim.kernels import passes
from whimbrel.optim.layout import BASIS_GROUP, MOMENT_BLOCK
from whimbrel.optim.matrix import Matrix

SCRATCH_ELEMENTS = 1 << 24
"""Most elements of one low-rank tensor of a batch: 4 bytes each are held during its step (8 in float32)."""
SCRATCH_SHARE = 9
"""A batch holds at most this part of all low-rank elements, so that a step needs less than a tenth of the state."""
FEW_ELEMENTS = 1 << 22
"""A batch may always hold so many, since small batches leave a GPU waiting for launches."""
TILE_ELEMENTS = 1 << 11
"""Elements that a program of the low-rank kernels holds of each tensor."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}


class Tile(NamedTuple):
    """Two sides of a program's tile of the gradient, columns of the basis, warps and the depth of the pipeline."""

    one: int
    other: int
    columns: int
    warps: int
    stages: int


class Table(NamedTuple):
    """Addresses [B], int64, on the device, and the bytes of which each is a multiple, 16 or 1."""

    places: Tensor
    alignment: int


class Addresses:
    """Tables of addresses on the device. One is sent again only when a tensor of it has moved."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, int], tuple[list[int], Table]] = {}

    def table(self, role: str, batch: int, tensors: Sequence[Tensor]) -> Table:
        """The table of tensors on one device; role and batch say which."""
        found = [tensor.data_ptr() for tensor in tensors]
        held = self._tables.get((role, batch))
        if held is None or held[0] != found:
            places = to_device(torch.tensor(found, dtype=torch.int64), tensors[0].device)
            # what is not aligned is read element by element
            held = found, Table(places, 16 if all(place % 16 == 0 for place in found) else 1)
            self._tables[role, batch] = held
        return held[1]


def fused_step(
    matrices: Sequence[Matrix],
    *,
    side: str,
    bases: Tensor,
    drawn: Tensor | None,
    coefficients: Callable[[lowrank.Slices, Tensor, Tensor], tuple[lowrank.Coefficients, list[Tensor]]],
    scalars: Sequence[str],
    betas: tuple[float, float],
    eps: float,
    decay: float | Tensor,
    stochastic: bool,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    addresses: Addresses,
) -> None:
    """Step matrices of one shape, dtype and layout in place: weights, moments, step and the method's scalars.

    matrices: B of them, whole or with whole slices here. bases [B]: `counter.base` words of the matrices. drawn [B]:
    words from which the bases are drawn, None where the states hold them. coefficients: the method's factors from
    (slices, correction [B], active [B]), and its scalars [B] after the step. decay: lr times weight decay. found_inf,
    grad_scale: what a gradient scaler has left.
    """
    states, grads = [matrix.state for matrix in matrices], [matrix.grad for matrix in matrices]
    weights, spread, (first_row, first_column) = [x.weight for x in matrices], matrices[0].spread, matrices[0].first
    weight, grad, moment = weights[0], grads[0], states[0]["exp_avg"]
    number, device, (s, r) = len(matrices), weight.device, moment.shape
    left = side == "left"
    across, along = (1, 0) if left else (0, 1)
    (m, n), d = weight.shape, weight.shape[along]
    dot = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(number, *shape, dtype=dtype, device=device)

    def table(role: str, tensors: Sequence[Tensor]) -> Table:
        return addresses.table(role, matrices[0].offset, tensors)

    if drawn is not None or "basis_scale" in states[0]:
        # drawn or opened for the time of the step, at places that the host need not send
        unpacked = scratch(d, r, dtype=dot)
        grid = (triton.cdiv(d * r, TILE_ELEMENTS), number)
        if drawn is None:
            codes, scales = (table(name, [state[name] for state in states]) for name in ("basis", "basis_scale"))
            passes.unpack[grid](unpacked, codes.places, scales.places, d, r, GROUP=BASIS_GROUP, BLOCK=TILE_ELEMENTS)
        else:
            passes.draw[grid](unpacked, drawn, d * r, r**-0.5, BLOCK=TILE_ELEMENTS)
        places = torch.arange(number, device=device)
        bases_at = Table(places * unpacked[0].nbytes + unpacked.data_ptr(), 16 if unpacked[0].nbytes % 16 == 0 else 1)
        basis_dtype = dot
    else:
        bases_at = table("basis", [state["basis"] for state in states])
        basis_dtype = states[0]["basis"].dtype
    grads_at, weights_at = table("grad", grads), table("weight", weights)
    types = {
        "GRAD": _DTYPES[grad.dtype],
        "BASIS": _DTYPES[basis_dtype],
        "DOT": _DTYPES[dot],
        "PRECISION": "tf32x3" if dot == torch.float32 else "tf32",
        "ALIGN": min(grads_at.alignment, weights_at.alignment, bases_at.alignment),
    }
    low, direction, sums = scratch(s, r, dtype=dot), scratch(s, r, dtype=dot), scratch(s)
    tile = _project_tile(dot, r)
    # where a process holds no slice there is nothing to launch, but sums to join
    launched = number if s else 0
    _on(passes.project, triton.cdiv(s, tile.one), triton.cdiv(r, tile.columns), launched)(
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
    norms = lowrank.Slices(scratch(s), scratch(s), scratch(s), spread)
    active, keys, correction = scratch(dtype=torch.bool), scratch(dtype=torch.int64), scratch()
    total = spread.total(sums) if spread.split else sums
    passes.settle[number,](
        sums,
        total,
        norms.grad,
        active,
        table("step", [state["step"] for state in states]).places,
        bases,
        keys,
        correction,
        correction if grad_scale is None else grad_scale,
        correction if found_inf is None else found_inf,
        s,
        *(math.log(beta) if beta > 0 else -math.inf for beta in betas),
        HAS_SCALE=grad_scale is not None,
        HAS_FOUND=found_inf is not None,
        HAS_TOTAL=spread.split,
        BS=1024,
    )
    wide = max(16, triton.next_power_of_2(r))
    rows = max(1, TILE_ELEMENTS // wide)
    moments = {
        name: table(name, [state[name] for state in states])
        for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        if name in states[0]
    }
    first_slice = first_column if left else first_row
    _on(passes.adam, triton.cdiv(s, rows), launched)(
        low,
        correction if grad_scale is None else grad_scale,
        direction,
        norms.low,
        norms.direction,
        moments["exp_avg"].places,
        moments.get("exp_avg_scale", moments["exp_avg"]).places,
        moments["exp_avg_sq"].places,
        moments.get("exp_avg_sq_scale", moments["exp_avg_sq"]).places,
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
        ALIGN=min(moments["exp_avg"].alignment, moments["exp_avg_sq"].alignment),
        BLOCK=min(MOMENT_BLOCK, wide),
        BS=rows,
        BR=wide,
    )
    on, after = coefficients(norms, correction, active)
    if on.on_direction is not None:
        _on(passes.blend, triton.cdiv(s, rows), launched)(
            direction,
            low,
            on.on_direction,
            on.on_direction if on.on_low is None else on.on_low.expand(number, s).contiguous(),
            active,
            s,
            r,
            HAS_LOW=on.on_low is not None,
            BS=rows,
            BR=wide,
        )
    on_grad = sums
    if on.on_grad is not None:
        on_grad = (on.on_grad if grad_scale is None else on.on_grad / grad_scale).expand(number, s).contiguous()
    tile = _write_tile(dot, r)
    _on(passes.write, triton.cdiv(n, tile.other), triton.cdiv(m, tile.one), launched)(
        weights_at.places,
        grads_at.places,
        bases_at.places,
        direction,
        on_grad,
        decay * active,
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
        HAS_INSIDE=on.on_direction is not None,
        HAS_GRAD=on.on_grad is not None,
        STOCHASTIC=stochastic and weight.dtype == torch.bfloat16,
        **types,
        BM=tile.one,
        BN=tile.other,
        BR=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    for name, value in zip(scalars, after, strict=True):
        storage.store(states, name, value)


def _on(kernel: Any, *grid: int) -> Callable[..., None]:
    """The kernel on a grid, which may be empty."""
    return kernel[grid] if math.prod(grid) else lambda *args, **kwargs: None


def batches(matrices: Sequence[Matrix], rank: int) -> list[list[Matrix]]:
    """Lists of matrices that one `fused_step` takes, none above the limits unless it is a single matrix."""
    equal: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        weight, grad = matrix.weight, matrix.grad
        kind = (matrix.shape, weight.dtype, weight.device, weight.stride(), grad.dtype, grad.stride(), matrix.spread)
        equal.setdefault(kind, []).append(matrix)
    found = []
    total = sum(max(matrix.shape) * rank for matrix in matrices)
    most = min(SCRATCH_ELEMENTS, max(FEW_ELEMENTS, total // SCRATCH_SHARE))
    for members in equal.values():
        size = max(1, most // (max(members[0].shape) * rank))
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return found


def _project_tile(dot: torch.dtype, rank: int) -> Tile:
    columns = max(16, triton.next_power_of_2(rank))
    if dot == torch.float32:
        return Tile(64, 32, min(64, columns), 4, 2)
    return Tile(128, 64, min(256, columns), 8, 3)


def _write_tile(dot: torch.dtype, rank: int) -> Tile:
    columns = max(16, triton.next_power_of_2(rank))
    if dot == torch.float32:
        return Tile(64, 64, min(32, columns), 4, 2)
    # at a low rank two smaller programs a multiprocessor hide each other's loads; at a high one factors are read often
    return Tile(64, 128, min(64, columns), 4, 3) if columns <= 128 else Tile(128, 128, 64, 8, 3)
