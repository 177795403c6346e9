"""`whimbrel eval MODEL`: judge a checkpoint, a merge or a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from whimbrel.cli.args import parse, print_table


@dataclass(frozen=True)
class Args:
    """Bits per byte of held-out text, MQAR and needle accuracy, with 95 % intervals and the chance level."""

    model: tyro.conf.Positional[Path]
    """Checkpoint, merge or run folder."""
    tasks: tuple[str, ...] = ("bpb", "mqar", "needle")
    """Any of bpb, mqar, needle."""
    data: Path | None = None
    """Folder of token shards; default: the corpus the model was trained on."""
    seed: int | None = None
    """Seed of the generated tasks; default: the run's."""
    num_sequences: int | None = None
    """Generated sequences for each cell; default: the run's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a CUDA device where there is one."""
    json: bool = False
    """Print JSON instead of tables."""


def main(argv: list[str]) -> int:
    """Evaluate and print."""
    args = parse(Args, argv, verb="eval")
    import dataclasses

    from whimbrel.data import TokenShards
    from whimbrel.evals import run_evals
    from whimbrel.infer.load import load_model, load_run_config, load_tokenizer
    from whimbrel.training.loop import shards_for
    from whimbrel.training.processes import pick_device

    model = load_model(args.model, device=pick_device(args.device))
    config = load_run_config(args.model)
    given = {name: getattr(args, name) for name in ("seed", "num_sequences") if getattr(args, name) is not None}
    results = run_evals(
        model,
        load_tokenizer(args.model),
        TokenShards(args.data or shards_for(config), "validation"),
        dataclasses.replace(config.eval, **given),
        seq_len=config.data.seq_len,
        tasks=args.tasks,
    )
    if args.json:
        print(json.dumps(results))
        return 0
    if "bpb" in results:
        row = results["bpb"]
        print_table(
            "Held-out text",
            ("tokens", "bits per byte", "95 % interval", "nats per token"),
            [
                (
                    f"{row['num_tokens']:,}",
                    f"{row['bits_per_byte']:.4f}",
                    f"{row['low']:.4f} to {row['high']:.4f}",
                    f"{row['nats_per_token']:.4f}",
                )
            ],
        )
    for task, title in (("mqar", "Multi-query associative recall"), ("needle", "Needle in text")):
        if task in results:
            print_table(
                title,
                ("pairs", "length", "depth", "accuracy", "95 % interval", "chance", "questions"),
                [
                    (
                        cell["num_pairs"],
                        cell["length"],
                        "" if cell["depth"] is None else f"{cell['depth']:.0%}",
                        f"{cell['accuracy']:.1%}",
                        f"{cell['low']:.1%} to {cell['high']:.1%}",
                        f"{cell['chance']:.1%}",
                        cell["num_queries"],
                    )
                    for cell in results[task]
                ],
            )
    return 0
