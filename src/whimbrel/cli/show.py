"""`whimbrel show SOURCE`: what a configuration means before anything is trained, or what a checkpoint holds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from whimbrel.cli.args import parse_with_config, print_table
from whimbrel.config import Config, ModelConfig, kind_of, kinds, to_toml

FAMILIES = ("whimbrel.mixers", "whimbrel.optim", "whimbrel.merge", "whimbrel.sparse")


@dataclass(frozen=True)
class Args:
    """Resolved settings, parameters and memory of a recipe or TOML file; `kinds` lists every family's methods.

    A checkpoint, a merge or a run in place of a recipe: what it holds, layer by layer (`--tokens`, `--device`).
    """

    json: bool = False
    """Print one JSON object instead of tables."""
    toml: bool = False
    """Print every setting as a TOML file instead, to begin one's own with."""
    config: Annotated[Config, tyro.conf.arg(name="")] = Config()
    """Settings"""


def main(argv: list[str]) -> int:
    """Show a configuration, the kinds, or the recipes."""
    if argv[:1] == ["kinds"]:
        return _show_kinds(as_json="--json" in argv)
    if argv and Path(argv[0]).is_dir():
        from whimbrel.cli.show_checkpoint import show_checkpoint

        return show_checkpoint(argv)
    args = parse_with_config(lambda _, config: Args(config=config), argv, verb="show")
    if args.toml:
        print(to_toml(args.config), end="")
        return 0
    from whimbrel.model.memory import model_report

    report = model_report(args.config)
    if args.json:
        print(json.dumps(report))
        return 0
    print(summary(args.config))
    print_table("Parameters", ("part", "parameters"), [(k, f"{v:,}") for k, v in report["parameters"].items()])
    print_table("Training memory, bytes", ("part", "bytes"), [(k, f"{v:,}") for k, v in report["training"].items()])
    print_states(report["inference"])
    return 0


def summary(config: Config) -> str:
    """The run in three lines: model, training, and where its settings are."""
    tokens = config.steps * config.batch_tokens
    return (
        f"{config.name}: {blocks(config.model)}\n"
        f"trains {config.steps:,} steps of {config.batch_tokens:,} tokens ({tokens:,}) in sequences of "
        f"{config.data.seq_len:,}, {kind_of(config.optim)}, {config.schedule.kind} schedule\n"
        "every setting: add --toml\n"
    )


def blocks(model: ModelConfig) -> str:
    """The model in a line."""
    kinds = Counter(kind_of(mixer) for mixer in model.layers())
    return (
        f"{model.num_layers} blocks of width {model.hidden_size}, "
        f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())}; vocabulary of {model.vocab_size:,}"
    )


def print_states(inference: list[dict[str, int]]) -> None:
    """The bytes of a sequence by length."""
    rows = [
        (f"{row['tokens']:,}", f"{row['recurrent']:,}", f"{row['kv_cache']:,}", f"{row['all_softmax']:,}")
        for row in inference
    ]
    print_table("State of one sequence, bytes", ("context tokens", "recurrent", "KV cache", "all-softmax model"), rows)


def _show_kinds(*, as_json: bool) -> int:
    from whimbrel import recipes
    from whimbrel.bench import CASES

    table = {family.rpartition(".")[2]: list(kinds(family)) for family in FAMILIES}
    table |= {"recipes": list(recipes.RECIPES), "bench": list(CASES)}
    if as_json:
        print(json.dumps(table))
    else:
        print_table("Kinds", ("family", "names"), [(name, ", ".join(names)) for name, names in table.items()])
    return 0
