"""Draw the figures that documents show from result lines: `python benchmarks/plots.py` makes `figures/*.svg`.

Every figure shows the newest line of each measurement, per device, and the ends of its quartiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from whimbrel.bench.results import ResultLine, read_lines
from whimbrel.errors import DataError, WhimbrelError
from whimbrel.files import atomic_write_text
from whimbrel.report.numbers import significant
from whimbrel.report.svg import Box, Svg, fit, scale, text_width, x_axis

HERE = Path(__file__).parent
WIDTH = 760.0


class Group(NamedTuple):
    """Rivals that were measured together."""

    title: str
    lines: list[ResultLine]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of *.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "figures", help="folder of the figures")
    given = parser.parse_args()
    try:
        for path in draw_all(given.results, given.out):
            print(path)
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def draw_all(results: Path, out: Path) -> list[Path]:
    """One figure per case and unit. Raises DataError for a folder without result lines."""
    written = []
    for path in sorted(results.glob("*.jsonl")):
        lines = newest(read_lines(path))
        for unit in dict.fromkeys(line["unit"] for line in lines):
            figure = draw([line for line in lines if line["unit"] == unit])
            name = path.stem if unit in ("s", "ms", "us") else f"{path.stem}-{unit.replace('/', '-per-')}"
            target = out / f"{name}.svg"
            atomic_write_text(target, figure.file())
            written.append(target)
    if not written:
        raise DataError(f"{results} holds no result lines; make some with benchmarks/run.py")
    return written


def newest(lines: Sequence[ResultLine]) -> list[ResultLine]:
    """The last line of each measurement, in the order in which they first appeared."""
    found: dict[str, ResultLine] = {}
    for line in lines:
        found[repr((_setting(line), line["impl"]))] = line
    return list(found.values())


def draw(lines: Sequence[ResultLine]) -> Svg:
    """Median and quartiles of each implementation on one logarithmic axis, in groups of rivals."""
    groups: dict[str, Group] = {}
    for line in lines:
        title = f"{_setting(line)[0]}, {line['metric']}"
        groups.setdefault(repr(_setting(line)), Group(title, [])).lines.append(line)
    first = lines[0]
    label = f"{first['case']}, {first['unit']}, on {', '.join(dict.fromkeys(x['device'] for x in lines))}"
    step, head = 24.0, 34.0
    left = min(220.0, 12 + max(text_width(line["impl"]) for line in lines))
    bottom = 34 + sum(head + step * len(group.lines) for group in groups.values())
    svg = Svg(WIDTH, bottom + 44, label=label)
    svg.text(0, 16, fit(label, WIDTH), "start ink bold")
    box = Box(left, 26, WIDTH - 84, bottom)
    x = scale([line[key] for line in lines for key in ("q25", "q75")], start=left, end=box.right, log=True)
    x_axis(svg, box, x, title=first["unit"], text=lambda value: significant(value, 3), grid=True)
    y = box.top + 8
    for group in groups.values():
        svg.text(0, y + 20, fit(group.title, WIDTH), "start", plate=True)
        y += head
        base = group.lines[0]["impl"]
        for line in group.lines:
            colour = 5 if line["impl"] == base else 0
            middle = y + step / 2 - 4
            value = f"{significant(line['value'])} {line['unit']}"
            svg.text(left - 10, middle + 4, fit(line["impl"], left - 10), "end ink")
            svg.line(x(line["q25"]), middle, x(line["q75"]), middle, f"line s{colour}")
            svg.dot(x(line["value"]), middle, f"f{colour} gap", radius=5, tip=f"{line['impl']}: {value}")
            svg.text(WIDTH, middle + 4, value, "end ink")
            y += step
    return svg


def _setting(line: ResultLine) -> tuple[str, str, str]:
    params = " ".join(f"{key}={value}" for key, value in line["params"].items())
    return params, line["metric"], line["device"]


if __name__ == "__main__":
    raise SystemExit(main())
