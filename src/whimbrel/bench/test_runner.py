"""The runner: the check first, rivals in turn, exact lines, plain errors."""

from __future__ import annotations

import json
import sys

import pytest

from whimbrel._lazy import load_object
from whimbrel.bench import CASES, runner
from whimbrel.bench.case import Case, Rival
from whimbrel.bench.first_call import first_calls
from whimbrel.bench.results import ResultLine, commit, read_lines, record
from whimbrel.bench.runner import CheckError, run_case, time_alternating
from whimbrel.errors import ConfigError, DataError, UnsupportedError


class Called(list):
    """The order of events in a run."""

    def note(self, what):
        return lambda: self.append(what)


events = Called()


def cases(*, device, quick):  # the signature that the runner calls
    def check():
        events.append("check")

    return [
        Case(
            name="toy",
            params={"T": 8, "quick": quick, "device": device},
            impls={"reference": lambda: events.note("reference"), "fast": lambda: events.note("fast")},
            check=check,
            flops=1e6,
            bytes=2e6,
            sizes={"fast": lambda: 4096},
        )
    ]


def red(*, device, quick):
    def check():
        raise AssertionError("fast differs\nby 0.5")

    return [Case(name="red", params={"T": 8}, impls={"fast": lambda: events.note("fast")}, check=check)]


def rivalled(*, device, quick):
    def missing():
        raise UnsupportedError("theirs is not installed; pip install theirs")

    def wrong():
        raise AssertionError("y: RMS ratio 0.5 above 0.02")

    def broken():
        raise RuntimeError("illegal\nmemory access")

    def call(name):
        return lambda: events.note(name)

    rivals = {
        "missing": Rival(call("missing"), missing),
        "wrong": Rival(call("wrong"), wrong),
        "broken": Rival(lambda: broken, str),
        "excused": Rival(call("excused"), lambda: "the gradient of k is off by 0.3"),
        "right": Rival(call("right"), str),
    }
    impls = {"fast": call("fast")}
    return [Case(name="rivalled", params={"T": 8}, impls=impls, rivals=rivals, check=lambda: None, metric="time")]


HERE = "whimbrel.bench.test_runner"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Enter this module under a name that `module:function` can load, whatever pytest called it."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    events.clear()


def quick(case="cases", **options):
    return run_case(f"{HERE}:{case}", quick=True, **options)


def test_rivals_alternate_after_the_check(tmp_path):
    quick(out=tmp_path, table=False)
    assert events[0] == "check"
    timed = events[1 + 4 :]
    assert len(timed) >= 6
    assert timed == ["reference", "fast"] * (len(timed) // 2)


def test_lines_have_exactly_the_fields_of_the_format(tmp_path):
    found = quick(out=tmp_path, table=False)
    lines = [json.loads(text) for text in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [(x["impl"], x["metric"], x["unit"]) for x in lines] == [
        ("reference", "forward", "ms"),
        ("fast", "forward", "ms"),
        ("fast", "state", "bytes"),
    ]
    for line in lines:
        assert list(line) == list(ResultLine.__annotations__)
        assert line["q25"] <= line["value"] <= line["q75"]
        assert line["params"] == {"T": 8, "quick": True, "device": "cpu"}
    assert lines[2]["value"] == 4096
    assert lines == found == read_lines(tmp_path / "toy.jsonl")


def test_nothing_is_written_or_printed_unless_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(quick(table=False)) == 3
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_table_states_medians_rates_and_ratios(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")  # of a terminal, which this is not
    monkeypatch.setattr(
        "whimbrel.bench.runner.time_alternating", lambda calls, **_: {"reference": [4e-3], "fast": [2e-3]}
    )
    quick()
    printed = capsys.readouterr().out
    reference, fast = (
        next(row for row in printed.splitlines() if name in row and " ms" in row) for name in ("reference", "fast")
    )
    for expected in ("T=8", "4 ms", "0.2", "0.5", "1.00"):  # 1e6 operations and 2e6 bytes in 4 ms
        assert expected in reference
    for expected in ("2 ms", "0.5", "1.0", "2.00", "0.00"):
        assert expected in fast
    for head in ("GFLOP/s", "GB/s", "state MiB", "times as fast as reference"):
        assert head in printed


def test_ratios_are_against_the_named(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")  # of a terminal, which this is not
    monkeypatch.setattr(
        "whimbrel.bench.runner.time_alternating", lambda calls, **_: {"reference": [4e-3], "fast": [2e-3]}
    )
    quick(against=["fast", "reference"])
    printed = capsys.readouterr().out
    assert "times as fast as fast" in printed
    assert "times as fast as reference" in printed
    reference = next(row for row in printed.splitlines() if "reference" in row and " ms" in row)
    assert "0.50" in reference


def test_a_red_check_prints_and_writes_no_time(tmp_path, capsys):
    with pytest.raises(
        CheckError, match=r"^bench red: the check failed, so nothing is timed: fast differs by 0.5 \(T=8\)$"
    ):
        quick("red", out=tmp_path)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
    assert events == []


def test_rivals_that_are_missing_wrong_or_broken_are_said_and_left_out(tmp_path, capsys):
    found = quick("rivalled", out=tmp_path, table=False)
    assert [line["impl"] for line in found] == ["fast", "excused", "right"]
    assert capsys.readouterr().err.splitlines() == [
        "bench rivalled (T=8): missing: left out, theirs is not installed; pip install theirs",
        "bench rivalled (T=8): wrong: left out, it fails: AssertionError: y: RMS ratio 0.5 above 0.02",
        "bench rivalled (T=8): broken: left out, it fails: RuntimeError: illegal memory access",
        "bench rivalled (T=8): excused: the gradient of k is off by 0.3",
    ]
    assert set(events) == {"fast", "excused", "right"}


def test_only_what_was_asked_for_is_timed():
    assert [line["impl"] for line in quick("rivalled", only=["right"], table=False)] == ["right"]
    assert set(events) == {"right"}
    with pytest.raises(ConfigError, match=r"^bench --only = 'fats' is no implementation of .*: choose from fast, m"):
        quick("rivalled", only=["fats"])


def test_first_calls_are_made_in_fresh_processes(tmp_path, capsys):
    found = first_calls(f"{HERE}:rivalled", quick=True, only=["fast", "broken"], out=tmp_path)
    assert [(x["impl"], x["metric"], x["unit"], x["n"]) for x in found] == [("fast", "first_call", "s", 1)]
    assert read_lines(tmp_path / "rivalled.jsonl") == found
    assert events == []
    said = capsys.readouterr()
    assert said.out.startswith(f"{HERE}:rivalled fast: first call 0.0 s")
    assert said.err == "bench rivalled (T=8): broken: left out, it fails: memory access\n"


def test_errors_name_what_is_allowed():
    with pytest.raises(
        ConfigError,
        match=r"^bench case = 'rnd' is unknown: choose one of rdn, rla, .*; did you mean 'rdn'\?$",
    ):
        run_case("rnd", device="cpu", quick=True)
    with pytest.raises(ConfigError, match=r"^bench --device = 'tpu' is unknown: choose cpu or cuda$"):
        run_case("rdn", device="tpu", quick=True)
    with pytest.raises(
        ConfigError,
        match=r"^bench --against = 'fats' is no implementation of .*: "
        r"choose from reference, fast; did you mean 'fast'\?$",
    ):
        quick(against=["fats"])
    with pytest.raises(
        ConfigError, match=r"^bench case = 'no_such:thing' cannot be loaded from 'no_such:thing': No module"
    ):
        run_case("no_such:thing")


def test_cuda_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        UnsupportedError,
        match=r"^bench --device = 'cuda' needs a CUDA device, and torch sees none: use --device cpu$",
    ):
        run_case("rdn", device="cuda", quick=True)


def test_budget_bounds_the_rounds():
    calls = {"a": lambda: None}
    assert len(time_alternating(calls, device="cpu", budget_seconds=0.0, least=4, most=9)["a"]) == 4
    assert len(time_alternating(calls, device="cpu", budget_seconds=60.0, least=4, most=9)["a"]) == 9


def test_record_states_median_and_quartiles(tmp_path):
    line = record("toy", "a", {"seed": 0}, "loss", [4.0, 1.0, 3.0, 2.0, 5.0], "nats/token", out=tmp_path)
    assert (line["value"], line["q25"], line["q75"], line["n"]) == (3.0, 2.0, 4.0, 5)
    one = record("toy", "a", {"seed": 0}, "loss", 2.5, "nats/token", out=tmp_path)
    assert (one["value"], one["q25"], one["q75"], one["n"]) == (2.5, 2.5, 2.5, 1)
    assert read_lines(tmp_path / "toy.jsonl") == [line, one]
    assert "thread" in line["device"]
    assert line["commit"] == commit() != ""


def test_record_refuses_what_would_spoil_a_file(tmp_path):
    with pytest.raises(ConfigError, match=r"^case = '\.\./x' cannot name a results file"):
        record("../x", "a", {}, "loss", 1.0, "nats", out=tmp_path)
    with pytest.raises(ConfigError, match=r"^toy/a loss: values must be finite numbers, at least one; got \[\]"):
        record("toy", "a", {}, "loss", [], "nats", out=tmp_path)
    with pytest.raises(ConfigError, match=r"^toy/a loss: values must be finite numbers, at least one; got nan"):
        record("toy", "a", {}, "loss", float("nan"), "nats", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_spoilt_results_file_is_named(tmp_path):
    path = tmp_path / "toy.jsonl"
    path.write_text('{"case": "toy"}\n')
    with pytest.raises(DataError, match=r"toy.jsonl:1 is not a result line: it lacks impl, params"):
        read_lines(path)
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"toy.jsonl:1 is not JSON: "):
        read_lines(path)


def test_table_of_cases_names_functions():
    assert all(callable(load_object(target)) for target in CASES.values())


def measuring_themselves(*, device, quick):
    def absent():
        raise UnsupportedError("name its environment")

    def run(name):
        events.note(name)()
        return {"rate": (float(len(events)), "GB/s"), "peak_rss": ([7.0, 9.0], "bytes")}

    figures = {"ours": lambda: run("ours"), "absent": absent, "read": lambda: run("read")}
    apart = {"read": {"scaled_from": 3}}
    return [Case(name="toy", params={"T": 8}, figures=figures, apart=apart, rounds=2, check=events.note("check"))]


def test_implementations_that_measure_themselves(tmp_path, capsys):
    found = quick("measuring_themselves", out=tmp_path)
    assert events == ["check", "ours", "read", "ours", "read"]
    assert [(x["impl"], x["metric"], x["value"], x["unit"], x["n"]) for x in found] == [
        ("ours", "rate", 3.0, "GB/s", 2),
        ("ours", "peak_rss", 8.0, "bytes", 4),
        ("read", "rate", 4.0, "GB/s", 2),
        ("read", "peak_rss", 8.0, "bytes", 4),
    ]
    assert [x["params"] for x in found] == [{"T": 8}] * 2 + [{"T": 8, "scaled_from": 3}] * 2
    assert "absent: left out, name its environment" in capsys.readouterr().err
    events.clear()
    assert [x["impl"] for x in quick("measuring_themselves", only=["read"], table=False)] == ["read", "read"]


def test_peaks_of_a_call_and_of_a_part_of_it_have_names_of_their_own(monkeypatch):
    monkeypatch.setattr(runner, "_cuda_seconds", lambda call: 1.0)
    monkeypatch.setattr(runner, "_peak_bytes", lambda call: call())
    monkeypatch.setattr(runner, "record", lambda *line, **_: {"metric": line[3], "value": line[4]})
    found = {}
    for metric, size in (("time", 8), ("time_select", 3)):
        case = Case(
            name="toy", params={}, impls={"a": lambda size=size: lambda: size}, check=lambda: None, metric=metric
        )
        [measured] = runner._measure(case, None, device="cuda", quick=True, out=None)
        found |= {line["metric"]: line["value"] for line in measured.lines[1:]}
    assert found == {"peak_bytes": 8, "peak_bytes_select": 3}
