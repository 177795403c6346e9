"""A real model under selectors, on the page of sparse prefill: perplexity and needles."""

from __future__ import annotations

import statistics
from pathlib import Path

from method_pages.lines import LINKS, RESULTS, of_case
from method_pages.markdown import header, row
from whimbrel.bench.results import ResultLine
from whimbrel.report.numbers import power_count

SMOLLM2 = {
    "dense": "dense",
    "row_local": "`row_local`, 0.95",
    "row_local-0.8": "`row_local`, 0.8",
    "flex_prefill": "`flex_prefill`, corrected, 0.95",
    "flex_prefill-official": "the authors' selection, 0.95",
    "window": "`window`, 1024 + 128 tokens",
}
"""Method -> title of a row."""


Chosen = dict[tuple[str, int, int], tuple[dict[tuple[str, str], float], int, str]]
"""(task, keys, tokens) -> value by method and metric, prompts, device."""


def smollm2_part(results: Path = RESULTS) -> str:
    """The Markdown between the marks of the real model on the page of sparse prefill."""
    return "\n".join(smollm2(results, links=LINKS)).rstrip("\n")


def smollm2(results: Path, *, links: str) -> list[str]:
    """What selectors do to a real model: perplexity by length, needles found by task, their mean and worst."""
    chosen = _chosen(results)
    return [*_perplexity(chosen, links), *_needles(chosen)]


def _chosen(results: Path) -> Chosen:
    """Of each task and length the lines of one device, those of the most prompts, so that methods saw the same ones."""
    groups: dict[tuple[str, int, int], dict[tuple[str, int], list[ResultLine]]] = {}
    for x in of_case(results, "smollm2"):
        given = x["params"]
        task = (str(given["task"]), int(given.get("keys", 8 if given["task"] == "needle-multi-key" else 1)))
        runs = groups.setdefault((*task, int(given["N"])), {})
        runs.setdefault((x["device"], int(given["samples"])), []).append(x)
    chosen: Chosen = {}
    for (task, keys, length), runs in groups.items():
        if task == "needle-multi-key" and keys == 8:
            continue
        # The most methods first: one that was tried alone says nothing.
        (device, samples), lines = max(runs.items(), key=lambda run: (len({x["impl"] for x in run[1]}), run[0][1]))
        found = {(x["impl"], x["metric"]): x["value"] for x in lines}
        if ("dense", "perplexity") in found or ("dense", "accuracy") in found:
            chosen[task, keys, length] = found, samples, device
    return chosen


def _perplexity(chosen: Chosen, links: str) -> list[str]:
    texts = [key for key in sorted(chosen, key=lambda key: key[2]) if key[0] == "perplexity"]
    if not texts:
        return []
    devices = ", ".join(dict.fromkeys(chosen[key][2] for key in texts))
    counts = [(key[2], chosen[key][1]) for key in texts]
    heads = [f"{power_count(length)} tokens, {n} prompt{'s' if n > 1 else ''}" for length, n in counts]
    rows = [
        "**Perplexity** of this repository's pages, share of positions whose most probable token is the dense "
        f"model's, and density ({devices}; [lines]({links}/smollm2.jsonl)):",
        "",
        *header("", *heads),
    ]
    for method, title in SMOLLM2.items():
        cells = []
        for key in texts:
            value, same, density = (chosen[key][0].get((method, m)) for m in ("perplexity", "agreement", "density"))
            shown = [] if value is None else [f"{value:.2f}"]
            shown += [] if same is None or method == "dense" else [f"{same:.1%}"]
            cells.append(", ".join([*shown, *([] if density is None else [f"{density:.0%}"])]))
        rows += [row([title, *cells])] if any(cells) else []
    return [*rows, ""]


def _needles(chosen: Chosen) -> list[str]:
    needles = [key for key in sorted(chosen, key=lambda key: (key[1], key[2])) if key[0] != "perplexity"]
    if not needles:
        return []
    devices = ", ".join(dict.fromkeys(chosen[key][2] for key in needles))
    heads = [f"{'one' if key[1] == 1 else f'one of {key[1]}'}, {power_count(key[2])}" for key in needles]
    rows = [
        f"**Needles** found ({devices}; same lines). Mean and worst are over the columns in which a method has a "
        "figure, less what the dense model finds there:",
        "",
        *header("", *heads, "mean", "worst"),
    ]
    for method, title in SMOLLM2.items():
        cells, falls = [], []
        for key in needles:
            found, samples, _ = chosen[key]
            value = found.get((method, "accuracy"))
            cells.append("" if value is None else f"{round(value * samples)} of {samples}")
            falls += [] if value is None else [value - found["dense", "accuracy"]]
        if falls:
            ends = [f"{statistics.mean(falls):+.0%}", f"{min(falls):+.0%}"] if method != "dense" else ["", ""]
            rows.append(row([title, *cells, *ends]))
    return [*rows, ""]
