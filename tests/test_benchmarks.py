"""Every case of the table runs, every committed line can be read, and figures follow from lines."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from whimbrel.bench import CASES
from whimbrel.bench.results import read_lines, record
from whimbrel.bench.runner import run_case
from whimbrel.errors import DataError
from whimbrel.sparse.crossover import PAYS_FROM

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plots():
    return script("plots")


@pytest.fixture(scope="module")
def tables():
    return script("tables")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # scripts import each other
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernel_lines(tmp_path, monkeypatch):
    """Lines as a GPU would leave them, a newer one over an older, other gates and a processor's beside them."""
    results = tmp_path / "results"

    def write(case, impl, batch, time, metric, value, unit, **more):
        record(case, impl, {"B": batch, "T": time, "H": 16, "D": 128} | more, metric, value, unit, out=results)

    write("rdn_fwd_bwd", "chunked", 1, 1024, "time", 77.0, "ms")
    monkeypatch.setattr("whimbrel.bench.results.device_name", lambda device: "A GPU")
    write("rdn_fwd_bwd", "triton", 16, 2048, "time", 99.0, "ms")
    for batch, time in ((16, 2048), (1, 16_384), (2, 16_384), (1, 65_536)):
        write("rdn_fwd_bwd", "triton", batch, time, "time", batch * time / 1024, "ms")
        write("rdn_fwd_bwd", "triton", batch, time, "peak_bytes", 4096 * batch * time, "bytes")
        write("rdn_fwd_bwd", "sdpa-cudnn", batch, time, "time", batch * time**2 / 2**21, "ms")
    write("rdn_fwd_bwd", "flash-qla", 16, 2048, "time", 40.0, "ms")
    write("rdn_fwd_bwd", "triton", 16, 2048, "time", 55.0, "ms", gates="fast")
    write("rdn_fwd_bwd", "triton", 16, 2048, "first_call", 9.5, "s")
    for time, softmax in ((2048, 80.0), (8192, 20.0)):
        for impl, value in (("rdn", 40.0), ("softmax", softmax)):
            params = {"B": 1, "T": time, "recipe": "toy", "softmax_every": 0, "recompute": False}
            record("prefill_tokens", impl, params, "throughput", value, "tokens/s", out=results)
    return results


@pytest.mark.parametrize("name", CASES)
def test_every_case_agrees_and_is_timed(name, tmp_path):
    lines = run_case(name, device="cpu", quick=True, out=tmp_path, table=False)
    assert lines == read_lines(tmp_path / f"{name}.jsonl")
    times = [line for line in lines if line["unit"] in ("s", "ms", "us", "tokens/s", "GB/s")]
    assert all(line["value"] > 0 for line in times)
    assert len({line["impl"] for line in times}) >= 2


def test_committed_lines_can_be_read():
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        for line in read_lines(path):
            assert line["case"] == path.stem


def test_figures_show_the_newest_line_of_each_measurement(plots, tmp_path):
    results, out = tmp_path / "results", tmp_path / "figures"
    for value in (8.0, 4.0):
        record("toy", "reference", {"T": 64}, "forward", value, "ms", out=results)
    record("toy", "fast", {"T": 64}, "forward", [1.0, 2.0, 3.0], "ms", out=results)
    record("toy", "fast", {"T": 128}, "forward", 5.0, "ms", out=results)
    record("toy", "fast", {"T": 64}, "state", 4096, "bytes", out=results)
    assert plots.draw_all(results, out) == [out / "toy.svg", out / "toy-bytes.svg"]
    root = ElementTree.parse(out / "toy.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"4 ms", "2 ms", "5 ms", "T=64, forward", "T=128, forward"} <= set(texts)
    assert "8 ms" not in texts
    assert "4,096 bytes" in (out / "toy-bytes.svg").read_text(encoding="utf-8")


def test_a_figure_of_nothing_but_zeros(plots, tmp_path):
    for impl in ("one", "other"):
        record("toy", impl, {"T": 64}, "wrong", 0.0, "share", out=tmp_path / "results")
    (drawn,) = plots.draw_all(tmp_path / "results", tmp_path / "figures")
    assert "0 share" in drawn.read_text(encoding="utf-8")


def test_no_lines_are_said_so(plots, tmp_path):
    with pytest.raises(DataError, match=r"holds no result lines; make some with benchmarks/run.py$"):
        plots.draw_all(tmp_path, tmp_path / "figures")


def test_time_and_memory_against_length(plots, kernel_lines, tmp_path):
    lines = plots.on_gpu(kernel_lines, "rdn_fwd_bwd")
    assert plots.against_length(lines, "triton", "time") == [(t, 1 / 1024) for t in (2048, 16_384, 65_536)]
    assert plots.against_length(lines, "sdpa-cudnn", "time") == [(t, t / 2**21) for t in (2048, 16_384, 65_536)]
    drawn = plots.draw_lengths(kernel_lines, tmp_path / "docs")
    assert [x.name for x in drawn] == ["residual-linear-attention-time.svg", "residual-linear-attention-memory.svg"]
    time, memory = (x.read_text(encoding="utf-8") for x in drawn)
    assert "<title>RDN, 64K: 977</title>" in time  # microseconds a thousand tokens
    assert "<title>RDN, 2K: 4</title>" in memory  # KiB a token
    assert ("softmax" in time, "softmax" in memory, "RLA" in time) == (True, False, False)
    assert plots.draw_lengths(tmp_path, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_pretraining_is_judged_correctly_and_as_published():
    class Text:
        num_tokens = 1000

        def read(self, start, stop):
            return np.arange(start, stop)

    class Model:
        def per_token_loss(self, tokens, targets):
            assert tokens.shape == (3, 10)
            assert torch.equal(targets, tokens + 1)
            return tokens / 100  # of a batch that begins at 30 i: 0.145 + 0.3 i in the mean

    found = script("pretrain").evaluate(Model(), Text(), 10, 100, 3, "cpu")
    losses = [0.145, 0.445, 0.745]  # the rest of 100 tokens does not fill a batch
    assert found["eval_batches"] == 3
    assert found["loss"] == pytest.approx(sum(losses) / 3)
    assert found["perplexity"] == pytest.approx(np.exp(sum(losses) / 3))
    assert found["perplexity_as_published"] == pytest.approx(np.exp(sum(losses) / 4))


def test_pretraining_runs_the_recipe_of_the_papers(tmp_path):
    pretrain = script("pretrain")
    (tmp_path / "manifest.json").write_text('{"vocab_size": 500}')
    args = argparse.Namespace(
        recipe="fira-60m", shards=tmp_path, batch_tokens=512 * 256, checkpoint_steps=500, device="cpu", impl="eager"
    )
    for name in pretrain.OPTIMIZERS:
        config = pretrain.config_for(args, name, 0.01, 1, 200_000_000)
        assert (config.steps, config.schedule.warmup_steps, config.schedule.min_ratio) == (1525, 152, 0.1)
        assert (config.optim.lr, config.optim.weight_decay, config.clip_grad_norm) == (0.01, 0.0, 0.0)
        assert (config.seed, config.data.seq_len, config.model.vocab_size) == (1, 256, 500)
        if name != "adamw":
            assert (config.optim.rank, config.optim.refresh_steps) == (128, 200)
    assert pretrain.config_for(args, "fira-paper", 0.01, 1, 1 << 20).optim.residual_mode == "paper"


def test_pretraining_takes_winners_seed_by_seed(monkeypatch):
    """The first seed of every optimizer comes before the second of any; without time left nothing begins."""
    pretrain = script("pretrain")
    args = argparse.Namespace(
        optimizers=["adamw", "fira", "fira-exact"],
        grid=[0.1, 0.2],
        seeds=[5, 6],
        tune_tokens=10,
        tokens=10,  # as many as in tuning, which must not be taken for tuning
        seconds=100.0,
        extend=0,
    )
    plan = pretrain.Plan(args)
    losses, order = {("adamw", 0.1): 2.0, ("adamw", 0.2): 1.0, ("fira", 0.1): 3.0, ("fira", 0.2): math.inf}, []
    while (run := plan.next()) is not None:
        order.append(run)
        plan.done(run, losses.get(run[:2], 9.0))
    grid = [("adamw", 0.1), ("fira", 0.1), ("adamw", 0.2), ("fira", 0.2)]
    assert order[:4] == [(*pair, 0, 10) for pair in grid]
    firsts, seconds = [(*order[4:7],), order[7:]]
    assert set(firsts) == {("adamw", 0.2, 5, 10), ("fira", 0.1, 5, 10), ("fira-exact", 0.1, 5, 10)}
    assert set(seconds) == {("adamw", 0.2, 6, 10), ("fira", 0.1, 6, 10)}
    plan = pretrain.Plan(args)
    first = plan.next()
    assert plan.again(first)
    assert [plan.next() for _ in range(4)][-1] == first
    assert not plan.again(first)
    late = pretrain.Plan(argparse.Namespace(**(vars(args) | {"seconds": -1.0})))
    assert late.next() is None


def test_pretraining_goes_beyond_the_end_of_a_grid_and_repeats_nothing(tmp_path):
    pretrain = script("pretrain")
    args = argparse.Namespace(
        optimizers=["adamw", "fira", "galore"],
        grid=[0.25, 0.5],
        seeds=[0, 1],
        tune_tokens=10,
        tokens=10,
        seconds=100.0,
        extend=2,
        recipe="fira-60m",
        batch_tokens=5,
        known=tmp_path / "pretrain.jsonl",
    )
    for name, rate, tokens, batch in (("galore", 0.5, 10, 5), ("galore", 0.125, 10, 5), ("adamw", 0.25, 10, 6)):
        params = {"recipe": "fira-60m", "lr": rate, "seed": 0, "tokens": tokens, "batch_tokens": batch}
        record("pretrain", name, params, "loss", rate, "nats", out=tmp_path)
    known = pretrain.known_runs(args)
    assert known == {("galore", 0.5, 0, 10): 0.5, ("galore", 0.125, 0, 10): 0.125}
    plan, order = pretrain.Plan(args, known), []
    best = {"adamw": 0.125, "fira": 4.0, "galore": 0.25}
    while (run := plan.next()) is not None:
        order.append(run)
        plan.done(run, abs(math.log2(run.lr / best[run.name])))
    rates = {name: [run.lr for run in order if run.name == name and run.seed == 0] for name in best}
    assert rates["adamw"] == [0.25, 0.5, 0.125, 0.0625]
    assert rates["fira"] == [0.25, 0.5, 1.0, 2.0]  # the best lies at the end, and the grid may grow no more
    assert rates["galore"] == [0.25]
    assert {run[:2] for run in order if run.seed == 1} == {("adamw", 0.125), ("fira", 2.0), ("galore", 0.25)}
    assert len(order) == len(set(order)) == 12


def test_winners_are_chosen_on_the_first_seed_of_the_longest_runs(tables, tmp_path):
    for name, rate, seed, tokens, loss in (
        ("fira", 0.1, 0, 20, 3.0),
        ("fira", 0.2, 0, 20, 2.0),
        ("fira", 0.4, 0, 20, 2.5),
        ("fira", 0.2, 1, 20, 4.0),
        ("fira", 0.8, 0, 10, 1.0),  # too short to count
        ("adamw", 0.1, 0, 20, 2.5),
        ("adamw", 0.2, 0, 10, 9.0),
        ("short", 0.1, 0, 10, 0.5),
    ):
        params = {"recipe": "r", "lr": rate, "seed": seed, "tokens": tokens, "batch_tokens": 5, "state_bytes": 2**20}
        for metric, value in (("loss", loss), ("perplexity", 10 * loss), ("perplexity_as_published", 5.0)):
            record("pretrain", name, params, metric, value, "nats", out=tmp_path)
    rows = tables.optimizers.optimizers_page(tmp_path).splitlines()[-2:]
    assert rows == [
        "| adamw | 1 | 2.500 | 25.0 | 5.0 | 0.1, the lowest, of 0.1, 0.2 | 1 MiB |",
        "| fira | 2 | 3.000 (2.000 to 4.000) | 30.0 | 5.0 | 0.2 of 0.1, 0.2, 0.4 | 1 MiB |",
    ]


def test_optimizers_against_rank_and_bytes(plots, tmp_path):
    results, out = tmp_path / "results", tmp_path / "docs"
    assert plots.draw_optimizers(tmp_path, out) == []
    for impl, rank, value in (("torch-adamw-fused", 128, 6.0), ("fira", 128, 5.0), ("fira", 512, 8.0)):
        params = {"model": "1.2b", "rank": rank, "state": "bfloat16"}
        line = record("optim_step", impl, params, "time", value, "ms", out=None) | {"device": "A GPU"}
        results.mkdir(exist_ok=True)
        with (results / "optim_step.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    for impl, size, value in (("adamw", 2**24, 3.0), ("fira", 2**23, 2.5)):
        for seed, more in enumerate((0.0, 0.5)):
            params = {"tokens": 1000, "seed": seed, "state_bytes": size}
            record("quality-optimizers", impl, params, "validation loss", value + more, "bits per byte", out=results)
    time, loss = (path.read_text(encoding="utf-8") for path in plots.draw_optimizers(results, out))
    assert all(f"<title>torch-adamw-fused, {rank}: 6</title>" in time for rank in (128, 512))
    assert "<title>fira, bfloat16 state, 512: 8</title>" in time
    assert "<title>adamw, 16: 3.25</title>" in loss
    assert "<title>fira, 8: 2.75</title>" in loss


def test_lines_of_two_cards_are_not_shown_together(plots, tables, kernel_lines, tmp_path):
    path = kernel_lines / "rdn_fwd_bwd.jsonl"
    older = [line | {"device": "Another GPU", "time": "2020-01-01T00:00:00+00:00"} for line in read_lines(path)]
    for case, impl in (("rdn", "flash-qla"), ("rla", "triton")):
        kept = [line | {"case": f"{case}_fwd_bwd", "impl": impl} for line in older if line["impl"] == "triton"]
        with (kernel_lines / f"{case}_fwd_bwd.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
    another = [x for x in plots.on_gpus(kernel_lines, "rla_fwd_bwd") if x["device"] == "Another GPU"]
    assert plots.against_length(another, "triton", "time")
    time, _ = (x.read_text(encoding="utf-8") for x in plots.draw_lengths(kernel_lines, tmp_path / "docs"))
    assert ("A GPU" in time, "Another GPU" in time, "RLA" in time, "FlashQLA" in time) == (True, False, False, False)
    text = tables.mixers.method_tables(kernel_lines, kernel_lines / "page.md")
    newer, _, older = text.partition("(Another GPU; ")
    assert ("A GPU" in newer, "RLA" in newer) == (True, False)  # what the newer card lacks is shown of the older one
    assert "| RLA |" in older


def test_kernel_tables_show_what_was_measured_and_leave_out_what_was_not(tables, kernel_lines):
    text = tables.mixers.method_tables(kernel_lines, kernel_lines / "page.md").replace("\u00a0", " ")
    assert "| B, T | RDN | one pass, FlashQLA | softmax, cuDNN |" in text
    assert "| 16, 2K | 32 | 40 | 32 |" in text
    assert "| 1, 16K | 16 |  | 128 |" in text
    assert "| 16, 2K | 128 MiB |" in text
    assert "| 16, 2K | 9.5 |" in text
    assert "RDN : softmax is 0.5 at 2K, 2 at 8K; RDN is the faster one from about 4,100 tokens." in text
    assert "77" not in text
    assert ".svg" not in text
    (kernel_lines / "residual-linear-attention-time.svg").touch()
    shown = tables.mixers.method_tables(kernel_lines, kernel_lines / "page.md")
    assert shown.startswith("![Time against length](residual-linear-attention-time.svg)\n\n")
    nothing = kernel_lines / "none"
    assert tables.mixers.method_tables(nothing, nothing / "page.md") == "No GPU has been measured yet."


def test_times_of_two_runs_are_not_shown_as_one(tables, kernel_lines):
    assert "another run" not in tables.mixers.method_tables(kernel_lines, kernel_lines / "page.md")
    path = kernel_lines / "rdn_fwd_bwd.jsonl"
    ours = next(x for x in read_lines(path) if x["impl"] == "triton" and x["value"] == 32.0)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(ours | {"value": 20.0, "commit": "a later one"}) + "\n")
    text = tables.mixers.method_tables(kernel_lines, kernel_lines / "page.md").replace("\u00a0", " ")
    assert "| 16, 2K | 20 | 40* | 32* |" in text
    assert "| 1, 16K | 16 |  | 128 |" in text
    assert "\\* from another run" in text


def test_crossover_is_said_only_where_it_lies(tables):
    assert tables.mixers.crossover([(2048, 0.5)]) == []
    assert tables.mixers.crossover([(2048, 0.5), (8192, 0.9)])[0].endswith("; softmax is the faster one throughout.")
    assert tables.mixers.crossover([(2048, 1.5), (8192, 3.0)])[0].endswith("; RDN is the faster one throughout.")


def test_the_method_page_shows_the_recorded_lines(tables):
    """If this fails after new measurements, run python benchmarks/plots.py and python benchmarks/tables.py."""
    page = tables.mixers.PAGE.read_text(encoding="utf-8")
    assert page == tables.insert(page, tables.mixers.method_tables())


def test_sparse_prefill_is_taken_where_it_was_measured_to_be_faster():
    """Selector, head and heads -> the first length from which on every line has it below dense attention."""
    times: dict[tuple, dict[int, dict[str, dict[str, float]]]] = {}
    for case in ("prefill", "prefill_crossover"):
        path = ROOT / "benchmarks" / "results" / f"{case}.jsonl"
        for x in read_lines(path) if path.exists() else []:
            p = x["params"]
            if x["metric"] != "time" or x["device"] != "NVIDIA H200" or p.get("coverage", 0.95) != 0.95:
                continue
            if not str(p["input"]).startswith("mixed"):
                continue
            runs = times.setdefault((p["D"], p["H"]), {}).setdefault(int(p["N"]), {})
            runs.setdefault(x["commit"], {})[x["impl"]] = x["value"]
    found: dict[str, dict[int, dict[int, int]]] = {}
    for (dim, heads), by_length in times.items():
        for kind in ("row_local", "flex_prefill"):
            complete = {
                n: [run for run in runs.values() if {kind, "sdpa-cudnn"} <= run.keys()] for n, runs in by_length.items()
            }
            faster = {n: runs[-1][kind] < runs[-1]["sdpa-cudnn"] for n, runs in complete.items() if runs}
            pays = [n for n in faster if all(faster[m] for m in faster if m >= n)]
            if pays:
                found.setdefault(kind, {}).setdefault(dim, {})[heads] = min(pays)
    assert PAYS_FROM[9, 0] == found


@pytest.fixture
def prefill_lines(tmp_path, monkeypatch):
    """Lines of sparse prefill as a GPU would leave them, those of a processor and another input beside them."""
    results = tmp_path / "results"

    def write(impl, length, metric, value, **more):
        params = {"N": length, "input": "mixed", "H": 32, "G": 8, "D": 128, "batch": 1} | more
        record("prefill", impl, params, metric, value, "ms", out=results)

    write("row_local", 8192, "time", 77.0, coverage=0.95)
    monkeypatch.setattr("whimbrel.bench.results.device_name", lambda device: "A GPU")
    for length in (8192, 32_768):
        write("sdpa-cudnn", length, "time", length / 1024)
        write("row_local", length, "time", length / 4096, coverage=0.95)
        write("row_local", length, "time", 66.0, coverage=0.9)
        write("row_local", length, "time", 55.0, coverage=0.95, input="structured")
        write("flashprefill-v1", length, "time", 9.0, threshold=0.18)
        write("flashprefill-v1", length, "output_error", 0.125, threshold=0.18)
        write("flashprefill-v1, equal error", length, "time", 44.0, coverage=0.95)
    for metric, value in (("time", 3.0), ("time_select", 1.0)):
        write("row_local", 32_768, metric, value, coverage=0.95, input="fading, 10 %")
    for share in (0.9, 0.95):
        write("row_local", 32_768, "density", share / 2, coverage=share)
        write("row_local", 32_768, "recall_p5", share, coverage=share)
        write("row_local", 32_768, "output_error", 1 - share, coverage=share)
        write("flashprefill-v1", 32_768, "density", share / 4, threshold=share / 10)
        write("flashprefill-v1", 32_768, "recall_p5", share / 2, threshold=share / 10)
    return results


def test_figures_of_sparse_prefill(plots, prefill_lines, tmp_path):
    drawn = plots.draw_prefill(prefill_lines, tmp_path / "docs")
    assert [x.name for x in drawn] == ["sparse-prefill-time.svg", "sparse-prefill-recall.svg"]
    time, recall = (x.read_text(encoding="utf-8") for x in drawn)
    assert "<title>row_local, 32K: 8</title>" in time
    assert "<title>sdpa-cudnn, 8K: 8</title>" in time
    assert "<title>flashprefill-v1, equal error, 32K: 44</title>" in time
    assert ": 9<" not in time
    assert "<title>row_local, 45: 90</title>" in recall
    assert "<title>flashprefill-v1, 22.5: 45</title>" in recall
    assert "sdpa" not in recall
    assert ": 66<" not in time
    assert plots.draw_prefill(tmp_path, tmp_path / "none") == []


def test_averages_are_shown_with_their_losses(plots, tables, tmp_path):
    for seed, gain in ((0, -0.1), (1, -0.2)):
        for window, difference in ((10, gain), (40, 0.5)):
            given = {"recipe": "r", "tokens": 8_000_000, "method": "sma", "seed": seed, "count": 3}
            given |= {"interval_tokens": window * 10_000, "difference": difference}
            record("merge_quality", "whimbrel", given, "loss", 4 + difference, "nats", out=tmp_path)
    record(
        "merge", "whimbrel", {"sources": 50, "MiB": 512, "study": "memory"}, "peak_rss", 2**28, "bytes", out=tmp_path
    )
    text = (tmp_path / "merge_quality.jsonl").read_text(encoding="utf-8")
    own = read_lines(tmp_path / "merge_quality.jsonl")[0]["device"]
    (tmp_path / "merge_quality.jsonl").write_text(text.replace(own, "NVIDIA A"), encoding="utf-8")
    (drawn,) = plots.draw_windows(tmp_path, tmp_path)
    assert drawn.exists()
    shown = tables.averaging.averaging_page(tmp_path, tmp_path / "page.md").replace("\u00a0", " ")
    assert "| sma | 3 x 0.10 M | 3.850 | -0.150 (-0.200 to -0.100) |" in shown
    assert "| sma | 3 x 0.40 M | 4.500 | +0.500 (+0.500 to +0.500) |" in shown
    assert "| 512 MiB | 256 MiB |" in shown
    assert plots.draw_windows(tmp_path / "nothing", tmp_path) == []


def test_collapses_and_costs_are_shown(plots, tables, tmp_path, monkeypatch):
    monkeypatch.setattr("whimbrel.bench.results.device_name", lambda device: "a GPU" if device == "cuda" else "a CPU")
    for method, loss, restarts in (("collapse-none", 7.5, 0), ("collapse-average", 5.5, 2), ("collapse-average", 5, 1)):
        run = {"recipe": "r", "method": method, "seed": 0, "rate": 1e-3, "burst_factor": 100.0, "burst_steps": 3}
        end = run | {"tokens": 8_000_000, "restarts": restarts}
        record("merge_quality", "whimbrel", end, "loss", loss, "nats", device="cuda", out=tmp_path)
        for tokens in (4_000_000, 8_000_000):
            point = run | {"tokens": tokens, "stretch_tokens": 100}
            record("merge_quality", "whimbrel", point, "training_loss", loss, "nats", device="cuda", out=tmp_path)
    for metric, value in (("overhead", [0.002, 0.004]), ("step", 0.15), ("gpu_bytes", 2**20)):
        given = {"recipe": "m", "B": 4, "T": 4096, "every": 50}
        record("online_average", "cpu", given, metric, value, "s", device="cuda", out=tmp_path)
    for impl, rate, processor in (("whimbrel", 2.0, 7), ("mergekit", 0.5, 21), ("read", 2.5, 1)):
        record("merge", impl, {"sources": 10}, "rate", rate, "GB/s", out=tmp_path)
        record("merge", impl, {"sources": 10}, "processor", processor, "s", out=tmp_path)
    (drawn,) = plots.draw_collapse(tmp_path, tmp_path)
    shown = tables.averaging.averaging_page(tmp_path, tmp_path / "page.md").replace("\u00a0", " ")
    assert f"({drawn.name})" in shown
    assert "**A collapse by 3 steps at 100 times the rate**, r, rate 0.001, 8.0 M tokens, seeds 0 (a GPU," in shown
    assert "| never going back | 7.500 | 0 |" in shown
    assert "| average of 3 checkpoints, moments averaged | 5.000 | 1 |" in shown
    assert "| m, B 4, T 4096 | main memory | 50 | 0.150 s | +0.30% (+0.25% to +0.35%) | 1.00 MiB |" in shown
    assert "| cold files on the disk, a CPU | 2.00 | 0.50 | 2.50 | 4.0 | 0.80 | 7.0 / 21.0 |" in shown


def test_the_page_of_averaging_shows_the_recorded_lines(tables):
    page = tables.averaging.PAGE.read_text(encoding="utf-8")
    assert page == tables.insert(page, tables.averaging.averaging_page())


def test_tables_of_sparse_prefill(tables, prefill_lines, tmp_path):
    text = "\n".join(tables.prefill.prefill(prefill_lines, links="there"))
    assert "| tokens | row_local | dense, cuDNN | FlashPrefill V1 | FlashPrefill V1 at the error of row_local |" in text
    assert "| 32K | 8 | 32 | 9 | 44 |" in text
    assert "| 32K | 48%, 95.0%, 0.050 | 0.125 |" in text
    assert "A GPU; [lines](there/prefill.jsonl)" in text
    assert "| fading, 10 %, 32K | 3 | 1 |  |  |" in text
    assert tables.prefill.prefill(tmp_path, links="there") == []
    line = {"T": 8192, "H": 32, "Hkv": 8, "D": 128, "density": 0.5}
    record("attend", "triton", line, "time", 1.0, "ms", out=prefill_lines)
    assert "| 8K, 50% | 1 |  |  |  | 275 |" in "\n".join(tables.prefill.given_blocks(prefill_lines, links="there"))


def test_the_page_of_sparse_prefill_shows_the_recorded_lines(tables):
    """If this fails after new measurements, run python benchmarks/plots.py and python benchmarks/tables.py."""
    page = tables.prefill.PAGE.read_text(encoding="utf-8")
    assert page == tables.insert(page, tables.prefill.prefill_page())
    assert page == tables.insert(page, tables.smollm2.smollm2_part(), "smollm2")


def test_the_real_model_is_shown_beside_itself_on_the_same_prompts(tables, tmp_path):
    """Lines of fewer prompts stay out, and the worst task stands beside the mean."""

    def write(method, task, length, metric, value, samples, **more):
        params = {"model": "m", "N": length, "task": task, "samples": samples} | more
        record("smollm2", method, params, metric, value, "share", out=tmp_path)

    for method, found in (("dense", (1.0, 0.75)), ("row_local", (1.0, 0.5))):
        for length, value in zip((2048, 4096), found):
            write(method, "needle", length, "accuracy", value, 4)
        write(method, "needle-multi-key", 2048, "accuracy", 1.0, 4, keys=4)
        write(method, "needle-multi-key", 2048, "accuracy", 0.125, 8)
        write(method, "perplexity", 2048, "perplexity", 20.0 if method == "dense" else 21.0, 4)
    write("dense", "needle", 2048, "accuracy", 0.0, 9)
    write("row_local", "perplexity", 2048, "agreement", 0.9, 4)
    write("row_local", "perplexity", 2048, "density", 0.5, 4)
    text = "\n".join(tables.smollm2.smollm2(tmp_path, links="there"))
    assert "| `row_local`, 0.95 | 21.00, 90.0%, 50% |" in text
    assert "| | one, 2K | one, 4K | one of 4, 2K | mean | worst |" in text
    assert "| dense | 4 of 4 | 3 of 4 | 4 of 4 |  |  |" in text
    assert "| `row_local`, 0.95 | 4 of 4 | 2 of 4 | 4 of 4 | -8% | -25% |" in text
    assert tables.smollm2.smollm2(tmp_path / "nothing", links="there") == []


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script("pages")


def test_the_pages_of_mixers_and_of_several_gpus_show_the_recorded_lines(pages, tables):
    """If this fails after new measurements, run python benchmarks/pages.py."""
    for page, text in (
        (pages.COMPARISON, pages.comparison_page(pages.ROOT / "benchmarks" / "results")),
        (pages.CARDS, pages.cards_page(pages.ROOT / "benchmarks" / "results")),
    ):
        written = page.read_text(encoding="utf-8")
        assert written == tables.insert(written, text)


def test_mixers_are_compared_by_the_longest_training_and_in_the_order_of_their_losses(pages, tmp_path, monkeypatch):
    def write(impl, metric, value, **params):
        record(
            "comparison",
            impl,
            {"parameters": 21e6, "hidden_size": 384, "layers": 8} | params,
            metric,
            value,
            "",
            out=tmp_path,
        )

    write("RDN", "loss", 9.0, of_tokens=8_000_000)  # on a processor
    monkeypatch.setattr("whimbrel.bench.results.device_name", lambda device: "A GPU")
    trained = {"T": 1024, "lr": 0.002, "tokens": 4_000_000, "chance": 1 / 64}
    write("RDN", "loss", 1.0, of_tokens=2_000_000, seed=0, **trained)
    # One model was judged at its end, all of them where the slowest was.
    write("RDN", "loss", 2.0, seed=0, **trained | {"tokens": 5_000_000, "of_tokens": 4_000_000})
    for seed in (0, 1):
        # Softmax lacks a seed: its one loss is below RDN's mean of two, and still above RDN's of the same seed.
        for impl, loss in (("softmax", 3.5), ("RDN", 3.25))[seed:]:
            given = trained | {"of_tokens": 4_000_000, "seed": seed}
            write(impl, "loss", loss + seed, **given)
            write(impl, "mqar", 0.5 + seed / 4, pairs=4, **given)
            for length in (1024, 2048):
                write(impl, "needle", 0.5 + seed / 4, length=length, depth=0.1, **given)
                write(impl, "needle", 1.0, length=length, depth=0.9, **given)
    # Of recall alone, the rate with the lower loss, though the other happens to be right more often.
    for impl, lr, loss, right in (("RDN", 1e-3, 0.5, 0.25), ("RDN", 3e-3, 0.25, 0.125), ("GDN", 1e-3, 0.5, 0.75)):
        small = {"layers": 2, "hidden_size": 128, "head_dim": 16, "state_bytes": 2**14, "tokens": 1e6, "T": 256}
        small |= {"lr": lr, "seed": 0}
        record("recall", impl, small, "loss", loss, "", out=tmp_path)
        for pairs in (4, 8):
            record("recall", impl, small | {"pairs": pairs, "chance": 1 / 256}, "accuracy", right, "", out=tmp_path)
    write("RDN", "train_rate", 50_000.0, T=1024)
    write("RDN", "decode_rate", 4000.0, context=1024, B=16)
    write("RDN", "train_peak", 2**33, T=1024)
    write("RDN", "state_bytes", 2**21, context=1024, B=16)
    # GDN was cut off by time before it was judged.
    for impl, end in (("RDN", 3), ("softmax", 3), ("GDN", 2)):
        for million in range(1, end + 1):
            given = trained | {"of_tokens": 4_000_000, "tokens": million * 1_000_000, "seed": 0}
            write(impl, "curve", (5.0 if impl == "GDN" else 6.0) - million, **given)
    text = pages.comparison_page(tmp_path).replace("\u00a0", " ")
    first, second = (
        text.index(f"| {row}")
        for row in (
            "RDN | 21.00 | 3.2500/4.2500 | 3.7500 (1.0000) | +0.0000 (0.0000) |",
            "softmax | 21.00 | 3.5000 | 3.5000 | +0.2500 |",
        )
    )
    assert first < second
    assert "seeds 0, 1; softmax: seed 0 alone" in text
    assert "| RDN | 50/75 |" in text
    assert "**At 2.0 M tokens**" in text
    assert "cut off by time: RDN at 3.0 M, softmax at 3.0 M, GDN at 2.0 M" in text
    assert "| GDN | 3.0000 | +0.0000 |\n| RDN | 4.0000 | +1.0000 |" in text
    assert "| RDN | 100/100, 50/75 | 100/100, 50/75 |" in text
    assert "| RDN | 16 | 16.0 KiB | 0.003 | 12% | 12% |\n| GDN | 16 | 16.0 KiB | 0.001 | 75% | 75% |" in text
    assert "| RDN | 50 | 4 | 8.00 GiB |" in text
    assert "| RDN | 2.00 MiB |" in text
    assert "9.0000" not in text
    assert [path.name for path in pages.figures(tmp_path, tmp_path)] == [
        "comparison-needle.svg",
        "comparison-loss.svg",
    ]
    assert pages.comparison_page(tmp_path / "none") == "Nothing has been measured on a GPU yet."


def test_several_gpus_are_shown_with_their_kill(pages, tmp_path, monkeypatch):
    monkeypatch.setattr("whimbrel.bench.results.device_name", lambda device: "A GPU")
    for lr in (1.0, 2e-4):
        given = {"recipe": "r", "batch_tokens": 8192, "micro_batch_tokens": 4096, "seq_len": 1024, "lr": lr}
        for count, rate in (("1 process", 100.0), ("2 processes", 150.0 + lr)):
            record("cards", count, given, "throughput", rate, "tokens/s", out=tmp_path)
        gap = {"largest": lr, "steps": 8, "last_loss": 8.0}
        record("cards", "2 processes", given | gap, "loss_gap", [lr, 0.0], "nats", out=tmp_path)
    kill = {"every": 8, "kills": 1, "most": 3}
    record("cards", "2 processes", given | kill, "steps_lost", 3, "steps", out=tmp_path)
    record("cards", "2 processes", given, "seconds_to_go_on", 42.0, "s", out=tmp_path)
    # A run of one process with kills, later and of another recipe, has no place in the table.
    given |= {"recipe": "s"}
    kill = {"every": 10, "kills": 3, "most": 9}
    again = "1 process, started again"
    record("cards", again, given, "throughput", 77.0, "tokens/s", out=tmp_path)
    record("cards", again, given | kill, "steps_lost", [3, 5, 9], "steps", out=tmp_path)
    record("cards", again, given, "seconds_to_go_on", [12.0], "s", out=tmp_path)
    record("cards", again, given | {"steps": 47}, "restart_gap", 0.0, "nats", out=tmp_path)
    text = pages.cards_page(tmp_path)
    assert "| 2 | 150 | 1.50 |" in text
    assert "77" not in text
    assert "Losses of the first 8 steps differ by at most 2e−4 nats" in text
    assert "killed with SIGKILL 1 time, at random moments: each cost 3 steps at most (a checkpoint every 8)" in text
    assert "Of s in 1 process under torchrun (A GPU" in text
    assert "3 times, at random moments: each cost 9 steps at most (a checkpoint every 10), and 12 s until" in text
    assert "The 47 steps after the first kill differ from a run without kills by 0 nats" in text
    assert text.count("Losses") == 1


def test_run_fails_with_one_line_on_an_unknown_case():
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "rnd", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: bench case = 'rnd' is unknown: choose one of rdn, ")
    assert done.stderr.endswith("; did you mean 'rdn'?\n")
    assert done.stderr.count("\n") == 1


def test_limits_and_kernels_of_the_roofline():
    """At the paper's unit (16,384 tokens, 16 heads of 128) and the H100's rates: 0.10 ms of products, 0.09 of bytes."""
    roofline = script("roofline")
    problem = roofline.Problem(1, 16_384, 16, 128, "cuda")
    by_products = roofline.limit("rdn", problem, 800e12, 1e18, False)
    by_bytes = roofline.limit("rdn", problem, 1e18, 3e12, False)
    assert by_products == pytest.approx(102e-6, rel=0.01)
    assert by_bytes == pytest.approx(89.5e-6, rel=0.02)
    assert roofline.limit("rdn", problem, 800e12, 3e12, False) == by_products
    both = roofline.limit("rdn", problem, 800e12, 1e18, True)
    assert both == pytest.approx((102 + 263) * 1e-6, rel=0.01)
    events = [("walk", 300.0, 2), ("void at::native::add", 20.0, 4), ("Memset (Device)", 2.0, 2), ("host", 0.0, 9)]
    assert roofline.summed(events, 2) == {"walk": (0.15, 1.0), "torch": (0.011, 3.0)}
    flops, bandwidth = roofline.rates("cpu", size=64)
    assert flops > 1e6
    assert bandwidth > 1e6


def test_roofline_table_names_the_kernels_that_take_most(tables, tmp_path, monkeypatch):
    monkeypatch.setattr("whimbrel.bench.results.device_name", lambda device: "A GPU")
    params = {"op": "rdn", "pass": "forward+backward", "B": 1, "T": 16_384, "H": 16, "D": 128}
    monkeypatch.setattr("whimbrel.bench.results.commit", lambda: "0000001")
    for impl in ("a kernel that went", "walk", "all kernels", "limit"):
        record("roofline", impl, params, "time", 2.0, "ms", out=tmp_path)
    monkeypatch.setattr("whimbrel.bench.results.commit", lambda: "0000002")
    for impl, value in (("torch", 0.01), ("walk", 1.5), ("all kernels", 1.51), ("limit", 0.4)):
        record("roofline", impl, params, "time", value, "ms", out=tmp_path)
    record("roofline", "matmul", {}, "rate", 700.0, "TFLOP/s", out=tmp_path)
    record("roofline", "copy", {}, "rate", 4.0, "TB/s", out=tmp_path)
    text = "\n".join(tables.mixers._roofline(tmp_path, links="results")).replace("\u00a0", " ")
    assert "| RDN | 1, 16K | forward and backward | 1.51 | 0.4 | `walk` 1.5 |" in text
    assert "700 TFLOP/s" in text
    assert tables.mixers._roofline(tmp_path / "none", links="results") == []


def test_recall_alone_is_trained_and_judged(tmp_path):
    recall = script("recall")
    args = argparse.Namespace(
        mixers=["RDN hybrid", "softmax"],
        hidden_size=32,
        layers=2,
        head_dims=[16],
        pairs=[2, 4, 64],
        warmup=0.5,
        steps=6,
        batch_tokens=512,
        seq_len=256,
        rates=[1e-2, 1e-3],
        seeds=[0],
        num_sequences=2,
        threads=1,
        log_every=0,
        device="cpu",
        out=tmp_path,
        end=math.inf,
    )
    jobs = recall.jobs(args)
    assert [(job.name, job.lr) for job in jobs] == [(name, lr) for lr in args.rates for name in args.mixers]
    assert [type(mixer).__name__ for mixer in jobs[0].model.layers()] == ["RDNConfig", "SoftmaxConfig"]
    shapes = []
    for step in range(args.steps):
        tokens, targets = recall.batch(step, 0, args)
        shapes.append(tuple(tokens.shape))
        # A question's key stands before, with the answer behind it.
        for row, column in (targets != -100).nonzero().tolist():
            key, before = tokens[row, column], tokens[row, :column]
            assert targets[row, column] == tokens[row, int((before == key).nonzero()[0, 0]) + 1]
    # First the fewest pairs without filler, then more of them, then whole sequences.
    assert shapes[0] == (8, 16)
    assert shapes[1] == (8, 16)
    assert shapes[3:] == [(2, 256)] * 3
    recall.write(jobs[1], recall.work(jobs[1]))
    lines = read_lines(tmp_path / "recall.jsonl")
    assert [x["params"]["pairs"] for x in lines if x["metric"] == "accuracy"] == [2, 4, 64, 128]
    assert {x["params"]["tokens"] for x in lines} == {sum(rows * length for rows, length in shapes)}
    assert lines[0]["metric"] == "loss"
    args.end = 0.0
    assert recall.work(jobs[0]) is None


def test_shared_sequences_are_compared_and_timed(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "sequence_parallel.py", "--device", "cpu", "--out", tmp_path]
    tiny = ["--heads", "2", "--dim", "8", "--repeats", "3", "--only", "rla", "--lengths"]
    done = subprocess.run([*command, *tiny, "66"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "sequence_parallel.jsonl")
    assert [(x["impl"], x["metric"]) for x in lines] == [
        ("one-card", "time"),
        ("rounds", "time"),
        ("rounds", "difference"),
        ("chain", "time"),
        ("chain", "difference"),
    ]
    assert all(x["n"] == 3 and x["value"] > 0 for x in lines if x["metric"] == "time")
    assert all(0 < x["value"] < 1e-5 for x in lines if x["metric"] == "difference")
    refused = subprocess.run([*command, *tiny, "67"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "must be a multiple of --processes = 2" in refused.stderr
