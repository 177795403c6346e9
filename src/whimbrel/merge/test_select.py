"""Windows of a run in tokens, presets, warnings, and sweeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from whimbrel.checkpoint.steps import Meta, write_meta
from whimbrel.cli import main
from whimbrel.errors import CheckpointError, ConfigError
from whimbrel.files import sha256_file
from whimbrel.merge import merge_checkpoints
from whimbrel.merge.config import SMAConfig, WMAConfig
from whimbrel.merge.job import Target
from whimbrel.merge.plan import Rules
from whimbrel.merge.select import learning_rates, list_candidates, parse_tokens, preset, select_window
from whimbrel.merge.stream import merge_many


def checkpoint(run: Path, name: str, value: float) -> Path:
    folder = run / name
    folder.mkdir(parents=True)
    save_file({"w": torch.full((9,), value)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Twenty steps of 100 tokens each, saved every second one; constant from step 4 to 16."""
    folder = tmp_path / "run"
    for step in range(2, 21, 2):
        write_meta(checkpoint(folder, f"step-{step:06d}", float(step)), Meta(step, step * 100, 1, "0", "0", {}))
    rates = [min(step / 4, 1.0, max(20 - step, 0) / 4) for step in range(1, 21)]
    lines = [json.dumps({"step": step, "tokens": step * 100, "lr": rate}) for step, rate in enumerate(rates, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 2')
    return folder


def steps(paths: list[Path]) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in paths]


def test_grid_of_tokens(run: Path) -> None:
    window = select_window(run, every=400, count=3, end=1600)
    assert steps(window.paths) == [8, 12, 16]
    assert (window.off, window.warnings) == (0, ())
    assert steps(select_window(run, every=200, count=2).paths) == [18, 20]
    near = select_window(run, every=390, count=3, end=1610, tolerance=0.1)
    assert steps(near.paths) == [8, 12, 16]
    assert near.off == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 400, "count": 6}, "no checkpoint lies near 0 tokens, point 1 of 6: the nearest, .*step-000002"),
        ({"every": 300, "count": 3, "end": 1600}, r"near 1.3K tokens, point 2 of 3: .*tolerance of more than 0.33"),
        ({"every": 100, "count": 3, "tolerance": 1.0}, "two points of the grid fall on .*step-0000.*longer one"),
        ({"every": 400, "count": 2, "end": 5000}, "no checkpoint lies near 4.6K tokens"),
        ({"every": 400, "count": 0}, "merge.count = 0 is not allowed; use a positive number"),
    ],
)
def test_grids_that_do_not_fit(settings: dict, message: str, run: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        select_window(run, **settings)


def test_warnings_of_warm_up_and_decay(run: Path) -> None:
    (warm,) = select_window(run, every=400, count=4, end=1400).warnings
    assert warm.startswith("1 of 4 checkpoints lie in the warm-up, which ends at step 4")
    (cold,) = select_window(run, every=200, count=3).warnings
    assert cold.startswith("2 of 3 checkpoints lie in the decay of the learning rate, which begins at step 16")
    lines = [{"step": step, "tokens": step * 100, "lr": 1.0 if step != 10 else 0.5} for step in range(2, 21)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (other,) = select_window(run, every=400, count=3, end=1600).warnings
    assert other.startswith("the learning rate changes within the window, from 1 to 0.5")


def test_rates_as_they_are_planned(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "config.toml").write_text('steps = 20\n[schedule]\nkind = "wsd"\nwarmup_steps = 4\ndecay_steps = 4\n')
    assert learning_rates(run) == [(0, 0.0), (4, 1.0), (16, 1.0), (20, 0.0)]
    assert "decay of the learning rate, which begins at step 16" in select_window(run, every=200, count=2).warnings[0]
    assert "warm-up, which ends at step 4" in select_window(run, every=600, count=3, end=1400).warnings[0]


def test_folders_of_other_trainers(tmp_path: Path) -> None:
    run = tmp_path / "hf"
    for step in (10, 20, 30):
        folder = checkpoint(run, f"checkpoint-{step}", float(step))
        history = [{"step": s, "learning_rate": 1e-3 if s < 25 else 5e-4, "loss": 1.0} for s in range(5, step + 1, 5)]
        state = {"global_step": step, "num_input_tokens_seen": step * 7, "log_history": history}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert [c.tokens for c in list_candidates(run)] == [70, 140, 210]
    assert [c.tokens for c in list_candidates(run, tokens_per_step=2)] == [20, 40, 60]
    assert "decay of the learning rate, which begins at step 20" in select_window(run, every=70, count=2).warnings[0]
    bare = tmp_path / "bare"
    for step in (1000, 2000):
        checkpoint(bare, f"iter_{step:07d}", 0.0)
    with pytest.raises(ConfigError, match="does not say how many tokens it has seen; give tokens_per_step"):
        list_candidates(bare)
    assert select_window(bare, every=4000, count=2, tokens_per_step=4).off == 0
    (bare / "metrics.jsonl").write_text('{"step": 1000, "tokens": 11}\n{"step": 2000, "tokens": 22}\n')
    assert [c.tokens for c in list_candidates(bare)] == [11, 22]
    for sources, options, wanted in (
        ([run / "checkpoint-10", run / "checkpoint-20"], {}, [(10, 70), (20, 140)]),
        ([bare / "iter_0001000", bare / "iter_0002000"], {}, [(1000, 11), (2000, 22)]),
        ([bare / "iter_0001000", bare / "iter_0002000"], {"tokens_per_step": 4}, [(1000, 4000), (2000, 8000)]),
    ):
        merge_checkpoints(sources, tmp_path / "merged", overwrite=True, **options)
        manifest = json.loads((tmp_path / "merged" / "merge.json").read_text())
        assert [(source["step"], source["tokens"]) for source in manifest["sources"]] == wanted
    with pytest.raises(ConfigError, match=r"checkpoint-10 \(step 10\) comes after .*checkpoint-20 \(step 20\)"):
        merge_checkpoints([run / "checkpoint-20", run / "checkpoint-10"], tmp_path / "no", method="wma")
    with pytest.raises(CheckpointError, match="holds no checkpoints; name the folder of a run"):
        list_candidates(bare / "iter_0001000")


def test_numbers_of_tokens() -> None:
    assert [parse_tokens(text, "x") for text in ("8B", "1.6T", "500m", "4096", "2e3")] == [
        8 * 10**9, 16 * 10**11, 5 * 10**8, 4096, 2000,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"--every = '8G' is no number of tokens; write 500M, 8B, 1.6T or 4096"):
        parse_tokens("8G", "--every")


@pytest.mark.parametrize(
    ("kind", "parameters", "every", "count"),
    [
        ("dense", 3e8, 2, 6),
        ("dense", 7e9, 15, 10),
        ("dense", 4e11, 40, 10),
        ("moe", 14e9, 8, 10),
        ("moe", 2e11, 80, 10),
    ],
)
def test_presets_of_the_paper(kind: str, parameters: float, every: int, count: int) -> None:
    found = preset(kind, parameters)
    assert (found.every, found.count) == (every * 10**9, count)


def test_several_merges_in_one_pass(run: Path, tmp_path: Path) -> None:
    sources = [run / f"step-{step:06d}" for step in (8, 12, 16)]
    targets = [
        Target("sma-all", (0, 1, 2), SMAConfig()),
        Target("wma-all", (0, 1, 2), WMAConfig()),
        Target("sma-two", (1, 2), SMAConfig()),
    ]
    report = merge_many(sources, tmp_path / "out", targets)
    assert report.read_bytes == 3 * 9 * 4
    for target in targets:
        own = [sources[member] for member in target.members]
        merge_checkpoints(own, tmp_path / target.name, method=target.config)
        for name in ("model.safetensors",):
            assert sha256_file(tmp_path / "out" / target.name / name) == sha256_file(tmp_path / target.name / name)
        manifests = [
            json.loads((base / target.name / "merge.json").read_text()) for base in (tmp_path / "out", tmp_path)
        ]
        assert manifests[0] == manifests[1]
    merges = json.loads((tmp_path / "out" / "merge.json").read_text())["merges"]
    assert merges["wma-all"]["weights"] == ["1/6", "1/3", "1/2"]
    with pytest.raises(ConfigError, match=r"merge.optimizer = 'newest' is for a single result"):
        merge_many(sources, tmp_path / "no", targets, rules=Rules(optimizer="newest"))


def command(capsys, *words: str) -> tuple[int, str, str]:
    status = main(["merge", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_command_over_a_run(capsys, run: Path, tmp_path: Path) -> None:
    grid = [str(run), "--every", "400", "--count", "3", "--end", "1.6K"]
    status, out, _ = command(capsys, *grid, "--dry-run")
    assert status == 0
    assert "3 checkpoints from 800 to 1.6K tokens, 400 apart, at most 0 from the grid" in out
    assert "nothing was written" in out
    status, out, err = command(capsys, *grid, "--out", str(tmp_path / "out"))
    assert status == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].unique().tolist() == [12.0]
    assert "warning" not in err
    status, out, err = command(
        capsys, str(run), "--every", "400", "--count", "4", "--json", "--out", str(tmp_path / "b")
    )
    assert status == 0
    assert "decay of the learning rate" in err
    assert json.loads(out)["event"] == "done"
    plan = json.loads(command(capsys, *grid, "--dry-run", "--json")[1])
    assert (plan["event"], plan["read_bytes"], plan["weights"]) == ("plan", 108, ["1/3", "1/3", "1/3"])


def test_command_line_that_does_not_fit(capsys, run: Path, tmp_path: Path) -> None:
    sources = [str(path) for path in sorted(run.glob("step-*"))[:2]]
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "curve").write_text("1, 0.5\n0.25")
    cases = [
        ([*sources], "needs --out DIR"),
        ([*sources, *out, "--count", "2"], "--count is for a run folder with --every or --preset"),
        ([*sources, *out, "--every", "8"], "--every and --preset take one run folder, not 2 checkpoints"),
        ([str(run), *out, "--every", "8"], "--every needs --count"),
        ([str(run), *out, "--preset", "dense"], "begin before the run did; choose a shorter interval"),
        ([*sources, *out, "--tied", "a"], "--tied = 'a' needs the form A=B"),
        ([*sources, *out, "--any-sum"], "--any-sum is for --method explicit"),
        ([*sources, *out, "--curve-file", "x"], "--curve-file is for --method decay"),
        ([*sources, *out, "--method", "decay", "--curve-file", "/x"], "--curve-file = '/x' cannot be read"),
        ([*sources, *out, "--method", "decay", "--curve-file", str(tmp_path / "curve")], "one for each of the 2 chec"),
        (["sweep", str(run), *out, "--every", "400", "--methods", "ema:x"], "'x' is no number; write ema:0.1"),
        (["sweep", str(run), *out, "--every", "400", "--counts", "9"], "no window of the sweep fits the run: 400-x9"),
        (["sweep", str(run), "--every", "400"], "needs --out DIR"),
    ]
    for words, message in cases:
        status, _, err = command(capsys, *words)
        assert status == 2, words
        assert message in err, err
    assert not (tmp_path / "out").exists()


def test_command_sweep(capsys, run: Path, tmp_path: Path) -> None:
    words = [
        "sweep",
        str(run),
        "--every",
        "200",
        "400",
        "--counts",
        "2",
        "3",
        "9",
        "--methods",
        "sma",
        "ema:0.5",
        "decay:cosine",
    ]
    words += ["--end", "1600", "--out", str(tmp_path / "out")]
    status, out, err = command(capsys, *words)
    assert status == 0
    assert "9 is left out" not in out
    assert "400-x9 is left out" in err
    assert "12 merges of 4 checkpoints in one pass" in out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 13
    assert load_file(tmp_path / "out" / "ema-0.5-400-x2" / "model.safetensors")["w"][0] == 14.0


def test_decay_from_a_file(capsys, run: Path, tmp_path: Path) -> None:
    (tmp_path / "curve").write_text("1, 0.5\n0.25")
    sources = [str(run / f"step-{step:06d}") for step in (8, 12, 16)]
    words = [*sources, "--method", "decay", "--curve-file", str(tmp_path / "curve"), "--out", str(tmp_path / "out")]
    assert command(capsys, *words)[0] == 0
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [source["weight"] for source in manifest["sources"]] == ["1/2", "1/4", "1/4"]
