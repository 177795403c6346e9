"""`whimbrel eval` over generated tasks: tables, JSON, methods and lengths."""

from __future__ import annotations

import json
import sys

import pytest

from whimbrel.cli import main
from whimbrel.evals.tasks import TASKS
from whimbrel.training import train

METHODS = ("dense", "row_local:coverage=0.5,block_size=16", "window:window_tokens=16,sink_tokens=16,block_size=16")


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    from whimbrel.config import load_config
    from whimbrel.testing.tiny import tiny_overrides

    folder = tmp_path_factory.mktemp("runs") / "run"
    train(load_config("demo", tiny_overrides(corpus)), run_dir=folder, quiet=True)
    return str(folder)


def test_the_grid_as_json(run, capsys) -> None:
    arguments = ["--tasks", "grid", "--lengths", "64", "96", "--methods", *METHODS, "--num-sequences", "3", "--json"]
    assert main(["eval", run, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["grid"]
    cells, rows = found["grid"]["cells"], found["grid"]["rows"]
    assert len(cells) == len(TASKS) * 2 * 3
    assert [(row["method"], row["length"]) for row in rows] == [
        (method, length) for method in ("dense", "row_local", "window") for length in (64, 96)
    ]
    assert [row["density"] is None for row in rows] == [True, True, False, False, False, False]
    assert all(0 < row["density"] < 1 for row in rows[2:])
    assert {row["budget"] for row in rows} == {"", *(method.partition(":")[2] for method in METHODS[1:])}
    assert main(["eval", run, *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_tables_show_tasks_lengths_places_and_the_worst(run, capsys) -> None:
    names = ("bpb", "mqar", "copying", "list_recall")
    assert main(["eval", run, "--tasks", *names, "--lengths", "64", "--methods", *METHODS[:2], "--seq-len", "32"]) == 0
    text = capsys.readouterr().out
    for part in (
        "By position in the window",
        "Multi-query associative recall",
        "Accuracy by length, with 95 % intervals: dense",
        "Accuracy by length, with 95 % intervals: row_local coverage=0.5,block_size=16",
        "64 tokens",
        "By place of what is asked for, at 64 tokens",
        "Mean and worst task; falls are below dense",
        "largest fall",
    ):
        assert part in text
    lines = text.partition("By position")[2].splitlines()[2:10]
    assert [int(line.split()[0]) for line in lines] == list(range(0, 32, 4))
    assert all(" to " in line for line in lines)


def test_lengths_are_those_of_needles_too(run, capsys) -> None:
    assert main(["eval", run, "--tasks", "needle", "--lengths", "48", "64", "--num-sequences", "2", "--json"]) == 0
    assert {cell["length"] for cell in json.loads(capsys.readouterr().out)["needle"]} == {48, 64}


def test_bfloat16_is_arithmetic_of_its_own_and_close(run, capsys) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        assert main(["eval", run, "--tasks", "bpb", "--dtype", dtype, "--json"]) == 0
        found[dtype] = json.loads(capsys.readouterr().out)["bpb"]["nats_per_token"]
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "windw"], "did you mean 'window'?"),
        (["--methods", "row_local:coverage"], "is not understood; write KIND:setting=value,setting=value"),
        (["--methods", "row_local:coverge=0.5"], "unknown setting 'row_local.coverge'; did you mean 'coverage'?"),
        (["--methods", "row_local:coverage=2.0"], "row_local.coverage = 2.0 is not allowed"),
        (["--tasks", "copying", "--lengths", "1"], "length = 1 has no room for the task 'copying'; use at least 2"),
        (
            ["--tasks", "mqar", "--lengths", "64"],
            "lengths = [64] has no task; add needle, or tasks of the grid, or leave",
        ),
        (
            ["--tasks", "bpb", "--methods", *METHODS[:2]],
            "methods are compared in tasks of the grid; add grid, or one of",
        ),
    ],
)
def test_wrong_arguments_are_named(run, arguments, message, capsys) -> None:
    assert main(["eval", run, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(run, capsys, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("whimbrel.integrations.lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", run, "--lm-eval", "whimbrel"]) == 6
    assert capsys.readouterr().err == (
        "whimbrel: error: whimbrel.integrations.lm_eval needs lm-eval and transformers; "
        "run pip install 'whimbrel[lm-eval]'\n"
    )
