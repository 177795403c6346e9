"""`whimbrel eval MODEL`: judge a checkpoint, a merge or a run."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from whimbrel.cli.args import parse
from whimbrel.errors import ConfigError

if TYPE_CHECKING:
    from whimbrel.evals import Method


@dataclass(frozen=True)
class Args:
    """Bits per byte of held-out text and accuracy in recall tasks, with 95 % intervals and the chance level."""

    model: tyro.conf.Positional[Path]
    """Checkpoint, merge or run folder."""
    tasks: tuple[str, ...] = ("bpb", "mqar", "needle")
    """Any of bpb, mqar, needle, and of the tasks of the grid by name; `grid` is all of these."""
    lengths: tuple[int, ...] = ()
    """Tokens of a sequence of needle and of the grid; default: the run's eval.needle_lengths."""
    methods: tuple[str, ...] = ("dense",)
    """Attention of the grid: dense, or KIND:setting=value,... of a selector, e.g. flex_prefill:coverage=0.9."""
    lm_eval: tuple[str, ...] = ()
    """Tasks or groups of lm-eval instead of the above, `whimbrel` among them (extra lm-eval)."""
    limit: int | None = None
    """Documents of each task of lm-eval, at most; default: all."""
    essays: Path | None = None
    """Text in place of the essays that RULER's needles lie in, for --lm-eval: a .txt or .jsonl file, or a folder."""
    datasets: tuple[str, ...] = ()
    """NAME=FILE: local copies of data sets that tasks of --lm-eval ask for, .jsonl, .parquet or a folder of splits."""
    data: Path | None = None
    """Folder of token shards; default: the corpus the model was trained on."""
    seq_len: int | None = None
    """Window of the bits per byte in tokens; default: the length trained on."""
    seed: int | None = None
    """Seed of the generated tasks; default: the run's."""
    num_sequences: int | None = None
    """Generated sequences for each cell; default: the run's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a CUDA device where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic (autocast); the kernels of linear mixers on CUDA serve bfloat16, and need less time."""
    json: bool = False
    """Print JSON instead of tables."""


def main(argv: list[str]) -> int:
    """Evaluate and print."""
    args = parse(Args, argv, verb="eval")
    if args.lm_eval:
        _refuse(args, "tasks", "methods", "data", "seq_len", "dtype", why="is not used with --lm-eval; leave it out")
        from whimbrel.cli.eval_lm import evaluate

        return evaluate(args)
    _refuse(args, "limit", why="belongs to --lm-eval; use --num-sequences")
    _refuse(args, "essays", "datasets", why="belongs to --lm-eval; leave it out")
    methods = [_method(text) for text in args.methods]
    import dataclasses

    import torch

    from whimbrel.cli.eval_tables import print_results
    from whimbrel.data import TokenShards
    from whimbrel.data.pipeline import shards_for
    from whimbrel.evals import run_evals
    from whimbrel.infer.load import load_model, load_run_config, load_tokenizer
    from whimbrel.training.processes import pick_device

    device = pick_device(args.device)
    model = load_model(args.model, device=device)
    config = load_run_config(args.model)
    given = {name: getattr(args, name) for name in ("seed", "num_sequences") if getattr(args, name) is not None}
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        results = run_evals(
            model,
            load_tokenizer(args.model),
            TokenShards(args.data or shards_for(config), "validation"),
            dataclasses.replace(config.eval, **given),
            seq_len=config.data.seq_len if args.seq_len is None else args.seq_len,
            tasks=args.tasks,
            lengths=args.lengths,
            methods=methods,
        )
    if args.json:
        print(json.dumps(results))
    else:
        print_results(results)
    return 0


def _refuse(args: Args, *names: str, why: str) -> None:
    for field in fields(Args):
        if field.name in names and getattr(args, field.name) != field.default:
            raise ConfigError(f"--{field.name.replace('_', '-')} {why}")


def _method(text: str) -> Method:
    """`dense`, or `KIND:setting=value,...` of a selector."""
    from whimbrel.config import SelectorConfig, decode, kind_class

    kind, _, settings = text.partition(":")
    chosen = kind_class(SelectorConfig.FAMILY, kind, where="--methods")
    config = decode(chosen, _settings(settings, text), where=f"{kind}.")

    from whimbrel.evals import DENSE, Method
    from whimbrel.infer.prefill import SparsePrefill

    if text == "dense":
        return DENSE
    sparse = SparsePrefill(config)

    def density() -> float:
        values = [layer.density for layer in sparse.layers]
        sparse.layers.clear()
        return sum(values) / max(1, len(values))

    return Method(kind, settings, sparse, density)


def _settings(text: str, method: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"--methods {method} is not understood; write KIND:setting=value,setting=value")
        try:
            values[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = value
    return values
