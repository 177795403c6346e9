"""Merged checkpoints against the last one and against annealing."""

from __future__ import annotations

from collections.abc import Sequence

from whimbrel.report.block import NARROW, Block, Table
from whimbrel.report.numbers import count, fixed, percent, short_count, signed
from whimbrel.report.schema import Averaging, AveragingRow, Interval, Run, Training
from whimbrel.report.svg import Box, Svg, fit, scale, spread, text_width, x_axis, y_axis

_COLOUR = {"last": 5, "merge": 0, "annealed": 1}


def blocks(averaging: Averaging, training: Training | None) -> list[Block]:
    """The end of training with the merges in it, and each difference with its interval."""
    level = percent(averaging["confidence"], 0)
    found = []
    if training and _end_of_training(training) and len(averaging["rows"]) > 1:
        found.append(
            Block(
                title="The end of training, enlarged",
                finding=_ranking(averaging),
                note="Validation loss at checkpoints, and of each merged or annealed model at the right.",
                draw=lambda width: _draw_end(averaging, training, width),
            )
        )
    found.append(
        Block(
            title="Difference to the last checkpoint",
            finding=finding(averaging),
            note=f"Paired over the same {averaging['blocks']:,} validation blocks; lines are {level} "
            "bootstrap intervals. Bars: weight of each merged checkpoint, oldest at the left.",
            draw=lambda width: _draw_differences(averaging, width),
            table=_table(averaging, level),
        )
    )
    return found


def finding(averaging: Averaging) -> str:
    """What merging brought, also if it brought nothing."""
    merges = [row for row in averaging["rows"] if row["kind"] == "merge"]
    if not merges:
        return "No merge was made."
    best = min(merges, key=lambda row: row["loss"])
    change = _difference(best, averaging)
    size = fixed(abs(change["value"]), 4)
    level = percent(averaging["confidence"], 0)
    interval = f"{level} interval {signed(change['low'], 4)} to {signed(change['high'], 4)}"
    if "difference" not in best:
        interval = "no paired interval was computed"
    if change["high"] < 0:
        text = f"The best merge, {best['name']}, is {size} nats per token below the last checkpoint ({interval})"
    elif change["low"] > 0:
        text = (
            f"No merge helps: the best, {best['name']}, is {size} nats per token above the last checkpoint ({interval})"
        )
    else:
        text = f"The best merge, {best['name']}, cannot be told apart from the last checkpoint ({interval})"
    return text + _against_annealing(best, change, averaging) + "."


def _against_annealing(best: AveragingRow, change: Interval, averaging: Averaging) -> str:
    annealed = next((row for row in averaging["rows"] if row["kind"] == "annealed"), None)
    if annealed is None:
        return ""
    other = _difference(annealed, averaging)
    if other["value"] >= 0:
        return f"; annealing ends {fixed(other['value'], 4)} above the last checkpoint"
    if change["value"] < other["value"]:
        return f", and further below than the annealed branch ({signed(other['value'], 4)})"
    gained = fixed(-other["value"], 4)
    if change["high"] < 0:
        share = percent(change["value"] / other["value"], 0)
        return f"; it reaches {share} of the {gained} that annealing gains"
    return f"; annealing gains {gained}"


def _ranking(averaging: Averaging) -> str:
    rows = sorted(averaging["rows"], key=lambda row: row["loss"])
    names = [f"{row['name']} ({fixed(row['loss'], 4)})" for row in rows]
    return f"From the lowest validation loss to the highest: {', '.join(names)} nats per token."


def _difference(row: AveragingRow, averaging: Averaging) -> Interval:
    if "difference" in row:
        return row["difference"]
    last = next(r for r in averaging["rows"] if r["kind"] == "last")
    change = row["loss"] - last["loss"]
    return {"value": change, "low": change, "high": change}


def _table(averaging: Averaging, level: str) -> Table:
    rows = []
    for row in averaging["rows"]:
        change = row.get("difference")
        rows.append(
            [
                row["name"],
                fixed(row["loss"], 4),
                f"{fixed(row['low'], 4)} to {fixed(row['high'], 4)}",
                fixed(row["bits_per_byte"], 4),
                signed(change["value"], 4) if change else "",
                f"{signed(change['low'], 4)} to {signed(change['high'], 4)}" if change else "",
                ", ".join(fixed(w, 3) for w in row.get("weights", [])),
            ]
        )
    head = [
        "model",
        "loss, nats/token",
        f"{level} interval",
        "bits/byte",
        "difference",
        f"{level} paired",
        "weights",
    ]
    return Table(head, rows)


def _end_of_training(training: Training) -> list[Run]:
    """Runs with the validation points from a little before the first merged checkpoint on."""
    merged = training.get("merged_tokens")
    if not merged:
        return []
    last = max((v["tokens"] for run in training["runs"] for v in run.get("validation", [])), default=0)
    first = min(merged) - 0.25 * (last - min(merged))
    found: list[Run] = []
    for run in training["runs"]:
        near = [v for v in run.get("validation", []) if v["tokens"] >= first]
        if near:
            found.append({"name": run["name"], "points": [], "validation": near})
    return found if sum(len(run.get("validation", [])) for run in found) >= 2 else []


def _draw_end(averaging: Averaging, training: Training, width: float) -> Svg:
    runs = _end_of_training(training)
    points = [v for run in runs for v in run.get("validation", [])]
    rows = [row for row in averaging["rows"] if row["kind"] != "last"]
    labels = {row["name"]: f"{row['name']} {fixed(row['loss'], 3)}" for row in rows}
    narrow = width < NARROW
    labels = {name: fit(text, width / 3) for name, text in labels.items()}
    room = max((text_width(text) for text in labels.values()), default=0) + 28
    box = Box(50, 34, width - room, 250 if narrow else 310)
    svg = Svg(width, box.bottom + 42, label=_ranking(averaging))
    x = scale([v["tokens"] for v in points], start=box.left, end=box.right, pad=0.04)
    y = scale([v["loss"] for v in points] + [r["loss"] for r in rows], start=box.bottom, end=box.top, pad=0.08)
    y_axis(svg, box, y, title="validation loss, nats per token")
    x_axis(svg, box, x, title="tokens", ticks=x.ticks(4 if narrow else 6), text=short_count)
    merged = training.get("merged_tokens", [])
    for i, run in enumerate(runs):
        line = [(x(v["tokens"]), y(v["loss"])) for v in run.get("validation", [])]
        svg.curve(line, f"line s{_run_colour(i)}")
        for (px, py), v in zip(line, run.get("validation", []), strict=True):
            is_merged = i == 0 and v["tokens"] in merged
            style = f"f{_run_colour(i)} gap" if is_merged else f"hollow s{_run_colour(i)}"
            tip = f"{run['name']}: {fixed(v['loss'], 4)} at {count(v['tokens'])} tokens"
            svg.dot(px, py, style, radius=4.5, tip=tip)
    px, py = x(runs[0].get("validation", [])[0]["tokens"]), y(runs[0].get("validation", [])[0]["loss"])
    svg.text(px + 8, py - 8, runs[0]["name"], "start ink halo")
    wanted = [y(row["loss"]) for row in rows]
    for row, at, label in zip(rows, wanted, spread(wanted, 17, box.top, box.bottom), strict=True):
        colour = _COLOUR[row["kind"]]
        svg.line(box.left, at, box.right, at, f"dash s{colour} soft")
        svg.curve([(box.right, at), (box.right + 14, label)], f"line thin s{colour}")
        svg.text(box.right + 19, label + 4, labels[row["name"]], f"start f{colour}")
    return svg


def _run_colour(index: int) -> int:
    return (_COLOUR["last"], _COLOUR["annealed"])[min(index, 1)]


def _draw_differences(averaging: Averaging, width: float) -> Svg:
    rows = [row for row in averaging["rows"] if row["kind"] != "last"]
    last = next(row for row in averaging["rows"] if row["kind"] == "last")
    narrow = width < NARROW
    step, top = (54.0, 30.0) if narrow else (44.0, 40.0)
    label = 0.0 if narrow else min(200.0, max(text_width(row["name"]) for row in rows) + 12) if rows else 0.0
    bars = 64.0
    numbers = 0.0 if narrow else 150.0
    box = Box(label + bars + 18, top, width - numbers - 8, top + step * len(rows))
    svg = Svg(width, box.bottom + 44, label=finding(averaging))
    ends = [0.0]
    for row in rows:
        change = _difference(row, averaging)
        ends += [change["value"], change["low"], change["high"]]
    x = scale(ends, start=box.left, end=box.right, pad=0.08)
    title = "nats per token, lower is better" if narrow else "difference in nats per token, lower is better"
    x_axis(svg, box, x, title=title, ticks=x.ticks(3 if narrow else 6), grid=True)
    svg.line(x(0), box.top - 6, x(0), box.bottom, "zero")
    if narrow:
        svg.text(min(x(0), width - 55), box.top - 12, "last checkpoint", "mid")
    else:
        svg.text(min(x(0), box.right - 50), box.top - 12, f"last checkpoint {fixed(last['loss'], 4)}", "mid")
        svg.text(width - 76, box.top - 12, "nats/token", "end")
        svg.text(width, box.top - 12, "bits/byte", "end")
    for i, row in enumerate(rows):
        colour, change = _COLOUR[row["kind"]], _difference(row, averaging)
        middle = box.top + step * (i + 0.5) + (9 if narrow else 0)
        if narrow:
            figures = f"{fixed(row['loss'], 4)} nats, {fixed(row['bits_per_byte'], 4)} bits/byte"
            name = fit(row["name"], width - text_width(figures) - 12)
            svg.text(0, middle - 20, name, "start ink bold", plate=True)
            svg.text(width, middle - 20, figures, "end", plate=True)
        else:
            svg.text(0, middle + 4, fit(row["name"], label - 12), "start ink")
            svg.text(width - 76, middle + 4, fixed(row["loss"], 4), "end ink")
            svg.text(width, middle + 4, fixed(row["bits_per_byte"], 4), "end ink")
        _weight_bars(svg, label, middle, bars, row.get("weights", []), colour)
        tip = f"{row['name']}: {signed(change['value'], 4)} ({signed(change['low'], 4)} to {signed(change['high'], 4)})"
        svg.line(x(change["low"]), middle, x(change["high"]), middle, f"line s{colour}")
        svg.dot(x(change["value"]), middle, f"f{colour} gap", radius=5, shape=_COLOUR[row["kind"]], tip=tip)
    return svg


def _weight_bars(svg: Svg, left: float, middle: float, room: float, weights: Sequence[float], colour: int) -> None:
    if not weights:
        return
    height, wide = 22.0, min(12.0, room / len(weights))
    most = max(max(weights), 0.0) or 1.0
    base = middle + height / 2
    for i, weight in enumerate(weights):
        tall = height * abs(weight) / most
        tip = f"checkpoint {i + 1} of {len(weights)}: weight {fixed(weight, 4)}"
        svg.rect(left + i * wide, base - tall, wide - 2, tall, f"f{colour} soft", tip=tip)
    svg.line(left, base, left + wide * len(weights) - 2, base, "axis")
