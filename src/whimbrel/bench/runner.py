"""Times rivals in one process, alternating, after their check has passed."""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from whimbrel._lazy import load_object
from whimbrel.bench import CASES
from whimbrel.bench.case import Case, Figures, Param
from whimbrel.bench.results import ResultLine, record
from whimbrel.errors import ConfigError, UnsupportedError, WhimbrelError, nearest

_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6}
_WARM_UP_CALLS = 2
_CACHE_BYTES = 1 << 28
"""More than the level-two cache of any GPU holds."""


class CheckError(WhimbrelError):
    """Rivals do not agree, so no time is stated."""


class Measurement(NamedTuple):
    """One implementation of one case."""

    lines: list[ResultLine]
    """The time first, then bytes."""
    rate: float | None
    """Useful floating-point operations per second, where the case states them."""
    bandwidth: float | None
    """Bytes that must move per second, where the case states them."""
    memory_bytes: int | None
    """Peak memory of one call, on CUDA."""
    state_bytes: int | None
    """Bytes held between two calls, where the case states them."""
    ratios: dict[str, float]
    """Time of each baseline over this one's: above 1 is faster than the baseline."""


def run_case(
    name: str,
    *,
    device: str = "cpu",
    quick: bool = False,
    against: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    out: Path | None = None,
    table: bool = True,
) -> list[ResultLine]:
    """Check and time every shape of one case, append the result lines, and print a table.

    A rival that is not installed, fails or is wrong is named on standard error and left out.

    name: a key of `CASES`, or "module:function" from outside.
    device: "cpu" or "cuda".
    quick: small shapes and few repeats.
    against: implementations to take ratios against, one column each; None is each shape's first.
    only: implementations to time; None is all.
    out: folder of the result files, to which lines are appended; None writes nothing.
    table: print a table to standard output.
    Returns the result lines: times, and bytes where the case states or the device measures them.
    Raises ConfigError for an unknown case or baseline, UnsupportedError without the device, CheckError when
    the check is red.
    """
    cases = load_cases(name, device=device, quick=quick)
    _refuse_unknown(name, cases, against, option="against")
    cases = choose(name, cases, only)
    for case in cases:
        try:
            if case.impls or case.figures:
                case.check()
        except AssertionError as error:
            shape = shape_text(case.params)
            raise CheckError(
                f"bench {case.name}: the check failed, so nothing is timed: {one_line(error)} ({shape})"
            ) from error
    found: list[Measurement] = []
    for case in cases:
        found += _measure(case, against, device=device, quick=quick, out=out)
    if table:
        # As wide as it wants where nobody sees where a line ends.
        Console(width=None if sys.stdout.isatty() else 200).print(_table(name, found))
    return [line for measurement in found for line in measurement.lines]


def time_alternating(
    calls: Mapping[str, Callable[[], object]], *, device: str, budget_seconds: float, least: int, most: int
) -> dict[str, list[float]]:
    """Seconds of each call, one repeat of every rival per round, after warm-up.

    Rounds go on until `budget_seconds` are spent, but at least `least` and at most `most` of them.
    """
    clock = _cuda_seconds if device.startswith("cuda") else _cpu_seconds
    for call in calls.values():
        for _ in range(_WARM_UP_CALLS):
            call()
    times: dict[str, list[float]] = {impl: [] for impl in calls}
    started = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - started > budget_seconds:
            break
        for impl, call in calls.items():
            times[impl].append(clock(call))
    return times


def load_cases(name: str, *, device: str, quick: bool) -> list[Case]:
    """The cases of a key of `CASES`, or of "module:function". Raises as `run_case`."""
    target = CASES.get(name, name if ":" in name else None)
    if target is None:
        raise ConfigError(f"bench case = {name!r} is unknown: choose one of {', '.join(CASES)}{nearest(name, CASES)}")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"bench --device = {device!r} is unknown: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("bench --device = 'cuda' needs a CUDA device, and torch sees none: use --device cpu")
    try:
        make = load_object(target)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"bench case = {name!r} cannot be loaded from {target!r}: {one_line(error)}") from error
    return make(device=device, quick=quick)


def choose(name: str, cases: Sequence[Case], only: Sequence[str] | None) -> list[Case]:
    """The cases with the implementations in `only`, all where it is None. Raises ConfigError for an unknown one."""
    if only is None:
        return list(cases)
    _refuse_unknown(name, cases, only, option="only")
    return [
        replace(
            case,
            impls={impl: set_up for impl, set_up in case.impls.items() if impl in only},
            rivals={impl: rival for impl, rival in case.rivals.items() if impl in only},
            figures={impl: call for impl, call in case.figures.items() if impl in only},
        )
        for case in cases
    ]


def _refuse_unknown(name: str, cases: Sequence[Case], names: Sequence[str] | None, *, option: str) -> None:
    known = list(dict.fromkeys(impl for case in cases for impl in (*case.impls, *case.rivals, *case.figures)))
    for wanted in names or ():
        if wanted not in known:
            raise ConfigError(
                f"bench --{option} = {wanted!r} is no implementation of {name}: "
                f"choose from {', '.join(known)}{nearest(wanted, known)}"
            )


def _present(case: Case) -> dict[str, Callable[[], object]]:
    """The calls of the case's rivals that run here and are right; a line on standard error for each other one."""
    calls = {}
    for impl, rival in case.rivals.items():
        try:
            remark = rival.check()
            call = rival.set_up()
            call()
        except UnsupportedError as error:
            say(case, impl, f"left out, {one_line(error)}")
        except Exception as error:  # somebody else's code may fail in any way, and the others are still to be timed
            say(case, impl, f"left out, it fails: {type(error).__name__}: {one_line(error)}")
        else:
            calls[impl] = call
            if remark:
                say(case, impl, remark)
    return calls


def say(case: Case, impl: str, text: str) -> None:
    """One line on standard error about one implementation of a case."""
    print(f"bench {case.name} ({shape_text(case.params)}): {impl}: {text}", file=sys.stderr, flush=True)


def _measure(
    case: Case, against: Sequence[str] | None, *, device: str, quick: bool, out: Path | None
) -> list[Measurement]:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # what the last shape left lies in pieces of other sizes
    if case.figures:
        return _run_themselves(case, device=device, out=out)
    calls = {impl: set_up() for impl, set_up in case.impls.items()} | _present(case)
    if not calls:
        return []
    baselines = [b for b in against or [next(iter(calls))] if b in calls]
    times = time_alternating(
        calls,
        device=device,
        budget_seconds=0.3 if quick else 2.0 if device == "cuda" else 5.0,
        least=3 if quick else 5,
        most=20 if quick else 200,
    )
    memory = {impl: _peak_bytes(call) for impl, call in calls.items()} if device == "cuda" else {}
    medians = {impl: float(np.median(t)) for impl, t in times.items()}
    found = []
    for impl, seconds in times.items():
        values, unit = [s * _PER_SECOND[case.unit] for s in seconds], str(case.unit)
        if case.tokens is not None:
            values, unit = [case.tokens / s for s in seconds], "tokens/s"
        lines = [record(case.name, impl, case.params, case.metric, values, unit, device=device, out=out)]
        state = case.sizes[impl]() if impl in case.sizes else None
        # A call and a part of it have the same params, so their peaks need names of their own, as their times have.
        peak = "peak_bytes_select" if case.metric == "time_select" else "peak_bytes"
        for metric, count in ((peak, memory.get(impl) or None), ("state", state)):
            if count is not None:
                lines.append(record(case.name, impl, case.params, metric, count, "bytes", device=device, out=out))
        found.append(
            Measurement(
                lines=lines,
                rate=case.flops / medians[impl] if case.flops else None,
                bandwidth=case.bytes / medians[impl] if case.bytes else None,
                memory_bytes=memory.get(impl),
                state_bytes=state,
                ratios={base: medians[base] / medians[impl] for base in baselines},
            )
        )
    return found


def _run_themselves(case: Case, *, device: str, out: Path | None) -> list[Measurement]:
    """Run implementations that measure themselves, one after the other in each round; lines as each one ends."""
    found: dict[str, list[Figures]] = {impl: [] for impl in case.figures}
    measured = []
    for number in range(case.rounds):
        for impl in list(found):
            try:
                found[impl].append(case.figures[impl]())
            except UnsupportedError as error:
                say(case, impl, f"left out, {one_line(error)}")
                del found[impl]
                continue
            if number == case.rounds - 1:
                measured += _figures_of(case, impl, found[impl], device=device, out=out)
    return measured


def _figures_of(case: Case, impl: str, runs: Sequence[Figures], *, device: str, out: Path | None) -> list[Measurement]:
    params = {**case.params, **case.apart.get(impl, {})}
    measured = []
    for metric, (_, unit) in runs[0].items():
        values = np.concatenate([np.atleast_1d(run[metric][0]) for run in runs]).tolist()
        line = record(case.name, impl, params, metric, values, unit, device=device, out=out)
        measured.append(Measurement([line], None, None, None, None, {}))
    return measured


def _cpu_seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _cuda_seconds(call: Callable[[], object]) -> float:
    """With a cold level-two cache, whose clearing also gives the processor time to launch what the call begins with."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler().zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _cache_filler() -> torch.Tensor:
    return torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")


def _peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that tensors of a call took above what was taken before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _table(name: str, found: Sequence[Measurement]) -> Table:
    device = found[0].lines[0]["device"] if found else ""
    table = Table(title=f"{name} on {device}", title_justify="left")
    extra = {
        "GFLOP/s": lambda m: None if m.rate is None else f"{m.rate / 1e9:.1f}",
        "GB/s": lambda m: None if m.bandwidth is None else f"{m.bandwidth / 1e9:.1f}",
        "peak MiB": lambda m: None if m.memory_bytes is None else f"{m.memory_bytes / 2**20:.1f}",
        "state MiB": lambda m: None if m.state_bytes is None else f"{m.state_bytes / 2**20:.2f}",
    }
    shown = [head for head, text in extra.items() if any(text(m) is not None for m in found)]
    baselines = list(dict.fromkeys(base for m in found for base in m.ratios))
    for head in ("shape", "implementation", "pass"):
        table.add_column(head)
    for head in ("median", "quartiles", "n", *shown, *(f"times as fast as {b}" for b in baselines)):
        table.add_column(head, justify="right")
    last = ""
    for m in found:
        line = m.lines[0]
        shape = shape_text(line["params"])
        table.add_row(
            "" if shape == last else shape,
            line["impl"],
            line["metric"],
            f"{line['value']:.4g} {line['unit']}",
            f"{line['q25']:.4g} to {line['q75']:.4g}",
            str(line["n"]),
            *(extra[head](m) or "" for head in shown),
            *(f"{m.ratios[b]:.2f}" if b in m.ratios else "" for b in baselines),
        )
        last = shape
    return table


def shape_text(params: Mapping[str, Param]) -> str:
    """{"T": 8, "H": 4} -> "T=8 H=4"."""
    return " ".join(f"{key}={value}" for key, value in params.items())


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
