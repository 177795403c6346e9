"""Quality of one small model under several mixers or optimizers, for the pages of both."""

from __future__ import annotations

import statistics
from pathlib import Path

from method_pages.markdown import header, row
from whimbrel.bench.results import read_lines


def demo_models(case: str, title: str, first: str, results: Path, *, links: str) -> list[str]:
    """Loss and recall of one small model by what was changed in it; every seed is a line of its own."""
    path = results / f"{case}.jsonl"
    lines = read_lines(path) if path.exists() else []
    if not lines:
        return []
    losses = [line for line in lines if line["metric"] == "validation loss"]
    names = list(dict.fromkeys(line["impl"] for line in losses))
    about = losses[0]
    rows = [
        f"**{title}**, the model of `tiny-rdn`, {about['params']['tokens']:,} tokens each, {about['params']['setting']}"
        f" ({about['device']}, [lines]({links}/{case}.jsonl)):",
        "",
        *header(first, "bits per byte, mean (lowest to highest)", "MQAR accuracy, by seed", "rate", "optimizer state"),
    ]
    for name in names:
        own = [line for line in losses if line["impl"] == name]
        recall = [line["value"] for line in lines if line["impl"] == name and line["metric"] == "MQAR accuracy"]
        values = [line["value"] for line in own]
        state = own[0]["params"]["state_bytes"]
        bits = f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        right = ", ".join(f"{value:.0%}" for value in recall)
        rows.append(row([name, bits, right, f"{own[0]['params']['lr']:g}", f"{state / 2**20:.1f} MiB"]))
    return [*rows, ""]
