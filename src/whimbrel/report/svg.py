"""A small SVG writer: scales, axes and marks, in colours that follow the reader's light or dark scheme.

Coordinates are CSS pixels. Colours are the variables of `THEME`, so that one drawing serves both schemes, in
a page (which holds `THEME` once) and as a file of its own (`Svg.file`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

SERIES = 6
"""Colours that can be told apart, also with red-green and blue-yellow blindness; more are not offered."""

THEME = """
:root{color-scheme:light dark;--paper:#fcfcfa;--ink:#1c1f22;--muted:#5d646b;--rule:#dcdcd6;--wash:#f1f1ec;
--c0:#1664a8;--c1:#c2510c;--c2:#0b8265;--c3:#93458c;--c4:#8a6a00;--c5:#6a727a}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e7e5df;--muted:#a0a6ac;--rule:#33383d;
--wash:#1d2124;--c0:#6db3ec;--c1:#f39a5c;--c2:#50c8a6;--c3:#d79ad0;--c4:#d8b750;--c5:#98a1aa}}
svg text{font:12px/1.2 -apple-system,"Segoe UI",Inter,"Helvetica Neue",Arial,"Liberation Sans",
"DejaVu Sans Condensed",sans-serif;fill:var(--muted);font-variant-numeric:tabular-nums}
svg .ink{fill:var(--ink)}svg .bold{font-weight:600}svg .small{font-size:11px}
svg .start{text-anchor:start}svg .mid{text-anchor:middle}svg .end{text-anchor:end}
svg .halo{paint-order:stroke;stroke:var(--paper);stroke-width:4px;stroke-linejoin:round}
svg .grid{stroke:var(--rule);stroke-width:1;fill:none}svg .axis{stroke:var(--muted);stroke-width:1;fill:none}
svg .zero{stroke:var(--ink);stroke-width:1;fill:none}
svg .wash{fill:var(--wash)}svg .plate{fill:var(--paper)}svg .gap{stroke:var(--paper);stroke-width:1}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}svg .thin{stroke-width:1}
svg .band{stroke-width:1.5}svg .raw{opacity:.3}svg .soft{opacity:.4}svg .dash{stroke-dasharray:4 4}
svg .hollow{fill:var(--paper);stroke-width:2}
svg .hit{fill:transparent}svg .hit:hover{fill:var(--ink);fill-opacity:.07}
""" + "".join(
    f"svg .s{i}{{stroke:var(--c{i})}}svg .f{i}{{fill:var(--c{i})}}svg .h{i}{{stroke:var(--c{i})}}"
    for i in range(SERIES)
)

_CHARACTER = 6.8  # mean width of a 12 px character in the widest of the fonts that are asked for


class Scale(NamedTuple):
    """Maps values `low..high` to pixels `start..end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the range, at most `most` of them."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def scale(
    values: Sequence[float],
    *,
    start: float,
    end: float,
    log: bool = False,
    include: Sequence[float] = (),
    pad: float = 0.05,
) -> Scale:
    """A scale over finite values, widened by the share `pad` except at an end that `include` names."""
    low, high = min((*values, *include)), max((*values, *include))
    if log:
        factor = (high / low) ** pad if high > low else 2.0
        return Scale(low / factor, high * factor, start, end, True)
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    return Scale(
        low if low in include else low - room,
        high if high in include else high + room,
        start,
        end,
    )


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    for factor in (1, 2, 5, 10):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int, *, base: float | None = None) -> list[float]:
    """Powers of `base`: of ten by default, or of two where the range is short."""
    base = base or (10.0 if high / low >= 300 else 2.0)
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / max(most, 1)))
    return [base**i for i in range(first, last + 1, stride)]


def digits_for(ticks: Sequence[float]) -> int:
    """Decimals that keep neighbouring ticks apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    return max(0, math.ceil(-math.log10(step) - 1e-9))


def text_width(text: str, *, pixels: float = _CHARACTER) -> float:
    """Room to keep for a text of 12 px; an estimate on the safe side."""
    return len(text) * pixels


def fit(text: str, room: float) -> str:
    """The text, cut with an ellipsis where it would need more than `room` pixels."""
    most = max(1, int(room / _CHARACTER))
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as can be to `wanted` with at least `gap` between them, inside `low..high`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    edge = low
    for i in order:
        placed[i] = max(wanted[i], edge)
        edge = placed[i] + gap
    edge = high
    for i in reversed(order):
        placed[i] = min(placed[i], edge)
        edge = placed[i] - gap
    return placed


class Svg:
    """Marks in drawing order."""

    def __init__(self, width: float, height: float, *, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._marks: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight line; `style` names a class of the page's style sheet, here and below."""
        self._marks.append(f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{style}"/>')

    def curve(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Straight pieces through the points."""
        if points:
            path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
            self._marks.append(f'<path d="{path}" class="{style}"/>')

    def area(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A filled outline."""
        path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points) + "Z"
        self._marks.append(f'<path d="{path}" class="{style}"/>')

    def rect(
        self, x: float, y: float, width: float, height: float, style: str, *, tip: str = "", round_: float = 0
    ) -> None:
        """A filled rectangle from its upper left corner; `tip` is shown under the pointer."""
        corner = f' rx="{_n(round_)}"' if round_ else ""
        self._mark(
            "rect",
            f'x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(max(height, 0))}"{corner}',
            style,
            tip,
        )

    def dot(self, x: float, y: float, style: str, *, radius: float = 4, shape: int = 0, tip: str = "") -> None:
        """A marker: circle, square, triangle, diamond and so on by `shape`, so that colour is not needed."""
        kind, r = shape % 4, radius
        if kind == 0:
            self._mark("circle", f'cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}"', style, tip)
            return
        r *= 1.25
        outline = {
            1: [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
            2: [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
            3: [(0, -1.05), (1.05, 0), (0, 1.05), (-1.05, 0)],
        }[kind]
        path = "M" + "L".join(f"{_n(x + r * dx)} {_n(y + r * dy)}" for dx, dy in outline) + "Z"
        self._mark("path", f'd="{path}"', style, tip)

    def text(self, x: float, y: float, text: str, style: str = "start", *, plate: bool = False) -> None:
        """Text with its baseline at `y`; `style` has one of start, mid, end; a plate hides what is behind it."""
        if plate:
            wide = text_width(text) + 6
            left = x - wide + 3 if "end" in style else x - wide / 2 if "mid" in style else x - 3
            self.rect(left, y - 13, wide, 17, "plate")
        self._marks.append(f'<text x="{_n(x)}" y="{_n(y)}" class="{style}">{escape(text)}</text>')

    def path(self, d: str, style: str) -> None:
        """A path whose data the caller has written; the caller answers for its characters."""
        self._marks.append(f'<path d="{d}" class="{style}"/>')

    def inline(self) -> str:
        """The drawing for a page that holds `THEME`."""
        return (
            f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" width="{_n(self.width)}" '
            f'height="{_n(self.height)}" role="img" aria-label="{escape(self.label, quote=True)}">'
            f"{''.join(self._marks)}</svg>"
        )

    def file(self) -> str:
        """The drawing as a file of its own, with its theme and background."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(self.width)} {_n(self.height)}" '
        size = f'width="{_n(self.width)}" height="{_n(self.height)}" role="img" '
        background = '<rect width="100%" height="100%" style="fill:var(--paper)"/>'
        return (
            f'{head}{size}aria-label="{escape(self.label, quote=True)}"><style>{THEME}</style>'
            f"{background}{''.join(self._marks)}</svg>\n"
        )

    def _mark(self, tag: str, attributes: str, style: str, tip: str) -> None:
        if tip:
            self._marks.append(f'<{tag} {attributes} class="{style}"><title>{escape(tip)}</title></{tag}>')
        else:
            self._marks.append(f'<{tag} {attributes} class="{style}"/>')


class Box(NamedTuple):
    """The plotting area inside a drawing."""

    left: float
    top: float
    right: float
    bottom: float


def x_axis(
    svg: Svg,
    box: Box,
    x: Scale,
    *,
    title: str = "",
    ticks: Sequence[float] | None = None,
    text: Callable[[float], str] | None = None,
    grid: bool = False,
) -> None:
    """Line, tick labels and a title below the box; a label that would touch the one before it is left out."""
    ticks = x.ticks() if ticks is None else ticks
    text = text or plain(ticks)
    svg.line(box.left, box.bottom, box.right, box.bottom, "axis")
    free = -math.inf
    for tick in ticks:
        at, label = x(tick), text(tick)
        if grid:
            svg.line(at, box.top, at, box.bottom, "grid")
        svg.line(at, box.bottom, at, box.bottom + 4, "axis")
        half = text_width(label) / 2
        centre = min(max(at, half), svg.width - half)
        if centre - half >= free:
            svg.text(centre, box.bottom + 18, label, "mid")
            free = centre + half + 6
    if title:
        svg.text(box.right, box.bottom + 36, title, "end")


def y_axis(
    svg: Svg,
    box: Box,
    y: Scale,
    *,
    title: str,
    ticks: Sequence[float] | None = None,
    text: Callable[[float], str] | None = None,
) -> None:
    """Grid lines, labels left of the box, and the title above it, where it can be read without tilting."""
    ticks = y.ticks(5) if ticks is None else ticks
    text = text or plain(ticks)
    for tick in ticks:
        svg.line(box.left, y(tick), box.right, y(tick), "grid")
        svg.text(box.left - 8, y(tick) + 4, text(tick), "end")
    svg.text(0, box.top - 12, title, "start")


def plain(ticks: Sequence[float]) -> Callable[[float], str]:
    """Tick labels with as many decimals as the ticks need."""
    digits = digits_for(ticks)
    return lambda value: f"{value:,.{digits}f}".replace("-", "\u2212")


def legend(svg: Svg, items: Sequence[tuple[str, int]], *, x: float, y: float, right: float, marks: bool) -> float:
    """Names with their colour (and shape) in rows from `x, y`; returns the height used."""
    at, row = x, 0
    for name, colour in items:
        name = fit(name, right - x - 18)
        width = 18 + text_width(name) + 14
        if at > x and at + width - 14 > right:
            at, row = x, row + 1
        middle = y + row * 18
        if marks:
            svg.dot(at + 6, middle - 4, f"f{colour}", shape=colour)
        else:
            svg.line(at, middle - 4, at + 12, middle - 4, f"line s{colour}")
        svg.text(at + 18, middle, name, "start ink")
        at += width
    return (row + 1) * 18.0


def _n(value: float) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text
