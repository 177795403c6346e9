"""Where the bytes are: training by part, inference by length."""

from __future__ import annotations

from whimbrel.report.block import NARROW, Block, Table
from whimbrel.report.numbers import percent, power_count, significant, size
from whimbrel.report.schema import Memory, MethodMemory, StateByLength
from whimbrel.report.svg import Box, Scale, Svg, fit, legend, log_ticks, scale, text_width, x_axis, y_axis

_PARTS = ("weights", "gradients", "optimizer state")
_STYLES = ("f5", "f5 soft", "f0")


def blocks(memory: Memory) -> list[Block]:
    """Bars by optimizer and lines by length, each where its numbers are given."""
    found = []
    methods, by_length = memory.get("methods"), memory.get("by_length")
    if methods:
        found.append(
            Block(
                title="Training memory by part",
                finding=training_finding(memory),
                note="Weights, gradients and optimizer state of one step; activations are not counted.",
                draw=lambda width: _draw_methods(memory, methods, width),
                table=Table(
                    ["method", *_PARTS, "together"],
                    [[m["method"], *map(size, _amounts(m)), size(_total(m))] for m in methods],
                ),
            )
        )
    if by_length and by_length["lengths"] and by_length["series"]:
        found.append(
            Block(
                title="Inference state by length",
                finding=length_finding(by_length),
                note="Bytes kept for one sequence: recurrent states and the key-value caches of softmax layers. "
                "Both axes are logarithmic.",
                draw=lambda width: _draw_lengths(by_length, width),
                table=Table(
                    ["tokens", *(s["name"] for s in by_length["series"])],
                    [
                        [f"{length:,}", *(size(s["bytes"][i]) for s in by_length["series"])]
                        for i, length in enumerate(by_length["lengths"])
                    ],
                ),
            )
        )
    return found


def training_finding(memory: Memory) -> str:
    """The used method's optimizer state against the first method's."""
    methods = memory.get("methods", [])
    base = methods[0]
    used = next((m for m in methods if m["method"] == memory.get("used")), methods[-1])
    if used is base:
        return f"{base['method']}’s optimizer state takes {size(base['optimizer_state'])} of {size(_total(base))}."
    share = used["optimizer_state"] / max(base["optimizer_state"], 1)
    whole = 1 - _total(used) / max(_total(base), 1)
    change = f"{percent(abs(whole), 0)} {'less' if whole > 0 else 'more'}"
    return (
        f"{used['method']}’s optimizer state takes {size(used['optimizer_state'])}, {percent(share, 0)} of "
        f"{base['method']}’s {size(base['optimizer_state'])}; all parts together take {change}."
    )


def length_finding(by_length: StateByLength) -> str:
    """The first series against each other one at the greatest length, and where the other is the smaller."""
    lengths, (first, *others) = by_length["lengths"], by_length["series"]
    own = first["bytes"][-1]
    parts = [f"{size(own)} for {first['name']}"]
    for other in others:
        amount = other["bytes"][-1]
        smaller = [n for n, a, b in zip(lengths, first["bytes"], other["bytes"], strict=True) if b < a]
        if amount == own:
            parts.append(f"the same for {other['name']}")
        elif amount > own:
            but = f", though less up to {max(smaller):,} tokens" if smaller else ""
            times = significant(amount / max(own, 1), 2)
            parts.append(f"{times} times as much, {size(amount)}, for {other['name']}{but}")
        else:
            parts.append(f"{size(amount)}, {percent(amount / own)} of that, for {other['name']}")
    return f"At {lengths[-1]:,} tokens one sequence keeps {'; '.join(parts)}."


def _total(method: MethodMemory) -> int:
    return sum(_amounts(method))


def _amounts(method: MethodMemory) -> tuple[int, int, int]:
    """In the order of `_PARTS`."""
    return method["weights"], method["gradients"], method["optimizer_state"]


def _draw_methods(memory: Memory, methods: list[MethodMemory], width: float) -> Svg:
    narrow = width < NARROW
    step, tall = (50.0, 22.0) if narrow else (42.0, 26.0)
    total_room = max(text_width(size(_total(m))) for m in methods) + 10
    left = 0.0 if narrow else min(200.0, max(text_width(m["method"]) for m in methods) + 16)
    top = 34.0
    svg = Svg(width, top + step * len(methods) + 2, label=training_finding(memory))
    at = left
    for name, style in zip(_PARTS, _STYLES, strict=True):
        svg.rect(at, 4, 11, 11, style)
        svg.text(at + 17, 14, name, "start ink")
        at += 17 + text_width(name) + 16
    x = Scale(0, max(_total(m) for m in methods), left, width - total_room)
    for i, method in enumerate(methods):
        y = top + step * i + (18 if narrow else 6)
        style = "ink bold" if method["method"] == memory.get("used") else "ink"
        if narrow:
            svg.text(0, y - 6, fit(method["method"], width), f"start {style}")
        else:
            svg.text(0, y + tall / 2 + 4, fit(method["method"], left - 16), f"start {style}")
        start = 0
        for name, amount, part_style in zip(_PARTS, _amounts(method), _STYLES, strict=True):
            wide = x(start + amount) - x(start)
            tip = f"{method['method']}: {name} {size(amount)}"
            svg.rect(x(start), y, wide, tall, f"{part_style} gap", tip=tip)
            if part_style == "f0" and wide > text_width(size(amount)) + 8:
                svg.text(x(start) + wide - 7, y + tall / 2 + 4, size(amount), "end on-fill bold")
            start += amount
        svg.text(x(start) + 8, y + tall / 2 + 4, size(start), "start ink")
    return svg


def _draw_lengths(by_length: StateByLength, width: float) -> Svg:
    narrow = width < NARROW
    lengths, series = by_length["lengths"], by_length["series"]
    room = max(text_width(size(s["bytes"][-1])) for s in series) + 8
    svg = Svg(width, 0, label=length_finding(by_length))
    items = [(s["name"], i) for i, s in enumerate(series)]
    top = 24 + legend(svg, items, x=0, y=14, right=width, marks=True)
    box = Box(62, top + 8, width - room, top + (210 if narrow else 270))
    svg.height = box.bottom + 42
    values = [max(b, 1) for s in series for b in s["bytes"]]
    x = scale(lengths, start=box.left, end=box.right, log=True, pad=0.02)
    y = scale(values, start=box.bottom, end=box.top, log=True, pad=0.06)
    y_axis(svg, box, y, title="bytes per sequence", ticks=log_ticks(y.low, y.high, 6, base=2), text=_power_size)
    ticks = lengths if len(lengths) <= 9 else log_ticks(x.low, x.high, 7, base=2)
    x_axis(svg, box, x, title="tokens in the context", ticks=ticks, text=power_count)
    for i, s in enumerate(series):
        line = [(x(n), y(max(b, 1))) for n, b in zip(lengths, s["bytes"], strict=True)]
        svg.curve(line, f"line s{i}")
        for (px, py), n, b in zip(line, lengths, s["bytes"], strict=True):
            svg.dot(px, py, f"f{i} gap", shape=i, tip=f"{s['name']}: {size(b)} at {n:,} tokens")
        svg.text(line[-1][0] + 9, line[-1][1] + 4, size(s["bytes"][-1]), f"start f{i} bold")
    return svg


def _power_size(value: float) -> str:
    """A power of two in bytes, without decimals."""
    for scale_, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale_:
            return f"{value / scale_:.0f} {unit}"
    return f"{value:.0f} B"
