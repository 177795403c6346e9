"""Loss, learning rate and gradient norm over tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

from whimbrel.report.block import NARROW, Block, Table
from whimbrel.report.numbers import count, fixed, short_count, significant
from whimbrel.report.schema import Run, Training, TrainPoint
from whimbrel.report.svg import Box, Scale, Svg, legend, scale, x_axis, y_axis

_T = TypeVar("_T")

_MOST_POINTS = 500
_SMOOTHING_SHARE = 40  # the window is one fortieth of the longest run


def blocks(training: Training) -> list[Block]:
    """Curves of all runs on one axis of tokens; nothing when no step was logged."""
    if not any(run["points"] for run in training["runs"]):
        return []
    window = _window(training)
    note = f"Training loss of each step (pale) and its mean over {window} logged steps." if window > 1 else ""
    if any(run.get("validation") for run in training["runs"]):
        note += " Circles: validation loss at checkpoints."
    if training.get("merged_tokens"):
        note += " Marks at the top: the checkpoints that were merged."
    if (norms := _values(training["runs"], lambda p: p.get("grad_norm"))) and max(norms) > _ceiling(norms):
        note += f" The gradient norm reaches {significant(max(norms), 2)}, above its axis."
    note += f" {training.get('note', '')}"
    return [
        Block(
            title="Loss and learning rate",
            finding=_finding(training),
            note=note.strip(),
            draw=lambda width: _draw(training, width),
            table=_table(training),
        )
    ]


def _finding(training: Training) -> str:
    main = training["runs"][0]
    points = main["points"]
    smooth = _smoothed([p["loss"] for p in points], _window(training))
    first, last = fixed(points[0]["loss"], 2), fixed(smooth[-1], 2)
    course = f"fell from {first} to {last}" if smooth[-1] < points[0]["loss"] else f"rose from {first} to {last}"
    if first == last:
        course = f"stayed at {last}"
    text = f"Training loss {course} nats per token over {count(points[-1]['tokens'])} tokens"
    speeds = [p["tokens_per_second"] for p in points if "tokens_per_second" in p]
    if speeds:
        text += f", at a median of {count(round(statistics.median(speeds)))} tokens per second"
    return text + "."


def _table(training: Training) -> Table:
    """Validation losses where there are some, else the ends of each run."""
    rows = []
    for run in training["runs"]:
        for point in run.get("validation", []):
            rows.append([run["name"], f"{point['tokens']:,}", fixed(point["loss"], 4)])
    if rows:
        return Table(["run", "tokens", "validation loss"], rows)
    for run in training["runs"]:
        for point in run["points"][:1] + run["points"][-1:]:
            rows.append([run["name"], f"{point['tokens']:,}", fixed(point["loss"], 4)])
    return Table(["run", "tokens", "training loss"], rows)


def _draw(training: Training, width: float) -> Svg:
    runs = [run for run in training["runs"] if run["points"]]
    narrow = width < NARROW
    main, strip, between = (220.0, 76.0, 44.0) if narrow else (290.0, 84.0, 44.0)
    norms = any("grad_norm" in p for run in runs for p in run["points"])
    top, left, right = 58.0, 50.0, width - (6 if narrow else 14)
    boxes = [Box(left, top, right, top + main)]
    for _ in range(1 + norms):
        start = boxes[-1].bottom + between
        boxes.append(Box(left, start, right, start + strip))
    svg = Svg(width, boxes[-1].bottom + 42, label=_finding(training))
    names = [(run["name"], i) for i, run in enumerate(runs)]
    legend(svg, names, x=left, y=14, right=right, marks=False)

    last = max(p["tokens"] for run in runs for p in run["points"]) or 1
    x = Scale(0, last, left, right)
    losses = [p["loss"] for run in runs for p in run["points"]]
    losses += [v["loss"] for run in runs for v in run.get("validation", [])]
    y = scale(losses, start=boxes[0].bottom, end=boxes[0].top)
    y_axis(svg, boxes[0], y, title="loss, nats per token")
    _merged(svg, boxes[0], x, training.get("merged_tokens", []))
    window = _window(training)
    for i, run in enumerate(runs):
        points = _thinned(run["points"])
        svg.curve([(x(p["tokens"]), y(p["loss"])) for p in points], f"line thin raw s{i}")
    for i, run in enumerate(runs):
        smooth = _smoothed([p["loss"] for p in run["points"]], window)
        pairs = _thinned(list(zip(run["points"], smooth, strict=True)))
        svg.curve([(x(p["tokens"]), y(value)) for p, value in pairs], f"line s{i}")
    for i, run in enumerate(runs):
        for point in run.get("validation", []):
            tip = f"{run['name']}: validation {fixed(point['loss'], 4)} at {count(point['tokens'])} tokens"
            svg.dot(x(point["tokens"]), y(point["loss"]), f"hollow s{i}", radius=3.5, tip=tip)

    _strip(svg, boxes[1], x, runs, "learning rate", lambda p: p["lr"])
    if norms:
        _strip(svg, boxes[2], x, runs, "gradient norm", lambda p: p.get("grad_norm"))
    for box in boxes:
        svg.line(box.left, box.bottom, box.right, box.bottom, "axis")
    x_axis(svg, boxes[-1], x, title="tokens", text=short_count)
    _hits(svg, Box(left, boxes[0].top, right, boxes[-1].bottom), x, runs)
    return svg


def _merged(svg: Svg, box: Box, x: Scale, tokens: Sequence[int]) -> None:
    for at in tokens:
        svg.line(x(at), box.top, x(at), box.bottom, "grid")
        svg.dot(x(at), box.top, "f5", radius=4, shape=3)
    if tokens:
        svg.text(min(x(t) for t in tokens) - 10, box.top + 4, "merged", "end small halo")


def _strip(
    svg: Svg, box: Box, x: Scale, runs: Sequence[Run], title: str, of: Callable[[TrainPoint], float | None]
) -> None:
    found = [[(p["tokens"], v) for p in _thinned(run["points"]) if (v := of(p)) is not None] for run in runs]
    y = Scale(0.0, _ceiling(_values(runs, of)), box.bottom, box.top)
    y_axis(svg, box, y, title=title, ticks=y.ticks(3), text=lambda v: significant(v, 2))
    for i, pairs in enumerate(found):
        svg.curve([(x(t), max(y(v), box.top - 4)) for t, v in pairs], f"line band s{i}")


def _values(runs: Sequence[Run], of: Callable[[TrainPoint], float | None]) -> list[float]:
    return [v for run in runs for p in run["points"] if (v := of(p)) is not None]


def _ceiling(values: Sequence[float]) -> float:
    """Where an axis ends: above the 99th percentile, so that one exploding step does not flatten the rest."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))] * 1.15 or 1.0


def _hits(svg: Svg, box: Box, x: Scale, runs: Sequence[Run]) -> None:
    """Invisible strips that tell the numbers below the pointer."""
    strips = 48
    wide = (box.right - box.left) / strips
    for k in range(strips):
        low, high = (x.low + (x.high - x.low) * (k + d) / strips for d in (0, 1))
        lines = []
        for run in runs:
            inside = [
                p for p in run["points"] if low <= p["tokens"] < high or (k == strips - 1 and p["tokens"] == high)
            ]
            if inside:
                loss = statistics.fmean(p["loss"] for p in inside)
                lines.append(f"{run['name']}: loss {fixed(loss, 3)}, learning rate {significant(inside[-1]['lr'])}")
        if lines:
            tip = f"{count((low + high) / 2)} tokens\n" + "\n".join(lines)
            svg.rect(box.left + k * wide, box.top, wide, box.bottom - box.top, "hit", tip=tip)


def _window(training: Training) -> int:
    return max(1, max(len(run["points"]) for run in training["runs"]) // _SMOOTHING_SHARE)


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over the steps around each, fewer at the ends."""
    half = window // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _thinned(items: Sequence[_T]) -> Sequence[_T]:
    """At most `_MOST_POINTS` evenly chosen items, the last among them."""
    stride = -(-len(items) // _MOST_POINTS)
    return items if stride <= 1 else [*items[:-1:stride], items[-1]]
