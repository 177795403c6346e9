"""Write the table of the README from the recorded lines: python benchmarks/summary.py"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from method_pages.lines import COVERAGE, RESULTS, ROOT, THRESHOLD, by_card, comparison_lines, of_case, on_gpu
from method_pages.markdown import header, insert, row
from method_pages.optimizers import most_judged, winners

from whimbrel.bench.results import ResultLine, read_lines
from whimbrel.files import atomic_write_text
from whimbrel.report.numbers import power_count, significant, size

PAGES = {
    "mixers": "methods/residual-linear-attention",
    "which blocks": "comparison",
    "optimizers": "methods/low-rank-optimizers",
    "averages": "methods/checkpoint-averaging",
    "prefill": "methods/sparse-prefill",
}
"""Area -> its page in docs, where all shapes, seeds and conditions are."""
PREFILLED = {"mixed": "95 % coverage", "fading, 10 %": "95 % coverage, which 10 % of its pairs hold"}
"""Input of sparse prefill -> how it is told."""


class Row(NamedTuple):
    """A line of the table: what was measured, our value, and what stands beside it."""

    area: str
    what: str
    ours: str
    beside: str
    device: str


def rows(results: Path = RESULTS) -> Iterator[Row]:
    """What of the rows has been recorded, in the order of the README."""
    yield from _passes(results, "rdn", {"flash-qla": "FlashQLA", "fla-gdn": "fla"})
    yield from _passes(results, "rla", {"fla-simple-gla": "fla simple GLA"})
    yield from _mixers(results)
    yield from _compared(results)
    yield from _step(results)
    yield from _pretraining(results)
    yield from _seven_billion(results)
    yield from _averages(results)
    yield from _merging(results)
    yield from _prefill(results)


def summary(results: Path = RESULTS) -> str:
    """The Markdown between the two marks of the README."""
    found = header("page", "measured", "Whimbrel", "beside it", "on")
    shown = set()
    for x in rows(results):
        page = "" if x.area in shown else f"[{x.area}](docs/{PAGES[x.area]}.md)"
        shown.add(x.area)
        found.append(row([page, x.what, x.ours, x.beside, x.device.removeprefix("NVIDIA ")]))
    return "\n".join(found)


def _beside(found: Mapping[str, ResultLine], titles: Mapping[str, str]) -> str:
    return ", ".join(f"{title} {significant(found[impl]['value'])}" for impl, title in titles.items() if impl in found)


def _passes(results: Path, op: str, rivals: Mapping[str, str]) -> Iterator[Row]:
    """Forward and backward at the longest sequence in which most rivals were timed, of the run with most of them."""
    lines = on_gpu(results, f"{op}_fwd_bwd", "time")
    timed: dict[int, set[str]] = {}
    for x in lines:
        if x["impl"] in rivals:
            timed.setdefault(int(x["params"]["T"]), set()).add(x["impl"])
    length = max(timed, key=lambda tokens: (len(timed[tokens]), tokens), default=0)
    runs: dict[str, dict[str, ResultLine]] = {}
    for x in read_lines(results / f"{op}_fwd_bwd.jsonl") if lines else []:
        here = (x["metric"], x["device"], x["params"]["B"], x["params"]["T"])
        if here == ("time", lines[0]["device"], 1, length) and "gates" not in x["params"]:
            runs.setdefault(x["commit"], {})[x["impl"]] = x
    complete = [run for run in runs.values() if "triton" in run]
    if complete:
        found = max(complete, key=lambda run: (len(rivals.keys() & run.keys()), run["triton"]["time"]))
        what = f"{op.upper()}, forward and backward, {power_count(length)} tokens, ms"
        beside = f"{_beside(found, rivals)}, with one state in place of two: half the work"
        yield Row("mixers", what, significant(found["triton"]["value"]), beside, found["triton"]["device"])


def _mixers(results: Path) -> Iterator[Row]:
    lines = of_case(results, "quality-mixers", "validation loss")
    if lines:
        means = _means(lines)
        ours = f"RDN hybrid {means.pop('RDN hybrid'):.3f}"
        yield Row("mixers", f"bits per byte, 2.2 M parameters, {_seeds(lines)}", ours, _listed(means), _device(lines))


def _compared(results: Path) -> Iterator[Row]:
    lines = [x for x in comparison_lines(results) if x["metric"] == "loss"]
    if lines:
        means = dict(sorted(_means(lines).items(), key=lambda item: item[1]))
        ours = {name: means.pop(name) for name in ("RDN hybrid", "RDN", "RLA") if name in means}
        given = lines[0]["params"]
        what = (
            f"nats a token, {int(given['parameters']) / 1e6:.0f} M parameters after {int(given['tokens']) / 1e6:.0f} M "
            f"tokens, {_seeds(lines)}"
        )
        yield Row("which blocks", what, _listed(ours), _listed(means), _device(lines))


def _step(results: Path) -> Iterator[Row]:
    times, states = (on_gpu(results, "optim_step", metric) for metric in ("time", "state_bytes"))
    key = {"model": "1.2b", "rank": 128, "state": "bfloat16"}
    found = [{x["impl"]: x for x in lines if key.items() <= x["params"].items()} for lines in (times, states)]
    if all({"fira", "torch-adamw-fused"} <= own.keys() for own in found):
        time, state = found

        def text(impl: str) -> str:
            return f"{significant(time[impl]['value'])}, {size(state[impl]['value'])}"

        what = "optimizer step of 1.2 B weights at rank 128, ms, and its state"
        beside = f"torch's fused AdamW {text('torch-adamw-fused')}"
        yield Row("optimizers", what, f"Fira {text('fira')}", beside, time["fira"]["device"])


def _pretraining(results: Path) -> Iterator[Row]:
    """After as many tokens as most optimizers were judged, which the figure shows, and after the most tokens."""
    lines = [x for metric in ("loss", "perplexity") for x in on_gpu(results, "pretrain", metric)]
    names = {"fira-paper": "Fira", "fira": "Fira as released", "galore": "GaLore", "apollo": "APOLLO", "adamw": "AdamW"}
    longest = max((int(x["params"]["tokens"]) for x in lines), default=0)
    for tokens in dict.fromkeys((most_judged(lines), longest)):
        reached = [x for x in lines if int(x["params"]["tokens"]) <= tokens]
        best = {name: own for name, own in winners(reached).items() if name in names} if reached else {}
        here = [x for own in best.values() for x in own.lines if x["metric"] == "perplexity"]
        means = _means([x | {"impl": names[x["impl"]]} for x in here])
        ours = {name: means.pop(name) for name in ("Fira", "Fira as released") if name in means}
        if ours:
            tuned = all(own.tried[0] < own.rate < own.tried[-1] for own in best.values())
            rates = "" if tuned else ", rates not all tuned"
            rates += ", rates of the shorter runs" if tokens > most_judged(lines) else ""
            what = f"perplexity, LLaMA-60M after {tokens / 1e6:.1f} M tokens, {_seeds(here)}{rates}"
            yield Row("optimizers", what, _listed(ours, 1), _listed(means, 1), _device(here))


def _seven_billion(results: Path) -> Iterator[Row]:
    lines = [x for x in on_gpu(results, "one_card", "peak_bytes") if x["params"]["model"] == "7b"]
    peaks = {impl: min(x["value"] for x in lines if x["impl"] == impl) for impl in {x["impl"] for x in lines}}
    if "fira" in peaks:
        what = "peak memory of a training step of LLaMA-7B's shapes"
        beside = f"AdamW in bfloat16 {size(peaks['adamw-bfloat16'])}" if "adamw-bfloat16" in peaks else ""
        yield Row("optimizers", what, f"Fira {size(peaks['fira'])}", beside, _device(lines))


def _averages(results: Path) -> Iterator[Row]:
    lines = [x for x in on_gpu(results, "merge_quality", "loss") if "difference" in x["params"]]
    most = max((int(x["params"]["tokens"]) for x in lines if x["params"]["method"] == "annealed"), default=0)
    lines = [x for x in lines if x["params"]["tokens"] == most]

    def gain(method: str, count: int, interval: int) -> str:
        key = (method, count, interval)
        own = [x["params"] for x in lines]
        own = [p for p in own if (p["method"], p.get("count", 0), p.get("interval_tokens", 0)) == key]
        return f"{statistics.mean(float(p['difference']) for p in own):+.3f}" if own else "not measured"

    if lines:
        what = f"loss minus the last checkpoint's, 60 M parameters, {_seeds(lines)}, nats a token"
        ours = f"mean of 6 {gain('sma', 6, 327_680)}, of 15 twice as far apart {gain('sma', 15, 655_360)}"
        yield Row("averages", what, ours, f"annealed branch {gain('annealed', 0, 0)}", _device(lines))


def _merging(results: Path) -> Iterator[Row]:
    lines = [x for x in of_case(results, "merge", "rate") if x["params"].get("storage", "disk") == "disk"]
    for device in by_card(lines)[:1]:
        found = {x["impl"]: x for x in lines if x["device"] == device}
        if {"whimbrel", "mergekit", "read"} <= found.keys():
            beside = _beside(found, {"mergekit": "mergekit", "read": "a plain read"})
            what = "mean of 10 checkpoints of 1 GiB on a disk, GB/s"
            yield Row("averages", what, significant(found["whimbrel"]["value"]), beside, device)


def _prefill(results: Path) -> Iterator[Row]:
    lines = [x for x in on_gpu(results, "prefill", "time") if _shown(x)]
    rivals = {
        "sdpa-cudnn": "dense, cuDNN",
        "flexprefill-official": "FlexPrefill's own code",
        "row_local, equal recall": "row_local at that code's recall",
        "flashprefill-v1": "FlashPrefill V1 (keeps less)",
        "flashprefill-v1, equal error": "FlashPrefill V1 at our error",
    }
    lengths = sorted({int(x["params"]["N"]) for x in lines if x["impl"] == "row_local"})
    for kind, length in dict.fromkeys((kind, at) for kind in PREFILLED for at in (lengths[:1] + lengths[-1:])):
        found = {x["impl"]: x for x in lines if (x["params"]["input"], x["params"]["N"]) == (kind, length)}
        if "row_local" in found:
            what = f"attention of a prompt of {power_count(length)} tokens, selection included, {PREFILLED[kind]}, ms"
            served = found.get("row_local, dense where short")
            ours = f"row_local {significant(found['row_local']['value'])}"
            if served:
                ours = f"as served, dense where that is faster, {significant(served['value'])}; {ours}"
            yield Row("prefill", what, ours, _beside(found, rivals), found["row_local"]["device"])


def _shown(line: ResultLine) -> bool:
    """Whether a line of sparse prefill has the settings of the table."""
    given: Mapping[str, object] = {"coverage": COVERAGE, "threshold": THRESHOLD} | line["params"]
    return given["input"] in PREFILLED and (given["coverage"], given["threshold"]) == (COVERAGE, THRESHOLD)


def _means(lines: Sequence[ResultLine]) -> dict[str, float]:
    names = dict.fromkeys(x["impl"] for x in lines)
    return {name: statistics.mean(x["value"] for x in lines if x["impl"] == name) for name in names}


def _listed(means: Mapping[str, float], digits: int = 3) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in means.items())


def _seeds(lines: Sequence[ResultLine]) -> str:
    count = len({x["params"].get("seed") for x in lines})
    return f"{count} seed{'s' * (count > 1)}"


def _device(lines: Sequence[ResultLine]) -> str:
    return max(lines, key=lambda x: x["time"])["device"]


def main() -> None:
    page = ROOT / "README.md"
    atomic_write_text(page, insert(page.read_text(encoding="utf-8"), summary()))


if __name__ == "__main__":
    main()
