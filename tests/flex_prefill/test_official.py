"""The official mode against selections recorded from the authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.flex_prefill.record import inputs
from whimbrel.sparse import FlexPrefillConfig

RECORDED = json.loads((Path(__file__).parent / "official.json").read_text(encoding="utf-8"))


def chosen(case, **changes):
    names = ("coverage", "tau", "min_budget", "max_budget", "block_size")
    settings = {name: case[name] for name in names if name in case} | changes
    q, k, _ = inputs(case)
    return FlexPrefillConfig(mode="official", **settings).build()(q, k).to_mask()[0]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"{case['maker']}-{case['seed']}")
def test_official_selects_what_the_authors_code_selected(case):
    """Recorded from it by record.py, in every head and row."""
    got = chosen(case)
    blocks = torch.arange(got.shape[-1])
    want = torch.tensor([[int(row, 16) for row in head] for head in case["chosen"]])[..., None] >> blocks & 1
    assert torch.equal(got, want.bool())


def test_the_recorded_heads_are_of_both_kinds():
    """Without query-aware heads, or with nothing else, the selections would be others."""
    for tau in (0.0, 9.0):
        cases = [case for case in RECORDED if "tau" not in case]
        assert sum(int((chosen(case) != chosen(case, tau=tau)).any((1, 2)).sum()) for case in cases) >= 3
