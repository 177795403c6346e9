"""The tables of `whimbrel eval`."""

from __future__ import annotations

from typing import Any

from whimbrel.cli.args import print_table
from whimbrel.report.numbers import size


def print_results(results: dict[str, Any]) -> None:
    """What `run_evals` found, on stdout."""
    if "bpb" in results:
        _print_bpb(results["bpb"])
    for task, title in (("mqar", "Multi-query associative recall"), ("needle", "Needle in text")):
        if task in results:
            _print_recall(title, results[task])
    if "grid" in results:
        _print_grid(results["grid"])


def _print_bpb(row: dict[str, Any]) -> None:
    columns = ("tokens", "bits per byte", "95 % interval", "nats per token")
    bits = _interval(row["low"], row["high"], ".4f")
    figures = (f"{row['num_tokens']:,}", f"{row['bits_per_byte']:.4f}", bits, f"{row['nats_per_token']:.4f}")
    print_table("Held-out text", columns, [figures])
    print_table(
        "By position in the window",
        ("from token", "bits per byte", "95 % interval"),
        [(first, f"{bits:.4f}", _interval(low, high, ".4f")) for first, bits, low, high in row["by_position"]],
    )


def _print_recall(title: str, cells: list[dict[str, Any]]) -> None:
    print_table(
        title,
        ("pairs", "length", "depth", "accuracy", "95 % interval", "chance", "questions"),
        [
            (
                cell["num_pairs"],
                cell["length"],
                "" if cell["depth"] is None else f"{cell['depth']:.0%}",
                f"{cell['accuracy']:.1%}",
                _interval(cell["low"], cell["high"], ".1%"),
                f"{cell['chance']:.1%}",
                cell["num_queries"],
            )
            for cell in cells
        ],
    )


def _print_grid(grid: dict[str, Any]) -> None:
    cells, rows = grid["cells"], grid["rows"]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    for method, budget in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        mine = [cell for cell in cells if (cell["method"], cell["budget"]) == (method, budget)]
        by_task: dict[str, list[dict[str, Any]]] = {}
        for cell in mine:
            by_task.setdefault(cell["task"], []).append(cell)
        print_table(
            f"Accuracy by length, with 95 % intervals: {' '.join(filter(None, (method, budget)))}",
            ("task", "chance", "of values seen", *(f"{length:,} tokens" for length in lengths)),
            [
                (task, f"{found[0]['chance']:.1%}", f"{found[-1]['chance_seen']:.1%}", *map(_share, found))
                for task, found in by_task.items()
            ],
        )
        _print_places([found[-1] for found in by_task.values()])
    first = (rows[0]["method"], rows[0]["budget"])
    print_table(
        f"Mean and worst task; falls are below {' '.join(filter(None, first))}",
        ("method", "budget", "length", "density", "state", "mean", "worst", "worst task", "largest fall", "in task"),
        [
            (
                row["method"],
                row["budget"],
                f"{row['length']:,}",
                "" if row["density"] is None else f"{row['density']:.1%}",
                "" if row["state_bytes"] is None else size(row["state_bytes"]),
                _share(row["mean"]),
                _share(row["worst"]),
                row["worst_task"],
                *(
                    ("", "")
                    if (row["method"], row["budget"]) == first or not row["largest_fall"]["value"]
                    else (_share(row["largest_fall"]), row["largest_fall_task"])
                ),
            )
            for row in rows
        ],
    )


def _print_places(cells: list[dict[str, Any]]) -> None:
    """Accuracy by the place of what is asked for, in eighths of the longest context."""
    placed = [cell for cell in cells if len(cell["by_place"]) > 1]
    if placed:
        eighths = [i / 8 for i in range(8)]
        found = [{place: value for place, value, *_ in cell["by_place"]} for cell in placed]
        print_table(
            f"By place of what is asked for, at {placed[0]['length']:,} tokens",
            ("task", *(f"from {place:.1%}" for place in eighths)),
            [
                (cell["task"], *(f"{by[place]:.0%}" if place in by else "" for place in eighths))
                for cell, by in zip(placed, found, strict=True)
            ],
        )


def _share(found: dict[str, Any]) -> str:
    return f"{found['value']:.1%} ({_interval(found['low'], found['high'], '.1%')})"


def _interval(low: float | None, high: float | None, style: str) -> str:
    return "unknown" if low is None or high is None else f"{low:{style}} to {high:{style}}"
