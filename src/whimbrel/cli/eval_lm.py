"""`whimbrel eval MODEL --lm-eval TASKS`: tasks of lm-eval, without a network."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whimbrel.cli.args import print_table
from whimbrel.errors import ConfigError

if TYPE_CHECKING:
    from whimbrel.cli.eval import Args


def evaluate(args: Args) -> int:
    """Run and print."""
    # The libraries read these as they are imported. HF_HUB_OFFLINE=0 in the environment lets them download.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from whimbrel.config import EvalConfig
    from whimbrel.infer.load import load_run_config, model_dir
    from whimbrel.integrations.lm_eval.harness import evaluate_folder
    from whimbrel.training.processes import pick_device

    theirs = (args.model / "config.json").is_file() and not (args.model / "config.toml").is_file()
    defaults = EvalConfig() if theirs else load_run_config(model_dir(args.model)).eval
    with _folder(args.model) as folder:
        found = evaluate_folder(
            folder,
            args.lm_eval,
            lengths=args.lengths or defaults.needle_lengths,
            num_samples=args.num_sequences or defaults.num_sequences,
            seed=defaults.seed if args.seed is None else args.seed,
            limit=args.limit,
            device=str(pick_device(args.device)),
            essays=args.essays,
            copies=_copies(args.datasets),
        )
    if args.json:
        print(json.dumps(found, default=str))
    else:
        if args.essays:
            print(f"Tasks with essays take them from {args.essays}; do not compare them with published scores.")
        _print(found)
    return 0


def _copies(given: Sequence[str]) -> dict[str, str]:
    copies = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--datasets {text} is not understood; write NAME=FILE, NAME as the task calls its data")
        copies[name] = path
    return copies


@contextmanager
def _folder(model: Path) -> Iterator[Path]:
    """`model` as transformers reads it, converted for the time being where it is a run."""
    from whimbrel.integrations.hf import convert_checkpoint

    if (model / "config.json").is_file():
        yield model
        return
    with tempfile.TemporaryDirectory() as place:
        yield convert_checkpoint(model, Path(place) / "model").out


def _print(found: dict[str, Any]) -> None:
    rows, accuracies = [], {}
    for task, figures in found["results"].items():
        if task not in found.get("groups", {}) and "accuracy,none" in figures:
            accuracies[task] = figures["accuracy,none"]
        for name, value in figures.items():
            metric, comma, kind = name.partition(",")
            # -1 is RULER's word for a length that was not asked for.
            if comma and isinstance(value, float | int) and value != -1 and not metric.endswith("_stderr"):
                error = figures.get(f"{metric}_stderr,{kind}")
                spread = f"{error:.4f}" if isinstance(error, float) else ""
                rows.append((task, metric, f"{value:.4f}", spread, figures.get("sample_len", "")))
    print_table("lm-eval", ("task", "metric", "value", "standard error", "documents"), rows)
    if len(accuracies) > 1:
        worst = min(accuracies, key=lambda task: accuracies[task])
        mean = sum(accuracies.values()) / len(accuracies)
        columns = ("mean accuracy", "worst", "worst task")
        print_table("Mean and worst task", columns, [(f"{mean:.4f}", f"{accuracies[worst]:.4f}", worst)])
