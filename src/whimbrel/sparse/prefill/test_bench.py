"""The cases of sparse prefill: what their lines are read by, what they measure, and who is missing."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from whimbrel.bench.runner import run_case
from whimbrel.errors import UnsupportedError
from whimbrel.sparse import rivals
from whimbrel.sparse.dense.config import DenseConfig
from whimbrel.sparse.prefill.bench import THRESHOLDS, Problem, _audited, _kept, _truth, cases
from whimbrel.testing.budget import assert_close
from whimbrel.testing.selectors import causal_attention


def test_cuda_cases_have_the_parameters_that_results_are_read_by():
    """Cases can be listed without a device; what they hold is made later."""
    made = cases(device="cuda")
    assert {case.name for case in made} == {"prefill"}
    first, second = made[0], next(case for case in made if "coverage" in case.params)
    assert first.params == {"N": 8192, "input": "mixed", "H": 32, "G": 8, "D": 128, "batch": 1}
    assert list(first.rivals) == ["sdpa-cudnn", "sdpa-flash"]
    assert second.params == {**first.params, "coverage": 0.9}
    assert list(second.impls) == ["row_local", "row_local-4", "flex_prefill"]
    assert list(second.rivals) == ["flexprefill-official", "flex-attention"]
    assert {case.metric for case in made if case.impls and "coverage" in case.params} == {"time", "time_select"}
    theirs = [case for case in made if "flashprefill-v1" in case.rivals]
    assert {case.params["threshold"] for case in theirs} == set(THRESHOLDS)
    assert {case.params["input"] for case in made} == {"mixed", "structured"}
    assert max(case.params["N"] for case in made) == 131_072


def test_lines_hold_what_was_asked_for(tmp_path):
    lines = run_case("prefill", device="cpu", quick=True, out=tmp_path, table=False)
    found = {(line["impl"], line["metric"]) for line in lines}
    per_selector = {"time", "time_select", "density", "recall_mean", "recall_p5", "recall_min", "output_error"}
    selectors = "row_local", "row_local-4", "flex_prefill"
    assert found == {("sdpa", "time")} | {(s, m) for s in selectors for m in per_selector}
    assert all(("coverage" in line["params"]) == (line["impl"] != "sdpa") for line in lines)


def test_truth_and_audit():
    problem = Problem("mixed", 300, "cpu")
    rows = _audited(problem)
    assert len(rows) == 256
    assert len(set((rows % 8).tolist())) == 8
    assert_close("truth", causal_attention(*problem.inputs())[:, rows], _truth(problem), 1e-5)
    found = _kept(problem, DenseConfig().build())
    assert found["density"] == (1.0, "share")
    assert found["output_error"][0] < 1e-5
    assert found["recall_min"][0] == pytest.approx(1, abs=1e-5)


def test_rivals_are_called_with_their_papers_numbers(monkeypatch):
    theirs = ModuleType("theirs")
    theirs.flex_prefill_attention = lambda q, k, v, **settings: settings
    theirs.get_active_blocks = lambda *given: [[torch.tensor([0, 2, 3]), torch.tensor([0, 3])]]
    theirs.flash_prefill = lambda q, k, v, out, *settings: out.fill_(sum(settings))
    for name in ("flex_prefill.ops.flex_prefill_attention", "ops.flashprefill_native_forward"):
        monkeypatch.setitem(sys.modules, name, theirs)
        for parent in (name.split(".")[0], name.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    q = torch.zeros(1, 4, 2, 8)
    assert rivals.flexprefill_official(q, q, q, coverage=0.9) == {"gamma": 0.9, "tau": 0.1, "min_budget": 1024}
    q = torch.zeros(1, 200, 2, 8)
    chosen = rivals.flexprefill_plan(q, q, q, coverage=0.9).to_mask()[0]
    assert chosen.tolist() == [[[True, False], [True, True]], [[True, False], [False, True]]]
    q = torch.zeros(1, 4, 2, 8)
    assert torch.equal(rivals.flashprefill_v1(q, q, q), torch.full_like(q, 128 + 2 + 4 + 0.18 + 2))


@pytest.mark.parametrize(
    ("call", "source"),
    [
        (lambda q: rivals.flexprefill_official(q, q, q, coverage=0.9), "ByteDance-Seed/FlexPrefill on PYTHONPATH"),
        (lambda q: rivals.flashprefill_v1(q, q, q), "qhfan/FlashPrefill on PYTHONPATH"),
    ],
)
def test_a_missing_rival_says_where_it_comes_from(call, source):
    with pytest.raises(UnsupportedError, match=f"is not found; put a checkout of github.com/{source}"):
        call(torch.zeros(1, 4, 2, 8))
