"""Checkpoints of `fira` 1.0.2, `galore-torch` 1.0 and `pytorch-optimizer` 4.1.0 go on here as they did there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from whimbrel.errors import CheckpointError, ConfigError
from whimbrel.optim import Fira, GaLore
from whimbrel.optim.fixtures.record_foreign import GAP, LR, RANK, SAVED, STEPS, run
from whimbrel.optim.foreign import load_foreign, read_foreign
from whimbrel.testing.budget import assert_close

FOLDER = Path(__file__).parent / "fixtures"
KEYS = {"rank": RANK, "update_proj_gap": GAP}
PACKAGES = {
    "fira": (Fira, {**KEYS, "alpha": 0.5, "proj_type": "std"}),
    "galore-torch": (GaLore, {**KEYS, "scale": 0.5, "proj_type": "std"}),
    "pytorch-optimizer": (Fira, {**KEYS, "scale": 0.5, "projection_type": "std"}),
}


def make(package, weights, **options):
    cls, keys = PACKAGES[package]
    groups = [{"params": weights[3:]}, {"params": weights[:3], **keys}]
    return cls(groups, lr=LR, eps=1e-6, refresh="exact", stagger=False, **options)


def weights_of(package):
    recorded = torch.load(FOLDER / f"{package}-weights.pt")
    return [torch.nn.Parameter(weight) for weight in recorded["saved"]], recorded["after"]


@pytest.mark.parametrize("package", ["fira", "galore-torch"])
def test_a_run_goes_on(package):
    weights, after = weights_of(package)
    before = [weight.detach().clone() for weight in weights]
    optimizer = make(package, weights)
    load_foreign(optimizer, read_foreign(FOLDER / f"{package}.pt"))
    run(optimizer, weights, range(SAVED, STEPS))  # with a refresh at step 6
    for old, want, got in zip(before, after, weights, strict=True):
        assert_close("movement", want - old, got.detach() - old, 2e-5)


def test_what_pytorch_optimizer_held_is_held():
    """It refreshes in the very next step, where we do not, so that the state is compared, not what follows."""
    weights, _ = weights_of("pytorch-optimizer")
    optimizer, saved = make("pytorch-optimizer", weights), read_foreign(FOLDER / "pytorch-optimizer.pt")
    load_foreign(optimizer, saved)
    for number, weight in enumerate([weights[3], *weights[:3]]):
        state, held = optimizer.state[weight], saved["state"][number]
        left = weight.shape == (7, 11)
        assert state["step"] == SAVED
        assert torch.equal(state["exp_avg"], held["exp_avg"].mT if left else held["exp_avg"])
        if number:
            basis = held["projector"].ortho_matrix
            assert torch.equal(state["basis"], basis if left else basis.mT)
            assert state["limiter_norm"] == held["scaling_grad"]
    assert [group["step"] for group in optimizer.param_groups] == [SAVED, SAVED]


def test_errors(tmp_path):
    weights, _ = weights_of("fira")
    saved = read_foreign(FOLDER / "fira.pt")
    with pytest.raises(
        CheckpointError, match="the saved state is of 4 parameters, the optimizer has 3; give it the groups"
    ):
        load_foreign(Fira([{"params": weights[:3], **KEYS}]), saved)
    with pytest.raises(CheckpointError, match=r"parameter 0, of shape \[12, 9\], was not projected by the saved"):
        load_foreign(Fira([{"params": [*weights[:3]], **KEYS}, {"params": weights[3:]}]), saved)
    with pytest.raises(ConfigError, match="state_dtype = 'int8' cannot be loaded from another package"):
        load_foreign(make("fira", weights, state_dtype="int8"), saved)
    torch.save({"x": Path("y")}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt cannot be read as a checkpoint of fira, galore-torch or"):
        read_foreign(tmp_path / "other.pt")
