"""Draw the figures that documents show from result lines.

`python benchmarks/plots.py` makes `figures/*.svg`, one for each file of results: the newest line of each measurement,
per device, and the ends of its quartiles. Where kernels have been timed it also makes time and memory against length,
which the page of residual linear attention shows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from method_pages.lines import COVERAGE, by_card, of_case, on_gpu, on_gpus, sizes
from method_pages.optimizers import most_judged, winners

from whimbrel.bench.results import ResultLine, newest, read_lines
from whimbrel.errors import DataError, WhimbrelError
from whimbrel.files import atomic_write_text
from whimbrel.report.numbers import power_count, significant
from whimbrel.report.svg import Box, Svg, fit, legend, scale, text_width, x_axis, y_axis

HERE = Path(__file__).parent
WIDTH = 760.0
TOKENS = 32_768
"""Tokens of a call up to that length; a longer sequence is a call by itself."""

CURVES = (
    ("RDN", "rdn_fwd_bwd", "triton"),
    ("RLA", "rla_fwd_bwd", "triton"),
    ("GDN", "delta_fwd_bwd", "triton"),
    ("sGLA", "decay_fwd_bwd", "triton"),
    ("softmax, cuDNN", "rdn_fwd_bwd", "sdpa-cudnn"),
    ("GDN by FlashQLA", "rdn_fwd_bwd", "flash-qla"),
)
"""What is drawn against length: name, case, implementation."""
LENGTH_FIGURES = (
    ("time", "microseconds a thousand tokens, forward and backward", 1e6),
    ("peak_bytes", "peak KiB a token, forward and backward, above the inputs", 1 / 1024),
)
"""Metric, title of the axis, factor on ms or bytes a token."""
EQUAL_ERROR = "flashprefill-v1, equal error"
PREFILL = ("row_local", "row_local-16", "xattention", "flexprefill-official", EQUAL_ERROR, "sdpa-cudnn")
"""What is drawn of sparse prefill, on the input `mixed` at the coverage of the tables."""
JUDGED = ("row_local", "row_local-16", "xattention", "flexprefill-official", "flashprefill-v1", "flex_prefill")
"""What is drawn of what selectors keep, by coverage or by threshold."""


class Group(NamedTuple):
    """Rivals that were measured together."""

    title: str
    lines: list[ResultLine]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of *.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "figures", help="folder of the figures")
    methods = HERE.parent / "docs" / "methods"
    parser.add_argument("--methods", type=Path, default=methods, help="folder of the figures against length")
    given = parser.parse_args()
    try:
        for path in (
            *draw_all(given.results, given.out),
            *draw_lengths(given.results, given.methods),
            *draw_prefill(given.results, given.methods),
            *draw_optimizers(given.results, given.methods),
            *draw_windows(given.results, given.methods),
            *draw_collapse(given.results, given.methods),
        ):
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
            plain = unit in ("s", "ms", "us") and unit == lines[0]["unit"]
            name = path.stem if plain else f"{path.stem}-{unit.replace('/', '-per-').replace(' ', '-')}"
            target = out / f"{name}.svg"
            atomic_write_text(target, figure.file())
            written.append(target)
    if not written:
        raise DataError(f"{results} holds no result lines; make some with benchmarks/run.py")
    return written


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
    ends = [line[key] for line in lines for key in ("q25", "q75")]
    log = min(ends) > 0  # a share of wrong outputs may be none
    x = scale(ends, start=left, end=box.right, log=log, include=() if log else (0.0, max(ends) or 1.0))
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


def draw_lengths(results: Path, out: Path) -> list[Path]:
    """Time and peak memory a token against length, as `residual-linear-attention-*.svg`; none without kernel lines."""
    written = []
    measured = [x for case in dict.fromkeys(case for _, case, _ in CURVES) for x in on_gpus(results, case)]
    gpu = next(iter(by_card(measured)), "")
    measured = [x for x in measured if x["device"] == gpu]
    for metric, title, factor in LENGTH_FIGURES:
        curves = {}
        for colour, (name, case, impl) in enumerate(CURVES):
            points = against_length([x for x in measured if x["case"] == case], impl, metric)
            if len(points) > 1:
                curves[name] = (colour, [(time, factor * value) for time, value in points])
        if "RDN" in curves or "RLA" in curves:
            target = out / f"residual-linear-attention-{'time' if metric == 'time' else 'memory'}.svg"
            drawn = draw_curves(curves, title, f"tokens of a sequence, on {gpu}", log=metric == "time")
            atomic_write_text(target, drawn.file())
            written.append(target)
    return written


def against_length(lines: Sequence[ResultLine], impl: str, metric: str) -> list[tuple[int, float]]:
    """(length, value a token) of one implementation in the lines of one case on one device, shortest first."""
    found = {}
    for line in lines:
        batch, time = sizes(line)
        if (line["impl"], line["metric"]) == (impl, metric) and batch == max(1, TOKENS // time):
            found[time] = line["value"] / (batch * time)
    return sorted(found.items())


def draw_prefill(results: Path, out: Path) -> list[Path]:
    """Time against length and recall against density, as `sparse-prefill-*.svg`; none without lines of a GPU."""
    lines = [x for x in on_gpu(results, "prefill") if x["params"]["input"] == "mixed"]
    every = [x for x in of_case(results, "prefill") if x["params"]["input"] == "mixed"]
    every = [x for x in every if {"coverage", "threshold"} & set(x["params"])]
    # Where most coverages were judged: what a plan keeps does not depend on the device.
    settings = [_problem(x)[:2] for x in every if x["metric"] == "density"]
    judged = max(settings, key=settings.count, default=None)
    times, kept = {}, {}
    for colour, impl in enumerate(PREFILL):
        own = [x for x in lines if x["impl"] == impl]
        own = [x for x in own if x["metric"] == "time" and x["params"].get("coverage", COVERAGE) == COVERAGE]
        points = [(int(x["params"]["N"]), x["value"]) for x in own]
        if len(points) > 1:
            times[impl] = (colour, sorted(points))
    for colour, impl in enumerate(JUDGED):
        own = [x for x in every if x["impl"] == impl]
        density, recall = ({_problem(x): x["value"] for x in own if x["metric"] == m} for m in ("density", "recall_p5"))
        points = [(100 * density[at], 100 * recall[at]) for at in density if at in recall and at[:2] == judged]
        if len(points) > 1:
            kept[impl] = (colour, sorted(points))
    written = []
    where = "" if judged is None else f"{power_count(judged[1])} tokens"
    for curves, name, title, along in (
        (times, "time", f"ms of attention, selection included, coverage {COVERAGE}", "tokens of a sequence"),
        (kept, "recall", f"% of attention kept, 5th percentile of queries, {where}", "% of causal pairs attended to"),
    ):
        if curves:
            written.append(out / f"sparse-prefill-{name}.svg")
            atomic_write_text(written[-1], draw_curves(curves, title, along, log=name == "time").file())
    return written


UNRANKED = ("torch-adamw-fused", "adamw-8bit")
"""Optimizers of `optim_step` without a rank."""


def draw_optimizers(results: Path, out: Path) -> list[Path]:
    """Step time against rank and loss against bytes of state, as `low-rank-optimizers-*.svg`, where there are lines.

    Losses are means over seeds, of the length at which most optimizers were judged: of `pretrain` lines, or where there
    are none of the model of tiny-rdn. An optimizer without a rank is drawn at all ranks, at the median of its runs.
    """
    lines = [x for x in on_gpu(results, "optim_step", "time") if x["params"]["model"] == "1.2b"]
    gpu, times = next(iter(by_card(lines)), ""), {}
    ranks = sorted({int(x["params"]["rank"]) for x in lines})
    for line in lines:
        ranked = line["impl"] not in UNRANKED
        name = f"{line['impl']}, {line['params']['state']} state" if ranked else line["impl"]
        at = [int(line["params"]["rank"])] if ranked else ranks
        times.setdefault(name, []).extend((float(rank), line["value"]) for rank in at)
    for name in times.keys() & set(UNRANKED):  # measured beside each rank and state
        middle = statistics.median(value for _, value in times[name])
        times[name] = [(float(rank), middle) for rank in ranks]
    losses: dict[str, list[tuple[float, float]]] = {}
    title = ""
    for case, metric in (("pretrain", "loss"), ("quality-optimizers", "validation loss")):
        found = of_case(results, case, metric)
        most = most_judged(found)
        found = [x for x in found if int(x["params"]["tokens"]) == most]
        if found and case == "pretrain":
            # an optimizer of one rate has not been tuned
            found = [x for best in winners(found).values() for x in best.lines if len(best.tried) > 1]
        if not found:
            continue
        for line in found:
            losses.setdefault(line["impl"], []).append((int(line["params"]["state_bytes"]) / 2**20, line["value"]))
        title = f"validation loss, {found[0]['unit']}, {most / 1e6:.3g} M tokens"
        break
    averaged = {name: [(points[0][0], sum(v for _, v in points) / len(points))] for name, points in losses.items()}
    written = []
    for points, name, what, along in (
        (times, "time", "median ms of a step, 1.2 B weights", f"rank, on {gpu}"),
        (averaged, "loss", title, "MiB of optimizer state"),
    ):
        if len(points) > 1:
            curves = {impl: (i, sorted(set(found))) for i, (impl, found) in enumerate(points.items())}
            written.append(out / f"low-rank-optimizers-{name}.svg")
            atomic_write_text(written[-1], draw_curves(curves, what, along, log=name == "time", zero=False).file())
    return written


def draw_windows(results: Path, out: Path) -> list[Path]:
    """Loss of a mean less that of its newest checkpoint, against its window's tokens; none without lines of a GPU."""
    lines = [x for x in on_gpu(results, "merge_quality", "loss") if x["params"]["method"] == "sma"]
    places = sorted({int(x["params"]["tokens"]) for x in lines})
    curves: dict[str, tuple[int, list[tuple[float, float]]]] = {}
    for tokens in places:
        gains: dict[tuple[int, int], list[float]] = {}
        for x in lines:
            given = x["params"]
            if given["tokens"] == tokens:
                count, interval = int(given["count"]), int(given["interval_tokens"])
                gains.setdefault((count, (count - 1) * interval), []).append(float(given["difference"]))
        for count in sorted({count for count, _ in gains}):
            points = [(window, statistics.mean(found)) for (n, window), found in sorted(gains.items()) if n == count]
            if len(points) > 1:
                curves[f"{count} up to {tokens / 1e6:.1f} M tokens"] = (len(curves), points)
    if not curves:
        return []
    target = out / "checkpoint-averaging-windows.svg"
    title = "nats a token above the newest checkpoint"
    atomic_write_text(target, draw_curves(curves, title, "tokens between first and last", log=False).file())
    return [target]


def draw_collapse(results: Path, out: Path) -> list[Path]:
    """Training loss along a run that collapsed, by what was done about it, one file; none without lines of a GPU.

    Of the first seed, and of the study measured last.
    """
    lines = on_gpu(results, "merge_quality", "training_loss")
    if not lines:
        return []
    last = max(lines, key=lambda x: x["time"])["params"]
    same = ("recipe", "rate", "burst_factor", "burst_steps", "stretch_tokens")
    own = [x for x in lines if all(x["params"].get(name) == last.get(name) for name in same)]
    seed = min(int(x["params"]["seed"]) for x in own)
    found: dict[str, list[tuple[float, float]]] = {}
    for x in own:
        if x["params"]["seed"] == seed:
            name = str(x["params"]["method"]).removeprefix("collapse-")
            found.setdefault(name, []).append((int(x["params"]["tokens"]) / 1e6, x["value"]))
    if len(found) < 2:
        return []
    curves = {name: (i, sorted(points)) for i, (name, points) in enumerate(found.items())}
    target = out / "checkpoint-averaging-collapse.svg"
    svg = draw_curves(curves, "training loss, nats a token", "M tokens", log=True)
    atomic_write_text(target, svg.file())
    return [target]


def _problem(line: ResultLine) -> tuple[str, int, float]:
    asked = line["params"].get("coverage", line["params"].get("threshold", 0.0))
    return line["device"], int(line["params"]["N"]), float(asked)


def draw_curves(
    curves: Mapping[str, tuple[int, Sequence[tuple[float, float]]]],
    title: str,
    along: str,
    *,
    log: bool,
    zero: bool = True,
) -> Svg:
    """Values against places; without `zero` an axis that is not logarithmic begins near the least value."""
    svg = Svg(WIDTH, 400, label=f"{title}, against {along}")
    used = legend(svg, [(name, colour) for name, (colour, _) in curves.items()], x=0, y=14, right=WIDTH, marks=True)
    box = Box(64, used + 36, WIDTH - 8, 352)
    places = sorted({float(place) for _, points in curves.values() for place, _ in points})
    tokens = along.startswith("tokens")
    x = scale(places, start=box.left, end=box.right, log=tokens, pad=0.03)
    values = [value for _, points in curves.values() for _, value in points]
    y = scale(values, start=box.bottom, end=box.top, log=log, include=(0.0,) if zero and not log else ())
    y_axis(svg, box, y, title=f"{title} (logarithmic)" if log else title, text=significant)
    if tokens:
        x_axis(svg, box, x, title=along, ticks=places, text=lambda place: power_count(int(place)))
    else:
        x_axis(svg, box, x, title=along, text=significant)
    for name, (colour, points) in curves.items():
        svg.curve([(x(place), y(value)) for place, value in points], f"line s{colour}")
        for place, value in points:
            where = power_count(int(place)) if tokens else significant(place)
            tip = f"{name}, {where}: {significant(value)}"
            svg.dot(x(place), y(value), f"f{colour} gap", radius=4.5, shape=colour, tip=tip)
    return svg


def _setting(line: ResultLine) -> tuple[str, str, str]:
    params = " ".join(f"{key}={value}" for key, value in line["params"].items())
    return params, line["metric"], line["device"]


if __name__ == "__main__":
    raise SystemExit(main())
