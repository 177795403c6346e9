"""`whimbrel show` of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whimbrel.cli import main
from whimbrel.config import Config, load_config, to_toml, with_overrides
from whimbrel.model.memory import parameter_counts
from whimbrel.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Config, Path]:
    from whimbrel.testing.tiny import tiny_overrides

    config = with_overrides(
        load_config("demo", tiny_overrides(corpus)),
        {"steps": 2, "checkpoint.every_steps": 1, "eval.checkpoint_tokens": 0},
    )
    folder = tmp_path_factory.mktemp("show") / "run"
    train(config, run_dir=folder, quiet=True)
    return config, folder


def test_a_checkpoint_is_explained(run: tuple[Config, Path], capsys) -> None:
    config, folder = run
    assert main(["show", str(folder), "--json", "--tokens", "100", "1000", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"].endswith("step-000002")
    assert "checkpoint of 'tiny' after step 2, 512 tokens, saved by 1 process" in report["what"]
    assert report["model"].startswith("2 blocks of width ")
    assert report["model"].endswith("1 rdn, 1 softmax; vocabulary of 448; weights in F32")
    assert report["parameters"] == parameter_counts(config.model)
    # Tied embeddings are stored once.
    assert report["disk"]["weights"] == 4 * report["parameters"]["total"]
    assert report["disk"]["training state"] > 0
    assert [(row["block"], row["kind"]) for row in report["layers"]] == [(0, "rdn"), (1, "softmax")]
    # keys and values of one key head of 16 channels in fp32
    assert report["layers"][1]["state_bytes"] == 100 * 2 * 16 * 4
    assert [row["kv_cache"] for row in report["inference"]] == [100 * 128, 1000 * 128]
    code = {(row["what"], row["kind"]): row for row in report["code"]}
    assert code["sequence", "rdn"]["runs"] == "chunked"
    assert code["sequence", "rdn"]["why"] == "the tensors are on cpu, not on a CUDA device"
    assert code["sparse prefill", "row_local"]["runs"] == "blocks"


def test_the_tables_name_every_part(run: tuple[Config, Path], capsys) -> None:
    assert main(["show", str(run[1] / "step-000002"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for title in ("Parameters", "On disk, bytes", "Layers", "State of one sequence, bytes", "Code that runs on cpu"):
        assert title in out


def test_an_average_says_what_of(run: tuple[Config, Path], tmp_path: Path, capsys) -> None:
    steps = [str(run[1] / f"step-00000{step}") for step in (1, 2)]
    assert main(["merge", *steps, "--out", str(tmp_path / "mean")]) == 0
    assert main(["show", str(tmp_path / "mean"), "--device", "cpu"]) == 0
    assert "mean: average (sma) of 2 checkpoints, of steps 1 to 2\n2 blocks of width " in capsys.readouterr().out


def test_what_cannot_be_shown(run: tuple[Config, Path], tmp_path: Path, capsys) -> None:
    assert main(["show", str(tmp_path)]) != 0
    assert "holds neither model.safetensors nor a complete checkpoint" in capsys.readouterr().err
    assert main(["show", str(run[1]), "--tokens", "0"]) != 0
    assert "--tokens = 0 is not allowed; use positive numbers of tokens" in capsys.readouterr().err


def test_a_model_too_small_for_the_optimizer_of_its_configuration(run: tuple[Config, Path], tmp_path: Path) -> None:
    """As `whimbrel convert` leaves a small model of the Llama family: the default optimizer has a higher rank."""
    config, folder = run
    (tmp_path / "model.safetensors").symlink_to(folder / "step-000002" / "model.safetensors")
    (tmp_path / "config.toml").write_text(to_toml(with_overrides(config, {"optim.rank": 4096})))
    assert main(["show", str(tmp_path), "--device", "cpu"]) == 0
