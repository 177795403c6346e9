"""Method x budget x length x task: what an approximate attention costs, the worst task beside the mean.

A mean over tasks hides that one of them breaks: at budgets that most tasks do not feel, some task is usually far below
dense attention (the Sparse Frontier, Nawrot et al., arXiv 2504.17768). So every row has its worst task and its largest
fall below the first method of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from whimbrel.data.tokenizer import Symbols
from whimbrel.errors import ConfigError
from whimbrel.evals.intervals import Interval, paired_difference
from whimbrel.evals.score import check_sequences, score
from whimbrel.evals.tasks import TASKS, Haystack, make_task
from whimbrel.model import Decoder, set_prefill
from whimbrel.model.memory import state_bytes
from whimbrel.progress import track


class Method(NamedTuple):
    """One way to compute the softmax attention of a prompt."""

    name: str
    budget: str
    """What it may spend, for people to read, e.g. "coverage=0.9"; empty for dense."""
    attention: Callable[..., Any] | None = None
    """For `set_prefill`; None is the model's own dense attention."""
    density: Callable[[], float] | None = None
    """The mean share of query-key pairs that were attended to since the last call."""


DENSE = Method("dense", "")


def evaluate_grid(
    model: nn.Module,
    symbols: Symbols,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (256, 512, 1024),
    methods: Sequence[Method] = (DENSE,),
    num_sequences: int = 64,
    seed: int = 0,
    haystack: Haystack | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Accuracy of every method and budget at every length in every task, as plain data.

    model: a Decoder, whose blocks take the methods' attention. tasks: of TASKS. lengths: most tokens of a sequence.
    num_sequences: for each cell. haystack: see `make_task`. All methods see the same sequences.

    Returns `cells`, one for each combination, and `rows`, one for each method, budget and length: the mean over tasks,
    the worst task, the largest fall below the first method with a paired bootstrap interval, and what the model keeps
    for a sequence, in bytes with fp32 activations (None for a model that is no Decoder). Raises ConfigError for sizes,
    names or methods that are not allowed.
    """
    check_sequences(num_sequences)
    for name, given in (("tasks", tasks), ("lengths", lengths), ("methods", methods)):
        if not given or len(set(given)) != len(given):
            raise ConfigError(f"{name} = {list(given)} is not allowed; name one at least, and none twice")
    cells: list[dict[str, Any]] = []
    firsts: dict[tuple[str, int], np.ndarray] = {}
    with track("recall", len(tasks) * len(lengths) * len(methods), "cell", quiet=quiet) as bar:
        for length in lengths:
            for task in tasks:
                made = make_task(
                    task, seed=seed, batch=num_sequences, length=length, symbols=symbols, haystack=haystack
                )
                for method in methods:
                    scores = _with(method, model, lambda made=made: score(model, made.tokens, made.answers, symbols))
                    found = scores.interval()
                    right, asked = scores.by_row()
                    first = firsts.setdefault((task, length), right)
                    drop = paired_difference(right, first, asked, seed=seed)
                    cells.append(
                        {
                            "task": task,
                            "method": method.name,
                            "budget": method.budget,
                            "length": length,
                            **found._asdict(),
                            "chance": scores.chance,
                            "chance_seen": scores.chance_seen,
                            "num_queries": len(scores.rows),
                            "num_sequences": num_sequences,
                            "density": method.density() if method.density else None,
                            "difference": _plain(drop),
                            "by_place": [[place, *part, count] for place, part, count in scores.by_place(made.places)],
                        }
                    )
                    bar.advance()
    return {"cells": cells, "rows": _rows(cells, methods, lengths, model)}


def _with(method: Method, model: nn.Module, run: Callable[[], Any]) -> Any:
    """`run()` under the method's attention."""
    if method.attention is None:
        return run()
    try:
        if not set_prefill(model, method.attention):
            raise ConfigError(f"method '{method.name}' needs softmax blocks, and the model has none; leave it out")
        return run()
    finally:
        set_prefill(model, None)


def _rows(
    cells: list[dict[str, Any]], methods: Sequence[Method], lengths: Sequence[int], model: nn.Module
) -> list[dict[str, Any]]:
    rows = []
    for method in methods:
        for length in lengths:
            row = {"method": method.name, "budget": method.budget, "length": length}
            mine = [cell for cell in cells if row.items() <= cell.items()]
            worst = min(mine, key=lambda cell: cell["value"])
            fell = min(mine, key=lambda cell: cell["difference"]["value"])
            kept = state_bytes(model.config, length) if isinstance(model, Decoder) else None
            densities = [cell["density"] for cell in mine if cell["density"] is not None]
            rows.append(
                row
                | {
                    "mean": mean_of_cells(mine)._asdict(),
                    "chance": float(np.mean([cell["chance"] for cell in mine])),
                    "worst_task": worst["task"],
                    "worst": {name: worst[name] for name in ("value", "low", "high", "chance")},
                    "largest_fall_task": fell["task"],
                    "largest_fall": fell["difference"],
                    "density": float(np.mean(densities)) if densities else None,
                    "state_bytes": kept.recurrent + kept.kv_cache if kept else None,
                }
            )
    return rows


def mean_of_cells(cells: Sequence[dict[str, Any]]) -> Interval:
    """The mean of independent accuracies, from their own intervals (Zou, Donner 2008, doi 10.1002/sim.3095)."""
    value = float(np.mean([cell["value"] for cell in cells]))
    below = math.sqrt(sum((cell["value"] - cell["low"]) ** 2 for cell in cells)) / len(cells)
    above = math.sqrt(sum((cell["high"] - cell["value"]) ** 2 for cell in cells)) / len(cells)
    return Interval(value, value - below, value + above)


def _plain(interval: Interval) -> dict[str, float | None]:
    return {name: None if math.isnan(end) else end for name, end in interval._asdict().items()}
