"""Methods side by side over seeds, losses as well as wins."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from whimbrel.report.block import NARROW, Block, Table
from whimbrel.report.numbers import fixed, listed, percent, significant
from whimbrel.report.schema import Comparison, ComparisonRow, Metric
from whimbrel.report.svg import Box, Svg, fit, scale, text_width, x_axis


def blocks(comparison: Comparison) -> list[Block]:
    """One figure with a panel per metric, and the table."""
    if not comparison["rows"] or not comparison["metrics"]:
        return []
    return [
        Block(
            title=comparison["title"],
            finding=" ".join(metric_finding(comparison["rows"], m) for m in comparison["metrics"]),
            note=f"{comparison['setting']} Small marks are seeds, the bar is their mean.",
            draw=lambda width: _draw(comparison, width),
            table=_table(comparison),
        )
    ]


def metric_finding(rows: Sequence[ComparisonRow], metric: Metric) -> str:
    """Who is ahead on one metric, where the first row stands, and whether seeds overlap."""
    means = {row["name"]: mean for row in rows if (mean := _mean(row, metric)) is not None}
    lost = [row["name"] for row in rows if None in row["values"].get(metric["name"], [])]
    diverged = f" {listed(lost)} diverged on some seed, which no mean counts." if lost else ""
    if not means:
        return f"No row has a {metric['name']}." + diverged
    order = sorted(means, key=lambda name: means[name], reverse=not metric["lower_is_better"])
    best, subject = order[0], rows[0]["name"]
    text = f"{'Lowest' if metric['lower_is_better'] else 'Highest'} mean {metric['name']}: {best}, "
    text += _value(means[best], metric)
    if len(order) > 1:
        other = subject if subject != best and subject in means else order[1]
        by_name = {row["name"]: _seeds(row, metric) for row in rows}
        gap = abs(means[best] - means[other])
        side = f"{_gap(gap, metric)} {'below' if metric['lower_is_better'] else 'above'}"
        text += f", {side if float(_gap(gap, metric).split()[0]) else 'level with'} {other}"
        one = len(by_name[best]) == 1 and len(by_name[other]) == 1
        if one:
            text += " (one seed each)"
        else:
            text += " (their seeds overlap)" if _overlap(by_name[best], by_name[other]) else " (no seed overlaps)"
    return text + "." + diverged


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return min(a) <= max(b) and min(b) <= max(a)


def _seeds(row: ComparisonRow, metric: Metric) -> list[float]:
    return [value for value in row["values"].get(metric["name"], []) if value is not None]


def _mean(row: ComparisonRow, metric: Metric) -> float | None:
    seeds = _seeds(row, metric)
    return statistics.fmean(seeds) if seeds else None


def _value(value: float, metric: Metric) -> str:
    return percent(value) if metric["unit"] == "share" else f"{fixed(value, 4)} {metric['unit']}"


def _gap(value: float, metric: Metric) -> str:
    return f"{fixed(100 * value, 1)} points" if metric["unit"] == "share" else fixed(value, 4)


def _cell(value: float | None, metric: Metric) -> str:
    if value is None:
        return "diverged"
    return percent(value) if metric["unit"] == "share" else fixed(value, 4)


def _table(comparison: Comparison) -> Table:
    facts = list(dict.fromkeys(key for row in comparison["rows"] for key in row.get("facts", {})))
    head = ["method", *facts]
    for metric in comparison["metrics"]:
        unit = "" if metric["unit"] == "share" else f", {metric['unit']}"
        head += [f"{metric['name']}{unit} (mean)", "each seed"]
    rows = []
    for row in comparison["rows"]:
        cells = [row["name"], *(_fact(row.get("facts", {}).get(key, "")) for key in facts)]
        for metric in comparison["metrics"]:
            mean = _mean(row, metric)
            seeds = row["values"].get(metric["name"], [])
            cells += ["" if mean is None else _cell(mean, metric), ", ".join(_cell(v, metric) for v in seeds)]
        rows.append(cells)
    return Table(head, rows)


def _fact(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else significant(value)


def _draw(comparison: Comparison, width: float) -> Svg:
    rows, metrics = comparison["rows"], comparison["metrics"]
    narrow = width < NARROW
    name_room = min(220.0, max(text_width(row["name"]) for row in rows) + 14)
    across = 1 if narrow else min(len(metrics), 2)
    gap, step, head, foot = 36.0, (40.0 if narrow else 32.0), 30.0, 46.0
    left = 0.0 if narrow else name_room
    wide = (width - left - gap * (across - 1)) / across
    tall = head + step * len(rows) + foot
    label = " ".join(metric_finding(rows, m) for m in metrics)
    svg = Svg(width, tall * -(-len(metrics) // across), label=label)
    for k, metric in enumerate(metrics):
        column, line = k % across, k // across
        x0 = left + column * (wide + gap)
        box = Box(x0 + 6, line * tall + head, x0 + wide - 62, line * tall + head + step * len(rows))
        _panel(svg, box, rows, metric, narrow)
        if not narrow and column == 0:
            for i, row in enumerate(rows):
                svg.text(
                    0,
                    box.top + step * (i + 0.5) + 4,
                    fit(row["name"], left - 14),
                    f"start ink{' bold' if i == 0 else ''}",
                )
    return svg


def _panel(svg: Svg, box: Box, rows: Sequence[ComparisonRow], metric: Metric, narrow: bool) -> None:
    values = [v for row in rows for v in _seeds(row, metric)]
    direction = "lower is better" if metric["lower_is_better"] else "higher is better"
    title = fit(f"{metric['name']} ({direction})", box.right - box.left + 68)
    svg.text(box.left - 6, box.top - 14, title, "start ink")
    if not values:
        svg.text(box.left - 6, box.top + 14, "every seed diverged", "start f1")
        return
    chance = metric.get("chance")
    share = metric["unit"] == "share"
    x = scale(values + ([chance] if chance is not None else []), start=box.left, end=box.right, pad=0.08)
    ticks = x.ticks(4)
    unit = "" if share else metric["unit"]
    x_axis(svg, box, x, title=unit, ticks=ticks, text=(lambda v: percent(v, 0)) if share else None, grid=True)
    if chance is not None:
        svg.line(x(chance), box.top, x(chance), box.bottom, "zero dash")
        svg.text(x(chance) + 5, box.top + 2, "chance", "start small halo")  # above the first row's marks
    step = (box.bottom - box.top) / len(rows)
    for i, row in enumerate(rows):
        colour = 0 if i == 0 else 5
        middle = box.top + step * (i + 0.5) + (7 if narrow else 0)
        if narrow:
            name = fit(row["name"], box.right - box.left)
            svg.text(box.left - 6, middle - 12, name, f"start ink{' bold' if i == 0 else ''}", plate=True)
        seeds, mean = _seeds(row, metric), _mean(row, metric)
        lost = row["values"].get(metric["name"], []).count(None)
        if lost:
            at = x(max(seeds)) + 12 if seeds else box.left
            svg.text(at, middle + 4, f"{lost} diverged", "start f1", plate=True)
        if mean is None:
            continue
        svg.line(x(min(seeds)), middle, x(max(seeds)), middle, f"line thin s{colour}")
        for value in seeds:
            svg.dot(x(value), middle, f"f{colour} soft", radius=4, tip=f"{row['name']}: {_value(value, metric)}")
        svg.line(x(mean), middle - 9, x(mean), middle + 9, f"line s{colour}")
        svg.text(box.right + 62, middle + 4, _cell(mean, metric), "end ink")
