"""Write the result tables of the pages of methods: python benchmarks/tables.py

Run it after benchmarks/plots.py: the page shows the figures that lie beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from whimbrel.bench.results import ResultLine, newest, read_lines
from whimbrel.report.numbers import power_count, significant, size

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PREFILL_PAGE = ROOT / "docs" / "methods" / "sparse-prefill.md"
AVERAGING_PAGE = ROOT / "docs" / "methods" / "checkpoint-averaging.md"
OPTIMIZERS_PAGE = ROOT / "docs" / "methods" / "low-rank-optimizers.md"
METHOD = ROOT / "docs" / "methods" / "residual-linear-attention.md"


class Column(NamedTuple):
    """One implementation in a table of kernels."""

    title: str
    case: str
    impl: str


Cells = Mapping[tuple[Column, tuple[int, int]], ResultLine]
"""Lines by column and shape."""

OPERATORS = (
    Column("RDN", "rdn", "triton"),
    Column("one pass, FlashQLA", "rdn", "flash-qla"),
    Column("one pass, fla", "rdn", "fla-gdn"),
    Column("RDN of FlashQLA", "rdn", "two-pass-flash-qla"),
    Column("RDN of fla", "rdn", "two-pass-fla"),
    Column("RLA", "rla", "triton"),
    Column("one pass, fla simple GLA", "rla", "fla-simple-gla"),
    Column("RLA of fla", "rla", "two-pass-fla"),
    Column("RDN, recompute=2", "rdn", "triton-recompute-2"),
    Column("GDN", "delta", "triton"),
    Column("sGLA", "decay", "triton"),
    Column("RDN in PyTorch", "rdn", "chunked"),
    Column("softmax, cuDNN", "rdn", "sdpa-cudnn"),
)
FEW = OPERATORS[:8]
STEPS = (
    *(
        Column(name, case, "triton")
        for name, case in (("RDN", "rdn"), ("RLA", "rla"), ("GDN", "delta"), ("sGLA", "decay"))
    ),
    Column("copy of two states", "rdn", "copy"),
    Column("GDN by fla", "rdn", "fla-gdn"),
    Column("RDN in PyTorch", "rdn", "chunked"),
)
PREFILL = {
    "row_local": "row_local",
    "row_local-16": "row_local, 16 samples",
    "flex_prefill": "flex_prefill",
    "sdpa-cudnn": "dense, cuDNN",
    "sdpa-flash": "dense, flash",
    "flex-attention": "FlexAttention, blocks given",
    "flexprefill-official": "FlexPrefill, its authors' code",
    "xattention": "XAttention's selection",
    "flashprefill-v1": "FlashPrefill V1",
    "flashprefill-v1, equal error": "FlashPrefill V1 at the error of row_local",
}
"""Implementation -> title of a column."""
COVERAGE, THRESHOLD = 0.95, 0.18
"""What the tables of sparse prefill show; the threshold is FlashPrefill's."""
MODELS = ("rdn", "rdn hybrid", "gdn", "gdn, fla", "gdn, flash-qla", "softmax")


def optimizers_page(results: Path = RESULTS) -> str:
    """The Markdown between the two marks of the page of low-rank optimizers."""
    to = "../../benchmarks/results"
    found = [
        *_pretrain(results, links=to),
        *_quality("quality-optimizers", "Optimizers", "optimizer", results, links=to),
    ]
    return "\n".join(found).rstrip("\n")


def optimizer_steps(results: Path = RESULTS) -> str:
    """Steps of every optimizer over the matrices of 1.2 B weights, and their ratio to torch's fused AdamW."""
    lines = [
        x
        for metric in ("time", "time_amortised", "time_max", "state_bytes", "peak_bytes")
        for x in _on_gpu(results, "optim_step", metric)
        if x["params"]["model"] == "1.2b"
    ]
    if not lines:
        return "No GPU has been measured yet."
    found: dict[tuple[int, str], dict[str, dict[str, ResultLine]]] = {}
    for x in lines:
        own = found.setdefault((int(x["params"]["rank"]), str(x["params"]["state"])), {})
        own.setdefault(x["impl"], {})[x["metric"]] = x
    rows = [
        "| rank, state | optimizer | ms a step without a refresh (quartiles) | of AdamW's | with refreshes | longest | "
        "state | peak above weights and gradients, of the state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (rank, state), impls in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        adamw = impls.get("torch-adamw-fused", {}).get("time")
        for impl, own in sorted(impls.items(), key=lambda item: item[1]["time"]["value"]):
            time = own["time"]
            quartiles = f" ({significant(time['q25'])} to {significant(time['q75'])})" if time["n"] > 1 else ""
            held = own["state_bytes"]["value"]
            peak = f"{own['peak_bytes']['value'] / held:.2f}" if "peak_bytes" in own else ""
            ratio = f"{time['value'] / adamw['value']:.2f}" if adamw else ""
            rows.append(
                f"| {rank}, {state} | {impl} | {significant(time['value'])}{quartiles} | {ratio} | "
                f"{significant(own['time_amortised']['value'])} | {significant(own['time_max']['value'])} | "
                f"{size(held)} | {peak} |"
            )
    return "\n".join([f"{lines[0]['device']}, [lines](../../benchmarks/results/optim_step.jsonl):", "", *rows])


def seven_billion(results: Path = RESULTS) -> str:
    """Steps of LLaMA-7B's shapes on one card: time and memory, or that they did not fit."""
    metrics = ("time", "weight_bytes", "state_bytes", "peak_bytes", "reserved_bytes", "out_of_memory")
    lines = [x for m in metrics for x in _on_gpu(results, "one_card", m) if x["params"]["model"] == "7b"]
    if not lines:
        return "No GPU has been measured yet."
    found: dict[tuple[str, str, float], dict[str, float]] = {}
    for x in lines:
        key = x["impl"], str(x["params"]["state"]), float(x["params"]["limit_gib"])
        found.setdefault(key, {})[x["metric"]] = x["value"]
    rows = [
        "| optimizer, its state | allocator held to | ms a step | weights | state | peak of tensors | allocated |",
        "|---|---|---|---|---|---|---|",
    ]
    for (impl, state, limit), own in sorted(found.items(), key=lambda item: item[1].get("peak_bytes", math.inf)):
        name = f"{'AdamW' if impl.startswith('adamw') else impl}, {state}"
        if "out_of_memory" in own:
            rows.append(f"| {name} | {limit:g} GiB | does not fit | | | | |")
            continue
        cells = [size(own[m]) for m in metrics[1:5]]
        rows.append(f"| {name} | {limit:g} GiB | {significant(own['time'])} | {' | '.join(cells)} |")
    return "\n".join([f"{lines[0]['device']}, [lines](../../benchmarks/results/one_card.jsonl):", "", *rows])


def method_tables(results: Path = RESULTS, page: Path = METHOD) -> str:
    """The Markdown between the two marks of the page of residual linear attention."""
    to = "../../benchmarks/results"
    found = [
        *_figures(page.parent),
        *_kernels(results, "fwd_bwd", "Forward and backward", OPERATORS, ("time", "ms"), links=to),
        *_kernels(results, "fwd", "Forward", OPERATORS, ("time", "ms"), links=to),
        *_kernels(results, "fwd_bwd", "Peak memory of forward and backward", OPERATORS, ("peak_bytes", ""), links=to),
        *_kernels(results, "fwd_bwd", "First call", OPERATORS, ("first_call", "s"), links=to),
        *_kernels(results, "step", "One token of each sequence", STEPS, ("time", "ms"), links=to),
        *_roofline(results, links=to),
        *_layer(results, links=to),
        *_models(results, "train_tokens", "Training", links=to),
        *_models(results, "prefill_tokens", "Prefill", links=to),
        *_quality("quality-mixers", "Quality", "blocks", results, links=to),
    ]
    return "\n".join(found or ["No GPU has been measured yet.", ""]).rstrip("\n")


def _figures(folder: Path) -> list[str]:
    shown = (("time", "Time against length"), ("memory", "Memory against length"))
    names = [(f"residual-linear-attention-{kind}.svg", text) for kind, text in shown]
    return [part for name, text in names if (folder / name).exists() for part in (f"![{text}]({name})", "")]


def _on_gpus(results: Path, case: str, metric: str) -> list[ResultLine]:
    """The newest lines of a case's metric on every GPU, without those of other gates."""
    path = results / f"{case}.jsonl"
    lines = [x for x in newest(read_lines(path)) if x["metric"] == metric] if path.exists() else []
    return [x for x in lines if "thread" not in x["device"] and "gates" not in x["params"]]


def _on_gpu(results: Path, case: str, metric: str) -> list[ResultLine]:
    """The same on the GPU that was measured last."""
    return _of_one_card(_on_gpus(results, case, metric))


def _of_one_card(lines: Sequence[ResultLine]) -> list[ResultLine]:
    """Those of the device that was measured last."""
    return [x for x in lines if x["device"] == _by_card(lines)[0]]


def _by_card(lines: Sequence[ResultLine]) -> list[str]:
    """The devices of `lines`, the one measured last first; a table holds lines of one card."""
    return sorted({x["device"] for x in lines}, key=lambda d: max(x["time"] for x in lines if x["device"] == d))[::-1]


def _kernels(
    results: Path, part: str, title: str, columns: Sequence[Column], metric: tuple[str, str], *, links: str
) -> list[str]:
    """A table for each card; an older one is shown for the implementations that newer ones lack."""
    lines = [(c, x) for c in columns for x in _on_gpus(results, f"{c.case}_{part}", metric[0]) if x["impl"] == c.impl]
    found, shown = [], set()
    for device in _by_card([x for _, x in lines]):
        cells = {(c, _sizes(x)): x for c, x in lines if x["device"] == device}
        here = {column for column, _ in cells}
        if any(column.impl == "triton" for column in here) and not here <= shown:
            shown |= here
            found += _kernel_table(cells, part, title, [c for c in columns if c in here], metric, columns is FEW, links)
    return found


def _kernel_table(
    cells: Cells, part: str, title: str, shown: Sequence[Column], metric: tuple[str, str], few: bool, links: str
) -> list[str]:
    """A row for each shape, with `few` for each in which a rival was timed; a column for each implementation."""
    some = next(iter(cells.values()))
    files = ", ".join(f"[{case}]({links}/{case}_{part}.jsonl)" for case in dict.fromkeys(c.case for c in shown))
    unit = f", {metric[1]}" if metric[1] else ""
    rows = [
        f"**{title}**{unit}, H = {some['params']['H']}, D = {some['params']['D']}, bf16 ({some['device']}; {files}):",
        "",
        f"| B, T | {' | '.join(c.title for c in shown)} |",
        f"|---|{'---|' * len(shown)}",
    ]
    text: Callable[[float], str] = significant if metric[1] else size
    runs = {(c.case, shape): line["commit"] for (c, shape), line in cells.items() if c.impl == "triton"}
    apart = False
    for shape in dict.fromkeys(shape for column, shape in cells if not few or column.impl != "triton"):
        values = [text(cells[c, shape]["value"]) if (c, shape) in cells else "" for c in shown]
        for n, c in enumerate(shown):
            if values[n] and metric[1] and cells[c, shape]["commit"] != runs.get((c.case, shape)):
                values[n], apart = f"{values[n]}*", True
        rows.append(f"| {shape[0]}, {power_count(shape[1])} | {' | '.join(values)} |")
    return [*rows, "", *["\\* from another run than what stands beside it, not to be divided by it.", ""][: 2 * apart]]


def _sizes(line: ResultLine) -> tuple[int, int]:
    return int(line["params"]["B"]), int(line["params"]["T"])


def _roofline(results: Path, *, links: str) -> list[str]:
    """Time of all kernels of a call, the limit it has, and the kernels that take most."""
    lines = _on_gpu(results, "roofline", "time")
    if not lines:
        return []
    rate = {line["impl"]: line["value"] for line in _on_gpu(results, "roofline", "rate")}
    rows = [
        f"**Where the time goes**, ms of GPU time a call, H = 16, D = 128, bf16 ({lines[0]['device']}, "
        f"[lines]({links}/roofline.jsonl)). The limit is that of products at {significant(rate['matmul'])} TFLOP/s or "
        f"of inputs and results at {significant(rate['copy'])} TB/s, both measured in the same run:",
        "",
        "| | B, T | pass | all kernels | limit | by kernel |",
        "|---|---|---|---|---|---|",
    ]
    names = {"rdn": "RDN", "rla": "RLA", "delta": "GDN", "decay": "sGLA"}
    for key in dict.fromkeys((x["params"]["op"], *_sizes(x), x["params"]["pass"]) for x in lines):
        op, batch, time, what = key
        own = {x["impl"]: x["value"] for x in lines if (x["params"]["op"], *_sizes(x), x["params"]["pass"]) == key}
        total, bound = own.pop("all kernels"), own.pop("limit")
        parts = ", ".join(f"`{name}` {significant(value)}" for name, value in own.items() if value > 0.02 * total)
        head = f"| {names[str(op)]} | {batch}, {power_count(int(time))} | {str(what).replace('+', ' and ')}"
        rows.append(f"{head} | {significant(total)} | {significant(bound)} | {parts} |")
    return [*rows, ""]


def _layer(results: Path, *, links: str) -> list[str]:
    """An RDN layer with the kernels around its recurrence and without."""
    parts = [("forward", "rdn_layer_fwd", 1.0, "time"), ("forward and backward", "rdn_layer_fwd_bwd", 1.0, "time")]
    parts.append(("peak of both, GiB", "rdn_layer_fwd_bwd", 2.0**-30, "peak_bytes"))
    lines = {title: _on_gpu(results, case, metric) for title, case, _, metric in parts}
    cells = {
        (title, impl, line["params"]["width"], *_sizes(line)): factor * line["value"]
        for title, _, factor, _ in parts
        for line in lines[title]
        for impl in [line["impl"]]
    }
    if not cells:
        return []
    heads = [f"{title}, {impl}" for title, *_ in parts for impl in ("kernels", "torch")]
    rows = [
        "**An RDN layer**, ms, with the kernels around its recurrence and with PyTorch in their place, "
        f"weights in fp32, bf16 autocast ({lines['forward'][0]['device']}, [lines]({links}/rdn_layer_fwd_bwd.jsonl)):",
        "",
        f"| width, B, T | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for width, batch, time in dict.fromkeys(key[2:] for key in cells):
        values = [cells.get((title, i, width, batch, time)) for title, *_ in parts for i in ("kernels", "torch")]
        shown = " | ".join("" if value is None else significant(value) for value in values)
        rows.append(f"| {width}, {batch}, {power_count(time)} | {shown} |")
    return [*rows, ""]


def _models(results: Path, case: str, title: str, *, links: str) -> list[str]:
    """Tokens a second of whole models; below it the length from which RDN is faster than softmax."""
    lines = _on_gpu(results, case, "throughput")
    if not lines:
        return []
    cells = {(x["impl"], *_setting(x)): x["value"] for x in lines}
    shown = [model for model in MODELS if any(impl == model for impl, *_ in cells)]
    rows = [
        f"**{title}**, tokens a second, {lines[0]['params']['recipe']} ({lines[0]['device']}, "
        f"[lines]({links}/{case}.jsonl)):",
        "",
        f"| B, T | softmax layers | recomputed | {' | '.join(shown)} |",
        f"|---|---|---|{'---|' * len(shown)}",
    ]
    for setting in dict.fromkeys(_setting(x) for x in lines):
        batch, time, every, recompute = setting
        values = [f"{cells[m, *setting]:,.0f}" if (m, *setting) in cells else "" for m in shown]
        where = f"one in {every}" if every else "none"
        rows.append(
            f"| {batch}, {power_count(time)} | {where} | {'yes' if recompute else 'no'} | {' | '.join(values)} |"
        )
    ratios = {s[1]: cells["rdn", *s] / value for (impl, *s), value in cells.items() if impl == "softmax"}
    return [*rows, "", *crossover(sorted(ratios.items()))]


def _setting(line: ResultLine) -> tuple[int, int, int, bool]:
    params = line["params"]
    return (*_sizes(line), int(params["softmax_every"]), bool(params["recompute"]))


def crossover(ratios: Sequence[tuple[int, float]]) -> list[str]:
    """Where RDN's throughput over softmax's passes 1, between two lengths along a line in logarithms."""
    if len(ratios) < 2:
        return []
    said = ", ".join(f"{significant(ratio)} at {power_count(time)}" for time, ratio in ratios)
    verdict = "RDN is the faster one throughout" if ratios[0][1] >= 1 else "softmax is the faster one throughout"
    for (a, low), (b, high) in pairwise(ratios):
        if low < 1 <= high:
            at = a * (b / a) ** (math.log(1 / low) / math.log(high / low))
            verdict = f"RDN is the faster one from about {round(at, -2):,.0f} tokens"
    return [f"RDN : softmax is {said}; {verdict}.", ""]


def _quality(case: str, title: str, first: str, results: Path, *, links: str) -> list[str]:
    path = results / f"{case}.jsonl"
    lines = read_lines(path) if path.exists() else []
    if not lines:
        return []
    losses = [line for line in lines if line["metric"] == "validation loss"]
    names = list(dict.fromkeys(line["impl"] for line in losses))
    about = losses[0]
    rows = [
        f"**{title}**, the demo's model, {about['params']['tokens']:,} tokens each, {about['params']['setting']} "
        f"({about['device']}, [lines]({links}/{case}.jsonl)):",
        "",
        f"| {first} | bits per byte, mean (lowest to highest) | MQAR accuracy, by seed | rate | optimizer state |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        own = [line for line in losses if line["impl"] == name]
        recall = [line["value"] for line in lines if line["impl"] == name and line["metric"] == "MQAR accuracy"]
        values = [line["value"] for line in own]
        state = own[0]["params"]["state_bytes"]
        rows.append(
            f"| {name} | {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}) | "
            f"{', '.join(f'{value:.0%}' for value in recall)} | {own[0]['params']['lr']:g} | {state / 2**20:.1f} MiB |"
        )
    return [*rows, ""]


class Winner(NamedTuple):
    """The longest runs of one optimizer in `pretrain` at its best rate, and the rates that rate was chosen from."""

    lines: list[ResultLine]
    rate: float
    tried: list[float]

    def values(self, metric: str) -> list[float]:
        """By seed."""
        return [line["value"] for line in self.lines if line["metric"] == metric]


def winners(lines: Sequence[ResultLine]) -> dict[str, Winner]:
    """Of each optimizer, best first: the rate with the lowest loss on the first seed of the longest runs.

    Where only one rate was run that long, the others are those of its shorter runs.
    """
    most = max(int(line["params"]["tokens"]) for line in lines)
    found = {}
    for name in dict.fromkeys(line["impl"] for line in lines):
        own = [line for line in lines if line["impl"] == name]
        longest = [line for line in own if int(line["params"]["tokens"]) == most]
        losses = [line for line in longest if line["metric"] == "loss"]
        if not losses:
            continue
        seed = min(int(line["params"]["seed"]) for line in losses)
        first = {float(x["params"]["lr"]): x["value"] for x in losses if int(x["params"]["seed"]) == seed}
        rate = min(first, key=first.__getitem__)
        tried = sorted(first if len(first) > 1 else {float(line["params"]["lr"]) for line in own})
        found[name] = Winner([line for line in longest if float(line["params"]["lr"]) == rate], rate, tried)
    return dict(sorted(found.items(), key=lambda item: statistics.mean(item[1].values("loss"))))


def _pretrain(results: Path, *, links: str) -> list[str]:
    """The longest runs of each optimizer, best first, with the rates that were tried."""
    path = results / "pretrain.jsonl"
    lines = newest(read_lines(path)) if path.exists() else []
    if not lines:
        return []
    best, about = winners(lines), lines[-1]
    most = max(int(line["params"]["tokens"]) for line in lines)
    rows = [
        f"**Optimizers at LLaMA-60M**, recipe {about['params']['recipe']} on documentation prose (not C4), {most:,} "
        f"tokens in batches of {about['params']['batch_tokens']:,}; means over seeds, their lowest and highest in "
        f"brackets; the rate is chosen on the first seed, and one at an end of those tried need not be the best "
        f"({about['device']}, [lines]({links}/pretrain.jsonl)):",
        "",
        "| optimizer | seeds | nats a token | perplexity | divided as published | rate, of those tried | state |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in best.items():
        losses = found.values("loss")
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        ends = {found.tried[0]: ", the lowest,", found.tried[-1]: ", the highest,"} if len(found.tried) > 1 else {}
        others = f"{ends.get(found.rate, '')} of {', '.join(f'{rate:g}' for rate in found.tried)}" if ends else ""
        rows.append(
            f"| {name} | {len(losses)} | {statistics.mean(losses):.3f}{spread} | "
            f"{statistics.mean(found.values('perplexity')):.1f} | "
            f"{statistics.mean(found.values('perplexity_as_published')):.1f} | {found.rate:g}{others} | "
            f"{int(found.lines[0]['params']['state_bytes']) / 2**20:.0f} MiB |"
        )
    return [*rows, ""]


def _averaging(results: Path, *, links: str) -> list[str]:
    path = results / "quality-averaging.jsonl"
    lines = read_lines(path) if path.exists() else []
    if not lines:
        return []
    about = lines[0]["params"]
    rows = [
        f"**Averaging**, `make demo`: {about['checkpoints']} checkpoints {about['every_steps']} steps apart of a "
        f"constant-rate run against its last one, and against a branch annealed over {about['anneal_steps']} steps, at "
        f"equal tokens ({lines[0]['device']}, [lines]({links}/quality-averaging.jsonl)):",
        "",
        "| | bits per byte | loss minus the last checkpoint's, nats a token (95 % interval) |",
        "|---|---|---|",
    ]
    return [*rows, *map(_averaging_row, lines), ""]


def _averaging_row(line: Any) -> str:
    params = line["params"]
    if line["impl"] == "last checkpoint":
        return f"| last checkpoint | {line['value']:.3f} | |"
    low, high = params["difference_low"], params["difference_high"]
    return f"| {line['impl']} | {line['value']:.3f} | {params['difference_nats']:+.3f} ({low:+.3f} to {high:+.3f}) |"


def prefill(results: Path, *, links: str) -> list[str]:
    """Times of sparse prefill by length, and what was kept; nothing where no GPU has been measured."""
    path = results / "prefill.jsonl"
    lines = [x for x in newest(read_lines(path)) if "thread" not in x["device"]] if path.exists() else []
    lines = [
        x
        for x in _of_one_card(lines)
        if x["params"]["input"] == "mixed"
        and x["params"].get("coverage", COVERAGE) == COVERAGE
        and x["params"].get("threshold", THRESHOLD) == THRESHOLD
    ]
    found = {(x["impl"], int(x["params"]["N"]), x["metric"]): x["value"] for x in lines}
    if not any(impl == "row_local" for impl, _, _ in found):
        return []
    lengths = sorted({length for _, length, metric in found if metric == "time"})
    about = lines[0]["params"]
    source = f"{lines[0]['device']}; [lines]({links}/prefill.jsonl)"
    heads = f"{about['H']} heads on {about['G']} key heads of {about['D']}, bf16"
    timed = [impl for impl in PREFILL if any((impl, length, "time") in found for length in lengths)]
    rows = [
        f"**Sparse prefill**, ms, selection included, {heads}, coverage {COVERAGE}, input `mixed` ({source}):",
        "",
        f"| tokens | {' | '.join(PREFILL[impl] for impl in timed)} |",
        f"|---|{'---|' * len(timed)}",
    ]
    for length in lengths:
        cells = [found.get((impl, length, "time")) for impl in timed]
        texts = ["" if cell is None else significant(cell) for cell in cells]
        rows.append(f"| {power_count(length)} | {' | '.join(texts)} |")
    kept = [impl for impl in PREFILL if any((impl, length, "output_error") in found for length in lengths)]
    rows += [
        "",
        "Causal pairs read, attention kept by the 5th percentile of queries, and RMS error of the output:",
        "",
        f"| tokens | {' | '.join(PREFILL[impl] for impl in kept)} |",
        f"|---|{'---|' * len(kept)}",
    ]
    for length in lengths:
        texts = []
        for impl in kept:
            density, recall, error = (found.get((impl, length, x)) for x in ("density", "recall_p5", "output_error"))
            shown = [] if density is None or recall is None else [f"{density:.0%}", f"{recall:.1%}"]
            texts.append(", ".join([*shown, *([] if error is None else [f"{error:.3f}"])]))
        if any(texts):
            rows.append(f"| {power_count(length)} | {' | '.join(texts)} |")
    return [*rows, "", *_selection(path, links=links)]


def _selection(path: Path, *, links: str) -> list[str]:
    """What selection takes, on heads of mixed sharpness and on those whose attention fades with distance."""
    lines = _of_one_card([x for x in newest(read_lines(path)) if "thread" not in x["device"]])
    found = {
        (str(x["params"]["input"]), int(x["params"]["N"]), x["impl"], x["metric"]): x["value"]
        for x in lines
        if x["params"].get("coverage", COVERAGE) == COVERAGE
    }
    shown = {"row_local": "time", "row_local ": "time_select", "sdpa-cudnn": "time", "flex-attention": "time"}
    rows = []
    for kind in ("mixed", "fading, 10 %", "fading, 5 %"):
        for length in sorted({n for name, n, impl, _ in found if (name, impl) == (kind, "row_local")}):
            cells = [found.get((kind, length, impl.strip(), metric)) for impl, metric in shown.items()]
            if cells[1] is not None:
                texts = ["" if cell is None else significant(cell) for cell in cells]
                rows.append(f"| {kind}, {power_count(length)} | {' | '.join(texts)} |")
    if not rows:
        return []
    return [
        f"**What choosing takes**, ms, coverage {COVERAGE}; `fading` names the share of pairs that holds it"
        f" ([lines]({links}/prefill.jsonl)):",
        "",
        "| input, tokens | row_local | of it, selection | dense, cuDNN | FlexAttention, blocks given |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def given_blocks(results: Path, *, links: str) -> list[str]:
    """Times of attention over blocks that are given, by length and density."""
    lines = _on_gpu(results, "attend", "time")
    impls = {"triton": "here", "flex-attention": "FlexAttention"}
    impls |= {"sdpa-cudnn": "dense, cuDNN", "sdpa-flash": "dense, flash"}
    found = {(x["impl"], int(x["params"]["T"]), float(x["params"]["density"])): x["value"] for x in lines}
    if not found:
        return []
    rows = [
        f"**Attention over given blocks**, ms, and TFLOP/s on the pairs in them ({lines[0]['device']}; "
        f"[lines]({links}/attend.jsonl)):",
        "",
        f"| tokens, density | {' | '.join(impls.values())} | rate here |",
        f"|---|{'---|' * (len(impls) + 1)}",
    ]
    for length, density in sorted({(length, density) for _, length, density in found}):
        cells = [found.get((impl, length, density)) for impl in impls]
        texts = ["" if cell is None else significant(cell) for cell in cells]
        rate = "" if cells[0] is None else f"{4 * 128 * 32 * density * length * (length + 1) / 2 / cells[0] / 1e9:.0f}"
        rows.append(f"| {power_count(length)}, {density:.0%} | {' | '.join(texts)} | {rate} |")
    return [*rows, ""]


SMOLLM2 = {
    "dense": "dense",
    "row_local": "`row_local`, 0.95",
    "row_local-0.8": "`row_local`, 0.8",
    "flex_prefill": "`flex_prefill`, corrected, 0.95",
    "flex_prefill-official": "the authors' selection, 0.95",
    "window": "`window`, 1024 + 128 tokens",
}
"""Method -> title of a row."""


def smollm2(results: Path, *, links: str) -> list[str]:
    """What selectors do to a real model: perplexity by length, needles found by task, their mean and worst.

    Of each task and length the lines of one device, those of the most prompts, so that methods saw the same ones.
    """
    path = results / "smollm2.jsonl"
    groups: dict[tuple[str, int, int], dict[tuple[str, int], list[ResultLine]]] = {}
    for x in newest(read_lines(path)) if path.exists() else []:
        given = x["params"]
        task = (str(given["task"]), int(given.get("keys", 8 if given["task"] == "needle-multi-key" else 1)))
        runs = groups.setdefault((*task, int(given["N"])), {})
        runs.setdefault((x["device"], int(given["samples"])), []).append(x)
    chosen = {}
    for (task, keys, length), runs in groups.items():
        if task == "needle-multi-key" and keys == 8:
            continue
        # The most methods first: one that was tried alone says nothing.
        (device, samples), lines = max(runs.items(), key=lambda run: (len({x["impl"] for x in run[1]}), run[0][1]))
        found = {(x["impl"], x["metric"]): x["value"] for x in lines}
        if ("dense", "perplexity") in found or ("dense", "accuracy") in found:
            chosen[task, keys, length] = found, samples, device
    if not chosen:
        return []
    texts = [key for key in sorted(chosen, key=lambda key: key[2]) if key[0] == "perplexity"]
    needles = [key for key in sorted(chosen, key=lambda key: (key[1], key[2])) if key[0] != "perplexity"]
    rows: list[str] = []
    if texts:
        devices = ", ".join(dict.fromkeys(chosen[key][2] for key in texts))
        counts = [(key[2], chosen[key][1]) for key in texts]
        heads = [f"{power_count(length)} tokens, {n} prompt{'s' if n > 1 else ''}" for length, n in counts]
        rows += [
            "**Perplexity** of this repository's pages, share of positions whose most probable token is the dense "
            f"model's, and density ({devices}; [lines]({links}/smollm2.jsonl)):",
            "",
            f"| | {' | '.join(heads)} |",
            f"|---|{'---|' * len(heads)}",
        ]
        for method, title in SMOLLM2.items():
            cells = []
            for key in texts:
                value, same, density = (chosen[key][0].get((method, m)) for m in ("perplexity", "agreement", "density"))
                shown = [] if value is None else [f"{value:.2f}"]
                shown += [] if same is None or method == "dense" else [f"{same:.1%}"]
                cells.append(", ".join([*shown, *([] if density is None else [f"{density:.0%}"])]))
            rows += [f"| {title} | {' | '.join(cells)} |"] if any(cells) else []
        rows.append("")
    if needles:
        devices = ", ".join(dict.fromkeys(chosen[key][2] for key in needles))
        heads = [f"{'one' if key[1] == 1 else f'one of {key[1]}'}, {power_count(key[2])}" for key in needles]
        rows += [
            f"**Needles** found ({devices}; same lines). Mean and worst are over the columns in which a method has a "
            "figure, less what the dense model finds there:",
            "",
            f"| | {' | '.join(heads)} | mean | worst |",
            f"|---|{'---|' * (len(heads) + 2)}",
        ]
        for method, title in SMOLLM2.items():
            cells, falls = [], []
            for key in needles:
                found, samples, _ = chosen[key]
                value = found.get((method, "accuracy"))
                cells.append("" if value is None else f"{round(value * samples)} of {samples}")
                falls += [] if value is None else [value - found["dense", "accuracy"]]
            if falls:
                ends = [f"{statistics.mean(falls):+.0%}", f"{min(falls):+.0%}"] if method != "dense" else ["", ""]
                rows.append(f"| {title} | {' | '.join([*cells, *ends])} |")
        rows.append("")
    return rows


def smollm2_part(results: Path = RESULTS) -> str:
    """The Markdown between the marks of the real model on the page of sparse prefill."""
    return "\n".join(smollm2(results, links="../../benchmarks/results")).rstrip("\n")


def prefill_page(results: Path = RESULTS, page: Path = PREFILL_PAGE) -> str:
    """The Markdown between the two marks of the page of sparse prefill."""
    shown = (("time", "Time against length"), ("recall", "Attention kept against pairs read"))
    names = [(f"sparse-prefill-{kind}.svg", text) for kind, text in shown]
    figures = [part for name, text in names if (page.parent / name).exists() for part in (f"![{text}]({name})", "")]
    to = "../../benchmarks/results"
    found = [*figures, *prefill(results, links=to), *given_blocks(results, links=to)]
    return "\n".join(found or ["No GPU has been measured yet.", ""]).rstrip("\n")


def averaging_page(results: Path = RESULTS, page: Path = AVERAGING_PAGE) -> str:
    """The Markdown between the two marks of the page of checkpoint averaging."""
    to = "../../benchmarks/results"
    parts = (
        *_shown(page, "checkpoint-averaging-windows.svg", "Gain of an average against the length of its window"),
        *_replica(results, links=to),
        *_averaging(results, links=to),
        *_shown(page, "checkpoint-averaging-collapse.svg", "Training loss of a run that collapses, by what is done"),
        *_collapses(results, links=to),
        *_online(results, links=to),
        *_merge_speed(results, links=to),
        *_memory(results, links=to),
    )
    return "\n".join(parts).rstrip("\n")


def _shown(page: Path, figure: str, text: str) -> list[str]:
    """The figure, where it lies beside the page."""
    return [f"![{text}]({figure})", ""] if (page.parent / figure).exists() else []


def quality_lines(results: Path, metric: str) -> list[ResultLine]:
    """The newest lines of merge_quality on a GPU."""
    path = results / "merge_quality.jsonl"
    lines = newest(read_lines(path)) if path.exists() else []
    return _of_one_card([x for x in lines if x["metric"] == metric and "thread" not in x["device"]])


def replica_lines(results: Path) -> list[ResultLine]:
    """The newest losses of the study of averages on a GPU."""
    return [x for x in quality_lines(results, "loss") if not _may_collapse(x)]


def _may_collapse(line: ResultLine) -> bool:
    """Whether a line of merge_quality is of the study of collapses."""
    method = str(line["params"]["method"])
    return method.startswith("collapse-") or method == "undisturbed"


WAYS = {
    "undisturbed": "the same run without the burst",
    "collapse-none": "never going back",
    "collapse-skip": "leaving abnormal updates out",
    "collapse-average": "average of 3 checkpoints, moments averaged",
    "collapse-newest": "average of 3 checkpoints, moments of the newest",
    "collapse-reset": "average of 3 checkpoints, no moments, rate warmed up again",
    "collapse-half-rate": "average of 3 checkpoints, moments averaged, rate halved at each restart",
}
"""Methods of the study of collapses, and what they did."""


def collapse_lines(results: Path, metric: str) -> dict[tuple[float, float, int], list[ResultLine]]:
    """(rate, factor of the burst or 0, tokens of the run) -> newest lines of runs that collapsed, on a GPU."""
    groups: dict[tuple[float, float, int], list[ResultLine]] = {}
    for x in quality_lines(results, metric):
        if not _may_collapse(x):
            continue
        given = x["params"]
        place = int(given["tokens"]) if metric == "loss" else 0
        groups.setdefault((float(given["rate"]), float(given.get("burst_factor", 0)), place), []).append(x)
    return {key: own for key, own in groups.items() if len({x["params"]["method"] for x in own}) > 1}


def _collapses(results: Path, *, links: str) -> list[str]:
    """Where a run ended that collapsed, by what was done about it; nothing without lines of a GPU."""
    rows: list[str] = []
    for (rate, factor, tokens), lines in collapse_lines(results, "loss").items():
        given = lines[0]["params"]
        cause = f"{given.get('burst_steps')} steps at {factor:g} times the rate" if factor else "the rate alone"
        seeds = sorted({int(x["params"]["seed"]) for x in lines})
        rows += [
            f"**A collapse by {cause}**, {given['recipe']}, rate {rate:g}, {tokens / 1e6:.1f} M tokens, seeds "
            f"{', '.join(map(str, seeds))} ({lines[0]['device']}, [lines]({links}/merge_quality.jsonl)):",
            "",
            "| | held-out loss at the end, by seed | restarts |",
            "|---|---|---|",
        ]
        for method, text in WAYS.items():
            own = {int(x["params"]["seed"]): x for x in lines if x["params"]["method"] == method}
            if own:
                losses = (f"{own[seed]['value']:.3f}" if seed in own else "ended early" for seed in seeds)
                restarts = (str(own[seed]["params"].get("restarts", "")) if seed in own else "" for seed in seeds)
                rows.append(f"| {text} | {', '.join(losses)} | {', '.join(restarts)} |")
        rows.append("")
    return rows


def _replica(results: Path, *, links: str) -> list[str]:
    """Losses at each place of the run: the last checkpoint, averages, branches; nothing without lines of a GPU."""
    lines = replica_lines(results)
    groups: dict[tuple[int, str, int, int], list[ResultLine]] = {}
    for x in lines:
        given = x["params"]
        key = (
            int(given["tokens"]),
            str(given["method"]),
            int(given.get("interval_tokens", 0)),
            int(given.get("count", 0)),
        )
        groups.setdefault(key, []).append(x)
    rows: list[str] = []
    for tokens in sorted({key[0] for key in groups}, reverse=True):
        own = {key[1:]: found for key, found in groups.items() if key[0] == tokens}
        if len(own) < 2:
            continue  # a place at which nothing but the checkpoint was judged
        seeds = sorted({int(x["params"]["seed"]) for found in own.values() for x in found})
        rows += [
            f"**After {tokens / 1e6:.1f} M tokens**, {lines[0]['params']['recipe']}, {len(seeds)} seeds "
            f"({lines[0]['device']}, [lines]({links}/merge_quality.jsonl)):",
            "",
            "| | window: count x interval | loss, nats a token | difference: mean (lowest to highest seed) |",
            "|---|---|---|---|",
            *(_replica_row(key, own[key]) for key in sorted(own, key=_replica_order)),
            "",
        ]
    return rows


def _replica_order(key: tuple[str, int, int]) -> tuple[int, str, int, int]:
    method, interval, count = key
    first = {"last": 0, "annealed": 1, "sma": 2, "wma": 3, "ema": 4, "minus-sqrt": 5}
    return first.get(method, 6), method, interval, count


def _replica_row(key: tuple[str, int, int], lines: Sequence[ResultLine]) -> str:
    method, interval, count = key
    window = f"{count} x {interval / 1e6:.2f} M" if interval else f"{count}" if count else ""
    differences = [float(x["params"]["difference"]) for x in lines if "difference" in x["params"]]
    text = ""
    if differences:
        text = f"{statistics.mean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f})"
    return f"| {method} | {window} | {statistics.mean(x['value'] for x in lines):.3f} | {text} |"


def _online(results: Path, *, links: str) -> list[str]:
    """What an average kept during training costs; nothing where no GPU was measured."""
    path = results / "online_average.jsonl"
    lines = [x for x in newest(read_lines(path)) if "thread" not in x["device"]] if path.exists() else []
    groups: dict[str, list[ResultLine]] = {}
    for x in _of_one_card(lines):
        groups.setdefault(repr((x["impl"], x["params"])), []).append(x)
    rows = []
    for own in groups.values():
        given, found = own[0]["params"], {x["metric"]: x for x in own}
        if "overhead" not in found:
            continue
        cost, step = found["overhead"], found["step"]["value"]
        spread = f"{cost['value']:+.2%} ({cost['q25']:+.2%} to {cost['q75']:+.2%})"
        where = "main memory" if own[0]["impl"] == "cpu" else "the GPU"
        shape = f"{given['recipe']}, B {given['B']}, T {given['T']}"
        cells = (shape, where, f"{given['every']}", f"{step:.3f} s", spread, size(found["gpu_bytes"]["value"]))
        rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return []
    return [
        f"**Cost during training** ({_of_one_card(lines)[0]['device']}, [lines]({links}/online_average.jsonl)):",
        "",
        "| | sums in | steps between samples | a step | time of a step (quartiles) | GPU memory |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _merge_speed(results: Path, *, links: str) -> list[str]:
    """The rate of a merge beside mergekit's and a plain read, each processor's newest run."""
    lines = [x for x in newest(read_lines(results / "merge.jsonl")) if x["metric"] in ("rate", "processor")]
    groups: dict[tuple[str, str], dict[tuple[str, str], ResultLine]] = {}
    for x in lines:
        key = (x["device"], str(x["params"].get("storage", "disk")))
        groups.setdefault(key, {})[x["impl"], x["metric"]] = x
    rows = []
    for (device, storage), found in groups.items():
        own, other, read = (found.get((impl, "rate")) for impl in ("whimbrel", "mergekit", "read"))
        if own is None or other is None or read is None:
            continue
        spent = [found.get((impl, "processor")) for impl in ("whimbrel", "mergekit")]
        seconds = " / ".join(f"{x['value']:.1f}" for x in spent if x is not None)
        rates = (f"{x['value']:.2f}" for x in (own, other, read))
        times = f"{own['value'] / other['value']:.1f}", f"{own['value'] / read['value']:.2f}"
        place = "cold files on the disk" if storage == "disk" else "files in memory"
        rows.append(f"| {place}, {device} | {' | '.join((*rates, *times, seconds))} |")
    if not rows:
        return []
    return [
        f"**Speed of a merge** of 10 checkpoints of 1 GiB in bfloat16, GB/s of input ([lines]({links}/merge.jsonl)):",
        "",
        "| | whimbrel | mergekit | plain read | times mergekit | times the read | processor seconds, ours / theirs |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _memory(results: Path, *, links: str) -> list[str]:
    """Peak memory of merges by number and size of checkpoints; nothing where it has not been measured."""
    lines = [x for x in newest(read_lines(results / "merge.jsonl")) if x["params"].get("study") == "memory"]
    if not lines:
        return []
    found = {(int(x["params"]["MiB"]), int(x["params"]["sources"])): x["value"] for x in lines}
    counts = sorted({count for _, count in found})
    rows = [
        f"**Peak memory of a merge** ({lines[0]['device']}, [lines]({links}/merge.jsonl)):",
        "",
        f"| a checkpoint | {' | '.join(f'{count} checkpoints' for count in counts)} |",
        f"|---|{'---|' * len(counts)}",
    ]
    for mebibytes in sorted({mebibytes for mebibytes, _ in found}):
        cells = [size(found[mebibytes, count]) if (mebibytes, count) in found else "" for count in counts]
        rows.append(f"| {size(mebibytes * 2**20)} | {' | '.join(cells)} |")
    return [*rows, ""]


def insert(page: str, text: str, name: str = "results") -> str:
    """`page` with what stands between the marks of that name replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = page.split(begin)
    return before + begin + text + "\n" + end + rest.split(end)[1]


def main(arguments: Sequence[str] = ()) -> None:
    for page, text in (
        (METHOD, method_tables()),
        (OPTIMIZERS_PAGE, optimizers_page()),
        (PREFILL_PAGE, prefill_page()),
        (AVERAGING_PAGE, averaging_page()),
    ):
        page.write_text(insert(page.read_text(encoding="utf-8"), text), encoding="utf-8")
    for name, text in (("steps", optimizer_steps()), ("card", seven_billion())):
        OPTIMIZERS_PAGE.write_text(insert(OPTIMIZERS_PAGE.read_text(encoding="utf-8"), text, name), encoding="utf-8")
    text = insert(PREFILL_PAGE.read_text(encoding="utf-8"), smollm2_part(), "smollm2")
    PREFILL_PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
