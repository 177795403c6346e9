"""The main job on a tiny model: every stage, the page, and no work done twice."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from whimbrel.config import Config, with_overrides
from whimbrel.demo import run_demo
from whimbrel.errors import ConfigError
from whimbrel.report.schema import check

STAGES = ["data", "train", "anneal", "merge", "judge", "recall", "inspect", "prefill", "generate"]
SAID = ["demo", *STAGES[:5], "forecast", *STAGES[5:], "time"]


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch) -> None:
    """Prompts of a few blocks: what they show of a model that small does not depend on their length."""
    for name, tokens in (("PREFILL_TOKENS", 512), ("PROMPT_TOKENS", 128), ("NEW_TOKENS", 16)):
        monkeypatch.setattr(f"whimbrel.demo.job.{name}", tokens)


def said(out: str) -> dict[str, str]:
    """What each line says by its name; a line may be continued, none is too long for a terminal."""
    assert all(len(line) <= 80 for line in out.splitlines())
    joined = re.sub(r"\n {10}", " ", out)
    return {line[:10].strip(): line[10:] for line in joined.splitlines()}


def test_demo_runs_every_stage_once(tiny: Config, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = run_demo(tiny, tmp_path / "run")
    assert report is not None
    lines = said(capsys.readouterr().out)
    assert list(lines) == SAID
    judged = json.loads((tmp_path / "run" / "stages" / "judge.json").read_text())["result"]
    rows = judged["rows"]
    assert f"SMA {rows['SMA']['bits_per_byte']:.3f}" in lines["judge"]
    assert all(f"{name} " in lines["time"] for name in STAGES)
    assert set(judged["rows"]) == {"last checkpoint", "SMA", "WMA", "EMA", "annealed"}
    assert judged["rows"]["last checkpoint"]["difference"] == [0.0, 0.0, 0.0]
    page = report.read_text(encoding="utf-8")
    assert f"{judged['rows']['SMA']['bits_per_byte']:.4f}" in page
    sample = json.loads((tmp_path / "run" / "stages" / "generate.json").read_text())["result"]
    assert sample["state_bytes_start"] == sample["state_bytes_end"] > 0

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("step-*/model.safetensors")}
    start = time.monotonic()
    assert run_demo(tiny, tmp_path / "run") == report
    assert time.monotonic() - start < 10
    again = said(capsys.readouterr().out)
    assert all(again[name].endswith("kept)") for name in STAGES)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_demo_that_was_cut_off_goes_on(tiny: Config, tmp_path: Path, capsys, monkeypatch) -> None:
    from whimbrel.demo import job

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "merge_checkpoints", broken)
        with pytest.raises(KeyboardInterrupt):
            run_demo(tiny, tmp_path / "run")
    capsys.readouterr()
    assert run_demo(tiny, tmp_path / "run") is not None
    lines = said(capsys.readouterr().out)
    assert [name for name in STAGES if lines[name].endswith("kept)")] == ["data", "train", "anneal"]


def test_a_stop_in_training_changes_neither_the_merge_nor_loses_its_time(
    tiny: Config, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The checkpoint that a signal leaves between the others is none of those that are averaged."""
    from whimbrel.demo import job

    config = with_overrides(tiny, {"averaging.anneal_steps": 0, "averaging.methods": ["sma"]})
    whole = job.train

    def stopped(config: Config, **places: Any) -> Any:
        return whole(with_overrides(config, {"steps": 5}), **places)._replace(interrupted=True)

    with monkeypatch.context() as patch:
        patch.setattr(job, "train", stopped)
        assert run_demo(config, tmp_path / "run") is None
    assert "stopped at step 5" in capsys.readouterr().out
    spent = json.loads((tmp_path / "run" / "stages" / "train.json").read_text())
    assert "result" not in spent
    demo = job._Job(config, tmp_path / "run")
    assert demo.stages.run("train", demo._train, str)["step"] == 6
    assert demo.stages.seconds["train"] > spent["seconds"] > 0
    assert [Path(path).name for path in demo._merge()["sma"]["sources"]] == ["step-000004", "step-000006"]


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ([-0.1, -0.2, -0.05], "is 0.100 nats a token below the last checkpoint (95% interval 0.050 to 0.200)"),
        ([0.1, 0.05, 0.2], "is 0.100 nats a token above the last checkpoint (95% interval 0.050 to 0.200)"),
        ([-0.1, -0.2, 0.05], "cannot be told apart from the last checkpoint"),
    ],
)
def test_an_average_that_does_not_help_is_said_so(difference: list[float], words: str) -> None:
    from whimbrel.demo.job import _say_forecast, _say_judge

    row = {"bits_per_byte": 2.0, "nats_per_token": 3.0, "difference": difference}
    judged = {"rows": {"last checkpoint": row, "SMA": row, "annealed": row | {"nats_per_token": 3.5}}}
    assert _say_judge(judged).endswith(f"; SMA {words}")
    forecast = _say_forecast(judged)
    if difference[2] < 0:
        assert forecast == "SMA forecasts 3.000 nats a token for a short annealing, which gave 3.500"
    else:
        assert forecast.startswith("none: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"averaging.last": 9}, "averaging.last = 9 checkpoints every 2 steps reach back beyond steps = 6"),
        ({"averaging.anneal_steps": 3}, "averaging.anneal_steps = 3 must be below steps = 6 and a multiple of"),
    ],
)
def test_settings_that_leave_nothing_to_compare(
    tiny: Config, tmp_path: Path, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        run_demo(with_overrides(tiny, overrides), tmp_path / "run")


def test_recorded_comparisons_become_tables(tmp_path: Path) -> None:
    from whimbrel.bench.results import record
    from whimbrel.demo.page import comparisons

    assert comparisons(tmp_path) == []
    for name, values in (("a", (1.0, 1.1)), ("b", (2.0, 2.1))):
        for seed, value in enumerate(values):
            params = {"tokens": 100, "seed": seed, "parameters": 7, "chance": 0.1, "setting": "equal"}
            record("quality-mixers", name, params, "validation loss", value, "bits per byte", out=tmp_path)
    (table,) = comparisons(tmp_path)
    assert [row["name"] for row in table["rows"]] == ["a", "b"]
    assert table["rows"][1]["values"] == {"validation loss": [2.0, 2.1]}
    header = {
        "name": "x",
        "date": "2026-01-01",
        "hardware": "h",
        "seconds": 1.0,
        "tokens": 1,
        "parameters": 1,
        "versions": {},
        "commit": "c",
    }
    check({"header": header, "comparisons": [table]})
