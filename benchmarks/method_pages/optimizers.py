"""The page of low-rank optimizers: steps, one card, losses at equal tokens."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from method_pages.lines import LINKS, METHODS, RESULTS, of_case, on_gpu
from method_pages.markdown import header, row
from method_pages.quality import demo_models
from whimbrel.bench.results import ResultLine
from whimbrel.report.numbers import significant, size

PAGE = METHODS / "low-rank-optimizers.md"


def parts(results: Path = RESULTS) -> dict[str, str]:
    """What stands between the page's marks, by their names."""
    return {
        "results": optimizers_page(results),
        "steps": optimizer_steps(results),
        "kernels": kernel_times(results),
        "fits": fits(results),
        "card": seven_billion(results),
        "gpus": two_gpus(results),
    }


def optimizers_page(results: Path = RESULTS) -> str:
    """The Markdown between the two marks of the page of low-rank optimizers."""
    found = [
        *_pretrain(results, links=LINKS),
        *demo_models("quality-optimizers", "Optimizers", "optimizer", results, links=LINKS),
    ]
    return "\n".join(found).rstrip("\n")


def optimizer_steps(results: Path = RESULTS) -> str:
    """Steps of every optimizer over the matrices of 1.2 B weights, and their ratio to torch's fused AdamW."""
    lines = [
        x
        for metric in ("time", "time_amortised", "time_max", "state_bytes", "peak_bytes")
        for x in on_gpu(results, "optim_step", metric)
        if x["params"]["model"] == "1.2b"
    ]
    if not lines:
        return "No GPU has been measured yet."
    found: dict[tuple[int, str], dict[str, dict[str, ResultLine]]] = {}
    for x in lines:
        own = found.setdefault((int(x["params"]["rank"]), str(x["params"]["state"])), {})
        own.setdefault(x["impl"], {})[x["metric"]] = x
    rows = [
        *header(
            "rank, state",
            "optimizer",
            "ms a step without a refresh (quartiles)",
            "of AdamW's",
            "with refreshes",
            "longest",
            "state",
            "peak above weights and gradients, of the state",
        )
    ]
    for (rank, state), impls in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        adamw = impls.get("torch-adamw-fused", {}).get("time")
        for impl, own in sorted(impls.items(), key=lambda item: item[1]["time"]["value"]):
            time = own["time"]
            quartiles = f" ({significant(time['q25'])} to {significant(time['q75'])})" if time["n"] > 1 else ""
            held = own["state_bytes"]["value"]
            peak = f"{own['peak_bytes']['value'] / held:.2f}" if "peak_bytes" in own else ""
            ratio = f"{time['value'] / adamw['value']:.2f}" if adamw else ""
            refreshed = [significant(own[metric]["value"]) for metric in ("time_amortised", "time_max")]
            step = f"{significant(time['value'])}{quartiles}"
            rows.append(row([f"{rank}, {state}", impl, step, ratio, *refreshed, size(held), peak]))
    return "\n".join([f"{lines[0]['device']}, [lines]({LINKS}/optim_step.jsonl):", "", *rows])


KERNELS = ("project", "project_unaligned", "settle", "adam", "coefficients", "blend", "unpack", "write")
"""Of a step, in their order."""


def kernel_times(results: Path = RESULTS) -> str:
    """What Fira's kernels take in a step without a refresh."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for kernel in KERNELS:
        for x in on_gpu(results, "optim_step", f"gpu_{kernel}"):
            if x["impl"] == "fira" and x["params"]["model"] == "1.2b":
                found.setdefault((int(x["params"]["rank"]), str(x["params"]["state"])), {})[kernel] = x["value"]
    if not found:
        return "No GPU has been measured yet."
    rows = header("rank, state", *(f"`{kernel}`" for kernel in KERNELS), "all")
    for (rank, state), own in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        times = [significant(own[kernel]) if kernel in own else "" for kernel in KERNELS]
        rows.append(row([f"{rank}, {state}", *times, significant(sum(own.values()))]))
    return "\n".join(rows)


def two_gpus(results: Path = RESULTS) -> str:
    """The step under FSDP2 on two GPUs beside torch's fused AdamW, and losses against one."""
    lines = on_gpu(results, "optim_sharded")
    found = {(x["impl"], x["params"].get("side"), x["metric"]): x["value"] for x in lines}
    sides = [side for side in ("right", "std") if ("fira", side, "time") in found]
    if not sides:
        return "Two GPUs have not been measured yet."
    adamw = {metric: value for (impl, side, metric), value in found.items() if impl == "torch-adamw-fused" and not side}

    def cells(metric: str, form: Callable[[float], str], impl: str = "fira") -> list[str]:
        values = (found.get((impl, side, metric)) for side in sides)
        return ["" if value is None else form(value) for value in values]

    def yes(value: float) -> str:
        return "yes" if value else "no"

    def short(value: float) -> str:
        return f"{value:.2g}"

    rows = header("", *(f'Fira, `side="{side}"`' for side in sides), "torch's fused AdamW")
    rows += [
        row(["ms a step", *cells("time", significant), significant(adamw["time"])]),
        row(["over AdamW's, medians", *cells("overhead", "{:.1%}".format), ""]),
        row(["over AdamW's, means, with every refresh", *cells("overhead_of_means", "{:.1%}".format), ""]),
        row(["state of one process", *cells("state_bytes", size), size(adamw["state_bytes"])]),
        row(["losses of 12 steps against one card, largest relative difference", *cells("loss_difference", short), ""]),
        row(
            [
                "the same of one card that takes the batch in two pieces",
                *cells("loss_difference", short, "one-in-pieces"),
                "",
            ]
        ),
        row(["the same run again, bit for bit", *cells("repeated_bitwise", yes), ""]),
        row(["saved, loaded and gone on with, bit for bit", *cells("resumed_bitwise", yes), ""]),
    ]
    return "\n".join([f"{lines[-1]['device']}, [lines]({LINKS}/optim_sharded.jsonl):", "", *rows])


def fits(results: Path = RESULTS) -> str:
    """What bases keep of the energy that an SVD keeps, on gradients of a small model in training."""
    lines = of_case(results, "refresh_quality")
    if not lines:
        return "Not measured yet."
    last = max(lines, key=lambda x: x["time"])["params"]
    found = {(x["impl"], x["metric"]): x for x in lines if x["params"] == last}
    rows = header("basis", "energy, of an SVD's: median over matrices and fits", "lowest")
    for impl, metric in found:
        if metric == "energy":
            values = (found[impl, metric]["value"], found[impl, "energy_min"]["value"])
            rows.append(row([impl, *(f"{value:.4f}" for value in values)]))
    return "\n".join(rows)


def seven_billion(results: Path = RESULTS) -> str:
    """Steps of LLaMA-7B's shapes on one card: time and memory, or that they did not fit."""
    metrics = ("time", "weight_bytes", "state_bytes", "peak_bytes", "reserved_bytes", "out_of_memory")
    lines = [x for m in metrics for x in on_gpu(results, "one_card", m) if x["params"]["model"] == "7b"]
    if not lines:
        return "No GPU has been measured yet."
    found: dict[tuple[str, str, float], dict[str, float]] = {}
    for x in lines:
        key = x["impl"], str(x["params"]["state"]), float(x["params"]["limit_gib"])
        found.setdefault(key, {})[x["metric"]] = x["value"]
    rows = [
        *header(
            "optimizer, its state", "allocator held to", "ms a step", "weights", "state", "peak of tensors", "allocated"
        ),
    ]
    for (impl, state, limit), own in sorted(found.items(), key=lambda item: item[1].get("peak_bytes", math.inf)):
        name = f"{'AdamW' if impl.startswith('adamw') else impl}, {state}"
        if "out_of_memory" in own:
            rows.append(f"| {name} | {limit:g} GiB | does not fit | | | | |")
            continue
        rows.append(row([name, f"{limit:g} GiB", significant(own["time"]), *(size(own[m]) for m in metrics[1:5])]))
    return "\n".join([f"{lines[0]['device']}, [lines]({LINKS}/one_card.jsonl):", "", *rows])


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


def most_judged(lines: Sequence[ResultLine]) -> int:
    """Tokens after which most optimizers were judged, the most of them where several lengths tie; 0 without lines."""
    judged = {(line["impl"], int(line["params"]["tokens"])) for line in lines}
    optimizers = Counter(tokens for _, tokens in judged)
    return max(optimizers, key=lambda tokens: (optimizers[tokens], tokens), default=0)


def _pretrain(results: Path, *, links: str) -> list[str]:
    """The two longest lengths of runs, the longest last, each with its optimizers, best first, and the rates tried."""
    lines = of_case(results, "pretrain")
    lengths = sorted({int(line["params"]["tokens"]) for line in lines})[-2:]
    return [
        text
        for most in lengths
        for text in _pretrain_of([x for x in lines if int(x["params"]["tokens"]) <= most], most, links=links)
    ]


def _pretrain_of(lines: Sequence[ResultLine], most: int, *, links: str) -> list[str]:
    best, about = winners(lines), lines[-1]
    rows = [
        f"**Optimizers at LLaMA-60M**, recipe {about['params']['recipe']} on documentation prose (not C4), {most:,} "
        f"tokens in batches of {about['params']['batch_tokens']:,}; means over seeds, their lowest and highest in "
        f"brackets; the rate is chosen on the first seed, and one at an end of those tried need not be the best "
        f"({about['device']}, [lines]({links}/pretrain.jsonl)):",
        "",
        *header(
            "optimizer", "seeds", "nats a token", "perplexity", "divided as published", "rate, of those tried", "state"
        ),
    ]
    for name, found in best.items():
        losses = found.values("loss")
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        ends = {found.tried[0]: ", the lowest,", found.tried[-1]: ", the highest,"} if len(found.tried) > 1 else {}
        others = f"{ends.get(found.rate, '')} of {', '.join(f'{rate:g}' for rate in found.tried)}" if ends else ""
        perplexities = [
            f"{statistics.mean(found.values(metric)):.1f}" for metric in ("perplexity", "perplexity_as_published")
        ]
        state = f"{int(found.lines[0]['params']['state_bytes']) / 2**20:.0f} MiB"
        loss = f"{statistics.mean(losses):.3f}{spread}"
        rows.append(row([name, str(len(losses)), loss, *perplexities, f"{found.rate:g}{others}", state]))
    return [*rows, ""]
