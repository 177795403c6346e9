"""A step of B matrices by the kernels: what they do not do is done by torch on [B] and [B, s], without host reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from whimbrel.optim import counter, lowrank, storage
from whimbrel.optim.device import to_device
from whimbrel.optim.kernels import passes
from whimbrel.optim.layout import MOMENT_BLOCK

SCRATCH_ELEMENTS = 1 << 24
"""Most elements of one low-rank tensor of a batch: 6 bytes each are held during its step (8 in float32)."""
TILE_ELEMENTS = 1 << 11
"""Elements that a program of the low-rank kernels holds of each tensor."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}


class Tile(NamedTuple):
    """Slices, elements of a slice and columns of a program, its warps and the depth of its pipeline."""

    BS: int
    BD: int
    BR: int
    warps: int
    stages: int


class Addresses:
    """Tables of addresses on the device. One is sent again only when a tensor of it has moved."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, int], tuple[tuple[int, ...], Tensor]] = {}

    def table(self, role: str, batch: int, tensors: Sequence[Tensor]) -> Tensor:
        """Addresses [B], int64, of tensors on one device; role and batch say which table."""
        found = tuple(tensor.data_ptr() for tensor in tensors)
        known, table = self._tables.get((role, batch), ((), None))
        if table is None or known != found:
            table = to_device(torch.tensor(found, dtype=torch.int64), tensors[0].device)
            self._tables[role, batch] = found, table
        return table


def fused_step(
    params: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
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
    usable: Tensor | None,
    grad_scale: Tensor | None,
    addresses: Addresses,
    batch: int,
) -> None:
    """Step matrices of one shape, dtype and layout in place: weights, moments, step and the method's scalars.

    params: B matrices with gradients. bases [B]: `counter.base` words of the matrices. drawn [B]: words from
    which the bases are drawn, None where the states hold them. coefficients: the
    method's factors from (slices, correction [B], active [B]), and its scalars [B] after the step. decay: lr times
    weight decay. usable, grad_scale: what a gradient scaler has left. batch: a number of these params, for `addresses`.
    """
    grads = [param.grad for param in params if param.grad is not None]
    weight, grad, moment = params[0], grads[0], states[0]["exp_avg"]
    number, device, (s, r) = len(params), weight.device, moment.shape
    across, along = (1, 0) if side == "left" else (0, 1)
    d = weight.shape[along]
    dot = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(number, *shape, dtype=dtype, device=device)

    def table(role: str, tensors: Sequence[Tensor]) -> Tensor:
        return addresses.table(role, batch, tensors)

    if drawn is not None or "basis_scale" in states[0]:
        # drawn or opened for the time of the step, at places that the host need not send
        if drawn is None:
            unpacked = storage.read_basis(states, d).to(dot).contiguous()
        else:
            unpacked = scratch(d, r, dtype=dot)
            grid = (triton.cdiv(d * r, TILE_ELEMENTS), number)
            passes.draw[grid](unpacked, drawn, d * r, r**-0.5, BLOCK=TILE_ELEMENTS)
        places = torch.arange(number, device=device)
        basis_table = places * unpacked[0].nbytes + unpacked.data_ptr()
    else:
        unpacked = [state["basis"] for state in states]
        basis_table = table("basis", unpacked)
    grad_table, weight_table = table("grad", grads), table("weight", params)
    types = {
        "GRAD": _DTYPES[grad.dtype],
        "BASIS": _DTYPES[unpacked[0].dtype],
        "DOT": _DTYPES[dot],
        "PRECISION": "tf32x3" if dot == torch.float32 else "tf32",
        "ALIGN": _alignment([*grads, *params, *unpacked]),
    }
    strides = (grad.stride(across), grad.stride(along))
    low, direction, sums = scratch(s, r), scratch(s, r, dtype=dot), scratch(s)
    tile = _project_tile(dot, r)
    passes.project[triton.cdiv(s, tile.BS), triton.cdiv(r, tile.BR), number](
        grad_table, basis_table, low, sums, s, d, r, *strides, **types, **_launch(tile)
    )
    inverse = torch.ones((), device=device) if grad_scale is None else 1 / grad_scale.reshape(())
    slice_norm = sums.sqrt() * inverse
    norm = torch.linalg.vector_norm(slice_norm, dim=-1)
    active = norm.isfinite() & (norm > 0)
    if usable is not None:
        active = active & usable
    step = storage.stack([state["step"] for state in states]) + active
    keys = counter.key(bases, step)

    low_sums, direction_sums = scratch(s), scratch(s)
    wide = max(16, triton.next_power_of_2(r))
    rows = max(1, TILE_ELEMENTS // wide)
    moments = [
        table(name, [state[name] for state in states]) if name in states[0] else keys
        for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    ]
    passes.adam[triton.cdiv(s, rows), number](
        low,
        inverse,
        direction,
        low_sums,
        direction_sums,
        *moments,
        active,
        keys,
        s,
        r,
        *betas,
        eps,
        MOMENT=_DTYPES[moment.dtype],
        ALIGN=_alignment([state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]),
        BLOCK=min(MOMENT_BLOCK, wide),
        BS=rows,
        BR=wide,
    )
    slices = lowrank.Slices(
        *(torch.where(active[:, None], x, 0.0) for x in (slice_norm, *_roots(low_sums, direction_sums)))
    )
    on, after = coefficients(slices, lowrank.bias_correction(step, betas), active)
    if on.on_direction is not None:
        passes.blend[triton.cdiv(s, rows), number](
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
    tile = _write_tile(dot, r)
    passes.write[triton.cdiv(s, tile.BS), triton.cdiv(d, tile.BD), number](
        weight_table,
        grad_table,
        basis_table,
        direction,
        sums if on.on_grad is None else (on.on_grad * inverse).expand(number, s).contiguous(),
        decay * active.float(),
        active,
        keys,
        s,
        d,
        r,
        weight.stride(across),
        weight.stride(along),
        *strides,
        *((1, s) if side == "left" else (d, 1)),
        counter.WEIGHTS,
        WEIGHT=_DTYPES[weight.dtype],
        HAS_INSIDE=on.on_direction is not None,
        HAS_GRAD=on.on_grad is not None,
        STOCHASTIC=stochastic and weight.dtype == torch.bfloat16,
        **types,
        **_launch(tile),
    )
    storage.store(states, "step", step)
    for name, value in zip(scalars, after, strict=True):
        storage.store(states, name, value)


def batches(params: Sequence[Tensor], rank: int) -> list[list[Tensor]]:
    """Lists of matrices that one `fused_step` takes, none above SCRATCH_ELEMENTS unless it is a single matrix."""
    equal: dict[object, list[Tensor]] = {}
    for param in params:
        grad = param.grad
        assert grad is not None
        kind = (param.shape, param.dtype, param.device, param.stride(), grad.dtype, grad.stride())
        equal.setdefault(kind, []).append(param)
    found = []
    for members in equal.values():
        size = max(1, SCRATCH_ELEMENTS // (max(members[0].shape) * rank))
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return found


def _alignment(tensors: Sequence[Tensor]) -> int:
    """Bytes of which every address is a multiple; what is not aligned is read element by element."""
    return 16 if all(tensor.data_ptr() % 16 == 0 for tensor in tensors) else 1


def _roots(*sums: Tensor) -> list[Tensor]:
    return [x.sqrt() for x in sums]


def _project_tile(dot: torch.dtype, rank: int) -> Tile:
    columns = max(16, triton.next_power_of_2(rank))
    if dot == torch.float32:
        return Tile(64, 32, min(64, columns), 4, 2)
    return Tile(128, 64, min(256, columns), 8, 3)


def _write_tile(dot: torch.dtype, rank: int) -> Tile:
    columns = max(16, triton.next_power_of_2(rank))
    if dot == torch.float32:
        return Tile(64, 64, min(32, columns), 4, 2)
    return Tile(128, 128, min(64, columns), 8, 3)


def _launch(tile: Tile) -> dict[str, int]:
    return {"BS": tile.BS, "BD": tile.BD, "BR": tile.BR, "num_warps": tile.warps, "num_stages": tile.stages}
