"""`whimbrel merge forecast` and `whimbrel merge path`: the loss of averages along a run, and between checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from whimbrel.checkpoint import list_checkpoints
from whimbrel.cli import main
from whimbrel.config import Config, with_overrides
from whimbrel.data import TokenShards
from whimbrel.data.pipeline import shards_for
from whimbrel.evals import evaluate_bpb
from whimbrel.evals.forecast import _places, forecast
from whimbrel.evals.path import layer_of
from whimbrel.infer import load_model
from whimbrel.merge import merge_checkpoints
from whimbrel.training.loop import train

TOKENS = "1024"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of 12 steps with a checkpoint after each, at a constant rate from the third on."""
    from whimbrel.config import load_config
    from whimbrel.testing.tiny import tiny_overrides

    settings = {"steps": 12, "checkpoint.every_steps": 1, "eval.checkpoint_tokens": 0}
    config = load_config("demo", tiny_overrides(corpus) | settings)
    return train(config, run_dir=tmp_path_factory.mktemp("runs") / "run", quiet=True).run_dir


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def edit(checkpoint: Path, name: str, old: str, new: str) -> None:
    """Replace a text in a file of a step folder, and its size in the folder's list."""
    file, meta = checkpoint / name, checkpoint / "meta.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    data = json.loads(meta.read_text())
    data["files"][name]["bytes"] = file.stat().st_size
    meta.write_text(json.dumps(data))


def loss_of(path: Path, config: Config) -> float:
    shards = TokenShards(shards_for(config, quiet=True), "validation")
    return evaluate_bpb(load_model(path), shards, seq_len=64, max_tokens=int(TOKENS)).nats_per_token


@pytest.fixture
def config(tiny: Config) -> Config:
    return with_overrides(tiny, {"steps": 12})


def test_forecast_of_a_run(run: Path, config: Config, capsys, tmp_path: Path) -> None:
    """Each figure is the one that the offline merge gives; warm-up is left out; the page holds the advice."""
    options = ("--tokens", TOKENS, "--counts", 3, 6, "--points", 4, "--annealed", run / "step-000012")
    status, out, err = command(capsys, "merge", "forecast", run, *options)
    assert status == 0, err
    found = json.loads((run / "forecast.json").read_text())
    assert [point["tokens"] // 256 for point in found["raw"]] == [4, 7, 9, 12]
    assert [len(window["points"]) for window in found["windows"]] == [4, 3]
    assert found["interval_tokens"] == 256
    for window in found["windows"]:
        count, point = window["count"], window["points"][-1]
        merge_checkpoints(list_checkpoints(run)[-count:], tmp_path / str(count))
        assert point["loss"] == loss_of(tmp_path / str(count), config)
        difference = point["difference"]
        assert difference["value"] == pytest.approx(point["loss"] - found["raw"][-1]["loss"], abs=1e-12)
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert found["annealed"]["difference"]["value"] == 0
    assert found["advice"]
    assert all(sentence in out for sentence in found["advice"])
    assert "no gain over decays of 1 T tokens" in out
    page = (run / "forecast.html").read_text()
    assert "Forecast of annealing" in page
    assert f"{found['raw'][-1]['loss']:.4f}" in page
    assert "nan" not in page.lower()


def test_forecast_needs_a_constant_rate_and_equal_distances(run: Path, capsys, tmp_path: Path) -> None:
    status, _, err = command(capsys, "merge", "forecast", tmp_path)
    assert status == 4
    assert "holds 0 complete checkpoints of whimbrel train; name a run folder with two or more" in err
    (tmp_path / "other" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-5" / "model.safetensors").touch()
    assert (
        "those of another trainer are averaged by whimbrel merge sweep"
        in command(capsys, "merge", "forecast", tmp_path / "other")[2]
    )
    gap = tmp_path / "gap"
    shutil.copytree(run, gap)
    shutil.rmtree(gap / "step-000008")
    status, _, err = command(capsys, "merge", "forecast", gap, "--tokens", TOKENS)
    assert status == 4
    assert "step-000009 lies 512 tokens after the checkpoint before it, others 256" in err
    cosine = tmp_path / "cosine"
    shutil.copytree(run, cosine)
    edit(cosine / "step-000012", "config.toml", 'kind = "wsd"', 'kind = "cosine"')
    status, _, err = command(capsys, "merge", "forecast", cosine, "--tokens", TOKENS)
    assert status == 4
    assert "1 of 12 checkpoints lie between warm-up (step 2) and decay (step 2)" in err
    status, _, err = command(capsys, "merge", "forecast", run, "--counts", 1, "--tokens", TOKENS)
    assert status == 2
    assert "counts = [] is not allowed; use sizes from 2 to 11" in err


def test_a_harmful_window_is_named(run: Path, config: Config) -> None:
    """An average with weights from before the run learnt anything is above the checkpoint, and the advice says so."""
    model = load_model(run)
    shards = TokenShards(shards_for(config, quiet=True), "validation")

    def evaluate(candidate):
        return evaluate_bpb(candidate, shards, seq_len=64, max_tokens=1024)

    found = forecast(model, list_checkpoints(run), evaluate, counts=(3, 12), points=3)
    worst = found["windows"][1]["points"][-1]
    assert worst["difference"]["low"] > 0
    assert any(sentence.startswith("The window of 12 is above the raw checkpoint") for sentence in found["advice"])


def test_places_are_even_and_end_at_the_last() -> None:
    assert _places(12, 3, 4) == [2, 5, 8, 11]
    assert _places(4, 3, 9) == [2, 3]
    assert _places(5, 3, 1) == [4]


def test_path_between_neighbours_and_across_a_barrier(run: Path, config: Config, capsys, tmp_path: Path) -> None:
    """The hidden units of every MLP in another order: the same function, and another basin."""
    near = (run / "step-000011", run / "step-000012")
    options = ("--tokens", TOKENS, "--json")
    status, out, _ = command(capsys, "merge", "path", *near, "--points", 3, *options, "--max-barrier", 0.01)
    assert status == 0
    found = json.loads(out)
    assert found["losses"][0] == loss_of(near[0], config)
    merge_checkpoints(near, tmp_path / "half")
    assert found["losses"][1] == loss_of(tmp_path / "half", config)
    half = found["losses"][1] - (found["losses"][0] + found["losses"][2]) / 2
    assert found["barrier"]["value"] == pytest.approx(half, abs=1e-12)
    assert half != pytest.approx(found["losses"][1] - found["losses"][0], abs=1e-6)
    far = (tmp_path / "far", tmp_path / "permuted")
    weights = load_file(near[1] / "model.safetensors")
    for name in weights:
        if ".mlp." in name:
            weights[name] *= 6
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    permuted = {
        name: w[:, order] if name.endswith("mlp.down.weight") else w[order] if ".mlp." in name else w
        for name, w in weights.items()
    }
    for folder, values in zip(far, (weights, permuted), strict=True):
        folder.mkdir()
        shutil.copy(near[1] / "config.toml", folder)
        save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors")
    command_line = ("merge", "path", *far, "--points", 5, "--per-layer", "--max-barrier", 0.01)
    status, out, err = command(capsys, *command_line, *options)
    assert status == 4
    found = json.loads(out)
    assert found["losses"][0] == pytest.approx(found["losses"][-1], abs=1e-5)
    assert found["barrier_at"] == 0.5
    assert found["barrier"]["low"] > 0.01
    assert f"the loss rises by {found['barrier']['value']:.4f} nats per token" in err
    assert f"at 0.50 of the way from {far[0]} to {far[1]}, more than --max-barrier = 0.01" in err
    layers = {row["layer"]: row["barrier"]["value"] for row in found["layers"]}
    # Which layer's permutation hurts by itself depends on the run; where nothing changes, nothing rises.
    assert max(layers.values()) > 0
    assert layers["embed"] == 0
    status, out, _ = command(capsys, *command_line[:-2], "--tokens", TOKENS)
    assert status == 0
    assert "barrier of " in out
    assert "One layer at a time" in out


def test_pairs_of_a_run(run: Path, capsys) -> None:
    status, out, _ = command(capsys, "merge", "path", run, "--every", 4, "--tokens", TOKENS, "--json")
    assert status == 0
    found = json.loads(out)
    assert [Path(source).name for source in found["sources"]] == ["step-000004", "step-000008", "step-000012"]
    rises = found["half_way"]
    assert all((rises[i][j] is None) == (j <= i) for i in range(3) for j in range(3))
    assert found["losses"] == sorted(found["losses"], reverse=True)
    status, out, _ = command(capsys, "merge", "path", run, "--every", 4, "--tokens", TOKENS)
    assert "half-way from step-0000" in out
    status, _, err = command(capsys, "merge", "path", run, "--every", 4, "--per-layer")
    assert status == 2
    assert "--per-layer is for two checkpoints, not 3" in err


def test_layers_of_names() -> None:
    names = {"blocks.3.mlp.up.weight": "blocks.3", "embed.weight": "embed", "model.layers.10.x": "model.layers.10"}
    assert {name: layer_of(name) for name in names} == names
    assert layer_of("norm") == "norm"
