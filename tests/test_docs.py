"""README and docs: every Python block runs, every command of the README runs, every link has a target."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from whimbrel import cli, recipes
from whimbrel.bench.results import record
from whimbrel.config import Config, with_overrides
from whimbrel.testing.tiny import tiny_overrides, write_corpus

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "src/whimbrel/**/README.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
LAST = re.compile(r"\$\(ls -d (\S+) \| tail -n (\d+)\)")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


HOWTO = [page for page in PAGES if page.parent.name == "howto" or page.name == "tutorial.md"]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in HOWTO], ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


@pytest.fixture
def users_folder(tmp_path: Path, monkeypatch) -> Path:
    """A folder with a text, where every recipe is shrunk."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "my-text")
    monkeypatch.setattr(recipes, "get", tiny_recipe)
    return tmp_path


def commands(code: str) -> list[str]:
    return [line.partition("#")[0] for line in code.splitlines() if line.startswith("whimbrel ")]


def run_command(folder: Path, command: str, capsys) -> None:
    """As a user would type it."""
    command = LAST.sub(lambda found: shlex.join(expand(folder, found[1])[-int(found[2]) :]), command)
    argv = [part for word in shlex.split(command)[1:] for part in expand(folder, word)]
    assert cli.main(argv) == 0, f"{command}: {capsys.readouterr().err}"


def test_readme_commands_run(users_folder: Path, capsys) -> None:
    lines = [line for code in blocks(ROOT / "README.md", "bash") for line in commands(code)]
    assert len(lines) >= 8
    for command in lines:
        run_command(users_folder, command, capsys)


@pytest.mark.parametrize("page", HOWTO, ids=name)
def test_howto_pages_run(page: Path, users_folder: Path, capsys) -> None:
    """Commands and Python blocks, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    if "whimbrel.integrations.hf" in text:
        pytest.importorskip("transformers")
    if "whimbrel.integrations.titan" in text:
        pytest.importorskip("torchtitan")
    if "--lm-eval" in text:
        pytest.importorskip("lm_eval")
    names: dict[str, object] = {}
    for language, code in FENCE.findall(text):
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif language == "bash":
            for command in commands(code):
                run_command(users_folder, command, capsys)


def tiny_recipe(wanted: str) -> Config:
    overrides = {key: value for key, value in tiny_overrides(Path("my-text")).items() if key != "name"}
    # The shards of a page must fit the recipe that it trains.
    room = recipes.RECIPES[wanted]().model.vocab_size
    tiny = with_overrides(recipes.RECIPES["demo"](), overrides | {"model.vocab_size": room})
    return replace(tiny, name=wanted, data=replace(tiny.data, recall_fraction=0.0))


def expand(folder: Path, word: str) -> list[str]:
    """As the shell does it for a pattern."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else [word]


def test_the_api_reference_is_that_of_the_docstrings() -> None:
    """If this fails, run python docs/api/write.py."""
    done = subprocess.run([sys.executable, str(ROOT / "docs/api/write.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_have_targets(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))  # code is no link
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)} links to {target}, which is not there"


@pytest.fixture
def benchmarks(monkeypatch) -> Callable[[str], ModuleType]:
    """A script of benchmarks/ by its name; scripts import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_readme_figures_are_the_recorded_ones(benchmarks) -> None:
    """If this fails after new measurements, run python benchmarks/summary.py."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page == benchmarks("tables").insert(page, benchmarks("summary").summary())


def test_the_page_of_optimizers_shows_the_recorded_lines(benchmarks) -> None:
    """If this fails after new measurements, run python benchmarks/tables.py."""
    optimizers, insert = benchmarks("tables").optimizers, benchmarks("tables").insert
    page = optimizers.PAGE.read_text(encoding="utf-8")
    for name, text in optimizers.parts().items():
        assert page == insert(page, text, name), name


def test_a_summary_leaves_out_what_was_not_recorded(benchmarks, tmp_path) -> None:
    assert list(benchmarks("summary").rows(tmp_path)) == []
    record("one_card", "fira", {"model": "7b"}, "peak_bytes", 2.0**34, "bytes", out=tmp_path)
    assert list(benchmarks("summary").rows(tmp_path)) == []  # of a processor
    line = (tmp_path / "one_card.jsonl").read_text(encoding="utf-8")
    device = json.loads(line)["device"]
    (tmp_path / "one_card.jsonl").write_text(line.replace(device, "A GPU"), encoding="utf-8")
    (row,) = benchmarks("summary").rows(tmp_path)
    assert row.ours.replace("\u00a0", " ") == "Fira 16.0 GiB"


def test_a_summary_sets_times_of_one_run_side_by_side(benchmarks, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("whimbrel.bench.results.device_name", lambda device: "A GPU")
    for commit, times in (("old", {"triton": 4.0, "flash-qla": 3.0, "fla-gdn": 6.0}), ("new", {"triton": 2.0})):
        monkeypatch.setattr("whimbrel.bench.results.commit", lambda commit=commit: commit)
        for impl, value in times.items():
            record("rdn_fwd_bwd", impl, {"B": 1, "T": 2048}, "time", value, "ms", out=tmp_path)
    (row,) = benchmarks("summary").rows(tmp_path)
    assert (row.ours, row.beside.rpartition(", with")[0]) == ("4", "FlashQLA 3, fla 6")


def test_a_summary_shows_the_figures_perplexities_and_those_after_most_tokens(
    benchmarks, tmp_path, monkeypatch
) -> None:
    """Two optimizers on two seeds and three rates, then one of them for longer."""
    monkeypatch.setattr("whimbrel.bench.results.device_name", lambda device: "A GPU")

    def write(impl: str, tokens: int, seed: int, rate: float, value: float) -> None:
        for metric in ("loss", "perplexity"):
            params = {"tokens": tokens, "seed": seed, "lr": rate}
            record("pretrain", impl, params, metric, value, "nats", out=tmp_path)

    for impl, best in (("fira-paper", 40.0), ("adamw", 50.0)):
        for rate, worse in ((1.0, 5.0), (2.0, 0.0), (4.0, 7.0)):
            write(impl, 6_000_000, 0, rate, best + worse)
        write(impl, 6_000_000, 1, 2.0, best + 1)
    write("adamw", 17_000_000, 0, 2.0, 30.0)
    write("fira-paper", 2_000_000, 0, 2.0, 90.0)
    write("adamw", 2_000_000, 0, 2.0, 90.0)
    first, *others = benchmarks("summary").rows(tmp_path)
    assert first.what == "perplexity, LLaMA-60M after 6.0 M tokens, 2 seeds"
    assert (first.ours, first.beside) == ("Fira 40.5", "AdamW 50.5")
    assert others == []  # the longest runs have no row without ours
    write("fira-paper", 17_000_000, 0, 2.0, 20.0)
    write("galore", 6_000_000, 0, 2.0, 60.0)
    first, second = benchmarks("summary").rows(tmp_path)
    assert first.beside == "AdamW 50.5, GaLore 60.0"
    assert second.what == "perplexity, LLaMA-60M after 17.0 M tokens, 1 seed, rates of the shorter runs"
    assert (second.ours, second.beside) == ("Fira 20.0", "AdamW 30.0")


def test_the_page_of_conformance_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 60
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
