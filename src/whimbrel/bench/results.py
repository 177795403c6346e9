"""Result lines: one JSON object per measurement, appended to `benchmarks/results/<case>.jsonl`."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from whimbrel.bench.case import Param
from whimbrel.errors import ConfigError, DataError

RESULTS = Path("benchmarks/results")
"""Where lines go unless the caller says otherwise, below the working directory."""

_PACKAGE = Path(__file__).resolve().parents[1]


# A dictionary key "case" and friends, in the order in which they stand in the file.
class ResultLine(TypedDict):
    case: str
    impl: str
    params: dict[str, Param]
    metric: str
    value: float
    unit: str
    q25: float
    q75: float
    n: int
    device: str
    torch: str
    triton: str | None
    commit: str
    time: str


def record(
    case: str,
    impl: str,
    params: Mapping[str, Param],
    metric: str,
    values: float | Sequence[float],
    unit: str,
    *,
    device: str = "cpu",
    out: Path | None = RESULTS,
) -> ResultLine:
    """Append one measurement to `out/<case>.jsonl` and return the line.

    values: one number, or the repeats of one measurement; the line states their median, quartiles and count.
    device: "cpu" or "cuda"; the line names the processor with its threads, or the GPU.
    out: folder of the result files; None writes nothing.
    Raises ConfigError for a case name that cannot be a file name, or for values that are empty or not finite.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", case):
        raise ConfigError(f"case = {case!r} cannot name a results file: use lower-case letters, digits, - and _")
    repeats = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if repeats.size == 0 or not np.isfinite(repeats).all():
        raise ConfigError(f"{case}/{impl} {metric}: values must be finite numbers, at least one; got {values!r}")
    low, middle, high = (float(x) for x in np.quantile(repeats, [0.25, 0.5, 0.75]))
    line: ResultLine = {
        "case": case,
        "impl": impl,
        "params": dict(params),
        "metric": metric,
        "value": middle,
        "unit": unit,
        "q25": low,
        "q75": high,
        "n": int(repeats.size),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"{case}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return line


def read_lines(path: Path) -> list[ResultLine]:
    """All lines of one results file, oldest first. Raises DataError naming a line that is not a result."""
    lines: list[ResultLine] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is not JSON: {error.msg}") from None
        missing = [key for key in ResultLine.__annotations__ if key not in line]
        if missing:
            raise DataError(f"{path}:{number} is not a result line: it lacks {', '.join(missing)}")
        lines.append(line)
    return lines


FINDINGS = ("difference", "difference_low", "difference_high", "restarts")
"""Parameters of a line that say what came out, so that they tell no two measurements apart."""


def newest(lines: Sequence[ResultLine]) -> list[ResultLine]:
    """The last line of each measurement, in the order in which they first appeared."""
    found: dict[str, ResultLine] = {}
    for line in lines:
        given = [(name, value) for name, value in line["params"].items() if name not in FINDINGS]
        found[repr((line["impl"], given, line["metric"], line["device"]))] = line
    return list(found.values())


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with the number of threads torch uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


@functools.cache
def commit() -> str:
    """Short hash of the checkout this package lies in, with "+" for uncommitted code; "unknown" elsewhere.

    WHIMBREL_COMMIT names it for a copy that was made without the checkout's history.
    """
    if "WHIMBREL_COMMIT" in os.environ:
        return os.environ["WHIMBREL_COMMIT"]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed below somebody else's checkout must not claim that checkout's hash.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    head = git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if git("status", "--porcelain", "--", ".") else "")


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _triton_version() -> str | None:
    return metadata.version("triton") if importlib.util.find_spec("triton") else None
