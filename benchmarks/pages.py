"""Write tables and figures of two pages, mixers compared and several GPUs: python benchmarks/pages.py"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from method_pages.lines import comparison_lines, on_gpu
from method_pages.markdown import header, insert, row
from plots import draw_curves

from whimbrel.bench.results import RESULTS, ResultLine
from whimbrel.files import atomic_write_text
from whimbrel.report.numbers import power_count, significant, size

ROOT = Path(__file__).resolve().parents[1]
COMPARISON = ROOT / "docs" / "comparison.md"
CARDS = ROOT / "docs" / "howto" / "many-gpus.md"
FIGURES = (
    ("needle", "length", "needle", "share of needles found", "tokens of context"),
    ("decode_rate", "context", "decoding", "tokens a second", "tokens before"),
    ("curve", "tokens", "loss", "nats a token of the batches trained on, from half of them on", "M tokens of training"),
)
"""Metric, what it is drawn against, end of the file's name, titles of the axes."""
SETTING = ("recipe", "batch_tokens", "micro_batch_tokens", "seq_len", "lr")
"""What runs on one GPU and on several have in common."""
BASE = "RDN"
"""What the losses of the others are compared with, seed by seed."""
LINKS = {COMPARISON: "../benchmarks/results", CARDS: "../../benchmarks/results"}


def _named(lines: Sequence[ResultLine]) -> list[str]:
    return list(dict.fromkeys(x["impl"] for x in lines))


def _by_seed(lines: Sequence[ResultLine], factor: float, digits: str) -> str:
    ordered = sorted(lines, key=lambda x: int(x["params"]["seed"]))
    return "/".join(format(factor * x["value"], digits) for x in ordered)


def _mean(lines: Sequence[ResultLine]) -> float:
    return statistics.mean(x["value"] for x in lines)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _seeds_of(losses: dict[str, dict[int, float]]) -> str:
    """Seeds of all, and those of models that have fewer."""
    every = sorted({seed for found in losses.values() for seed in found})
    fewer: dict[str, list[str]] = {}
    for name, found in losses.items():
        if len(found) < len(every):
            fewer.setdefault(_seeds(sorted(found)), []).append(name)
    return "; ".join([_seeds(every), *(f"{', '.join(names)}: {seeds} alone" for seeds, names in fewer.items())])


def _mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, and largest minus smallest where there are several."""
    spread = f" ({max(values) - min(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def comparison_page(results: Path) -> str:
    """The Markdown between the marks of the page that compares mixers."""
    shown = (("loss", "Loss along the run"), ("needle", "Needles by length"), ("decoding", "Decoding by length"))
    drawn = {name: f"comparison-{name}.svg" for name, _ in shown}
    images = {
        name: [f"![{text}]({drawn[name]})", ""] if (COMPARISON.parent / drawn[name]).exists() else []
        for name, text in shown
    }
    if not on_gpu(results, "comparison"):
        return "Nothing has been measured on a GPU yet."
    parts = [*_losses(results), *_on_the_way(results), *images["loss"], *_recall(results), *images["needle"]]
    parts += [*_recall_alone(results), *_speed(results), *images["decoding"], *_held(results)]
    return "\n".join(parts).rstrip("\n")


def _losses(results: Path) -> list[str]:
    lines = [x for x in comparison_lines(results) if x["metric"] != "curve"]
    if not lines:
        return []
    about, names = lines[0], _named([x for x in lines if x["metric"] == "loss"])
    given = about["params"]
    part = ""
    if any(x["params"]["tokens"] != given["of_tokens"] for x in lines if x["metric"] == "loss"):
        part = f", judged after {max(int(x['params']['tokens']) for x in lines) / 1e6:.1f} M of them"
    losses = {
        name: {int(x["params"]["seed"]): x["value"] for x in lines if x["impl"] == name and x["metric"] == "loss"}
        for name in names
    }
    rows = [
        f"**After {int(given['of_tokens']) / 1e6:.1f} M tokens**{part}, {int(given['parameters']) / 1e6:.0f} M "
        f"parameters, {given['layers']} blocks of width {given['hidden_size']}, sequences of {given['T']}, AdamW at "
        f"{given['lr']:g}, {_seeds_of(losses)} ({about['device']}, "
        f"[lines]({LINKS[COMPARISON]}/comparison.jsonl)):",
        "",
        *header(
            "blocks",
            "parameters, M",
            "loss, nats a token, by seed",
            "mean (largest - smallest)",
            f"minus {BASE}'s, seed by seed",
        ),
    ]
    base = losses.get(BASE, losses[names[0]])
    # A model that lacks a seed is set beside the same seeds of the base, since seeds shift all models alike.
    beside = {name: [found[seed] - base[seed] for seed in found if seed in base] for name, found in losses.items()}
    for name in sorted(names, key=lambda name: statistics.mean(beside[name])):
        found = [losses[name][seed] for seed in sorted(losses[name])]
        given = next(x["params"] for x in lines if x["impl"] == name)
        rows.append(
            f"| {name} | {int(given['parameters']) / 1e6:.2f} | {'/'.join(f'{loss:.4f}' for loss in found)} | "
            f"{_mean_and_spread(found)} | {_mean_and_spread(beside[name], '+')} |"
        )
    return [*rows, ""]


def _on_the_way(results: Path) -> list[str]:
    """Where runs were cut off: the loss of the batches trained on, at the last tokens that every model reached."""
    lines = [x for x in comparison_lines(results) if x["metric"] == "curve"]
    reached = {name: {int(x["params"]["tokens"]) for x in lines if x["impl"] == name} for name in _named(lines)}
    common = max(set.intersection(*reached.values()), default=0) if reached else 0
    found = {name: [x for x in lines if x["impl"] == name and x["params"]["tokens"] == common] for name in reached}
    whole = max((int(x["params"]["of_tokens"]) for x in lines), default=0)
    if not common or common == whole or len(found) < 2:
        return []
    cut = [f"{name} at {max(tokens) / 1e6:.1f} M" for name, tokens in reached.items() if max(tokens) < whole]
    rows = [
        f"**At {common / 1e6:.1f} M tokens**, the loss of the batches trained on, the same for all, mean over steps "
        f"since the line before" + (f" (cut off by time: {', '.join(cut)})" if cut else "") + ":",
        "",
        *header("blocks", "nats a token, by seed", "above the best"),
    ]
    best = min(_mean(own) for own in found.values())
    for name, own in sorted(found.items(), key=lambda item: _mean(item[1])):
        rows.append(f"| {name} | {_by_seed(own, 1, '.4f')} | {_mean(own) - best:+.4f} |")
    return [*rows, ""]


def _recall(results: Path) -> list[str]:
    lines = comparison_lines(results)
    rows: list[str] = []
    for metric, along, title in (
        ("mqar", "pairs", "Multi-query associative recall**, per cent right by the number of pairs"),
        (
            "needle",
            "length",
            "One of four needles in held-out text**, per cent right by the length of the context, each behind 90, 50 "
            "and 10 % of the text",
        ),
    ):
        own = [x for x in lines if x["metric"] == metric]
        if not own:
            continue
        places = sorted({int(x["params"][along]) for x in own})
        chance = own[0]["params"]["chance"]
        rows += [
            f"**{title}, seed by seed (chance {chance:.1%}):",
            "",
            *header("blocks", *map(power_count, places)),
        ]
        for name in _named(own):
            cells = [[x for x in own if x["impl"] == name and x["params"][along] == place] for place in places]
            rows.append(row([name, *map(_shares, cells)]))
        rows.append("")
    return rows


def _shares(cell: Sequence[ResultLine]) -> str:
    """Per cent of each seed, at each depth of a needle, the nearest to the question first."""
    depths = sorted({x["params"].get("depth", 0) for x in cell}, reverse=True)
    return ", ".join(
        _by_seed([x for x in cell if x["params"].get("depth", 0) == depth], 100, ".0f") for depth in depths
    )


def _recall_alone(results: Path) -> list[str]:
    """Small models trained on recall alone, each at the rate with the lowest loss at the end of its training."""
    lines = on_gpu(results, "recall")
    if not lines:
        return []
    given = lines[0]["params"]
    places = sorted({int(x["params"]["pairs"]) for x in lines if x["metric"] == "accuracy"})
    seeds = sorted({int(x["params"]["seed"]) for x in lines})
    chance = next(x["params"]["chance"] for x in lines if x["metric"] == "accuracy")
    rates = [f"{rate:g}" for rate in sorted({float(x["params"]["lr"]) for x in lines})]
    rows = [
        f"**Trained on recall alone**, share right by the number of pairs, {given['layers']} blocks of width "
        f"{given['hidden_size']}, {int(given['tokens']) / 1e6:.0f} M tokens in sequences of {given['T']}, up to "
        f"{places[-2]} pairs in training, {_seeds(seeds)}, each at the better rate of {' and '.join(rates)} "
        f"(chance {chance:.1%}; {lines[0]['device']}, [lines]({LINKS[COMPARISON]}/recall.jsonl)):",
        "",
        *header("blocks", "head dim", "state", "rate", *map(str, places)),
    ]
    for dim in sorted({int(x["params"]["head_dim"]) for x in lines}):
        for name in _named(lines):
            own = [x for x in lines if x["impl"] == name and x["params"]["head_dim"] == dim]
            if not own:
                continue
            losses: dict[float, list[ResultLine]] = {}
            for x in own:
                if x["metric"] == "loss":
                    losses.setdefault(float(x["params"]["lr"]), []).append(x)
            best = min(losses, key=lambda rate: _mean(losses[rate]))
            shown = [x for x in own if x["params"]["lr"] == best and x["metric"] == "accuracy"]
            cells = [f"{_mean([x for x in shown if x['params']['pairs'] == place]):.0%}" for place in places]
            state = size(own[0]["params"]["state_bytes"])
            rows.append(row([name, str(dim), state, f"{best:g}", *cells]))
    return [*rows, ""]


def _speed(results: Path) -> list[str]:
    measured = on_gpu(results, "comparison")
    lines = [x for x in measured if x["metric"] in ("train_rate", "decode_rate")]
    if not lines:
        return []
    about = lines[0]
    lengths = sorted({int(x["params"]["T"]) for x in lines if x["metric"] == "train_rate"})
    contexts = sorted({int(x["params"]["context"]) for x in lines if x["metric"] == "decode_rate"})
    batch = next((x["params"]["B"] for x in lines if x["metric"] == "decode_rate"), 0)
    heads = [f"training at {power_count(n)}" for n in lengths] + [f"decoding behind {power_count(n)}" for n in contexts]
    heads += ["peak of training"]
    rows = [
        f"**Thousand tokens a second** of models of {int(about['params']['parameters']) / 1e6:.0f} M parameters, bf16, "
        f"{batch} sequences decoded together, without CUDA graphs ({about['device']}, "
        f"[lines]({LINKS[COMPARISON]}/comparison.jsonl)):",
        "",
        *header("blocks", *heads),
    ]
    for name in _named(lines):
        own = [x for x in lines if x["impl"] == name]
        found = {("T", x["params"]["T"]): x["value"] for x in own if x["metric"] == "train_rate"}
        found |= {("context", x["params"]["context"]): x["value"] for x in own if x["metric"] == "decode_rate"}
        wanted = [("T", n) for n in lengths] + [("context", n) for n in contexts]
        cells = [significant(found[key] / 1e3) if key in found else "" for key in wanted]
        peaks = [x["value"] for x in measured if x["impl"] == name and x["metric"] == "train_peak"]
        cells.append(size(max(peaks)) if peaks else "")
        rows.append(row([name, *cells]))
    return [*rows, ""]


def _held(results: Path) -> list[str]:
    lines = [x for x in on_gpu(results, "comparison") if x["metric"] == "state_bytes"]
    if not lines:
        return []
    contexts = sorted({int(x["params"]["context"]) for x in lines})
    rows = [
        "**Bytes that one sequence holds**, states in fp32, keys and values in bf16, by its length:",
        "",
        *header("blocks", *map(power_count, contexts)),
    ]
    for name in _named(lines):
        found = {x["params"]["context"]: x["value"] for x in lines if x["impl"] == name}
        rows.append(row([name, *(size(found[n]) if n in found else "" for n in contexts)]))
    return [*rows, ""]


def figures(results: Path, folder: Path) -> list[Path]:
    """The figures of the comparison, `comparison-*.svg`; none for what was not measured."""
    written = []
    for metric, along, name, title, place in FIGURES:
        lines = comparison_lines(results) if metric != "decode_rate" else on_gpu(results, "comparison")
        lines = [x for x in lines if x["metric"] == metric]
        curves = {}
        for colour, impl in enumerate(sorted(_named(lines))):
            own = [x for x in lines if x["impl"] == impl]
            places = sorted({int(x["params"][along]) for x in own})
            points = [(float(at), _mean([x for x in own if x["params"][along] == at])) for at in places]
            if metric == "curve":  # the descent that all share would leave no room for what tells them apart
                points = [(at / 1e6, value) for at, value in points if at > places[-1] / 2]
            if len(points) > 1:
                curves[impl] = (colour, points)
        if curves:
            target = folder / f"comparison-{name}.svg"
            atomic_write_text(
                target, draw_curves(curves, title, place, log=metric == "decode_rate", zero=metric != "curve").file()
            )
            written.append(target)
    return written


def _setting(line: ResultLine) -> tuple[object, ...]:
    return tuple(line["params"].get(name) for name in SETTING)


def cards_page(results: Path) -> str:
    """The Markdown between the marks of the page of several GPUs."""
    measured = on_gpu(results, "cards")
    if not measured:
        return "Nothing has been measured on GPUs yet."
    several = [x for x in measured if x["impl"].endswith("processes")]
    lines: list[ResultLine] = []
    if several:
        # The newest of the largest batches: a small one shows restarts alone.
        about = max(reversed(several), key=lambda x: (x["params"]["batch_tokens"], x["time"]))  # the last of one second
        lines = [x for x in measured if _setting(x) == _setting(about)]
    return "\n".join([*_cards(lines), *_kills(measured)]).rstrip("\n")


def _cards(lines: Sequence[ResultLine]) -> list[str]:
    """Tokens a second of one and of several processes of one setting, and how far their losses part."""
    if not lines:
        return []
    given, about = lines[0]["params"], lines[-1]
    rates = {x["impl"]: x["value"] for x in lines if x["metric"] == "throughput"}
    one = rates.get("1 process")
    rows = [
        f"**{given['recipe']}**, batches of {given['batch_tokens']:,} tokens in sequences of {given['seq_len']:,}, "
        f"{given['micro_batch_tokens']:,} at a time in each process ({about['device']}, torch {about['torch']}, "
        f"[lines]({LINKS[CARDS]}/cards.jsonl)):",
        "",
        *header("processes, a GPU each", "tokens a second", "times one"),
    ]
    for impl, rate in rates.items():
        rows.append(f"| {impl.split()[0]} | {rate:,.0f} | {f'{rate / one:.2f}' if one else ''} |")
    rows.append("")
    for x in lines:
        if x["metric"] == "loss_gap":
            largest = x["params"].get("largest", x["value"])
            rows += [
                f"Losses of the first {x['params']['steps']} steps differ by at most {significant(largest)} nats "
                f"(the last is {x['params']['last_loss']:.2f}).",
                "",
            ]
    return rows


def _kills(measured: Sequence[ResultLine]) -> list[str]:
    """What killed workers cost, of each setting in which some were."""
    rows = []
    for lost in (x for x in measured if x["metric"] == "steps_lost"):
        own = {x["metric"]: x for x in measured if _setting(x) == _setting(lost) and x["impl"] == lost["impl"]}
        given, wait = lost["params"], own["seconds_to_go_on"]["value"]
        text = (
            f"Of {given['recipe']} in {lost['impl'].split(',')[0]} under torchrun ({lost['device']}, torch "
            f"{lost['torch']}) a worker was killed with SIGKILL {given['kills']} time{'s' * (given['kills'] > 1)}, at "
            f"random moments: each cost {given['most']:.0f} steps at most (a checkpoint every {given['every']}), and "
            f"{wait:.0f} s until the next new step."
        )
        if "repeat_gap" in own:
            gap = significant(own["repeat_gap"]["value"])
            text += f" Losses of steps that were run again differ by {gap} nats at most."
        if "restart_gap" in own:
            gap, steps = significant(own["restart_gap"]["value"]), own["restart_gap"]["params"]["steps"]
            text += f" The {steps} steps after the first kill differ from a run without kills by {gap} nats at most."
        rows += [text, ""]
    return rows


def main() -> None:
    for path in figures(RESULTS, COMPARISON.parent):
        print(path)
    for page, text in ((COMPARISON, comparison_page(RESULTS)), (CARDS, cards_page(RESULTS))):
        atomic_write_text(page, insert(page.read_text(encoding="utf-8"), text))


if __name__ == "__main__":
    main()
