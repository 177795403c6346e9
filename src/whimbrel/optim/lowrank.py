"""The low-rank ground of GaLore and Fira: find a basis, project down, project up. Pure functions of tensors.

Shapes: gradients [B, m, n], B matrices of one shape. `side` says which side of the matrix is projected:

- "left": basis [B, m, r] over the rows, low = basis^T grad [B, r, n]; a slice is a column.
- "right": basis [B, n, r] over the columns, low = grad basis [B, m, r]; a slice is a row.

Slices run along the dimension that stays, so that each slice of the gradient [B, m, n] has its own slice of
`low`. Everything is float32.

Where a `spread` is given, gradients and starts of fits are the parts that this process holds: rows of bases for the
elements of slices that are here. Processes then agree on Gram matrices and on sums, which are small.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.optim import counter, storage
from whimbrel.optim.sharding import WHOLE, Split, Spread

OVERSAMPLING = 8
"""Extra directions of the first, randomised fit (Halko, Martinsson and Tropp 2011, section 4.2)."""
FIRST_ITERATIONS = 3
"""Multiplications with G G^T in the first fit: one to sample the range and two power iterations."""
FILL = 1e-6
"""Size of the noise that fills columns without rank, relative to a column: above the rounding of float32."""
SHIFT = 2e-15
"""Added to the first Gram matrix, for each column, some ten roundings of float64."""
COARSE_FILL = 2.0**-11
"""Size of the noise for columns that are products of bfloat16. Its square is far above the rounding of float64."""
WARM_ITERATIONS = 1
"""Multiplications with G G^T in a later fit, which starts from the basis before it. What a second one adds is far less
than what a basis loses until its next refresh (benchmarks/refresh_quality.py)."""


def basis_shape(shape: Sequence[int], rank: int, side: str) -> tuple[int, int]:
    """Shape of the basis of one m x n matrix."""
    return (shape[-2] if side == "left" else shape[-1], rank)


def slice_dim(side: str) -> int:
    """The dimension that runs inside one slice."""
    return -2 if side == "left" else -1


def down(grad: Tensor, basis: Tensor, side: str) -> Tensor:
    """The gradient in the coordinates of the basis: [B, m, n] -> [B, r, n] or [B, m, r]."""
    return basis.mT @ grad if side == "left" else grad @ basis


def up(low: Tensor, basis: Tensor, side: str, *, add: Tensor | None = None) -> Tensor:
    """Back to full size, [B, m, n]; `add` [B, m, n] is added and may be overwritten."""
    first, second = (basis, low) if side == "left" else (low, basis.mT)
    return first @ second if add is None else add.baddbmm_(first, second)


def orthonormal(x: Tensor, *, rounds: int = 2, split: Split = WHOLE.depth) -> Tensor:
    """An orthonormal basis of the columns of x [B, d, k], k <= d, each column on the side of its column of x.

    Cholesky QR: `rounds` of products and one triangular solve each, where Householder's takes k dependent steps,
    which leave a GPU idle. It squares the condition number, which plain CholeskyQR2 does not survive; here the
    columns are brought to norm 1, the work is done in float64, a first round is shifted (Fukaya et al. 2020), and a
    little of fixed noise in every column bounds the condition by about 1 / FILL and completes the basis where x has
    lost rank. One round is enough between two multiplications. Columns keep their signs, as moments that outlive a
    refresh need: the triangle has a positive diagonal. A failure leaves NaN, without asking the device.
    split: how the rows of x are split over processes, which add up the Gram matrices of their rows.
    """
    y = _filled(x.to(torch.float64, copy=True), FILL, split)
    for done in range(rounds):
        gram = split.sum(y.mT @ y)
        if done == 0:
            gram.diagonal(dim1=-2, dim2=-1).add_(SHIFT * x.shape[-1])
        y = torch.linalg.solve_triangular(_factor(gram).mT, y, upper=True, left=False)
    return y.to(x.dtype)


def _orthonormal_once(x: Tensor, split: Split) -> Tensor:
    """The same of products of bfloat16, float32, k <= d / 2, in one round.

    With COARSE_FILL the condition is far from what float64 survives without a shift.
    """
    # columns of norm 1 / COARSE_FILL, as their size does not matter
    y = torch.empty_like(x, dtype=torch.float64)
    torch.addcdiv(_filling(x, split), x, _column_norms(x, split), value=1 / COARSE_FILL, out=y)
    return torch.linalg.solve_triangular(_factor(split.sum(y.mT @ y)).mT, y, upper=True, left=False).float()


def _filled(x: Tensor, fill: float, split: Split) -> Tensor:
    """x with columns of norm 1 and `fill` of fixed noise, in its place."""
    return x.div_(_column_norms(x, split)).add_(_filling(x, split), alpha=fill)


def _column_norms(x: Tensor, split: Split) -> Tensor:
    """Norms [B, 1, k] in the dtype of x, none below the range of float32."""
    norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    if split.groups:
        norm = split.sum(norm.square()).sqrt()
    return norm.clamp_min_(torch.finfo(torch.float32).tiny)


def _factor(gram: Tensor) -> Tensor:
    """Cholesky's lower triangles of matrices [B, k, k]; NaN where one is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    return lower.masked_fill_((failed != 0)[..., None, None], math.nan)


def _filling(x: Tensor, split: Split) -> Tensor:
    """Fixed noise for the rows of x that are here, in columns of some norm below 1."""
    return split.cut(_noise_of(split.rows(x), x.shape[-1], x.device), -2)


@functools.lru_cache(maxsize=16)
def _noise_of(rows: int, columns: int, device: torch.device) -> Tensor:
    """Kept for the few shapes of a model: drawing it is most of what a refresh would launch."""
    key = torch.zeros((), dtype=torch.int64, device=device)
    return counter.lattice(key, rows, columns).sub_(1 << 15).float().div_(math.sqrt(rows) * (1 << 16))


Matrices = Tensor | Sequence[Tensor]
"""[B, m, n], or B matrices [m, n] that lie anywhere."""


def norms(matrices: Matrices, dtype: torch.dtype) -> Tensor:
    """Frobenius norms [B]; of other than float32 and float64, float64 needs a copy on a GPU."""
    if isinstance(matrices, Tensor):
        return torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=dtype)
    return storage.stack([torch.linalg.vector_norm(matrix, dtype=dtype) for matrix in matrices])


def times(matrices: Matrices, x: Tensor) -> Tensor:
    """Products [B, m, k] with x [B, n, k], rounded to their dtype, in float32 also where that is bfloat16."""
    if isinstance(matrices, Tensor):
        return _product(matrices, x)
    return storage.stack([_product(matrix, columns) for matrix, columns in zip(matrices, x.unbind(), strict=True)])


def _product(a: Tensor, b: Tensor) -> Tensor:
    b = b.to(a.dtype)
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32)


def _both_ways(grad: Matrices, side: str, dtype: torch.dtype) -> tuple[Matrices, Matrices]:
    """The gradients with the dimension of their bases first, and with it last."""
    if isinstance(grad, Tensor):
        g = (grad if side == "left" else grad.mT).to(dtype)
        return g, g.mT
    found = [(x if side == "left" else x.mT).to(dtype) for x in grad]
    return found, [x.mT for x in found]


def iterate(grad: Matrices, start: Tensor, side: str, iterations: int, *, spread: Spread = WHOLE) -> Tensor:
    """Block power iteration from `start` [B, d, k], orthonormalised after every multiplication.

    Without the orthonormalisation between grad and grad^T the condition number is squared, and directions
    below about 3e-4 of the largest are lost in float32. All but the last only keep the columns apart.
    """
    g, transposed = _both_ways(grad, side, torch.float32)
    for done in range(1, iterations + 1):
        middle = orthonormal(spread.depth.sum(times(transposed, start)), rounds=1, split=spread.slices)
        start = spread.slices.sum(times(g, middle))
        start = orthonormal(start, rounds=2 if done == iterations else 1, split=spread.depth)
    return start


def fit_first(grad: Tensor, noise: Tensor, side: str, rank: int, *, spread: Spread = WHOLE) -> Tensor:
    """Leading `rank` directions by randomised subspace iteration from `noise` [B, d, k], rank <= k."""
    wide = iterate(grad, noise, side, FIRST_ITERATIONS, spread=spread)
    low = spread.depth.sum(down(grad, wide, side))
    gram = spread.slices.sum(low @ low.mT if side == "left" else low.mT @ low)
    # eigh sorts upwards; the leading directions are its last columns
    leading = torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)
    return wide @ leading


def fit_warm(
    grad: Matrices,
    basis: Tensor,
    side: str,
    *,
    products: torch.dtype = torch.float32,
    total: Tensor | None = None,
    spread: Spread = WHOLE,
) -> Tensor:
    """Leading directions by power iteration from the basis before, whose order and signs it keeps.

    grad: [B, m, n], or B matrices, which are then not stacked. products: dtype of the factors, for a gradient in
    bfloat16 its own. That gradient is rounded by 2^-9 of its elements, so directions that would be lost without an
    orthonormalisation between the two products are mostly rounding, and one round does in place of three. total:
    the squares [B] of the norms of the whole gradients, where they are known.
    """
    if products == torch.float32:
        return iterate(grad, basis.float(), side, WARM_ITERATIONS, spread=spread)
    if total is None:
        total = spread.everywhere(norms(grad, torch.float64).square())
    g, transposed = _both_ways(grad, side, products)
    middle = spread.depth.sum(times(transposed, basis))
    # of G G^T / |G|^2, in which columns keep their norms' squares in the range of float32
    scale = total.clamp_min(torch.finfo(total.dtype).tiny)[:, None, None]
    middle = torch.div(middle, scale, out=torch.empty_like(middle, dtype=products))
    new = spread.slices.sum(times(g, middle))
    if 2 * new.shape[-1] > spread.depth.rows(new):
        return orthonormal(new, split=spread.depth)
    return _orthonormal_once(new, spread.depth)


def fit_exact(grad: Tensor, side: str, rank: int) -> Tensor:
    """Leading `rank` singular vectors of grad [B, m, n] by a thin SVD, with the signs that the SVD happens to give.

    [B, m, rank] of the left ones, or [B, n, rank] of the right ones, as columns.
    """
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    return left[..., :rank] if side == "left" else right[..., :rank, :].mT


def noise_columns(shape: Sequence[int], rank: int, side: str) -> int:
    """Columns of the noise for `fit_first`."""
    return min(rank + OVERSAMPLING, shape[-2], shape[-1])


def noise(rows: int, columns: int, *, seed: int, index: int) -> Tensor:
    """Gaussian [rows, columns] on the CPU that depends on the seed and the matrix's index alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.randn(rows, columns, generator=generator)


def drawn(keys: Tensor, rows: int, rank: int) -> Tensor:
    """Gaussian bases [B, rows, rank] of variance 1 / rank under the words `keys` [B]; the same on every device."""
    return counter.normal(keys, rows * rank).view(-1, rows, rank) / math.sqrt(rank)


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """Share of the old subspace that the new one keeps, ||old^T new||_F^2 / r, for bases [B, d, r]."""
    return (old.mT @ new).square().sum((-2, -1)) / old.shape[-1]


class Moments(NamedTuple):
    """Adam state of B low-rank gradients: step [B], exp_avg and exp_avg_sq of the shape of `low`."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def carry(moments: Moments, old: Tensor, new: Tensor, side: str, how: str) -> Moments:
    """The moments after a change of basis from `old` to `new`, both [B, d, r].

    `keep` leaves them, `reset` starts Adam again, and `rotate` expresses them in the new directions: the mean
    by C = new^T old, the mean square by the elementwise square of C, which is exact for uncorrelated
    coordinates.
    """
    if how == "keep":
        return moments
    if how == "reset":
        return Moments(*map(torch.zeros_like, moments))
    turn = new.mT @ old
    weights = turn.square()
    if side == "left":
        return Moments(moments.step, turn @ moments.exp_avg, weights @ moments.exp_avg_sq)
    return Moments(moments.step, moments.exp_avg @ turn.mT, moments.exp_avg_sq @ weights.mT)


class AdamOut(NamedTuple):
    """direction: exp_avg / (sqrt(exp_avg_sq) + eps), not corrected; correction [B]; the moments after."""

    direction: Tensor
    correction: Tensor
    moments: Moments


def adam(low: Tensor, moments: Moments, active: Tensor, *, betas: tuple[float, float], eps: float) -> AdamOut:
    """Adam on B low-rank gradients; matrices that are not `active` [B] keep their moments and step.

    `eps` is added to the uncorrected root, and the bias correction is one factor for the whole direction, as
    in the authors' code: update = lr * correction * direction.
    """
    step, exp_avg, exp_avg_sq = moments
    on = active.to(low.dtype)
    step = step + on
    exp_avg = exp_avg.lerp(low, (on * (1 - betas[0]))[:, None, None])
    # low is zero where not active; rounded as in torch.optim.AdamW, which multiplies by beta2
    kept = torch.where(active, betas[1], 1.0)[:, None, None]
    exp_avg_sq = (exp_avg_sq * kept).addcmul_(low, low, value=1 - betas[1])
    direction = exp_avg / exp_avg_sq.sqrt().add_(eps)
    return AdamOut(direction, bias_correction(step, betas), Moments(step, exp_avg, exp_avg_sq))


class Slices(NamedTuple):
    """Norms [B, s] of the slices of a gradient, of its projection and of Adam's direction."""

    grad: Tensor
    low: Tensor
    direction: Tensor
    spread: Spread = WHOLE

    def total(self, x: Tensor) -> Tensor:
        """Sums [B] of x [B, s] over all slices, those of other processes included."""
        return self.spread.total(x)

    def norm(self, x: Tensor) -> Tensor:
        """Norms [B] of x [B, s] over all slices."""
        return self.total(x.square()).sqrt() if self.spread.split else torch.linalg.vector_norm(x, dim=-1)


class Coefficients(NamedTuple):
    """What a method makes of the norms: update = up(on_direction direction - on_low low) + on_grad grad.

    on_direction [B], or None for nothing inside of the basis; on_low and on_grad [B, s], a factor for each slice,
    [B, 1], one for all, or None for zero.
    """

    on_direction: Tensor | None
    on_low: Tensor | None
    on_grad: Tensor | None


class Factors(NamedTuple):
    """How the coefficients of a method follow from the norms, in numbers.

    With r the limited ratio of norms of direction and low for each slice, and k = lr correction:
    on_direction = k inside, on_grad = k outside r, on_low = kept on_grad. None: no such coefficient. The limiter sees
    the norm of r (grad - kept up(low)), with the correction where `early`. gamma: its growth, 0 for none. matrix: one
    ratio for all slices.
    """

    inside: float | None
    outside: float | None
    kept: float = 0.0
    early: bool = False
    gamma: float = 0.0
    matrix: bool = False

    @property
    def measures(self) -> bool:
        """Whether anything follows from sums over all slices."""
        return self.outside is not None and (self.gamma != 0 or self.matrix)


def slices(slice_norm: Tensor, low: Tensor, direction: Tensor, side: str, spread: Spread = WHOLE) -> Slices:
    """The norms [B, s], given that of the gradient's slices."""
    low_norm, direction_norm = (torch.linalg.vector_norm(x, dim=slice_dim(side)) for x in (low, direction))
    return Slices(slice_norm, low_norm, direction_norm, spread)


def combine(
    grad: Tensor,
    basis: Tensor,
    side: str,
    low: Tensor,
    direction: Tensor,
    on: Coefficients,
    spread: Spread = WHOLE,
) -> Tensor:
    """The update [B, m, n], in two passes over the gradient: one for its projection and norms, one here.

    low, direction and coefficients are those of the slices that `spread` gives this process.
    """
    dim = slice_dim(side)
    if spread.shares_slices and on.on_grad is not None:
        count = low.shape[-1 if side == "left" else -2]
        on = on._replace(on_grad=spread.whole(on.on_grad.expand(-1, count), 1))
    if on.on_direction is None:
        assert on.on_grad is not None
        return grad * on.on_grad.unsqueeze(dim)
    inside = direction * on.on_direction[:, None, None]
    if on.on_low is not None:
        inside = torch.addcmul(inside, low, on.on_low.unsqueeze(dim), value=-1)
    inside = spread.whole(inside, -1 if side == "left" else -2)
    return up(inside, basis, side, add=None if on.on_grad is None else grad * on.on_grad.unsqueeze(dim))


def bias_correction(step: Tensor, betas: tuple[float, float]) -> Tensor:
    """sqrt(1 - beta2^step) / (1 - beta1^step) for step [B], accurate in float32 at every step; 0 counts as 1."""
    count = step.clamp_min(1)
    first, second = (-torch.expm1(count * (math.log(beta) if beta > 0 else -math.inf)) for beta in betas)
    return second.sqrt() / first
