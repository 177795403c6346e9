"""How published packages, which decompose all matrices in one step, are measured."""

from __future__ import annotations

import time

import pytest
import torch

from whimbrel.errors import UnsupportedError
from whimbrel.optim.kernels import bench

LAYERS = bench.MODELS["tiny"]
MATRICES = sum(count for _, count in LAYERS.shapes)


class Published(torch.optim.Optimizer):
    """Decomposes every matrix in its first step."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if "basis" not in self.state[param]:
                    u, _, _ = torch.linalg.svd(param.grad.float(), full_matrices=False)
                    self.state[param]["basis"] = u[:, :4].clone()


def test_decompositions_of_one_layer_stand_for_all(monkeypatch):
    shapes, original = [], torch.linalg.svd

    def svd(x, **options):
        shapes.append(tuple(x.shape))
        if x.shape != (64, 64):
            time.sleep(0.02)
        return original(x, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    figures = bench._measure_published(Published, "tiny", "cpu", 200)
    # the matrices of one layer, and one that loads the solver
    assert len(shapes) == MATRICES + 1
    assert torch.linalg.svd is svd
    refresh = figures["time_max"][0] - sorted(figures["time"][0])[len(figures["time"][0]) // 2]
    slow = sum(count for shape, count in LAYERS.shapes if shape != (64, 64))
    assert refresh > LAYERS.depth * slow * 20
    assert figures["time_amortised"][0] < refresh / 10
    rows = sum(shape[0] * count for shape, count in LAYERS.shapes) * LAYERS.depth
    assert figures["state_bytes"] == (4.0 * 4 * rows, "bytes")


def test_a_package_that_fails_is_left_out():
    def make(params):
        raise ValueError("no such thing")

    with pytest.raises(UnsupportedError) as error:
        bench._measure_published(make, "tiny", "cpu", 200)
    assert str(error.value) == "it fails: ValueError: no such thing"
