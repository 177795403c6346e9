"""GaLore against its algorithm in fp64 and against Adam where the basis is the identity."""

from __future__ import annotations

import math

import pytest
import torch

from whimbrel.optim import GaLore
from whimbrel.optim.fira.fixtures.problem import Problem
from whimbrel.testing.budget import assert_close


@pytest.mark.parametrize(("shape", "side"), [((15, 15), "right"), ((22, 13), "right"), ((13, 22), "left")])
def test_equals_the_paper_in_fp64(shape, side):
    """arXiv 2403.03507, algorithm 2, with the moments kept at a new basis."""
    problem = Problem(shape)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = GaLore(
        [{"params": [weight], "rank": 4}], lr=0.01, alpha=0.5, refresh_steps=7, refresh="exact", stagger=False
    )
    m = v = 0.0
    for step in range(20):
        grad = torch.from_numpy(problem.grad(problem.start, step))
        with torch.no_grad():
            weight.zero_()
        weight.grad = grad
        optimizer.step()
        g = grad.double() if side == "left" else grad.double().T
        if step % 7 == 0:
            basis = torch.linalg.svd(g, full_matrices=False)[0][:, :4]
            # the signs of singular vectors are anyone's choice
            basis = basis * (basis * optimizer.state[weight]["basis"]).sum(0).sign()
        low = basis.T @ g
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        correction = math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        change = 0.01 * 0.5 * correction * basis @ (m / (v.sqrt() + 1e-6))
        assert_close(f"update of step {step}", -(change if side == "left" else change.T), weight, 1e-4)


def test_with_the_identity_as_basis_it_is_adamw():
    problem = Problem((12, 12))
    ours, theirs = (torch.nn.Parameter(torch.from_numpy(problem.start.copy())) for _ in range(2))
    galore = GaLore([{"params": [ours], "rank": 12}], lr=0.01, alpha=1.0, eps=1e-12, refresh_steps=1000)
    adamw = torch.optim.AdamW([theirs], lr=0.01, eps=1e-12, weight_decay=0.0)
    # a zero gradient makes the state without counting; a basis and a counted step then stand as if loaded
    ours.grad = torch.zeros(12, 12)
    galore.step()
    state = galore.state_dict()
    state["state"][0]["basis"] = torch.eye(12)
    state["state"][0]["step"] = torch.tensor(1.0)
    state["param_groups"][0]["step"] = 1
    galore.load_state_dict(state)
    theirs.grad = torch.zeros(12, 12)
    adamw.step()
    for step in range(10):
        for weight in (ours, theirs):
            weight.grad = torch.from_numpy(problem.grad(problem.start, step))
        galore.step()
        adamw.step()
    moved = theirs.detach() - torch.from_numpy(problem.start)
    assert_close("movement", moved, ours.detach() - torch.from_numpy(problem.start), 1e-5)
