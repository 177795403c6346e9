"""Write the README's result tables from benchmarks/results: python benchmarks/tables.py"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whimbrel.bench.results import read_lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"


def tables(results: Path = RESULTS) -> str:
    """The Markdown between the two marks of the README."""
    return "\n".join(
        [
            *_quality("quality-optimizers", "Optimizers", "optimizer", results),
            "",
            *_quality("quality-mixers", "Mixers", "blocks", results),
            "",
            *_averaging(results),
        ]
    )


def _quality(case: str, title: str, first: str, results: Path) -> list[str]:
    lines = read_lines(results / f"{case}.jsonl")
    losses = [line for line in lines if line["metric"] == "validation loss"]
    names = list(dict.fromkeys(line["impl"] for line in losses))
    about = losses[0]
    rows = [
        f"**{title}**, the demo's model, {about['params']['tokens']:,} tokens each, {about['params']['setting']} "
        f"({about['device']}, [lines](benchmarks/results/{case}.jsonl)):",
        "",
        f"| {first} | bits per byte, mean (lowest to highest) | MQAR accuracy, by seed | rate | optimizer state |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        own = [line for line in losses if line["impl"] == name]
        recall = [line["value"] for line in lines if line["impl"] == name and line["metric"] == "MQAR accuracy"]
        values = [line["value"] for line in own]
        state = own[0]["params"]["state_bytes"]
        rows.append(
            f"| {name} | {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}) | "
            f"{', '.join(f'{value:.0%}' for value in recall)} | {own[0]['params']['lr']:g} | {state / 2**20:.1f} MiB |"
        )
    return rows


def _averaging(results: Path) -> list[str]:
    lines = read_lines(results / "quality-averaging.jsonl")
    about = lines[0]["params"]
    rows = [
        f"**Averaging**, `make demo`: {about['checkpoints']} checkpoints {about['every_steps']} steps apart of a "
        f"constant-rate run against its last one, and against a branch annealed over {about['anneal_steps']} steps, at "
        f"equal tokens ({lines[0]['device']}, [lines](benchmarks/results/quality-averaging.jsonl)):",
        "",
        "| | bits per byte | loss minus the last checkpoint's, nats a token (95 % interval) |",
        "|---|---|---|",
    ]
    return rows + [_averaging_row(line) for line in lines]


def _averaging_row(line: Any) -> str:
    params = line["params"]
    if line["impl"] == "last checkpoint":
        return f"| last checkpoint | {line['value']:.3f} | |"
    low, high = params["difference_low"], params["difference_high"]
    return f"| {line['impl']} | {line['value']:.3f} | {params['difference_nats']:+.3f} ({low:+.3f} to {high:+.3f}) |"


def insert(page: str, text: str) -> str:
    """`page` with what stands between the marks replaced."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + text + "\n" + END + rest.split(END)[1]


def main(arguments: Sequence[str] = ()) -> None:
    readme = ROOT / "README.md"
    readme.write_text(insert(readme.read_text(encoding="utf-8"), tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
