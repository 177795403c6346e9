"""The low-rank ground: projection, fits and what becomes of the moments at a new basis."""

from __future__ import annotations

import pytest
import torch

from whimbrel.optim import lowrank
from whimbrel.optim.groups import resolve_side
from whimbrel.testing.budget import assert_close

SIDES = ("left", "right")


def with_spectrum(batch, m, n, values, seed=0):
    """Matrices [batch, m, n] with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = len(values)
    left = torch.linalg.qr(torch.randn(batch, m, k, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(batch, n, k, generator=generator, dtype=torch.float64))[0]
    return (left * torch.as_tensor(values, dtype=torch.float64)) @ right.mT


def energy(grad, basis, side):
    """Share of the best possible energy that the basis keeps, per matrix."""
    low = lowrank.down(grad.double(), basis.double(), side)
    best = torch.linalg.svdvals(grad.double()).square()[..., : basis.shape[-1]].sum(-1)
    return low.square().sum((-2, -1)) / best


def draw_noise(grad, rank, side, seed=0):
    rows, _ = lowrank.basis_shape(grad.shape, rank, side)
    columns = lowrank.noise_columns(grad.shape, rank, side)
    return torch.stack([lowrank.noise(rows, columns, seed=seed, index=i) for i in range(len(grad))])


def test_sides_of_every_shape():
    table = {
        (8, 3): ("right", "left"),
        (3, 8): ("left", "right"),
        (5, 5): ("right", "left"),
    }
    for shape, (std, reverse) in table.items():
        assert resolve_side("std", shape) == std
        assert resolve_side("reverse_std", shape) == reverse
        assert resolve_side("left", shape) == "left"
        assert resolve_side("right", shape) == "right"


@pytest.mark.parametrize("side", SIDES)
def test_down_and_up_project_on_the_basis(side):
    grad = with_spectrum(2, 9, 14, [3, 2, 1, 0.5])
    basis = lowrank.fit_exact(grad, side, 2)
    assert basis.shape == (2, *lowrank.basis_shape(grad.shape, 2, side))
    low = lowrank.down(grad, basis, side)
    assert low.shape == ((2, 2, grad.shape[-1]) if side == "left" else (2, grad.shape[-2], 2))
    again = lowrank.up(low, basis, side)
    left, values, right = torch.linalg.svd(grad, full_matrices=False)
    assert_close("truncated SVD", (left[..., :2] * values[..., None, :2]) @ right[..., :2, :], again, 1e-12)
    assert_close("sum", again + grad, lowrank.up(low, basis, side, add=grad.clone()), 1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_power_keeps_the_energy_that_the_exact_fit_keeps(side, decay):
    # spectra k^-0.5 and k^-1 stand for the flat and the steep end of what weight gradients show
    rank, shape = 24, (96, 131)
    values = torch.arange(1.0, 97.0) ** -decay
    first = with_spectrum(3, *shape, values, seed=1).float()
    basis = lowrank.fit_first(first, draw_noise(first, rank, side), side, rank)
    assert energy(first, basis, side).min() > 0.97
    # the gradient turns by about a tenth; a stale basis loses energy, one warm fit wins it back
    later = first + 0.3 * with_spectrum(3, *shape, values, seed=2).float()
    warm = lowrank.fit_warm(later, basis, side)
    half = lowrank.fit_warm(later, basis, side, products=torch.bfloat16)
    assert energy(later, half, side).min() > 0.98
    assert energy(later, warm, side).min() > 0.98
    assert (energy(later, warm, side) > energy(later, basis, side) + 0.004).all()


@pytest.mark.parametrize("side", SIDES)
def test_bases_are_orthonormal_where_the_gradient_has_lost_rank(side):
    grad = with_spectrum(2, 20, 31, [1, 1e-3, 1e-6]).float()
    rank = 8
    first = lowrank.fit_first(grad, draw_noise(grad, rank, side), side, rank)
    for basis in (first, lowrank.fit_warm(grad, first, side), lowrank.fit_exact(grad, side, rank)):
        gram = basis.mT @ basis
        assert_close("gram", torch.eye(rank).expand_as(gram), gram, 1e-5)
        assert energy(grad, basis, side).min() > 1 - 1e-5


def test_steep_spectra_do_not_break_the_power_iteration():
    """Condition 1e5: squared, as by one multiplication with G G^T, the weaker directions drown in float32."""
    grad = with_spectrum(2, 80, 64, torch.logspace(0, -5, 64)).float()
    basis = lowrank.fit_first(grad, draw_noise(grad, 48, "right"), "right", 48)
    exact = lowrank.fit_exact(grad, "right", 48)
    # the same subspace with its directions mixed, so that the strong ones are in every column
    mixed = exact @ lowrank.orthonormal(torch.randn(2, 48, 48, generator=torch.Generator().manual_seed(0)))
    warm = lowrank.fit_warm(grad, mixed, "right")
    assert lowrank.overlap(exact, warm).min() > 1 - 1e-4
    for found in (basis, warm):
        assert_close("gram", torch.eye(48).expand(2, -1, -1), found.mT @ found, 1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_gradients_in_bfloat16_need_one_round(side, decay):
    """Strong directions in every column, so that both products between two orthonormalisations are badly conditioned.

    What is lost against an orthonormalisation between them are directions that hold next to nothing.
    """
    grad = with_spectrum(2, 120, 150, torch.arange(1.0, 121.0) ** -decay, seed=4)
    later = (1e-5 * (grad + 0.3 * with_spectrum(2, 120, 150, torch.arange(1.0, 121.0) ** -decay, seed=5))).bfloat16()
    exact = lowrank.fit_exact(grad.float(), side, 40)
    mixed = exact @ lowrank.orthonormal(torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(0)))
    found = lowrank.fit_warm(list(later), mixed, side, products=torch.bfloat16)
    careful = lowrank.fit_warm(later.float(), mixed, side)
    assert (energy(later, found, side) > energy(later, careful, side) - 2e-4).all()
    assert_close("gram", torch.eye(40).expand(2, -1, -1), found.mT @ found, 1e-5)


@pytest.mark.parametrize("rank", [8, 20])
def test_bases_of_a_gradient_in_bfloat16_that_has_lost_rank_are_orthonormal(rank):
    grad = torch.zeros(2, 20, 31)
    grad[:, :2, :2] = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    start = lowrank.orthonormal(torch.randn(2, 20, rank, generator=torch.Generator().manual_seed(0)))
    for lost in (grad, torch.zeros_like(grad)):
        found = lowrank.fit_warm(lost.bfloat16(), start, "left", products=torch.bfloat16)
        assert_close("gram", torch.eye(rank).expand(2, -1, -1), found.mT @ found, 1e-5)
        if lost is grad:
            assert energy(grad, found, "left").min() > 0.9999


@pytest.mark.parametrize("side", SIDES)
def test_full_rank_fits_span_everything(side):
    grad = with_spectrum(1, 7, 11, torch.arange(1.0, 8.0)).float()
    for basis in (
        lowrank.fit_exact(grad, side, 7),
        lowrank.fit_first(grad, draw_noise(grad, 7, side), side, 7),
    ):
        assert_close("all of it", grad, lowrank.up(lowrank.down(grad, basis, side), basis, side), 1e-5)


def test_a_warm_fit_keeps_order_and_signs():
    grad = with_spectrum(4, 30, 40, 0.7 ** torch.arange(30))
    for side in SIDES:
        old = lowrank.fit_exact(grad, side, 5)
        new = lowrank.fit_warm(grad + 1e-3 * with_spectrum(4, 30, 40, [1.0] * 30, seed=3), old, side)
        assert (old * new).sum(-2).min() > 0.9


def test_power_fits_the_gradients_of_a_network_as_the_exact_fit_does():
    """Gradients of a two-layer network on inputs with a decaying spectrum, as training goes on between two fits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 160), torch.nn.Tanh(), torch.nn.Linear(160, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mixing = torch.randn(96, 96) * torch.arange(1.0, 97.0).rsqrt()
    bases = {}
    for step in range(41):
        x = torch.randn(256, 96) @ mixing.T
        target = (2 * x[:, :8]).sin().sum(1).abs().long() % 64
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        if step % 20:
            continue
        for name, param in model.named_parameters():
            if param.ndim == 2:
                grad, side, rank = param.grad[None], resolve_side("std", param.shape), 12
                if name in bases:
                    bases[name] = lowrank.fit_warm(grad, bases[name], side)
                else:
                    bases[name] = lowrank.fit_first(grad, draw_noise(grad, rank, side), side, rank)
                assert energy(grad, bases[name], side).item() > 0.97, (step, name)


def test_noise_depends_on_seed_and_index_alone():
    state = torch.get_rng_state()
    one = lowrank.noise(5, 3, seed=1, index=2)
    torch.manual_seed(7)
    assert torch.equal(one, lowrank.noise(5, 3, seed=1, index=2))
    assert not torch.equal(one, lowrank.noise(5, 3, seed=1, index=3))
    assert not torch.equal(one, lowrank.noise(5, 3, seed=2, index=2))
    torch.set_rng_state(state)
    lowrank.noise(5, 3, seed=1, index=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_overlap_counts_shared_directions():
    basis = torch.eye(6)[None]
    assert lowrank.overlap(basis[..., :4], basis[..., 2:6]).item() == pytest.approx(0.5)
    assert lowrank.overlap(basis[..., :4], -basis[..., :4]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("side", SIDES)
def test_moments_at_a_new_basis(side):
    shape, rank = (10, 12), 4
    generator = torch.Generator().manual_seed(0)
    low = (rank, shape[1]) if side == "left" else (shape[0], rank)
    moments = lowrank.Moments(
        torch.full((2,), 5.0), torch.randn(2, *low, generator=generator), torch.rand(2, *low, generator=generator)
    )
    d, _ = lowrank.basis_shape(shape, rank, side)
    old = lowrank.orthonormal(torch.randn(2, d, rank, generator=generator))
    # the same subspace with directions swapped and flipped: rotating must swap and flip the moments with them
    order, signs = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    new = old[..., order] * signs
    dim = -2 if side == "left" else -1
    turned = lowrank.carry(moments, old, new, side, "rotate")
    spread = signs[:, None] if side == "left" else signs
    assert_close("mean", moments.exp_avg.index_select(dim, order) * spread, turned.exp_avg, 1e-5)
    assert_close("square", moments.exp_avg_sq.index_select(dim, order), turned.exp_avg_sq, 1e-5)
    assert torch.equal(turned.step, moments.step)
    # a mean square that is the same in every direction is so in every basis
    equal = moments._replace(exp_avg_sq=torch.full_like(moments.exp_avg_sq, 3.0))
    mixed = old @ lowrank.orthonormal(torch.randn(rank, rank, generator=generator))
    assert_close("equal squares", equal.exp_avg_sq, lowrank.carry(equal, old, mixed, side, "rotate").exp_avg_sq, 1e-5)
    assert lowrank.carry(moments, old, new, side, "keep") is moments
    assert all(not value.any() for value in lowrank.carry(moments, old, new, side, "reset"))


def test_bias_correction_is_exact_from_the_first_step_to_the_millionth():
    steps = [1, 2, 10, 1000, 1_000_000]
    for betas in ((0.9, 0.999), (0.0, 0.95)):
        got = lowrank.bias_correction(torch.tensor([float(s) for s in steps]), betas)
        want = torch.tensor([(1 - betas[1] ** s) ** 0.5 / (1 - betas[0] ** s) for s in steps])
        assert_close("correction", want, got, 3e-7)


@pytest.mark.parametrize("side", SIDES)
def test_bases_are_orthonormal_where_most_of_the_gradient_is_zero(side):
    """As for rows of tokens or channels that nothing has reached: columns without rank are completed."""
    grad = torch.zeros(2, 20, 31)
    grad[:, :2, :2] = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    start = lowrank.orthonormal(torch.zeros(2, 20 if side == "left" else 31, 8))
    for basis in (
        start,
        lowrank.fit_warm(grad, start, side),
        lowrank.fit_first(grad, draw_noise(grad, 8, side), side, 8),
    ):
        gram = basis.mT @ basis
        assert_close("gram", torch.eye(8).expand_as(gram), gram, 1e-5)


def test_columns_that_nearly_coincide_become_orthonormal():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 60, 1, generator=generator) + 1e-6 * torch.randn(1, 60, 20, generator=generator)
    basis = lowrank.orthonormal(x)
    assert_close("gram", torch.eye(20)[None], basis.mT @ basis, 1e-6)
    # one round keeps columns apart, which is what the products between two iterations ask for
    once = lowrank.orthonormal(x, rounds=1)
    assert torch.linalg.cond(once).item() < 100


def test_a_factorisation_that_fails_leaves_nan():
    grams = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 1.0]))]).double()
    found = lowrank._factor(grams)
    assert torch.equal(found[0], grams[0])
    assert found[1].isnan().all()


@pytest.mark.parametrize("side", SIDES)
def test_gradients_in_bfloat16_of_any_size_give_the_same_basis(side):
    grad = with_spectrum(1, 40, 60, torch.arange(1.0, 41.0) ** -1)
    start = lowrank.fit_exact(grad.float(), side, 10)
    large, small = (lowrank.fit_warm((x * grad).bfloat16(), start, side, products=torch.bfloat16) for x in (1, 2**-100))
    assert_close("basis", large, small, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 683), (683, 300), (257, 257)])
@pytest.mark.parametrize("rank", [32, 200])
def test_bases_fitted_on_a_gpu_are_those_of_the_processor(shape, rank):
    """Gradients in bfloat16, whose products run on the GPU's matrix units; rows at any multiple of two bytes."""
    side = resolve_side("std", shape)
    values = torch.arange(1.0, min(shape) + 1) ** -0.7
    grad = with_spectrum(2, *shape, values, seed=1).bfloat16()
    start = lowrank.fit_exact((grad.float() + 0.1 * with_spectrum(2, *shape, values, seed=2)).float(), side, rank)
    want = lowrank.fit_warm(grad, start, side, products=torch.bfloat16)
    for grads in (grad.cuda(), list(grad.cuda())):
        got = [lowrank.fit_warm(grads, start.cuda(), side, products=torch.bfloat16) for _ in range(2)]
        assert torch.equal(*got)
        assert_close("gram", torch.eye(rank).expand(2, -1, -1), (got[0].mT @ got[0]).cpu(), 1e-5)
        assert (energy(grad, got[0].cpu(), side) - energy(grad, want, side)).abs().max() < 1e-5
        assert lowrank.overlap(want, got[0].cpu()).min() > 0.999
