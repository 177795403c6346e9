"""All evaluations of one model, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from whimbrel.config import EvalConfig
from whimbrel.data.shards import TokenShards
from whimbrel.data.tokenizer import Tokenizer
from whimbrel.errors import ConfigError, DataError, nearest
from whimbrel.evals.bpb import evaluate_bpb
from whimbrel.evals.grid import DENSE, Method, evaluate_grid
from whimbrel.evals.recall import evaluate_mqar, evaluate_needle, held_out_text
from whimbrel.evals.tasks import TASKS as GRID
from whimbrel.progress import track

DEFAULT = ("bpb", "mqar", "needle")
TASKS = (*DEFAULT, "grid", *GRID)
"""`grid` stands for every task of `whimbrel.evals.tasks`."""


def run_evals(
    model: nn.Module,
    tokenizer: Tokenizer,
    shards: TokenShards,
    config: EvalConfig,
    *,
    seq_len: int = 256,
    tasks: tuple[str, ...] = DEFAULT,
    lengths: Sequence[int] = (),
    methods: Sequence[Method] = (DENSE,),
    quiet: bool = False,
) -> dict[str, Any]:
    """The results of `tasks` by name: a dictionary for "bpb", a list of them for "mqar" and "needle".

    Tasks of `whimbrel.evals.tasks` are evaluated together, with the held-out text as haystack, and are one dictionary,
    "grid" (see `evaluate_grid`). tokenizer: the model's. shards: held-out text. seq_len: window of the bits per byte
    and least length of an MQAR sequence, usually the length trained on. lengths: of needles and of the grid; those of
    the configuration if empty. methods: of the grid. Raises ConfigError for an unknown task, and for lengths or methods
    that no task takes, DataError if the text was made with another tokenizer.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"unknown task '{task}'{nearest(task, TASKS)}; use one of {', '.join(TASKS)}")
    grid = tuple(GRID) if "grid" in tasks else tuple(task for task in tasks if task in GRID)
    if lengths and not grid and "needle" not in tasks:
        raise ConfigError(f"lengths = {list(lengths)} has no task; add needle, or tasks of the grid, or leave it out")
    if tuple(methods) != (DENSE,) and not grid:
        raise ConfigError("methods are compared in tasks of the grid; add grid, or one of them, or leave methods out")
    lengths = tuple(lengths) or config.needle_lengths
    if tokenizer.to_json() != shards.tokenizer().to_json():
        raise DataError(
            f"the shards in {shards.folder} were made with another tokenizer than the model's; "
            "evaluate on shards made for this model"
        )
    sizes = {"seed": config.seed, "num_sequences": config.num_sequences}
    results: dict[str, Any] = {}
    others = [task for task in tasks if task in DEFAULT]
    with track("evaluate", len(others), "task", quiet=quiet) as bar:
        for task in others:
            if task == "bpb":
                found = evaluate_bpb(
                    model, shards, seq_len=seq_len, max_tokens=config.validation_tokens, seed=config.seed
                )
                results[task] = found.summary()
            elif task == "mqar":
                cells = evaluate_mqar(model, tokenizer.symbols, pairs=config.mqar_pairs, seq_len=seq_len, **sizes)
                results[task] = [cell._asdict() for cell in cells]
            else:
                cells = evaluate_needle(model, shards, tokenizer.symbols, lengths=tuple(lengths), **sizes)
                results[task] = [cell._asdict() for cell in cells]
            bar.advance()
    if grid:
        results["grid"] = evaluate_grid(
            model,
            tokenizer.symbols,
            tasks=grid,
            lengths=tuple(lengths),
            methods=methods,
            haystack=held_out_text(shards),
            quiet=quiet,
            **sizes,
        )
    return results
