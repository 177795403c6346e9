"""The experiments on averages, benchmarks/merge_quality.py and online_overhead.py, so small that they only run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from whimbrel.bench.results import read_lines
from whimbrel.config import Config, load_config, to_toml, with_overrides
from whimbrel.training.loop import shards_for

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(tiny: Config, tmp_path: Path):
    module = script("merge_quality")
    spikes = {"spikes.window": 8, "spikes.patience": 3, "spikes.margin_steps": 1}
    config = with_overrides(tiny, {"averaging.anneal_steps": 4, **spikes})
    source = tmp_path / "tiny.toml"
    source.write_text(to_toml(config))

    def run(name: str, *options: str) -> list[dict]:
        places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--device", "cpu"]
        module.main([name, str(source), "--steps", "24", "--every", "2", *places, *options])
        return read_lines(tmp_path / "out" / "merge_quality.jsonl")

    return run


def test_anneal(study) -> None:
    lines = study("anneal", "--forks", "2")
    methods = [line["params"]["method"] for line in lines]
    assert methods.count("last") == methods.count("annealed") == 2
    assert {"sma", "wma", "ema", "minus-sqrt"} < set(methods)
    tokens = {line["params"]["tokens"] for line in lines}
    assert tokens == {12 * 256, 24 * 256}
    windows = {(line["params"].get("count"), line["params"].get("interval_tokens")) for line in lines}
    assert (10, 512) in windows
    assert (3, 2048) in windows
    annealed = next(line for line in lines if line["params"]["method"] == "annealed")
    low, middle, high = (annealed["params"][f"difference{end}"] for end in ("_low", "", "_high"))
    assert low <= middle <= high


def test_start(study) -> None:
    lines = study("start", "--forks", "1")
    assert [line["params"]["method"] for line in lines] == ["start-last", "start-average"]
    assert lines[0]["value"] != lines[1]["value"]


def test_spike(study) -> None:
    lines = study("spike", "--burst-factor", "300")
    found = {line["params"]["method"]: (line["value"], line["params"].get("restarts")) for line in lines}
    ways = ["none", "skip", "average", "newest", "reset"]
    assert list(found) == ["undisturbed", *(f"spike-{way}" for way in ways)]
    assert [restarts for _, restarts in found.values()] == [None, 0, 0, 1, 1, 1]
    assert found["spike-average"][0] < found["spike-none"][0]


@pytest.fixture
def replica(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = script("merge_replica")
    source = tmp_path / "tiny.toml"
    source.write_text(to_toml(with_overrides(tiny, {"optim.kind": "adamw", "optim.lr": 1e-2})))
    shards = shards_for(load_config(source))

    def run(name: str, *options: str) -> list[dict]:
        sizes = ["--every", "2", "--anneal-steps", "4", "--count", "3", "--warmup", "4", "--validation-tokens", "2048"]
        places = ["--corpus", str(shards), "--out", str(tmp_path / "out"), "--device", "cpu", "--no-compile"]
        module.main([name, str(source), *sizes, *places, *options])
        return read_lines(tmp_path / "out" / "merge_quality.jsonl")

    return run, shards


def test_replica_anneals_and_tunes(replica) -> None:
    run, shards = replica
    lines = run("anneal", "--steps", "24", "--forks", "0.5", "1", "--tune-steps", "4", "--apart", str(shards))
    found = {(line["params"]["method"], line["params"]["tokens"]): line for line in lines}
    for step in (12, 24):
        last, annealed = (found[name, step * 256] for name in ("last", "annealed"))
        assert annealed["params"]["difference"] == pytest.approx(annealed["value"] - last["value"], abs=1e-5)
        assert found["start-average", step * 256]["value"] != annealed["value"]
    windows = {(x["params"].get("count"), x["params"].get("interval_tokens")) for x in lines}
    assert {(10, 512), (3, 1024), (3, 2048)} < windows
    assert {"wma", "ema", "minus-sqrt", "tune-last", "tune-average"} < {method for method, _ in found}


def test_replica_goes_back_from_a_collapse(replica) -> None:
    run, _ = replica
    options = ["--steps", "24", "--window", "8", "--patience", "3", "--stretch", "4", "--margin", "1"]
    lines = run("collapse", *options, "--rates", "30", "--clip", "0")
    ends = {x["params"]["method"]: x["params"] for x in lines if x["metric"] == "loss"}
    assert "collapse-none" in ends
    assert {"training_loss", "loss"} == {x["metric"] for x in lines}


def test_overhead(tmp_path: Path) -> None:
    sizes = ["--batch", "1", "--seq-len", "32", "--every", "2", "--rounds", "2", "--device", "cpu"]
    script("online_overhead").main(["--recipe", "tiny-softmax", *sizes, "--out", str(tmp_path)])
    lines = read_lines(tmp_path / "online_average.jsonl")
    assert [(line["impl"], line["metric"]) for line in lines] == [
        (place, metric) for place in ("cpu", "same") for metric in ("overhead", "step", "gpu_bytes", "sample")
    ]
