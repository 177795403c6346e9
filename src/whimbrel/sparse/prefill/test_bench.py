"""The cases of sparse prefill: what their lines are read by, what they measure, and who is missing."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from whimbrel.bench.results import read_lines
from whimbrel.bench.runner import run_case
from whimbrel.errors import UnsupportedError
from whimbrel.sparse import rivals
from whimbrel.sparse.dense.config import DenseConfig
from whimbrel.sparse.flex_prefill.config import FlexPrefillConfig
from whimbrel.sparse.prefill import bench
from whimbrel.sparse.prefill.bench import (
    COVERAGES,
    CUDA_LENGTHS,
    FADING,
    THRESHOLDS,
    WIDE,
    Problem,
    _audited,
    _check_chunks,
    _in_chunks,
    _kept,
    _truth,
    cases,
    equal_coverage,
    equal_threshold,
)
from whimbrel.testing.budget import assert_close
from whimbrel.testing.heads import gaussian
from whimbrel.testing.selectors import causal_attention


def test_cuda_cases_have_the_parameters_that_results_are_read_by():
    """Cases can be listed without a device; what they hold is made later."""
    made = cases(device="cuda")
    assert {case.name for case in made} == {"prefill"}
    first, second = made[0], next(case for case in made if "coverage" in case.params)
    assert first.params == {"N": 8192, "input": "mixed", "H": 32, "G": 8, "D": 128, "batch": 1}
    assert list(first.rivals) == ["sdpa-cudnn", "sdpa-flash"]
    assert second.params == {**first.params, "coverage": 0.9}
    assert list(second.impls) == ["row_local", "row_local-16", "flex_prefill", "row_local, dense where short"]
    theirs = ["flexprefill-official", "row_local, equal recall", "xattention", "flex-attention"]
    assert list(second.rivals) == theirs
    assert {case.metric for case in made if case.impls and "coverage" in case.params} == {"time", "time_select"}
    theirs = [case for case in made if "flashprefill-v1" in case.rivals]
    assert {case.params["threshold"] for case in theirs} == set(THRESHOLDS)
    theirs = [case for case in made if "flashprefill-v1, equal error" in case.rivals]
    assert {case.params["coverage"] for case in theirs} == set(COVERAGES)
    chunked = [case for case in made if "row_local, one piece" in case.impls]
    assert {case.params["N"] for case in chunked} == set(CUDA_LENGTHS[1:])
    assert {case.params["input"] for case in made} == {"mixed", "structured", WIDE, *FADING}
    assert max(case.params["N"] for case in made) == 131_072


def test_lines_hold_what_was_asked_for(tmp_path):
    lines = run_case("prefill", device="cpu", quick=True, out=tmp_path, table=False)
    found = {(line["impl"], line["metric"]) for line in lines}
    per_selector = {"time", "time_select", "density", "recall_mean", "recall_p5", "recall_min", "output_error"}
    selectors = "row_local", "row_local-16", "flex_prefill"
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


def test_the_plans_of_rivals(monkeypatch):
    """FlashPrefill's lists of blocks, and XAttention's mask, which has columns and rows of padding."""
    flash, x = ModuleType("flash"), ModuleType("x")
    flash.deal_output_score = lambda score: (torch.tensor([[[[0], [2]], [[0], [1]]]]), None)  # [B, queries, keys, H]
    flash.flash_prefill = lambda *given: flash.deal_output_score(None)
    x.given = []
    padded = torch.tensor([[True, False, False], [True, True, True], [True, True, True]]).expand(1, 2, 3, 3)
    x.xattn_estimate = lambda *given, **settings: x.given.append((given, settings)) or (None, padded)
    for name, module in (("ops.flashprefill_native_forward", flash), ("xattn.src.Xattention", x)):
        for parent in (name.split(".")[0], name.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    q = torch.zeros(1, 200, 1, 8)
    assert rivals.flashprefill_plan(q, q, q, threshold=0.1).to_mask().tolist() == [[[[True, False], [True, True]]]]
    plan = rivals.xattention_plan(q.expand(-1, -1, 2, -1), q, coverage=0.9)
    assert plan.to_mask().tolist() == [[[[True, False], [True, True]]] * 2]
    (given, settings) = x.given[0]
    assert [tuple(tensor.shape) for tensor in given] == [(1, 2, 200, 8)] * 2
    assert settings == {"block_size": 128, "stride": 16, "threshold": 0.9, "chunk_size": 2048}
    assert "block_sparse_attn" not in sys.modules


def test_the_threshold_of_equal_error_is_found(monkeypatch):
    """A rival whose error is its threshold: at the found one it errs as row_local does, and no more."""
    problem = Problem("mixed", 1024, "cpu")
    truth = causal_attention(*problem.inputs())
    monkeypatch.setattr(rivals, "flashprefill_v1", lambda q, k, v, threshold: (truth * (1 + threshold)).float())
    equal_threshold.cache_clear()
    wanted = _kept(problem, problem.selectors(0.7)["row_local"])["output_error"][0]
    assert 1e-4 < wanted < 0.18
    assert wanted * 0.95 <= equal_threshold(problem, 0.7) <= wanted
    equal_threshold.cache_clear()


def test_the_coverage_of_equal_recall_is_found(monkeypatch):
    """Where the authors' plan keeps what `row_local` keeps at 0.8, that is what is found."""
    problem = Problem("mixed", 1024, "cpu")
    q, k, _ = problem.inputs()
    theirs = problem.selectors(0.8)["row_local"](q, k)
    monkeypatch.setattr(rivals, "flexprefill_plan", lambda q, k, v, *, coverage: theirs)
    equal_coverage.cache_clear()
    asked = equal_coverage(problem, 0.95)
    equal_coverage.cache_clear()
    assert asked <= 0.8
    wanted, found, less = (
        _kept(problem, selector)["recall_p5"][0]
        for selector in (
            lambda q, k, scale: theirs,
            *(problem.selectors(c)["row_local"] for c in (asked, asked - 0.001)),
        )
    )
    assert less < wanted <= found


def test_chunks_are_held_against_the_whole(monkeypatch):
    """Where a selector looks at the end of the prompt, the check of chunks is red."""
    monkeypatch.setattr(bench, "CHUNK", 256)
    problem = Problem("mixed", 700, "cpu")
    case = _in_chunks(problem, 0.8)
    assert list(case.impls) == ["row_local, one piece", "row_local, chunks of 256"]
    case.check()
    chunks = case.impls["row_local, chunks of 256"]()()
    assert [out.y.shape[1] for out in chunks] == [256, 256, 188]
    with pytest.raises(AssertionError, match="blocks selected otherwise in the chunk of query 256"):
        _check_chunks(problem, FlexPrefillConfig(coverage=0.8, min_budget=128).build())


@pytest.mark.parametrize(
    ("call", "source"),
    [
        (lambda q: rivals.flexprefill_official(q, q, q, coverage=0.9), "ByteDance-Seed/FlexPrefill on PYTHONPATH"),
        (lambda q: rivals.flashprefill_v1(q, q, q), "qhfan/FlashPrefill on PYTHONPATH"),
        (lambda q: rivals.xattention(q, q, q, coverage=0.9), "mit-han-lab/x-attention on PYTHONPATH"),
    ],
)
def test_a_missing_rival_says_where_it_comes_from(call, source):
    with pytest.raises(UnsupportedError, match=f"is not found; put a checkout of github.com/{source}"):
        call(torch.zeros(1, 4, 2, 8))


def captured_layers(folder, tokens=300):
    """A file as benchmarks/smollm2.py leaves it."""
    from safetensors.torch import save_file

    kept = {}
    for layer in (3, 12):
        made = gaussian(layer, tokens=tokens, heads=6, kv_heads=2, dim=16, dtype=torch.bfloat16)
        kept |= {f"{tokens}.{layer}.{name}": x for name, x in made._asdict().items()}
    (folder / bench.CAPTURED).parent.mkdir(parents=True)
    save_file(kept, folder / bench.CAPTURED)


def test_captured_layers_are_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.captured("cpu") == []
    captured_layers(tmp_path)
    found = [case for case in cases(device="cpu", quick=True) if case.params["input"] == "smollm2"]
    assert {case.params["layer"] for case in found} == {3, 12}
    assert found[0].params == {"N": 300, "input": "smollm2", "H": 6, "G": 2, "D": 16, "batch": 1, "layer": 3}
    assert Problem("smollm2", 300, "cpu", 12).inputs().k.shape == (1, 300, 2, 16)


def test_coverage_is_printed_by_layer_and_head(tmp_path, monkeypatch, capsys):
    from whimbrel import cli

    monkeypatch.chdir(tmp_path)
    captured_layers(tmp_path)
    assert cli.main(["bench", "prefill", "--coverage", "--quick", "--device", "cpu", "--out", "lines"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    heads = 4 + 4 + 2 * 6
    assert len(rows) == heads * 4
    assert {row[1] for row in rows} == {"mixed", "structured", "smollm2"}
    assert {tuple(row[2:4]) for row in rows if row[1] == "smollm2"} == {
        (l, str(h)) for l in ["3", "12"] for h in range(6)
    }
    for row in rows:
        low, p5, mean, covered = map(float, row[-4:])
        assert low <= p5 <= mean <= 1.001
        if row[-6] in ("row_local", "flex_prefill"):
            assert p5 >= 0.945
            assert covered >= 0.94
    lines = read_lines(tmp_path / "lines" / "prefill_heads.jsonl")
    assert {line["metric"] for line in lines} == {"density", "recall_min", "recall_p5", "recall_mean", "covered"}
    assert len(lines) == 5 * len(rows)
    assert cli.main(["bench", "rdn", "--coverage"]) != 0
    assert "--coverage goes with the case prefill, not 'rdn'; leave it out" in capsys.readouterr().err
