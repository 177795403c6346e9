"""Recall from the context: MQAR by pairs, needle by length and depth."""

from __future__ import annotations

from collections.abc import Sequence

from whimbrel.report.block import NARROW, Block, Table
from whimbrel.report.numbers import listed, percent, power_count
from whimbrel.report.schema import DepthGrid, Recall, RecallPoint, RecallSeries, RecallTask
from whimbrel.report.svg import Box, Scale, Svg, fit, legend, scale, x_axis, y_axis


def blocks(recall: Recall) -> list[Block]:
    """One block per task that was run, and one for the needle's depth."""
    level = percent(recall["confidence"], 0)
    found = []
    for task, title, unit, x_title in (
        (recall.get("mqar"), "Associative recall (MQAR)", "pairs", "key-value pairs in the context"),
        (recall.get("needle"), "Needle in a long text", "tokens", "tokens in the context"),
    ):
        if task is None or not any(s["points"] for s in task["series"]):
            continue
        trained = recall.get("trained_length") if unit == "tokens" else None
        note = f"Bars are {level} Wilson intervals; the dashed line is chance ({_share(task['chance'])})."
        if trained:
            note += f" Training sequences had {trained:,} tokens."
        found.append(
            Block(
                title=title,
                finding=finding(task, unit),
                note=note,
                draw=lambda width, task=task, unit=unit, x_title=x_title, trained=trained: _draw(
                    task, width, unit, x_title, trained
                ),
                table=_table(task, unit, level),
            )
        )
        grids = task.get("grids")
        if grids:
            found.append(
                Block(
                    title="Needle by depth",
                    finding=_depth_finding(grids),
                    note=f"Share of {grids[0]['n']:,} questions per cell; depth 0% is the start of the context.",
                    draw=lambda width, grids=grids: _draw_grids(grids, width),
                )
            )
    return found


def finding(task: RecallTask, unit: str) -> str:
    """Where each model's interval lies above chance, and its accuracy there."""
    parts = [_series_finding(series, task["chance"], unit) for series in task["series"] if series["points"]]
    return f"Above chance: {'; '.join(parts)}."


def _series_finding(series: RecallSeries, chance: float, unit: str) -> str:
    name, points = series["name"], sorted(series["points"], key=lambda p: p["x"])
    above = [p for p in points if p["low"] > chance]
    if not above:
        return f"{name} nowhere"
    first, last, best = points[0], points[-1], max(above, key=lambda p: p["accuracy"])
    if len(points) == 1:
        return f"{name}, {_share(last['accuracy'])} at {last['x']:,} {unit}"
    if len(above) == len(points):
        return (
            f"{name} throughout, {_share(first['accuracy'])} at {first['x']:,} {unit} "
            f"and {_share(last['accuracy'])} at {last['x']:,}"
        )
    where = listed([f"{p['x']:,}" for p in above])
    if len(above) == 1:
        return f"{name} only at {where} {unit} ({_share(best['accuracy'])})"
    return f"{name} only at {where} {unit} (best {_share(best['accuracy'])} at {best['x']:,})"


def _depth_finding(grids: Sequence[DepthGrid]) -> str:
    parts = []
    for grid in grids:
        cells = [
            (accuracy, depth, length)
            for depth, row in zip(grid["depths"], grid["accuracy"], strict=True)
            for length, accuracy in zip(grid["lengths"], row, strict=True)
        ]
        worst, best = min(cells), max(cells)
        if worst[0] == best[0]:
            parts.append(f"{grid['name']} {_share(worst[0])} in every cell")
        else:
            parts.append(f"{grid['name']} {_cell(*worst)} to {_cell(*best)}")
    return f"From the weakest cell to the strongest: {'; '.join(parts)}."


def _cell(accuracy: float, depth: float, length: int) -> str:
    return f"{_share(accuracy)} ({length:,} tokens, depth {percent(depth, 0)})"


def _table(task: RecallTask, unit: str, level: str) -> Table:
    rows = [
        [
            s["name"],
            f"{p['x']:,}",
            _share(p["accuracy"]),
            f"{_share(p['low'])} to {_share(p['high'])}",
            f"{p['n']:,}",
        ]
        for s in task["series"]
        for p in s["points"]
    ]
    rows.append(["chance", "", _share(task["chance"]), "", ""])
    return Table(["model", unit, "accuracy", f"{level} interval", "questions"], rows)


def _draw(task: RecallTask, width: float, unit: str, x_title: str, trained: int | None) -> Svg:
    narrow = width < NARROW
    series = [s for s in task["series"] if s["points"]]
    svg = Svg(width, 0, label=finding(task, unit))
    top = 24 + legend(svg, [(s["name"], i) for i, s in enumerate(series)], x=0, y=14, right=width, marks=True)
    box = Box(46, top + 8, width - 50, top + (190 if narrow else 240))
    svg.height = box.bottom + 42
    places = sorted({p["x"] for s in series for p in s["points"]})
    inset = 14 if narrow else 24
    x = scale(
        [*places, trained] if trained else places,
        start=box.left + inset,
        end=box.right - inset,
        log=True,
        pad=0.0,
    )
    if x.low == x.high:
        x = Scale(x.low / 2, x.high * 2, x.start, x.end, True)
    y = Scale(0, 1, box.bottom, box.top)
    y_axis(svg, box, y, title="accuracy", ticks=[0, 0.25, 0.5, 0.75, 1], text=lambda v: percent(v, 0))
    x_axis(
        svg,
        box,
        x,
        title=x_title,
        ticks=places,
        text=power_count if unit == "tokens" else lambda v: f"{v:,.0f}",
    )
    if trained:
        svg.line(x(trained), box.top, x(trained), box.bottom, "grid")
        side = "end" if x(trained) > (box.left + box.right) / 2 else "start"
        svg.text(x(trained) + (-6 if side == "end" else 6), box.top + 11, "training length", f"{side} small halo")
    svg.line(box.left, y(task["chance"]), box.right, y(task["chance"]), "zero dash")
    dodge = 7.0
    for i, s in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * dodge
        points = sorted(s["points"], key=lambda p: p["x"])
        svg.curve([(x(p["x"]) + shift, y(p["accuracy"])) for p in points], f"line band s{i} soft")
        for p in points:
            _mark(svg, x(p["x"]) + shift, y, p, i, f"{s['name']}, {p['x']:,} {unit}")
    svg.text(box.right + 8, y(task["chance"]) + 4, "chance")
    return svg


def _mark(svg: Svg, at: float, y: Scale, point: RecallPoint, colour: int, name: str) -> None:
    tip = (
        f"{name}: {_share(point['accuracy'])} ({_share(point['low'])} to {_share(point['high'])}), "
        f"{point['n']:,} questions"
    )
    svg.line(at, y(point["low"]), at, y(point["high"]), f"line band s{colour}")
    svg.dot(at, y(point["accuracy"]), f"f{colour} gap", radius=4.5, shape=colour, tip=tip)


def _draw_grids(grids: Sequence[DepthGrid], width: float) -> Svg:
    across = 1 if width < NARROW else min(2, len(grids))
    gap = 28.0
    wide = (width - gap * (across - 1)) / across
    svg = Svg(width, 0, label=_depth_finding(grids))
    top = 0.0
    for start in range(0, len(grids), across):
        ends = [
            _draw_grid(svg, grid, k * (wide + gap), top, min(wide, 84.0 * len(grid["lengths"]) + 46))
            for k, grid in enumerate(grids[start : start + across])
        ]
        top = max(ends) + 16
    svg.height = top - 10
    return svg


def _draw_grid(svg: Svg, grid: DepthGrid, left: float, top: float, room: float) -> float:
    svg.text(left, top + 13, fit(grid["name"], room), "start ink bold")
    svg.text(left, top + 31, "depth", "start small")
    x0, y0, tall = left + 46, top + 38, 30.0
    wide = (room - 46) / len(grid["lengths"])
    for i, (depth, row) in enumerate(zip(grid["depths"], grid["accuracy"], strict=True)):
        y = y0 + tall * i
        svg.text(x0 - 8, y + tall / 2 + 4, percent(depth, 0), "end")
        for j, (length, accuracy) in enumerate(zip(grid["lengths"], row, strict=True)):
            level = round(10 * min(max(accuracy, 0.0), 1.0))
            tip = f"{grid['name']}: {_share(accuracy)} at {length:,} tokens, depth {percent(depth, 0)}"
            svg.rect(x0 + wide * j, y, wide, tall, "wash gap")
            svg.rect(x0 + wide * j, y, wide, tall, f"f0 gap o{level}", tip=tip)
            svg.text(x0 + wide * (j + 0.5), y + tall / 2 + 4, f"{100 * accuracy:.0f}", f"mid ink over{level}")
    end = y0 + tall * len(grid["depths"])
    for j, length in enumerate(grid["lengths"]):
        svg.text(x0 + wide * (j + 0.5), end + 17, power_count(length), "mid")
    svg.text(x0 + wide * len(grid["lengths"]), end + 34, "tokens in the context", "end")
    return end + 38


def _share(value: float) -> str:
    return percent(value, 0 if value in (0, 1) else 1)
