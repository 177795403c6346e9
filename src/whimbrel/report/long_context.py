"""Sparse prefill against dense, the plans it made, and what the model wrote."""

from __future__ import annotations

from collections.abc import Sequence

from whimbrel.report.block import NARROW, Block, Table
from whimbrel.report.numbers import fixed, listed, percent, seconds, significant
from whimbrel.report.schema import LongContext, PlanPicture, Prefill, Sample, Timing
from whimbrel.report.svg import Box, Scale, Svg, fit, text_width, x_axis


def blocks(long: LongContext) -> list[Block]:
    """Prefill, plans and a sample, each where it is given."""
    found = []
    prefills = [p for p in long.get("prefill", []) if p["layers"]]
    if prefills:
        found.append(
            Block(
                title="Sparse prefill of the softmax layers",
                finding=prefill_finding(prefills),
                note="Bars: causal blocks read, as a share of all causal blocks. Circles: attention mass covered, "
                "the smallest over the rows that were measured. Upright marks: the coverage asked for. Next tokens "
                "and logits are compared with dense prefill of the same prompt.",
                draw=lambda width: _draw_prefill(prefills, width),
                table=_table(prefills),
            )
        )
        timed = [(p, p["dense"], p["sparse"]) for p in prefills if "dense" in p and "sparse" in p]
        if timed:
            found.append(
                Block(
                    title="Prefill time",
                    finding=" ".join(_time_finding(*each) for each in timed),
                    note="Whole model, median; the thin lines are quartiles.",
                    draw=lambda width: _draw_times(timed, width),
                )
            )
    plans = [p for p in long.get("plans", []) if p["mask"]]
    if plans:
        found.append(
            Block(
                title="Block plans",
                finding=_plan_finding(plans),
                note="One square per block: queries run down, keys run across. Filled: read; pale: skipped.",
                draw=lambda width: _draw_plans(plans, width),
            )
        )
    sample = long.get("sample")
    if sample:
        found.append(_sample(sample))
    return found


def prefill_finding(prefills: Sequence[Prefill]) -> str:
    """Density, coverage and agreement: the first selector in words, the others in the same order."""
    first, *others = prefills
    text = (
        f"With {first['selector']} the softmax layers read {_densities(first)} of the causal blocks, cover at "
        f"least {_least_coverage(first)} of the attention, and agree with dense prefill on "
        f"{percent(first['top1_agreement'])} of the next tokens."
    )
    for p in others:
        text += f" {p['selector']}: {_densities(p)}, {_least_coverage(p)} and {percent(p['top1_agreement'])}."
    return text


def _densities(prefill: Prefill) -> str:
    return _span([layer["density"] for layer in prefill["layers"]])


def _least_coverage(prefill: Prefill) -> str:
    layers = prefill["layers"]
    short = [str(x["layer"]) for x in layers if x["coverage_achieved"] < x["coverage_asked"]]
    text = percent(min(x["coverage_achieved"] for x in layers))
    return text + (f" (less than asked in layer{'s' if len(short) > 1 else ''} {listed(short)})" if short else "")


def _time_finding(prefill: Prefill, dense: Timing, sparse: Timing) -> str:
    ratio = dense["seconds"] / sparse["seconds"]
    apart = sparse["q75"] < dense["q25"] or sparse["q25"] > dense["q75"]
    times = f"({seconds(sparse['seconds'])} against {seconds(dense['seconds'])})"
    if not apart:
        return f"Prefill with {prefill['selector']} is not told apart from dense {times}: the quartiles overlap."
    if ratio > 1:
        return f"Prefill with {prefill['selector']} is {fixed(ratio, 2)} times as fast as dense {times}."
    return f"Prefill with {prefill['selector']} is slower: {fixed(1 / ratio, 2)} times as long as dense {times}."


def _plan_finding(plans: Sequence[PlanPicture]) -> str:
    densities = [_density(plan) for plan in plans]
    first = sum(all(row[0] for row in plan["mask"]) for plan in plans)
    text = f"The {'head' if len(plans) == 1 else 'heads'} shown read {_span(densities)} of the causal blocks"
    return text + f"; {first} of {len(plans)} always read the first key block."


def _density(plan: PlanPicture) -> float:
    mask = plan["mask"]
    extra = len(mask[0]) - len(mask)
    causal = [row[: i + 1 + extra] for i, row in enumerate(mask)]
    return sum(map(sum, causal)) / sum(map(len, causal))


def _sample(sample: Sample) -> Block:
    speed = f" at {sample['tokens_per_second']:,.0f} tokens per second" if "tokens_per_second" in sample else ""
    return Block(
        title="What the model writes",
        finding=f"{sample['model']} read {sample['prompt_tokens']:,} tokens and wrote {sample['tokens']:,}{speed}.",
        quotes=(("End of the prompt", sample["prompt"].strip()), ("Continuation", sample["text"].strip())),
    )


def _table(prefills: Sequence[Prefill]) -> Table:
    rows = []
    for p in prefills:
        for layer in p["layers"]:
            rows.append(
                [
                    f"{p['selector']}, layer {layer['layer']}",
                    f"{p['tokens']:,}",
                    percent(layer["density"]),
                    percent(layer["coverage_asked"]),
                    percent(layer["coverage_achieved"]),
                    _logit(p),
                    percent(p["top1_agreement"]),
                    *(_timing(p[key]) if key in p else "" for key in ("dense", "sparse")),
                ]
            )
    head = [
        "selector",
        "tokens",
        "blocks read",
        "coverage asked",
        "achieved",
        "largest logit difference",
        "same top-1",
    ]
    return Table([*head, "dense", "sparse"], rows)


def _timing(timing: Timing) -> str:
    quartiles = f"{seconds(timing['q25'])} to {seconds(timing['q75'])}"
    return f"{seconds(timing['seconds'])} ({quartiles}, n={timing['n']})"


def _draw_prefill(prefills: Sequence[Prefill], width: float) -> Svg:
    narrow = width < NARROW
    step, title = 28.0, 40.0 if narrow else 28.0
    left = 62.0
    box = Box(left, 34, width - (50 if narrow else 60), 34 + sum(title + step * len(p["layers"]) for p in prefills))
    svg = Svg(width, box.bottom + 42, label=prefill_finding(prefills))
    svg.rect(0, 6, 16, 9, "f0 soft")
    svg.text(22, 14, "blocks read", "start ink")
    svg.dot(112, 10, "f1", radius=4.5)
    svg.text(121, 14, "covered", "start ink")
    svg.line(188, 3, 188, 17, "line s5")
    svg.text(195, 14, "asked", "start ink")
    x = Scale(0, 1, box.left, box.right)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    x_axis(svg, box, x, title="share", ticks=ticks, text=lambda v: percent(v, 0), grid=True)
    y = box.top
    for p in prefills:
        svg.text(0, y + 17, _heading(p, 330 if not narrow else width), "start ink bold", plate=True)
        same = f"same next token at {percent(p['top1_agreement'])}, logits within {_logit(p)}"
        if narrow:
            svg.text(0, y + 33, same, "start", plate=True)
        else:
            svg.text(box.right, y + 17, same, "end", plate=True)
        y += title
        for layer in p["layers"]:
            middle = y + step / 2
            name = f"layer {layer['layer']}"
            svg.text(box.left - 10, middle + 4, name, "end ink")
            tip = f"{p['selector']}, {name}: {percent(layer['density'])} of the causal blocks read"
            svg.rect(box.left, middle - 6, x(layer["density"]) - box.left, 12, "f0 soft", tip=tip)
            # At the start of its bar: at the end the circle and the mark would cover it.
            inside = x(layer["density"]) - box.left > 40
            place = box.left + 6 if inside else x(layer["density"]) + 5
            svg.text(place, middle + 4, percent(layer["density"], 0), "start ink small")
            svg.line(x(layer["coverage_asked"]), middle - 10, x(layer["coverage_asked"]), middle + 10, "line s5")
            asked, reached = layer["coverage_asked"], layer["coverage_achieved"]
            tip = f"{name}: covers {percent(reached)}, {percent(asked)} asked"
            svg.dot(x(layer["coverage_achieved"]), middle, "f1 gap", radius=5, tip=tip)
            svg.text(width, middle + 4, percent(layer["coverage_achieved"]), "end f1")
            y += step
    return svg


def _draw_times(timed: Sequence[tuple[Prefill, Timing, Timing]], width: float) -> Svg:
    narrow = width < NARROW
    step, tall, title = 27.0, 15.0, 26.0
    left, room = 56.0, 76.0
    bottom = (title + 2 * step) * len(timed) + 8
    box = Box(left, 4, width - room, bottom)
    svg = Svg(width, bottom + 42, label=" ".join(_time_finding(*each) for each in timed))
    most = max(t["q75"] for _, *pair in timed for t in pair)
    x = Scale(0, most, box.left, box.right)
    ticks = x.ticks(4 if narrow else 6)
    x_axis(svg, box, x, title="seconds", ticks=ticks, grid=True)
    y = box.top
    for p, dense, sparse in timed:
        svg.text(0, y + 17, _heading(p, width), "start ink bold", plate=True)
        y += title
        for key, timing, colour in (("dense", dense, 5), ("sparse", sparse, 0)):
            middle = y + step / 2
            svg.text(box.left - 10, middle + 4, key, "end ink")
            tip = f"{p['selector']}, {key}: {_timing(timing)}"
            svg.rect(box.left, middle - tall / 2, x(timing["seconds"]) - box.left, tall, f"f{colour} soft", tip=tip)
            svg.line(x(timing["q25"]), middle, x(timing["q75"]), middle, f"line band s{colour}")
            svg.text(
                max(x(timing["q75"]), x(timing["seconds"])) + 8,
                middle + 4,
                seconds(timing["seconds"]),
                "start ink",
            )
            y += step
    return svg


def _draw_plans(plans: Sequence[PlanPicture], width: float) -> Svg:
    gap, head = 22.0, 40.0
    across = min(len(plans), 2 if width < NARROW else 4)
    side = min((width - gap * (across - 1)) / across, 300.0)
    rows = -(-len(plans) // across)
    svg = Svg(width, rows * (side + head + gap) - gap + 2, label=_plan_finding(plans))
    for k, plan in enumerate(plans):
        left, top = (k % across) * (side + gap), (k // across) * (side + head + gap)
        name = f"layer {plan['layer']}, head {plan['head']}: {percent(_density(plan), 0)}"
        svg.text(left, top + 13, fit(plan["selector"], side), "start ink bold")
        svg.text(left, top + 30, name, "start")
        _draw_mask(svg, plan["mask"], left, top + head, side)
    return svg


def _draw_mask(svg: Svg, mask: Sequence[Sequence[int]], left: float, top: float, side: float) -> None:
    rows, columns = len(mask), len(mask[0])
    wide, tall = side / columns, side / rows
    skipped, read = [], []
    for i, row in enumerate(mask):
        y = top + tall * i
        skipped.append(_strip(left, y, wide * min(i + 1 + columns - rows, columns), tall))
        start = None
        for j in range(columns + 1):
            on = j < columns and bool(row[j])
            if on and start is None:
                start = j
            elif not on and start is not None:
                read.append(_strip(left + wide * start, y, wide * (j - start), tall))
                start = None
    svg.path("".join(skipped), "wash crisp")
    svg.path("".join(read), "f0 crisp")


def _strip(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.2f} {y:.2f}h{width:.2f}v{height:.2f}h{-width:.2f}z"


def _heading(prefill: Prefill, room: float) -> str:
    tokens = f", {prefill['tokens']:,} tokens"
    return fit(prefill["selector"], room - text_width(tokens)) + tokens


def _logit(prefill: Prefill) -> str:
    return significant(prefill["max_logit_difference"])


def _span(shares: Sequence[float]) -> str:
    low, high = percent(min(shares), 0), percent(max(shares), 0)
    return low if low == high else f"{low} to {high}"
