"""An average kept by configuration: equal to the merge of the checkpoints, resumed, judged, no trace in the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from whimbrel.cli import main
from whimbrel.config import Config, with_overrides
from whimbrel.errors import ConfigError
from whimbrel.infer import load_model
from whimbrel.merge import merge_checkpoints
from whimbrel.training.loop import train
from whimbrel.training.metrics import read_metrics

ONLINE = {"averaging.online.every_steps": 2, "averaging.online.count": 3, "averaging.online.method.kind": "wma"}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def assert_equal(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_average_of_a_run(tiny: Config, tmp_path: Path, capsys) -> None:
    config = with_overrides(tiny, ONLINE)
    train(config, run_dir=tmp_path / "run", quiet=True)
    train(tiny, run_dir=tmp_path / "plain", quiet=True)
    assert_equal(tmp_path / "run" / "step-000006", tmp_path / "plain" / "step-000006")
    merge_checkpoints([tmp_path / "run" / f"step-00000{i}" for i in (2, 4, 6)], tmp_path / "merged", method="wma")
    average = tmp_path / "run" / "average-000006"
    assert_equal(average, tmp_path / "merged")
    manifest = json.loads((average / "merge.json").read_text())
    assert (manifest["steps"], manifest["weights"]) == ([2, 4, 6], ["1/6", "1/3", "1/2"])
    assert load_model(average).config == config.model
    lines = [line for line in read_metrics(tmp_path / "run") if "validation_loss" in line]
    assert [line["average_validation_loss"] == line["validation_loss"] for line in lines] == [True, False, False]
    assert main(["eval", str(average), "--tasks", "bpb"]) == 0
    assert "Held-out text" in capsys.readouterr().out


def test_average_goes_on_with_the_run(tiny: Config, tmp_path: Path) -> None:
    config = with_overrides(tiny, ONLINE | {"averaging.online.save": "every", "averaging.online.accumulate": "float32"})
    train(config, run_dir=tmp_path / "whole", quiet=True)
    for steps in (4, 6):
        train(with_overrides(config, {"steps": steps}), run_dir=tmp_path / "parts", quiet=True)
    for step in (2, 4, 6):
        assert_equal(*(tmp_path / name / f"average-{step:06d}" for name in ("whole", "parts")))


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({}, r"the average kept during training begins anew: tensor '.*' is missing from .*step-000004"),
        (
            ONLINE | {"averaging.online.method.kind": "sma"},
            "begins anew: the saved average was kept with other settings",
        ),
        (ONLINE | {"averaging.online.count": 4}, r"begins anew: tensor 'steps' has shape \[4\], not \[3\], in"),
    ],
)
def test_an_average_that_does_not_fit_begins_anew(tiny: Config, tmp_path: Path, first: dict, message: str) -> None:
    train(with_overrides(tiny, {"steps": 4, **first}), run_dir=tmp_path / "run", quiet=True)
    with pytest.warns(UserWarning, match=message):
        train(with_overrides(tiny, ONLINE), run_dir=tmp_path / "run", quiet=True)
    assert_equal(tmp_path / "run" / "average-000006", tmp_path / "run" / "step-000006")


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"averaging.online.windows = 11 is not allowed; use 1 to 10"):
        with_overrides(Config(), {"averaging.online.windows": 11})
    with pytest.raises(ConfigError, match=r"spikes.collapse = 1.0 is not allowed; use a factor above 1"):
        with_overrides(Config(), {"spikes.collapse": 1.0})
