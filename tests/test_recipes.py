"""Recipes: what they resolve to, and that they have the sizes they claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from whimbrel.config import to_toml
from whimbrel.model.memory import model_report, parameter_counts
from whimbrel.recipes import RECIPES

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_recipe_is_the_recorded_one(name: str) -> None:
    """A changed default shows here; if it is meant, run python tests/golden/write.py and look at the diff."""
    assert to_toml(RECIPES[name]()) == (GOLDEN / f"{name}.toml").read_text(encoding="utf-8")


def test_nothing_recorded_without_a_recipe() -> None:
    assert {path.stem for path in GOLDEN.glob("*.toml")} == set(RECIPES)


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        # Fira's paper counts LLaMA's 58.07 and 134.11 M exactly; the 1.5 B model is given as 1.55 B.
        ("fira-60m", 58.07, 0.005),
        ("fira-130m", 134.11, 0.005),
        ("rdn-360m", 360, 10),
        ("rdn-1.5b", 1550, 10),
    ],
)
def test_sizes_are_the_papers(name: str, millions: float, tolerance: float) -> None:
    assert parameter_counts(RECIPES[name]().model)["total"] / 1e6 == pytest.approx(millions, abs=tolerance)


def test_the_tiny_recipes_have_equal_parameters() -> None:
    counts = [parameter_counts(RECIPES[name]().model)["total"] for name in ("tiny-rdn", "tiny-gdn", "tiny-softmax")]
    assert max(counts) / min(counts) < 1.02
    assert 2e6 < counts[0] < 6e6


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_estimated(name: str) -> None:
    report = model_report(RECIPES[name]())
    assert report["training"]["optimizer"] > 0
    lengths = [row["recurrent"] for row in report["inference"]]
    assert len(set(lengths)) == 1, "recurrent state must not grow"
