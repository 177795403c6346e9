"""Every case of the table runs, every committed line can be read, and figures follow from lines."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from whimbrel.bench import CASES
from whimbrel.bench.results import read_lines, record
from whimbrel.bench.runner import run_case
from whimbrel.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plots():
    spec = importlib.util.spec_from_file_location("plots", ROOT / "benchmarks" / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CASES)
def test_every_case_agrees_and_is_timed(name, tmp_path):
    lines = run_case(name, device="cpu", quick=True, out=tmp_path, table=False)
    assert lines == read_lines(tmp_path / f"{name}.jsonl")
    times = [line for line in lines if line["unit"] in ("s", "ms", "us", "tokens/s")]
    assert all(line["value"] > 0 for line in times)
    assert len({line["impl"] for line in times}) >= 2


def test_committed_lines_can_be_read():
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        for line in read_lines(path):
            assert line["case"] == path.stem


def test_figures_show_the_newest_line_of_each_measurement(plots, tmp_path):
    results, out = tmp_path / "results", tmp_path / "figures"
    for value in (8.0, 4.0):
        record("toy", "reference", {"T": 64}, "forward", value, "ms", out=results)
    record("toy", "fast", {"T": 64}, "forward", [1.0, 2.0, 3.0], "ms", out=results)
    record("toy", "fast", {"T": 128}, "forward", 5.0, "ms", out=results)
    record("toy", "fast", {"T": 64}, "state", 4096, "bytes", out=results)
    assert plots.draw_all(results, out) == [out / "toy.svg", out / "toy-bytes.svg"]
    root = ElementTree.parse(out / "toy.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"4 ms", "2 ms", "5 ms", "T=64, forward", "T=128, forward"} <= set(texts)
    assert "8 ms" not in texts
    assert "4,096 bytes" in (out / "toy-bytes.svg").read_text(encoding="utf-8")


def test_no_lines_are_said_so(plots, tmp_path):
    with pytest.raises(DataError, match=r"holds no result lines; make some with benchmarks/run.py$"):
        plots.draw_all(tmp_path, tmp_path / "figures")


def test_run_fails_with_one_line_on_an_unknown_case():
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "rnd", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: bench case = 'rnd' is unknown: choose one of rdn, ")
    assert done.stderr.endswith("; did you mean 'rdn'?\n")
    assert done.stderr.count("\n") == 1
