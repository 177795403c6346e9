"""What goes wrong for users: one clear line, the promised exit status, and nothing lost."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from whimbrel.checkpoint import latest_checkpoint, list_checkpoints
from whimbrel.cli import main
from whimbrel.config import Config, to_toml, with_overrides
from whimbrel.errors import ConfigError, DataError
from whimbrel.infer import generate, load_model
from whimbrel.training.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run with three checkpoints; tests copy it."""
    from whimbrel.config import load_config
    from whimbrel.testing.tiny import tiny_overrides

    run = tmp_path_factory.mktemp("trained") / "run"
    train(load_config("demo", tiny_overrides(corpus)), run_dir=run, quiet=True)
    return run


def fails(capsys: pytest.CaptureFixture[str], status: int, *argv: str) -> str:
    """The one line that a command prints when it fails with `status`."""
    assert main(list(argv)) == status
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("whimbrel: error:")]
    assert len(lines) == 1, captured.err
    return lines[0]


def test_wrong_key_in_toml(capsys, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('recipe = "demo"\n[model.mixer]\nclpi = 2.0\n')
    line = fails(capsys, 2, "train", str(file), "--run-dir", str(tmp_path / "run"))
    assert "unknown setting 'model.mixer.clpi'; did you mean 'clip'?" in line
    assert not (tmp_path / "run").exists()


def test_missing_corpus(capsys, tiny: Config, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(to_toml(with_overrides(tiny, {"data.corpus": "nowhere/text"})))
    line = fails(capsys, 3, "train", str(file), "--run-dir", str(tmp_path / "run"))
    assert "nowhere/text" in line


def test_rank_above_the_smaller_side(capsys, tiny: Config, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(to_toml(tiny))
    line = fails(capsys, 2, "train", str(file), "--optim.rank", "40", "--run-dir", str(tmp_path / "run"))
    assert "rank = 40 exceeds the smaller side 32 of blocks.0.mixer.q_proj.weight; choose at most 32" in line


def test_truncated_checkpoint(capsys, tiny: Config, trained: Path, tmp_path: Path) -> None:
    """The damaged one is passed over with a warning, and training goes on from the one before."""
    run = shutil.copytree(trained, tmp_path / "run")
    newest = list_checkpoints(run)[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"{newest.name}.*bytes"):
        assert latest_checkpoint(run) == run / "step-000004"
    line = fails(capsys, 4, "eval", str(newest))
    assert "model.safetensors" in line
    with pytest.warns(UserWarning, match=newest.name):
        result = train(tiny, run_dir=run, quiet=True)
    whole = load_file(trained / "step-000006" / "model.safetensors")
    again = load_file(result.checkpoint / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_mismatched_shapes_in_a_merge(capsys, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    first, second, _ = list_checkpoints(run)
    tensors = load_file(second / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    line = fails(capsys, 4, "merge", str(first), str(other), "--out", str(tmp_path / "out"))
    assert "norm.weight" in line
    assert "32" in line
    assert "31" in line
    assert not (tmp_path / "out").exists()


def test_full_disk(tiny: Config, tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk; what was saved before stays usable."""
    run = tmp_path / "run"
    train(dataclasses.replace(tiny, steps=2), run_dir=run, quiet=True)
    file = tmp_path / "c.toml"
    file.write_text(to_toml(tiny))

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = [sys.executable, "-m", "whimbrel", "train", str(file), "--run-dir", str(run)]
    done = subprocess.run(command, preexec_fn=small_disk, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, done.stderr
    assert "step-000004" in errors[0]
    assert [path.name for path in run.iterdir() if path.name.startswith((".", "step"))] == ["step-000002"]
    assert train(tiny, run_dir=run, quiet=True).step == 6


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 65, 129])
def test_odd_lengths(trained: Path, length: int) -> None:
    model = load_model(trained)
    tokens = torch.randint(0, 448, (1, length), generator=torch.Generator().manual_seed(length))
    assert model(tokens).logits.shape == (1, length, 448)
    assert generate(model, tokens, max_new_tokens=3).tokens.shape == (1, 3)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batch(trained: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(DataError) as error:
        load_model(trained)(torch.empty(shape, dtype=torch.int64))
    assert "\n" not in str(error.value)
    assert str(list(shape)) in str(error.value) or str(shape) in str(error.value)


def test_unknown_task_and_method(capsys, trained: Path, tmp_path: Path) -> None:
    assert "unknown task 'mqra'; did you mean 'mqar'?" in fails(capsys, 2, "eval", str(trained), "--tasks", "mqra")
    line = fails(capsys, 2, "merge", str(trained / "step-000002"), "--method", "smaa", "--out", str(tmp_path / "o"))
    assert "'smaa'" in line
    assert "did you mean 'sma'?" in line


def test_an_output_that_exists_is_not_overwritten(capsys, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    fails(capsys, 2, "merge", *map(str, list_checkpoints(trained)), "--out", str(out))
    assert (out / "precious.txt").read_text() == "keep me"


def test_a_prompt_that_is_not_tokens(trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt is a str; give token ids \[B, T\], such as torch.tensor"):
        generate(load_model(trained), "In the beginning", max_new_tokens=1)  # pyrefly: ignore


def test_empty_prompt(capsys, trained: Path) -> None:
    line = fails(capsys, 2, "generate", str(trained))
    assert "the prompt is empty; give --prompt TEXT or --prompt-file FILE" in line
