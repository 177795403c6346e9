"""Every averaging method keeps the merge contract; a new kind in the table is covered without an edit here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from whimbrel.config import MergeConfig
from whimbrel.merge import KINDS
from whimbrel.merge.config import DecayConfig, merge_config
from whimbrel.testing import merge as contract


def make(kind: str, n: int) -> MergeConfig:
    """The method with its defaults; `explicit` has none, so it gets unequal weights of sum 1."""
    weights = [f"{2 * i + 1}/{n * n}" for i in range(n)] if kind == "explicit" else None
    return merge_config(kind, weights=weights)


METHODS = {kind: partial(make, kind) for kind in KINDS} | {
    f"decay {curve}": lambda n, curve=curve: DecayConfig(curve=curve) for curve in ("linear", "cosine", "minus-sqrt")
}
method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


@method
def test_weights_sum_to_one(method: contract.Make) -> None:
    contract.check_weights(method)


@method
def test_equal_checkpoints_give_themselves_back(method: contract.Make, tmp_path: Path) -> None:
    contract.check_equal_inputs(method, tmp_path)


@method
def test_results_are_the_correctly_rounded_mean(method: contract.Make, tmp_path: Path) -> None:
    contract.check_exact_mean(method, tmp_path)


@method
def test_weights_go_to_their_checkpoints(method: contract.Make, tmp_path: Path) -> None:
    contract.check_order(method, tmp_path)


@method
def test_missing_tensor_is_named(method: contract.Make, tmp_path: Path) -> None:
    contract.check_missing_tensor(method, tmp_path)


@method
def test_integers_are_kept_or_refused(method: contract.Make, tmp_path: Path) -> None:
    contract.check_integers(method, tmp_path)
