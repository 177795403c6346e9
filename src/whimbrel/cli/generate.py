"""`whimbrel generate MODEL`: continue a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from whimbrel.cli.args import parse
from whimbrel.errors import ConfigError, DataError


@dataclass(frozen=True)
class Args:
    """Continue a prompt with a trained model."""

    model: tyro.conf.Positional[Path]
    """Checkpoint, merge or run folder."""
    prompt: str = ""
    """Text to continue."""
    prompt_file: Path | None = None
    """File with the text to continue, instead of --prompt."""
    max_new_tokens: int = 64
    """Tokens to append."""
    temperature: float = 0.8
    """0 takes the likeliest token; 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 draws among all."""
    seed: int = 0
    """Seed of the drawing."""
    prefill: str = "run"
    """Selector of the softmax layers: a kind such as dense, flex_prefill or row_local, or `run` for the model's own."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(argv: list[str]) -> int:
    """Generate and print."""
    args = parse(Args, argv, verb="generate")
    text = _prompt(args)
    from whimbrel.config import SelectorConfig, kind_class

    selector: SelectorConfig | None = None
    if args.prefill != "run":
        selector = kind_class(SelectorConfig.FAMILY, args.prefill, where="--prefill")()

    import torch

    from whimbrel.infer.decode import generate
    from whimbrel.infer.load import load_model, load_run_config, load_tokenizer
    from whimbrel.infer.prefill import SparsePrefill
    from whimbrel.model import set_prefill

    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    sparse = SparsePrefill(selector or load_run_config(args.model).prefill)
    ids = tokenizer.encode(text)
    if not len(ids):
        raise ConfigError("the prompt is empty; give --prompt TEXT or --prompt-file FILE")
    set_prefill(model, sparse)
    out = generate(
        model,
        torch.from_numpy(ids)[None],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    )
    continuation = tokenizer.decode(out.tokens[0].tolist())
    densities = [layer.density for layer in sparse.layers]
    if args.json:
        print(json.dumps({"prompt_tokens": len(ids), "text": continuation, "prefill_density": densities}))
    else:
        print(text + continuation)
    return 0


def _prompt(args: Args) -> str:
    if args.prompt_file is None:
        return args.prompt
    try:
        return args.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file = '{args.prompt_file}' cannot be read: {error}") from error
