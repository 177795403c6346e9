"""The page of checkpoint averaging: averages against annealing, collapses, costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from method_pages.lines import LINKS, METHODS, RESULTS, of_case, on_gpu
from method_pages.markdown import figure, header, row
from whimbrel.bench.results import ResultLine, read_lines
from whimbrel.report.numbers import size

PAGE = METHODS / "checkpoint-averaging.md"

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


def averaging_page(results: Path = RESULTS, page: Path = PAGE) -> str:
    """The Markdown between the two marks of the page of checkpoint averaging."""
    parts = (
        *figure(page, "checkpoint-averaging-windows.svg", "Gain of an average against the length of its window"),
        *_replica(results, links=LINKS),
        *_averaging(results, links=LINKS),
        *figure(page, "checkpoint-averaging-collapse.svg", "Training loss of a run that collapses, by what is done"),
        *_collapses(results, links=LINKS),
        *_online(results, links=LINKS),
        *_merge_speed(results, links=LINKS),
        *_memory(results, links=LINKS),
    )
    return "\n".join(parts).rstrip("\n")


def quality_lines(results: Path, metric: str) -> list[ResultLine]:
    """The newest lines of merge_quality on a GPU."""
    return on_gpu(results, "merge_quality", metric)


def replica_lines(results: Path) -> list[ResultLine]:
    """The newest losses of the study of averages on a GPU."""
    return [x for x in quality_lines(results, "loss") if not _may_collapse(x)]


def _may_collapse(line: ResultLine) -> bool:
    """Whether a line of merge_quality is of the study of collapses."""
    method = str(line["params"]["method"])
    return method.startswith("collapse-") or method == "undisturbed"


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
            *header("", "window: count x interval", "loss, nats a token", "difference: mean (lowest to highest seed)"),
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


def _averaging(results: Path, *, links: str) -> list[str]:
    path = results / "quality-averaging.jsonl"
    lines = read_lines(path) if path.exists() else []
    if not lines:
        return []
    about = lines[0]["params"]
    rows = [
        f"**Averaging**, `whimbrel demo tiny-rdn`: {about['checkpoints']} checkpoints {about['every_steps']} steps"
        " apart of a constant-rate run against its last one, and against a branch annealed over"
        f" {about['anneal_steps']} steps, at equal tokens ({lines[0]['device']},"
        f" [lines]({links}/quality-averaging.jsonl)):",
        "",
        *header("", "bits per byte", "loss minus the last checkpoint's, nats a token (95 % interval)"),
    ]
    return [*rows, *map(_averaging_row, lines), ""]


def _averaging_row(line: ResultLine) -> str:
    params = line["params"]
    if line["impl"] == "last checkpoint":
        return f"| last checkpoint | {line['value']:.3f} | |"
    low, high = params["difference_low"], params["difference_high"]
    return f"| {line['impl']} | {line['value']:.3f} | {params['difference_nats']:+.3f} ({low:+.3f} to {high:+.3f}) |"


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
            *header("", "held-out loss at the end, by seed", "restarts"),
        ]
        for method, text in WAYS.items():
            own = {int(x["params"]["seed"]): x for x in lines if x["params"]["method"] == method}
            if own:
                losses = (f"{own[seed]['value']:.3f}" if seed in own else "ended early" for seed in seeds)
                restarts = (str(own[seed]["params"].get("restarts", "")) if seed in own else "" for seed in seeds)
                rows.append(f"| {text} | {', '.join(losses)} | {', '.join(restarts)} |")
        rows.append("")
    return rows


def _online(results: Path, *, links: str) -> list[str]:
    """What an average kept during training costs; nothing where no GPU was measured."""
    lines = on_gpu(results, "online_average")
    groups: dict[str, list[ResultLine]] = {}
    for x in lines:
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
        rows.append(row(cells))
    if not rows:
        return []
    return [
        f"**Cost during training** ({lines[0]['device']}, [lines]({links}/online_average.jsonl)):",
        "",
        *header("", "sums in", "steps between samples", "a step", "time of a step (quartiles)", "GPU memory"),
        *rows,
        "",
    ]


def _merge_speed(results: Path, *, links: str) -> list[str]:
    """The rate of a merge beside mergekit's and a plain read, each processor's newest run."""
    lines = [x for x in of_case(results, "merge") if x["metric"] in ("rate", "processor")]
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
        rows.append(row([f"{place}, {device}", *rates, *times, seconds]))
    if not rows:
        return []
    return [
        f"**Speed of a merge** of 10 checkpoints of 1 GiB in bfloat16, GB/s of input ([lines]({links}/merge.jsonl)):",
        "",
        *header(
            "",
            "whimbrel",
            "mergekit",
            "plain read",
            "times mergekit",
            "times the read",
            "processor seconds, ours / theirs",
        ),
        *rows,
        "",
    ]


def _memory(results: Path, *, links: str) -> list[str]:
    """Peak memory of merges by number and size of checkpoints; nothing where it has not been measured."""
    lines = [x for x in of_case(results, "merge") if x["params"].get("study") == "memory"]
    if not lines:
        return []
    found = {(int(x["params"]["MiB"]), int(x["params"]["sources"])): x["value"] for x in lines}
    counts = sorted({count for _, count in found})
    rows = [
        f"**Peak memory of a merge** ({lines[0]['device']}, [lines]({links}/merge.jsonl)):",
        "",
        *header("a checkpoint", *(f"{count} checkpoints" for count in counts)),
    ]
    for mebibytes in sorted({mebibytes for mebibytes, _ in found}):
        cells = [size(found[mebibytes, count]) if (mebibytes, count) in found else "" for count in counts]
        rows.append(row([size(mebibytes * 2**20), *cells]))
    return [*rows, ""]
