"""Averages along a run against its checkpoints: what annealing would give, and how windows differ."""

from __future__ import annotations

from whimbrel.report.block import NARROW, Block, Table
from whimbrel.report.numbers import count, fixed, percent, short_count, signed, significant
from whimbrel.report.schema import DriftSplit, Forecast, GainPoint
from whimbrel.report.svg import Box, Svg, legend, scale, x_axis, y_axis

_RAW, _FIRST = 5, 0


def blocks(forecast: Forecast) -> list[Block]:
    """Losses along the run, the gain of each window, and what the distances between checkpoints say."""
    level = percent(forecast["confidence"], 0)
    found = [
        Block(
            title="Averages along the run",
            finding=" ".join(forecast["advice"]),
            note=f"{forecast['method']} over checkpoints {count(forecast['interval_tokens'])} tokens apart; above: "
            f"validation loss; below: the same less the raw checkpoint's, paired over {forecast['blocks']:,} blocks, "
            f"with {level} bootstrap intervals. {forecast['limits']}",
            draw=lambda width: _draw(forecast, width),
            table=_table(forecast, level),
        )
    ]
    if "statistics" in forecast:
        found.append(_split(forecast["statistics"]))
    return found


def _split(split: DriftSplit) -> Block:
    rows = [[str(w["count"]), percent(w["noise_left"], 0), percent(w["error"], 0)] for w in split["windows"]]
    return Block(
        title="Drift and noise",
        finding=f"Over one interval the weights drift by {significant(split['drift'], 2)} of their length; their noise "
        f"is {significant(split['noise'], 2)} of it and {percent(split['correlation'], 0)} of it lasts to the next "
        "checkpoint.",
        note="From distances between the newest checkpoints: noise left is what an average keeps of one checkpoint's "
        "variance; with the lag, its squared distance to where the run is heading, all directions alike.",
        table=Table(["window", "noise left", "with the lag"], rows),
    )


def _table(forecast: Forecast, level: str) -> Table:
    rows = [["checkpoint", count(p["tokens"]), fixed(p["loss"], 4), "", ""] for p in forecast["raw"]]
    for name, points in _lines(forecast):
        rows += [[name, count(p["tokens"]), fixed(p["loss"], 4), *_gain(p)] for p in points]
    return Table(["model", "tokens", "loss, nats/token", "difference", f"{level} paired"], rows)


def _gain(point: GainPoint) -> list[str]:
    change = point["difference"]
    return [signed(change["value"], 4), f"{signed(change['low'], 4)} to {signed(change['high'], 4)}"]


def _lines(forecast: Forecast) -> list[tuple[str, list[GainPoint]]]:
    """Name and points of each window, and of the annealed branch."""
    lines = [(f"average of {w['count']}", w["points"]) for w in forecast["windows"] if w["points"]]
    return [*lines, ("annealed", [forecast["annealed"]])] if "annealed" in forecast else lines


def _draw(forecast: Forecast, width: float) -> Svg:
    lines, raw = _lines(forecast), forecast["raw"]
    narrow = width < NARROW
    main, strip = (200.0, 130.0) if narrow else (260.0, 150.0)
    left, right = 58.0, width - 14
    names = [("checkpoint", _RAW), *((name, _colour(i)) for i, (name, _) in enumerate(lines))]
    # Drawn once for its height, which the size of the figure depends on.
    top = legend(Svg(width, 1, label=""), names, x=left, y=14, right=right, marks=True) + 40
    upper = Box(left, top, right, top + main)
    lower = Box(left, upper.bottom + 44, right, upper.bottom + 44 + strip)
    svg = Svg(width, lower.bottom + 42, label=" ".join(forecast["advice"]))
    legend(svg, names, x=left, y=14, right=right, marks=True)
    tokens = [p["tokens"] for p in raw] + [p["tokens"] for _, points in lines for p in points]
    losses = [p["loss"] for p in raw] + [p["loss"] for _, points in lines for p in points]
    changes = [p["difference"][end] for _, points in lines for p in points for end in ("value", "low", "high")]
    x = scale(tokens, start=left, end=right, pad=0.04)
    y = scale(losses, start=upper.bottom, end=upper.top, pad=0.08)
    z = scale([0.0, *changes], start=lower.bottom, end=lower.top, pad=0.08)
    y_axis(svg, upper, y, title="validation loss, nats per token")
    y_axis(svg, lower, z, title="less the checkpoint’s", ticks=z.ticks(4))
    x_axis(svg, lower, x, title="tokens", ticks=x.ticks(4 if narrow else 6), text=short_count)
    svg.line(left, z(0), right, z(0), "zero")
    svg.curve([(x(p["tokens"]), y(p["loss"])) for p in raw], f"line s{_RAW}")
    for point in raw:
        tip = f"checkpoint: {fixed(point['loss'], 4)} at {count(point['tokens'])} tokens"
        svg.dot(x(point["tokens"]), y(point["loss"]), f"hollow s{_RAW}", radius=3.5, tip=tip)
    for number, (name, points) in enumerate(lines):
        colour = _colour(number)
        # Side by side, so that intervals of the same place do not hide one another.
        aside = 5.0 * (number - (len(lines) - 1) / 2)
        svg.curve([(x(p["tokens"]), y(p["loss"])) for p in points], f"line s{colour}")
        for point in points:
            change = point["difference"]
            tip = f"{name}: {fixed(point['loss'], 4)} at {count(point['tokens'])} tokens, {' ('.join(_gain(point))})"
            svg.dot(x(point["tokens"]), y(point["loss"]), f"f{colour} gap", radius=4, shape=colour, tip=tip)
            at = x(point["tokens"]) + aside
            svg.line(at, z(change["low"]), at, z(change["high"]), f"line s{colour}")
            svg.dot(at, z(change["value"]), f"f{colour} gap", radius=4, shape=colour, tip=tip)
    return svg


def _colour(index: int) -> int:
    """The palette without the colour of the raw checkpoints."""
    return (_FIRST, 1, 2, 3, 4)[index % 5]
