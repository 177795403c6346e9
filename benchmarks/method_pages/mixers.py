"""The page of residual linear attention: kernels, layers and whole models by shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from method_pages.lines import LINKS, METHODS, RESULTS, by_card, on_gpu, on_gpus, sizes
from method_pages.markdown import figure, header, row
from method_pages.quality import demo_models
from whimbrel.bench.results import ResultLine
from whimbrel.report.numbers import power_count, significant, size


class Column(NamedTuple):
    """One implementation in a table of kernels."""

    title: str
    case: str
    impl: str


Cells = Mapping[tuple[Column, tuple[int, int]], ResultLine]
"""Lines by column and shape."""


PAGE = METHODS / "residual-linear-attention.md"

OPERATORS = (
    Column("RDN", "rdn", "triton"),
    Column("one pass, FlashQLA", "rdn", "flash-qla"),
    Column("one pass, fla", "rdn", "fla-gdn"),
    Column("RDN of FlashQLA", "rdn", "two-pass-flash-qla"),
    Column("RDN of fla", "rdn", "two-pass-fla"),
    Column("RLA", "rla", "triton"),
    Column("one pass, fla simple GLA", "rla", "fla-simple-gla"),
    Column("RLA of fla", "rla", "two-pass-fla"),
    Column("RDN, recompute=2", "rdn", "triton-recompute-2"),
    Column("GDN", "delta", "triton"),
    Column("sGLA", "decay", "triton"),
    Column("RDN in PyTorch", "rdn", "chunked"),
    Column("softmax, cuDNN", "rdn", "sdpa-cudnn"),
)


FEW = OPERATORS[:8]


STEPS = (
    *(
        Column(name, case, "triton")
        for name, case in (("RDN", "rdn"), ("RLA", "rla"), ("GDN", "delta"), ("sGLA", "decay"))
    ),
    Column("copy of two states", "rdn", "copy"),
    Column("GDN by fla", "rdn", "fla-gdn"),
    Column("RDN in PyTorch", "rdn", "chunked"),
)


MODELS = ("rdn", "rdn hybrid", "gdn", "gdn, fla", "gdn, flash-qla", "softmax")


def method_tables(results: Path = RESULTS, page: Path = PAGE) -> str:
    """The Markdown between the two marks of the page of residual linear attention."""
    memory = "Peak memory of forward and backward"
    found = [
        *figure(page, "residual-linear-attention-time.svg", "Time against length"),
        *figure(page, "residual-linear-attention-memory.svg", "Memory against length"),
        *_kernels(results, "fwd_bwd", "Forward and backward", OPERATORS, ("time", "ms"), links=LINKS),
        *_kernels(results, "fwd", "Forward", OPERATORS, ("time", "ms"), links=LINKS),
        *_kernels(results, "fwd_bwd", memory, OPERATORS, ("peak_bytes", ""), links=LINKS),
        *_kernels(results, "fwd_bwd", "First call", OPERATORS, ("first_call", "s"), links=LINKS),
        *_kernels(results, "step", "One token of each sequence", STEPS, ("time", "ms"), links=LINKS),
        *_roofline(results, links=LINKS),
        *_layer(results, links=LINKS),
        *_models(results, "train_tokens", "Training", links=LINKS),
        *_models(results, "prefill_tokens", "Prefill", links=LINKS),
        *demo_models("quality-mixers", "Quality", "blocks", results, links=LINKS),
    ]
    return "\n".join(found or ["No GPU has been measured yet.", ""]).rstrip("\n")


def _kernels(
    results: Path, part: str, title: str, columns: Sequence[Column], metric: tuple[str, str], *, links: str
) -> list[str]:
    """A table for each card; an older one is shown for the implementations that newer ones lack."""
    lines = [(c, x) for c in columns for x in on_gpus(results, f"{c.case}_{part}", metric[0]) if x["impl"] == c.impl]
    found, shown = [], set()
    for device in by_card([x for _, x in lines]):
        cells = {(c, sizes(x)): x for c, x in lines if x["device"] == device}
        here = {column for column, _ in cells}
        if any(column.impl == "triton" for column in here) and not here <= shown:
            shown |= here
            found += _kernel_table(cells, part, title, [c for c in columns if c in here], metric, columns is FEW, links)
    return found


def _kernel_table(
    cells: Cells, part: str, title: str, shown: Sequence[Column], metric: tuple[str, str], few: bool, links: str
) -> list[str]:
    """A row for each shape, with `few` for each in which a rival was timed; a column for each implementation."""
    some = next(iter(cells.values()))
    files = ", ".join(f"[{case}]({links}/{case}_{part}.jsonl)" for case in dict.fromkeys(c.case for c in shown))
    unit = f", {metric[1]}" if metric[1] else ""
    rows = [
        f"**{title}**{unit}, H = {some['params']['H']}, D = {some['params']['D']}, bf16 ({some['device']}; {files}):",
        "",
        *header("B, T", *(c.title for c in shown)),
    ]
    text: Callable[[float], str] = significant if metric[1] else size
    runs = {(c.case, shape): line["commit"] for (c, shape), line in cells.items() if c.impl == "triton"}
    apart = False
    for shape in dict.fromkeys(shape for column, shape in cells if not few or column.impl != "triton"):
        values = [text(cells[c, shape]["value"]) if (c, shape) in cells else "" for c in shown]
        for n, c in enumerate(shown):
            if values[n] and metric[1] and cells[c, shape]["commit"] != runs.get((c.case, shape)):
                values[n], apart = f"{values[n]}*", True
        rows.append(row([f"{shape[0]}, {power_count(shape[1])}", *values]))
    return [*rows, "", *["\\* from another run than what stands beside it, not to be divided by it.", ""][: 2 * apart]]


def _roofline(results: Path, *, links: str) -> list[str]:
    """Time of all kernels of a call, the limit it has, and the kernels that take most."""
    lines = on_gpu(results, "roofline", "time")
    if not lines:
        return []
    rate = {line["impl"]: line["value"] for line in on_gpu(results, "roofline", "rate")}
    rows = [
        f"**Where the time goes**, ms of GPU time a call, H = 16, D = 128, bf16 ({lines[0]['device']}, "
        f"[lines]({links}/roofline.jsonl)). The limit is that of products at {significant(rate['matmul'])} TFLOP/s or "
        f"of inputs and results at {significant(rate['copy'])} TB/s, both measured in the same run:",
        "",
        *header("", "B, T", "pass", "all kernels", "limit", "by kernel"),
    ]
    names = {"rdn": "RDN", "rla": "RLA", "delta": "GDN", "decay": "sGLA"}
    for key in dict.fromkeys((x["params"]["op"], *sizes(x), x["params"]["pass"]) for x in lines):
        op, batch, time, what = key
        here = [x for x in lines if (x["params"]["op"], *sizes(x), x["params"]["pass"]) == key]
        (run,) = (x["commit"] for x in here if x["impl"] == "all kernels")  # earlier ones had other kernels
        own = {x["impl"]: x["value"] for x in sorted(here, key=lambda x: -x["value"]) if x["commit"] == run}
        total, bound = own.pop("all kernels"), own.pop("limit")
        parts = ", ".join(f"`{name}` {significant(value)}" for name, value in own.items() if value > 0.02 * total)
        head = names[str(op)], f"{batch}, {power_count(int(time))}", str(what).replace("+", " and ")
        rows.append(row([*head, significant(total), significant(bound), parts]))
    return [*rows, ""]


def _layer(results: Path, *, links: str) -> list[str]:
    """An RDN layer with the kernels around its recurrence and without."""
    parts = [("forward", "rdn_layer_fwd", 1.0, "time"), ("forward and backward", "rdn_layer_fwd_bwd", 1.0, "time")]
    parts.append(("peak of both, GiB", "rdn_layer_fwd_bwd", 2.0**-30, "peak_bytes"))
    lines = {title: on_gpu(results, case, metric) for title, case, _, metric in parts}
    cells = {
        (title, impl, line["params"]["width"], *sizes(line)): factor * line["value"]
        for title, _, factor, _ in parts
        for line in lines[title]
        for impl in [line["impl"]]
    }
    if not cells:
        return []
    heads = [f"{title}, {impl}" for title, *_ in parts for impl in ("kernels", "torch")]
    rows = [
        "**An RDN layer**, ms, with the kernels around its recurrence and with PyTorch in their place, "
        f"weights in fp32, bf16 autocast ({lines['forward'][0]['device']}, [lines]({links}/rdn_layer_fwd_bwd.jsonl)):",
        "",
        *header("width, B, T", *heads),
    ]
    for width, batch, time in dict.fromkeys(key[2:] for key in cells):
        values = [cells.get((title, i, width, batch, time)) for title, *_ in parts for i in ("kernels", "torch")]
        shown = ["" if value is None else significant(value) for value in values]
        rows.append(row([f"{width}, {batch}, {power_count(time)}", *shown]))
    return [*rows, ""]


def _models(results: Path, case: str, title: str, *, links: str) -> list[str]:
    """Tokens a second of whole models; below it the length from which RDN is faster than softmax."""
    lines = on_gpu(results, case, "throughput")
    if not lines:
        return []
    cells = {(x["impl"], *_setting(x)): x["value"] for x in lines}
    shown = [model for model in MODELS if any(impl == model for impl, *_ in cells)]
    rows = [
        f"**{title}**, tokens a second, {lines[0]['params']['recipe']} ({lines[0]['device']}, "
        f"[lines]({links}/{case}.jsonl)):",
        "",
        *header("B, T", "softmax layers", "recomputed", *shown),
    ]
    for setting in dict.fromkeys(_setting(x) for x in lines):
        batch, time, every, recompute = setting
        values = [f"{cells[m, *setting]:,.0f}" if (m, *setting) in cells else "" for m in shown]
        where = f"one in {every}" if every else "none"
        rows.append(row([f"{batch}, {power_count(time)}", where, "yes" if recompute else "no", *values]))
    ratios = {s[1]: cells["rdn", *s] / value for (impl, *s), value in cells.items() if impl == "softmax"}
    return [*rows, "", *crossover(sorted(ratios.items()))]


def _setting(line: ResultLine) -> tuple[int, int, int, bool]:
    params = line["params"]
    return (*sizes(line), int(params["softmax_every"]), bool(params["recompute"]))


def crossover(ratios: Sequence[tuple[int, float]]) -> list[str]:
    """Where RDN's throughput over softmax's passes 1, between two lengths along a line in logarithms."""
    if len(ratios) < 2:
        return []
    said = ", ".join(f"{significant(ratio)} at {power_count(time)}" for time, ratio in ratios)
    verdict = "RDN is the faster one throughout" if ratios[0][1] >= 1 else "softmax is the faster one throughout"
    for (a, low), (b, high) in pairwise(ratios):
        if low < 1 <= high:
            at = a * (b / a) ** (math.log(1 / low) / math.log(high / low))
            verdict = f"RDN is the faster one from about {round(at, -2):,.0f} tokens"
    return [f"RDN : softmax is {said}; {verdict}.", ""]
