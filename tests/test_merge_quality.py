"""The experiments on averages, benchmarks/merge_quality.py and online_overhead.py, so small that they only run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from whimbrel.bench.results import read_lines
from whimbrel.config import Config, load_config, to_toml, with_overrides
from whimbrel.data.pipeline import shards_for

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(tiny: Config, tmp_path: Path):
    module = script("merge_quality")
    source = tmp_path / "tiny.toml"
    source.write_text(to_toml(with_overrides(tiny, {"optim.kind": "adamw", "optim.lr": 1e-2})))
    shards = shards_for(load_config(source))

    def run(name: str, *options: str) -> list[dict]:
        sizes = ["--every", "2", "--anneal-steps", "4", "--count", "3", "--warmup", "4", "--validation-tokens", "2048"]
        places = ["--corpus", str(shards), "--out", str(tmp_path / "out"), "--device", "cpu", "--no-compile"]
        module.main([name, str(source), *sizes, *places, *options])
        return read_lines(tmp_path / "out" / "merge_quality.jsonl")

    return run, shards


def test_anneals_and_tunes(study) -> None:
    run, shards = study
    lines = run("anneal", "--steps", "24", "--forks", "0.5", "1", "--tune-steps", "4", "--apart", str(shards))
    found = {(line["params"]["method"], line["params"]["tokens"]): line for line in lines}
    for step in (12, 24):
        last, annealed = (found[name, step * 256] for name in ("last", "annealed"))
        assert annealed["params"]["difference"] == pytest.approx(annealed["value"] - last["value"], abs=1e-5)
        low, middle, high = (annealed["params"][f"difference{end}"] for end in ("_low", "", "_high"))
        assert low <= middle <= high
        assert found["start-average", step * 256]["value"] != annealed["value"]
    windows = {(x["params"].get("count"), x["params"].get("interval_tokens")) for x in lines}
    assert {(10, 512), (3, 1024), (3, 2048)} < windows
    assert {"wma", "ema", "minus-sqrt", "tune-last", "tune-average"} < {method for method, _ in found}


SPIKES = ("--window", "8", "--patience", "3", "--stretch", "4", "--margin", "1")


def test_goes_back_from_a_burst(study) -> None:
    run, _ = study
    lines = run("collapse", "--steps", "32", *SPIKES, "--burst-factor", "300")
    ends = {x["params"]["method"]: x for x in lines if x["metric"] == "loss"}
    ways = ["skip", "none", "average", "newest", "reset", "half-rate"]
    assert list(ends) == ["undisturbed", *(f"collapse-{way}" for way in ways)]
    assert [x["params"]["restarts"] for x in ends.values()] == [0, 0, 0, 1, 1, 1, 1]
    assert ends["collapse-average"]["value"] < ends["collapse-none"]["value"] - 0.1
    curves = {name: [x["value"] for x in lines if x["metric"] == "training_loss" and x["params"]["method"] == name]
              for name in ends}  # fmt: skip
    before = [curve[:4] for curve in curves.values()]
    assert all(len(curve) == 8 for curve in curves.values())
    assert all(curve == before[0] for curve in before)


def test_no_collapse_at_a_rate_that_is_fine(study, capsys) -> None:
    run, _ = study
    lines = run("collapse", "--steps", "16", *SPIKES, "--rates", "1e-3")
    assert {x["params"]["method"] for x in lines} == {"collapse-none"}
    assert "no collapse at rate 0.001" in capsys.readouterr().out


def test_one_way_at_a_time(study) -> None:
    run, _ = study
    given = ("collapse", "--steps", "32", *SPIKES, "--burst-factor", "300")
    run(*given, "--ways", "none")
    lines = [x for x in run(*given, "--ways", "average") if x["metric"] == "loss"]
    assert [(x["params"]["method"], x["params"]["restarts"]) for x in lines] == [
        ("collapse-none", 0), ("collapse-average", 1)
    ]  # fmt: skip


def test_overhead(tmp_path: Path) -> None:
    sizes = ["--batch", "1", "--seq-len", "32", "--every", "2", "--rounds", "2", "--device", "cpu"]
    script("online_overhead").main(["--recipe", "tiny-softmax", *sizes, "--out", str(tmp_path)])
    lines = read_lines(tmp_path / "online_average.jsonl")
    metrics = ("overhead", "step", "gpu_bytes", "sample", "sample_bytes")
    assert [(line["impl"], line["metric"]) for line in lines] == [(p, m) for p in ("cpu", "same") for m in metrics]
