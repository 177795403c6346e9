"""Which of the recorded lines a page shows: the newest of each measurement, of one card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from whimbrel.bench.results import ResultLine, newest, read_lines

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
METHODS = ROOT / "docs" / "methods"
LINKS = "../../benchmarks/results"
"""The results, seen from the pages."""
COVERAGE, THRESHOLD = 0.95, 0.18
"""What is shown of sparse prefill; the threshold is FlashPrefill's."""


def of_case(results: Path, case: str, metric: str | None = None) -> list[ResultLine]:
    """The newest lines of a case, or of one metric of it; none where it was never measured."""
    path = results / f"{case}.jsonl"
    lines = newest(read_lines(path)) if path.exists() else []
    return [x for x in lines if metric in (None, x["metric"])]


def on_gpus(results: Path, case: str, metric: str | None = None) -> list[ResultLine]:
    """The same on every GPU, without lines of other gates."""
    lines = of_case(results, case, metric)
    return [x for x in lines if "thread" not in x["device"] and "gates" not in x["params"]]


def on_gpu(results: Path, case: str, metric: str | None = None) -> list[ResultLine]:
    """The same on the GPU that was measured last."""
    return of_one_card(on_gpus(results, case, metric))


def of_one_card(lines: Sequence[ResultLine]) -> list[ResultLine]:
    """Those of the device that was measured last."""
    return [x for x in lines if x["device"] == by_card(lines)[0]]


def by_card(lines: Sequence[ResultLine]) -> list[str]:
    """The devices of `lines`, the one measured last first; a table holds lines of one card."""
    last: dict[str, str] = {}
    for x in lines:
        last[x["device"]] = max(x["time"], last.get(x["device"], ""))
    return sorted(last, key=last.__getitem__)[::-1]


def comparison_lines(results: Path) -> list[ResultLine]:
    """Lines of mixers compared: of the longest training, judged where most models were, and there the latest."""
    lines = [x for x in on_gpu(results, "comparison") if "of_tokens" in x["params"]]
    most = max((int(x["params"]["of_tokens"]) for x in lines), default=0)
    lines = [x for x in lines if x["params"]["of_tokens"] == most]
    judged: dict[int, set[str]] = {}
    for x in lines:
        if x["metric"] == "loss":
            judged.setdefault(int(x["params"]["tokens"]), set()).add(x["impl"])
    where = max(judged, key=lambda tokens: (len(judged[tokens]), tokens), default=0)
    return [x for x in lines if x["metric"] == "curve" or x["params"]["tokens"] == where]


def sizes(line: ResultLine) -> tuple[int, int]:
    """Sequences and tokens of each."""
    return int(line["params"]["B"]), int(line["params"]["T"])
