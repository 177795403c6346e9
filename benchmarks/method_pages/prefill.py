"""The page of sparse prefill: times by length, what is kept, attention over given blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from method_pages.lines import COVERAGE, LINKS, METHODS, RESULTS, THRESHOLD, on_gpu
from method_pages.markdown import figure, header, row
from whimbrel.bench.results import ResultLine
from whimbrel.report.numbers import power_count, significant

PAGE = METHODS / "sparse-prefill.md"

PREFILL = {
    "row_local": "row_local",
    "row_local, dense where short": "row_local, dense where that is faster",
    "row_local-16": "row_local, 16 samples",
    "flex_prefill": "flex_prefill",
    "sdpa-cudnn": "dense, cuDNN",
    "sdpa-flash": "dense, flash",
    "flex-attention": "FlexAttention, blocks given",
    "flexprefill-official": "FlexPrefill, its authors' code",
    "row_local, equal recall": "row_local at the recall of the authors' code",
    "xattention": "XAttention's selection",
    "flashprefill-v1": "FlashPrefill V1",
    "flashprefill-v1, equal error": "FlashPrefill V1 at the error of row_local",
}
"""Implementation -> title of a column."""


def prefill_page(results: Path = RESULTS, page: Path = PAGE) -> str:
    """The Markdown between the two marks of the page of sparse prefill."""
    found = [
        *figure(page, "sparse-prefill-time.svg", "Time against length"),
        *figure(page, "sparse-prefill-recall.svg", "Attention kept against pairs read"),
        *prefill(results, links=LINKS),
        *given_blocks(results, links=LINKS),
    ]
    return "\n".join(found or ["No GPU has been measured yet.", ""]).rstrip("\n")


def prefill(results: Path, *, links: str) -> list[str]:
    """Times of sparse prefill by length, and what was kept; nothing where no GPU has been measured."""
    asked = [
        x
        for x in on_gpu(results, "prefill")
        if x["params"].get("coverage", COVERAGE) == COVERAGE and x["params"].get("threshold", THRESHOLD) == THRESHOLD
    ]
    lines = [x for x in asked if x["params"]["input"] == "mixed"]
    found = {(x["impl"], int(x["params"]["N"]), x["metric"]): x["value"] for x in lines}
    if not any(impl == "row_local" for impl, _, _ in found):
        return []
    lengths = sorted({length for _, length, metric in found if metric == "time"})
    about = lines[0]["params"]
    source = f"{lines[0]['device']}; [lines]({links}/prefill.jsonl)"
    heads = f"{about['H']} heads on {about['G']} key heads of {about['D']}, bf16"
    timed = [impl for impl in PREFILL if any((impl, length, "time") in found for length in lengths)]
    rows = [
        f"**Sparse prefill**, ms, selection included, {heads}, coverage {COVERAGE}, input `mixed` ({source}):",
        "",
        *header("tokens", *(PREFILL[impl] for impl in timed)),
    ]
    for length in lengths:
        cells = [found.get((impl, length, "time")) for impl in timed]
        texts = ["" if cell is None else significant(cell) for cell in cells]
        rows.append(row([power_count(length), *texts]))
    return [*rows, "", *_kept(asked), "", *_selection(results, links=links)]


def _kept(lines: Sequence[ResultLine]) -> list[str]:
    """What was kept: a row for each length of `mixed`, and for each length and layer of other inputs."""
    found: dict[tuple[str, int, int], dict[tuple[str, str], float]] = {}
    for x in lines:
        given = x["params"]
        where = str(given["input"]), int(given["N"]), int(given.get("layer", -1))
        found.setdefault(where, {})[x["impl"], x["metric"]] = x["value"]
    kept = [impl for impl in PREFILL if any((impl, "output_error") in cells for cells in found.values())]
    rows = [
        "Causal pairs read, attention kept by the 5th percentile of queries, and RMS error of the output, for"
        " `mixed` or as named:",
        "",
        *header("tokens", *(PREFILL[impl] for impl in kept)),
    ]
    for (kind, length, layer), cells in sorted(found.items()):
        texts = []
        for impl in kept:
            density, recall, error = (cells.get((impl, x)) for x in ("density", "recall_p5", "output_error"))
            shown = [] if density is None or recall is None else [f"{density:.0%}", f"{recall:.1%}"]
            texts.append(", ".join([*shown, *([] if error is None else [f"{error:.3f}"])]))
        if any(texts):
            name = ("" if kind == "mixed" else f"{kind}, ") + power_count(length)
            rows.append(row([name if layer < 0 else f"{name}, layer {layer}", *texts]))
    return rows


def _selection(results: Path, *, links: str) -> list[str]:
    """What selection takes, on heads of mixed sharpness and on those whose attention fades with distance."""
    found = {
        (str(x["params"]["input"]), int(x["params"]["N"]), x["impl"], x["metric"]): x["value"]
        for x in on_gpu(results, "prefill")
        if x["params"].get("coverage", COVERAGE) == COVERAGE
    }
    shown = {"row_local": "time", "row_local ": "time_select", "sdpa-cudnn": "time", "flex-attention": "time"}
    rows = []
    for kind in ("mixed", "mixed, heads of 256", "fading, 10 %", "fading, 5 %"):
        for length in sorted({n for name, n, impl, _ in found if (name, impl) == (kind, "row_local")}):
            cells = [found.get((kind, length, impl.strip(), metric)) for impl, metric in shown.items()]
            if cells[1] is not None:
                texts = ["" if cell is None else significant(cell) for cell in cells]
                rows.append(row([f"{kind}, {power_count(length)}", *texts]))
    if not rows:
        return []
    return [
        f"**What choosing takes**, ms, coverage {COVERAGE}; `fading` names the share of pairs that holds it"
        f" ([lines]({links}/prefill.jsonl)):",
        "",
        *header("input, tokens", "row_local", "of it, selection", "dense, cuDNN", "FlexAttention, blocks given"),
        *rows,
        "",
    ]


def given_blocks(results: Path, *, links: str) -> list[str]:
    """Times of attention over blocks that are given, by length and density."""
    lines = on_gpu(results, "attend", "time")
    impls = {"triton": "here", "flex-attention": "FlexAttention"}
    impls |= {"sdpa-cudnn": "dense, cuDNN", "sdpa-flash": "dense, flash"}
    found = {(x["impl"], int(x["params"]["T"]), float(x["params"]["density"])): x["value"] for x in lines}
    if not found:
        return []
    rows = [
        f"**Attention over given blocks**, ms, and TFLOP/s on the pairs in them ({lines[0]['device']}; "
        f"[lines]({links}/attend.jsonl)):",
        "",
        *header("tokens, density", *impls.values(), "rate here"),
    ]
    for length, density in sorted({(length, density) for _, length, density in found}):
        cells = [found.get((impl, length, density)) for impl in impls]
        texts = ["" if cell is None else significant(cell) for cell in cells]
        rate = "" if cells[0] is None else f"{4 * 128 * 32 * density * length * (length + 1) / 2 / cells[0] / 1e9:.0f}"
        rows.append(row([f"{power_count(length)}, {density:.0%}", *texts, rate]))
    return [*rows, ""]
