"""Moments, bases and weights in few bits: float32 tensors to what is held, and back.

8-bit moments: a code is a root of the element's share of its block's largest, so that small elements keep their ratio:
the square root for the mean, with a sign, and the fourth root for the mean square. Rounding is stochastic: an average
that moves by a thousandth a step would never leave a code that is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from whimbrel.optim import counter
from whimbrel.optim.layout import BASIS_GROUP, MOMENT_BLOCK

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}

CENTRE, LARGEST_CODE = 128, 127
"""Code of a mean of zero, and the largest distance from it."""
INT4_CENTRE, INT4_LARGEST = 8, 7


class Codes(NamedTuple):
    """8-bit codes of any shape, and float32 scales with one for each MOMENT_BLOCK along the last dimension."""

    codes: Tensor
    scale: Tensor


def encode_moment(x: Tensor, bits: Tensor, *, squared: bool) -> Codes:
    """A moment [..., r], float32, to codes; `bits` (`counter.lattice`) of its shape decide the rounding."""
    blocks = F.pad(x, (0, -x.shape[-1] % MOMENT_BLOCK)).unflatten(-1, (-1, MOMENT_BLOCK))
    scale = blocks.abs().amax(-1)
    share = (blocks.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).flatten(-2)[..., : x.shape[-1]]
    chance = bits.float() * 2.0**-16
    if squared:
        code = (255 * share.sqrt().sqrt() + chance).floor_().clamp_(max=255)
    else:
        code = (LARGEST_CODE * share.sqrt() + chance).floor_().clamp_(max=LARGEST_CODE) * x.sign() + CENTRE
    return Codes(code.to(torch.uint8), scale)


def decode_moment(codes: Codes, *, squared: bool) -> Tensor:
    """Codes to the moment, float32."""
    code = codes.codes.float()
    scale = codes.scale.repeat_interleave(MOMENT_BLOCK, -1)[..., : code.shape[-1]]
    if squared:
        return (code / 255).square().square() * scale
    share = (code - CENTRE) / LARGEST_CODE
    return share * share.abs() * scale


def encode_basis(basis: Tensor) -> Codes:
    """A basis [..., d, r] to two 4-bit codes a byte, [..., ceil(d / 2), r], and scales [..., ceil(d / 128), r].

    The scales of a column are stretched by one factor so that the column keeps norm 1. Rounding to 4 bits
    lengthens columns (by 1.5 % in the mean square), and norms of projections with them; what is left of the
    error in the Gram matrix lies off its diagonal, has mean zero, and needs no matrix beside the codes.
    """
    d = basis.shape[-2]
    groups = F.pad(basis.float(), (0, 0, 0, -d % BASIS_GROUP)).unflatten(-2, (-1, BASIS_GROUP))
    scale = groups.abs().amax(-2) / INT4_LARGEST
    codes = (groups / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-2)).round_()
    codes = codes.clamp_(-INT4_LARGEST, INT4_LARGEST)
    norm = torch.linalg.vector_norm((codes * scale.unsqueeze(-2)).flatten(-3, -2), dim=-2, keepdim=True)
    scale = scale / norm.clamp_min(torch.finfo(torch.float32).tiny)
    flat = (codes + INT4_CENTRE).to(torch.uint8).flatten(-3, -2)[..., : d + d % 2, :]
    return Codes(flat[..., ::2, :] | flat[..., 1::2, :] << 4, scale)


def decode_basis(codes: Codes, rows: int) -> Tensor:
    """The basis [..., rows, r] of packed codes, float32."""
    packed = codes.codes
    pairs = torch.stack([packed & 15, packed >> 4], dim=-2).flatten(-3, -2)[..., :rows, :]
    scale = codes.scale.repeat_interleave(BASIS_GROUP, -2)[..., :rows, :]
    return (pairs.float() - INT4_CENTRE) * scale


def read_moment(states: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    """One moment of several equal parameters, [B, ...], float32; a single float32 one is viewed, not copied."""
    stored = stack([state[name] for state in states])
    if f"{name}_scale" not in states[0]:
        return stored.float()
    return decode_moment(Codes(stored, stack([s[f"{name}_scale"] for s in states])), squared=name == "exp_avg_sq")


def write_moment(
    states: Sequence[dict[str, Tensor]],
    name: str,
    values: Tensor,
    keys: Tensor,
    active: Tensor | None,
    *,
    first: tuple[int, int] = (0, 0),
) -> None:
    """Store a moment [B, ...]; keys [B] (`counter.key`) decide the rounding below float32.

    first: row and column of the whole moment at which these values begin.

    Parameters that are not `active` ([B], or one for all) keep their codes, which rounding anew might move.
    """
    if states[0][name].dtype == torch.float32:
        store(states, name, values)
        return
    squared = name == "exp_avg_sq"
    columns = values.shape[-1]
    # the other moment of the same element gets other bits
    rows = (counter.SQUARES if squared else counter.MEANS) + first[0]
    count = values[0].numel() // columns if columns else 0
    bits = counter.lattice(keys, count, columns, first=rows, first_column=first[1]).view(values.shape)
    if states[0][name].dtype == torch.bfloat16:
        store(states, name, counter.round_to_bfloat16(values, bits))
        return
    encoded = encode_moment(values, bits, squared=squared)
    for key, new in ((name, encoded.codes), (f"{name}_scale", encoded.scale)):
        if active is not None:
            old = stack([state[key] for state in states])
            new = torch.where(active.view(-1, *[1] * (new.ndim - 1)), new, old)
        store(states, key, new)


def read_basis(states: Sequence[dict[str, Tensor]], rows: int, *, opened: bool = True) -> Tensor:
    """The bases [B, rows, r] of several equal matrices, float32; not `opened`, as they are held unless in codes."""
    stored = stack([state["basis"] for state in states])
    if "basis_scale" not in states[0]:
        return stored.float() if opened else stored
    return decode_basis(Codes(stored, stack([state["basis_scale"] for state in states])), rows)


def write_basis(states: Sequence[dict[str, Tensor]], basis: Tensor) -> None:
    """Store bases [B, d, r]."""
    if "basis_scale" not in states[0]:
        store(states, "basis", basis)
        return
    encoded = encode_basis(basis)
    store(states, "basis", encoded.codes)
    store(states, "basis_scale", encoded.scale)


def write_weights(
    weights: Sequence[Tensor], values: Tensor, keys: Tensor, *, stochastic: bool, first: tuple[int, int]
) -> None:
    """Write values [B, ...] into B equal parameters; keys [B] (`counter.key`) decide the rounding to bfloat16.

    first: row and column at which the parts that these are begin, by which the rounding is counted.
    """
    if weights[0].dtype == torch.bfloat16 and stochastic and values.numel():
        columns = values.shape[-1] if values.ndim > 1 else 1
        rows, count = counter.WEIGHTS + first[0], values[0].numel() // columns
        bits = counter.lattice(keys, count, columns, first=rows, first_column=first[1])
        values = counter.round_to_bfloat16(values, bits.view(values.shape))
    torch._foreach_copy_(list(weights), list(values.unbind()))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """[B, ...]; a single tensor is viewed, not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def store(states: Sequence[dict[str, Tensor]], key: str, values: Tensor) -> None:
    """Write values [B, ...] into one entry of each state."""
    torch._foreach_copy_([state[key] for state in states], list(values.unbind()))
