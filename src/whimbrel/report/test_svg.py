"""Scales, ticks, labels, marks, and colours that can be read on both backgrounds."""

from __future__ import annotations

import itertools
import random
import re
from xml.etree import ElementTree

import pytest

from whimbrel.report import numbers
from whimbrel.report.svg import SERIES, THEME, Scale, Svg, linear_ticks, log_ticks, scale, spread


def test_scale_maps_ends_to_ends():
    linear, log = Scale(2.0, 6.0, 100.0, 0.0), Scale(1.0, 10_000.0, 0.0, 80.0, True)
    assert (linear(2.0), linear(4.0), linear(6.0)) == (100.0, 50.0, 0.0)
    assert log(100.0) == pytest.approx(40.0)


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_few_and_inside(seed):
    rng = random.Random(seed)
    low = rng.uniform(-5, 5)
    high = low + 10 ** rng.uniform(-4, 5)
    most = rng.randint(3, 8)
    ticks = linear_ticks(low, high, most)
    assert 1 <= len(ticks) <= most
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)
    steps = {f"{b - a:.6e}"[:6] for a, b in itertools.pairwise(ticks)}
    assert all(step[0] in "125" or step.startswith(("9.99", "4.99", "1.99")) for step in steps)


def test_log_ticks_are_powers():
    assert log_ticks(1, 1e6, 7) == [10.0**i for i in range(7)]
    assert log_ticks(256, 4096, 9) == [256.0, 512.0, 1024.0, 2048.0, 4096.0]
    assert len(log_ticks(1, 1e12, 5)) <= 5


def test_a_scale_over_one_value_has_room():
    made = scale([3.0], start=0, end=100)
    assert made.low < 3.0 < made.high
    assert scale([8], start=0, end=100, log=True)(8) == pytest.approx(50)


@pytest.mark.parametrize("seed", range(10))
def test_spread_keeps_labels_apart_and_inside(seed):
    rng = random.Random(seed)
    wanted = [rng.uniform(0, 100) for _ in range(5)]
    placed = spread(wanted, 17, 0, 100)
    in_order = [placed[i] for i in sorted(range(5), key=lambda i: wanted[i])]
    assert all(b - a >= 17 - 1e-9 for a, b in itertools.pairwise(in_order))
    assert min(placed) >= 0
    assert max(placed) <= 100


def test_a_file_is_valid_xml_with_its_theme():
    svg = Svg(100, 50, label='a < b & "c"')
    for shape in range(4):
        svg.dot(10 * shape, 10, "f0", shape=shape, tip="1 < 2")
    svg.text(5, 20, "<b>", "start ink", plate=True)
    svg.line(0, 0, 1, 1, "axis")
    svg.curve([(0, 0), (1.234567, -0.001)], "line s0")
    root = ElementTree.fromstring(svg.file())
    assert root.attrib["viewBox"] == "0 0 100 50"
    assert root.attrib["aria-label"] == 'a < b & "c"'
    assert "prefers-color-scheme:dark" in svg.file()
    assert "M0 0L1.23 0" in svg.file()
    assert [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")] == ["<b>"]
    ElementTree.fromstring(svg.inline())


def contrast(a: str, b: str) -> float:
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_and_series_colours_reach_the_contrast_of_body_text():
    """WCAG 2.2, success criterion 1.4.3: at least 4.5 to 1."""
    light, dark = THEME.split("@media", 1)[0], THEME.split("@media", 1)[1]
    for part in (light, dark):
        colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", part))
        assert {f"c{i}" for i in range(SERIES)} <= set(colours)
        for name in ("ink", "muted", *(f"c{i}" for i in range(SERIES))):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name


def test_numbers_are_written_for_readers():
    plain = {
        numbers.fixed(-0.00004, 3): "0.000",
        numbers.fixed(-1234.5, 1): "−1,234.5",
        numbers.signed(0.25, 2): "+0.25",
        numbers.signed(0.0001, 2): "0.00",
        numbers.significant(0.000012345): "1.23e−5",
        numbers.significant(-0.21374): "−0.214",
        numbers.significant(1000.0): "1,000",
        numbers.significant(0): "0",
        numbers.count(9_999): "9,999",
        numbers.count(3_214_592): "3.21\u00a0million",
        numbers.short_count(1_500_000): "1.5M",
        numbers.power_count(4096): "4K",
        numbers.power_count(512): "512",
        numbers.size(1000): "1000\u00a0B",
        numbers.size(6_612_928): "6.31\u00a0MiB",
        numbers.size(3 * 2**40): "3.00\u00a0TiB",
        numbers.percent(0.95, 0): "95%",
        numbers.seconds(0.0123): "12.3\u00a0ms",
        numbers.seconds(59.7): "1\u00a0min 0\u00a0s",
        numbers.seconds(323): "5\u00a0min 23\u00a0s",
        numbers.seconds(7260): "2\u00a0h 1\u00a0min",
        numbers.listed(["a"]): "a",
        numbers.listed(["a", "b", "c"]): "a, b and c",
    }
    assert list(plain) == list(plain.values())
