"""The command: exit status, one-line errors, and what each verb prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whimbrel.cli import VERBS, main
from whimbrel.cli.args import print_table


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tarin"], "unknown command 'tarin'; did you mean 'train'?"),
        (["train"], "whimbrel train needs a recipe or a TOML file as its first argument"),
        (["train", "dmeo"], "unknown recipe 'dmeo'; did you mean 'demo'?"),
        (["train", "demo", "--stpes", "3"], "did you mean --steps?"),
        (["train", "demo", "--optim.rank", "x"], "--optim.rank"),
        (["train", "demo", "--optim", "adamw"], "did you mean --optim.kind?"),
        (["train", "demo", "--mixer", "rla"], "did you mean --model.mixer.kind?"),
        (["eval", "runs/a", "--lm-eval"], "--lm-eval is empty; name at least one"),
        (["train", "demo", "--optim.kind", "fria"], "optim.kind = 'fria' is not known; did you mean 'fira'?"),
        (["train", "demo", "--optim.kind"], "--optim.kind needs the name of a method"),
        (["train", "demo", "--steps", "0"], "steps = 0 is not allowed; use a positive number"),
        (["train", "nowhere.toml"], "configuration file 'nowhere.toml' does not exist"),
        (["bench", "nothing"], "unknown case 'nothing'"),
        (["generate"], "whimbrel generate needs PATH Checkpoint, merge or run folder. (whimbrel generate --help"),
        (["train", "demo", "--optim.rnk", "3"], "unknown option --optim.rnk; did you mean --optim.rank?"),
        (["train", "demo", "--optim.rank", "x"], "--optim.rank = 'x' is not allowed; use a whole number"),
        (["train", "demo", "--optim.lr", "x"], "--optim.lr = 'x' is not allowed; use a number"),
        (["train", "demo", "--device", "gpu"], "--device = 'gpu' is not allowed; use one of 'auto', 'cpu', 'cuda'"),
        (["train", "demo", "demo"], "unknown argument demo (whimbrel train --help"),
        (["train", "demo", "--run-dir"], "--run-dir needs a value"),
        (["eval", "x", "--lengths", "y"], "--lengths = 'y' is not allowed"),
        (["bench", "rdn", "--device", "cud"], "--device = 'cud' is not allowed; use one of 'auto', 'cpu', 'cuda'"),
        (["show"], "whimbrel show needs a recipe or a TOML file, a checkpoint, or 'kinds' as its first argument"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(capsys, argv: list[str], message: str) -> None:
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("whimbrel: error: ")
    assert err.count("\n") == 1


def test_a_terminal_that_knows_ascii_only_gets_the_same_line() -> None:
    lines = set()
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "whimbrel", "train", "demo", "--mixer", "rla"],
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        lines.add(done.stderr)
    assert lines == {
        "whimbrel: error: unknown option --mixer; did you mean --model.mixer.kind? "
        "(whimbrel train --help lists all options)\n"
    }


def test_missing_model_exits_4(capsys, tmp_path) -> None:
    status, _, err = run(capsys, "generate", str(tmp_path / "none"), "--prompt", "x")
    assert status == 4
    assert "is not a folder; name a checkpoint, a merge or a run" in err


def test_convert_without_transformers_names_the_extra(capsys, tmp_path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("whimbrel.integrations.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run(capsys, "convert", str(tmp_path), "--out", str(tmp_path / "out"))
    assert status == 6
    assert err == ("whimbrel: error: whimbrel.integrations.hf needs transformers; run pip install 'whimbrel[hf]'\n")


def test_folders_that_may_not_be_written_to_are_named(capsys, monkeypatch, tmp_path) -> None:
    import whimbrel.demo

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/mine/run")

    monkeypatch.setattr(whimbrel.demo, "run_demo", refused)
    status, _, err = run(capsys, "demo")
    assert status == 1
    assert err == (
        "whimbrel: error: /mine/run: Permission denied; name another path, or one that you may read and write\n"
    )
    with pytest.raises(PermissionError):
        main(["demo", "--debug"])


def test_debug_shows_the_traceback() -> None:
    from whimbrel.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["train", "dmeo", "--debug"])


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_sleep_where_they_wait_unless_told_otherwise(capsys, monkeypatch, given, spins) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run(capsys, "--version")
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_help_and_version(capsys) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(verb in out for verb in VERBS)
    assert all(len(line) <= 80 for line in out.splitlines())
    assert run(capsys, "--version")[1].startswith("whimbrel 0.")
    assert run(capsys)[0] == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys, verb: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: whimbrel {verb}" in capsys.readouterr().out


def test_show_prints_a_configuration_that_can_be_given_back(capsys) -> None:
    from whimbrel.config import load_config, parse_toml

    status, out, _ = run(capsys, "show", "demo", "--optim.kind", "galore", "--optim.rank", "16", "--toml")
    assert status == 0
    assert parse_toml(out) == load_config("demo", {"optim.kind": "galore", "optim.rank": 16})


def test_show_begins_with_what_people_look_for(capsys) -> None:
    out = run(capsys, "show", "tiny-rdn", "--steps", "100")[1].splitlines()
    assert out[0] == "tiny-rdn: 4 blocks of width 192, 3 rdn, 1 softmax; vocabulary of 2,048"
    assert out[1].startswith("trains 100 steps of 2,048 tokens (204,800) in sequences of 256, fira, wsd")
    titles = [out.index(title) for title in ("Parameters", "Training memory, bytes", "State of one sequence, bytes")]
    assert titles == sorted(titles)
    assert len(out) < 30, "all of it on one screen"


def test_show_json_and_kinds(capsys) -> None:
    report = json.loads(run(capsys, "show", "rdn-1.5b", "--json")[1])
    assert 1.5e9 < report["parameters"]["total"] < 1.6e9
    kinds = json.loads(run(capsys, "show", "kinds", "--json")[1])
    assert {"rla", "rdn", "softmax"} <= set(kinds["mixers"])
    assert "fira" in kinds["optim"]


def test_columns_of_words_stand_on_the_left_and_figures_on_the_right(capsys) -> None:
    print_table("Title", ("part", "why", "bytes"), [("a", "short", "1,000"), ("b", "longer than that", "5")])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "a     short             1,000",
        "b     longer than that      5",
        "",
    ]


def test_merge_by_a_decay_curve_and_by_fractions(capsys, tmp_path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folders = []
    for i in range(3):
        folder = tmp_path / f"c{i}"
        folder.mkdir()
        save_file({"w": torch.full((5,), float(i))}, folder / "model.safetensors")
        folders.append(str(folder))
    explicit = ["merge", *folders, "--method", "explicit", "--weights", "1/3", "1/3", "1/3"]
    status, out, _ = run(capsys, *explicit, "--out", str(tmp_path / "a"))
    assert status == 0
    assert "merged 3 checkpoints by explicit (0.3333, 0.3333, 0.3333)" in out
    assert load_file(tmp_path / "a" / "model.safetensors")["w"].tolist() == [1.0] * 5
    status, out, _ = run(
        capsys, "merge", *folders, "--method", "decay", "--curve", "cosine", "--json", "--out", str(tmp_path / "b")
    )
    assert status == 0
    assert sum(json.loads(out)["weights"]) == pytest.approx(1)
    status, _, err = run(capsys, "merge", *folders, "--curve", "cosine", "--out", str(tmp_path / "c"))
    assert status == 2
    assert "--curve is for --method decay, not 'sma'" in err


def test_a_benchmark_that_is_terminated_leaves_no_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "whimbrel", "bench", "merge", "--quick"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        for _ in range(600):
            if any(tmp_path.rglob("*.safetensors")) or running.poll() is not None:
                break
            time.sleep(0.1)
        assert any(tmp_path.rglob("*.safetensors"))
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
    assert not any(tmp_path.iterdir())
