"""Inside the model: which heads recall, which watch the first token, how long states last."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from whimbrel.report.block import Block, Table
from whimbrel.report.numbers import fixed, percent, significant
from whimbrel.report.schema import Diagnostics, HeadRise, HeadSink, LayerDynamics
from whimbrel.report.svg import Box, Scale, Svg, scale, text_width, x_axis

_MOST = 12
"""Heads drawn."""

_SINK = 0.3
"""Attention on the first token above which `whimbrel.evals.diagnostics` counts a head as a sink."""


def blocks(found: Diagnostics) -> list[Block]:
    """Heads, sinks and states, each where its numbers are given."""
    made = []
    if found["heads"]:
        made.append(
            Block(
                title="Heads that recall",
                finding=heads_finding(found),
                note="The rise of the loss at the answers of key-value prompts when one head's output is set to zero; "
                f"the {_MOST} that cost most. Below zero the prompts fare better without the head.",
                draw=lambda width: _draw_heads(found["heads"][:_MOST], width, heads_finding(found)),
                table=Table(
                    ["head", "kind", "rise, nats"],
                    [[_name(head), head["kind"], fixed(head["rise"], 3)] for head in found["heads"]],
                ),
            )
        )
    if found["sinks"]:
        made.append(
            Block(
                title="Attention sinks",
                finding=sinks_finding(found),
                note="Share of a softmax head's attention on the first token, averaged over the second half of a text; "
                f"the {_MOST} highest.",
                draw=lambda width: _draw_sinks(found["sinks"], width, sinks_finding(found)),
                table=Table(
                    ["head", "attention on the first token"],
                    [[_name(sink), percent(sink["share"])] for sink in found["sinks"]],
                ),
            )
        )
    if found["layers"]:
        made.append(
            Block(
                title="How long states last",
                finding=layers_finding(found["layers"]),
                note="Tokens in which a head's state falls to a half by its median decay, one dot a head, logarithmic; "
                "in the numbers also the root mean square of the states, and how much of the residual is clipped.",
                draw=lambda width: _draw_layers(found["layers"], width),
                table=Table(
                    ["block", "kind", "half-life, tokens", "state, RMS", "clipped"],
                    [_row(layer) for layer in found["layers"]],
                ),
            )
        )
    return made


def heads_finding(found: Diagnostics) -> str:
    """The head that matters most, against all of them."""
    first = found["heads"][0]
    if first["rise"] <= 0:
        return f"No single head lowers the loss at the answers, {fixed(found['answer_loss'], 2)} nats."
    return (
        f"Without {_name(first)} ({first['kind']}) the loss at the answers rises by {fixed(first['rise'], 2)} from "
        f"{fixed(found['answer_loss'], 2)} nats, more than without any other."
    )


def sinks_finding(found: Diagnostics) -> str:
    """The share of heads that are sinks, and the strongest."""
    most = max(found["sinks"], key=lambda sink: sink["share"])
    return (
        f"{percent(found.get('sink_rate', 0.0), 0)} of the softmax heads spend over {percent(_SINK, 0)} of their "
        f"attention on the first token; the most is {percent(most['share'])}, by {_name(most)}."
    )


def layers_finding(layers: list[LayerDynamics]) -> str:
    """Shortest and longest memory, and the strongest clipping."""
    halves = [half for layer in layers for half in layer["half_lives"]]
    text = f"States fall to a half within {significant(min(halves), 2)} to {significant(max(halves), 2)} tokens"
    clipped = [layer for layer in layers if "clip_rate" in layer]
    if not clipped:
        return f"{text}."
    most = max(clipped, key=lambda layer: layer["clip_rate"])
    return f"{text}; the clip cuts {percent(most['clip_rate'])} of the residual in block {most['block']}, the most."


def _name(head: HeadRise | HeadSink) -> str:
    return f"block {head['block']}, head {head['head']}"


def _row(layer: LayerDynamics) -> list[str]:
    halves, norms = layer["half_lives"], layer["norms"]
    clipped = layer.get("clip_rate")
    spread = f"{significant(min(halves), 2)} to {significant(max(halves), 2)}"
    rms = significant(statistics.fmean(norms), 2)
    return [str(layer["block"]), layer["kind"], spread, rms, "" if clipped is None else percent(clipped)]


def _draw_heads(heads: list[HeadRise], width: float, label: str) -> Svg:
    bars = [_Bar(_name(head), head["rise"], fixed(head["rise"], 3), head["kind"]) for head in heads]
    return _draw_bars(bars, width, "rise of the loss at the answers, nats", label)


def _draw_sinks(sinks: list[HeadSink], width: float, label: str) -> Svg:
    most = sorted(sinks, key=lambda sink: -sink["share"])[:_MOST]
    bars = [_Bar(_name(sink), sink["share"], percent(sink["share"]), "softmax") for sink in most]
    return _draw_bars(bars, width, "attention on the first token", label, reach=_SINK)


class _Bar(NamedTuple):
    name: str
    value: float
    text: str
    kind: str


def _draw_bars(bars: list[_Bar], width: float, title: str, label: str, *, reach: float = 0.0) -> Svg:
    """A bar for each head, from zero to either side, under what the bars measure; there is room to `reach` at least."""
    step, top, left = 24.0, 22.0, max(text_width(bar.name) for bar in bars) + 12
    room = max(text_width(bar.text) for bar in bars) + 12
    svg = Svg(width, top + step * len(bars) + 4, label=label)
    svg.text(left, 12, title, "start")
    values = [bar.value for bar in bars]
    x = Scale(min(0.0, *values), max(reach, *values) or 1.0, left, width - room)
    for i, bar in enumerate(bars):
        y = top + step * i
        svg.text(0, y + 13, bar.name, "start ink")
        start, end = sorted((x(0), x(bar.value)))
        svg.rect(start, y, max(end - start, 1), 16, "f0", tip=f"{bar.name} ({bar.kind}): {bar.text}")
        svg.text(end + 6, y + 13, bar.text, "start")
    return svg


def _draw_layers(layers: list[LayerDynamics], width: float) -> Svg:
    names = [f"block {layer['block']}, {layer['kind']}" for layer in layers]
    step, left = 28.0, max(map(text_width, names)) + 14
    svg = Svg(width, step * len(layers) + 56, label=layers_finding(layers))
    box = Box(left, 6, width - 12, step * len(layers) + 10)
    halves = [half for layer in layers for half in layer["half_lives"]]
    x = scale(halves, start=box.left, end=box.right, log=True, pad=0.05)
    x_axis(svg, box, x, title="half-life of the state, tokens", grid=True, text=lambda value: significant(value, 2))
    for i, (name, layer) in enumerate(zip(names, layers, strict=True)):
        y = step * i + 22
        svg.text(0, y + 4, name, "start ink")
        for head, half in enumerate(layer["half_lives"]):
            svg.dot(x(half), y, "f0 gap", tip=f"{name}, head {head}: {significant(half, 2)} tokens")
    return svg
