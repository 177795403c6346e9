"""`whimbrel data TEXT --out DIR`: text into token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from whimbrel.cli.args import parse


@dataclass(frozen=True)
class Args:
    """Split documents into training and validation, train a byte-level BPE on the training part, write shards."""

    corpus: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CORPUS")]
    """A .txt file, a folder of .txt files, a .jsonl file with a "text" field, or `demo`."""
    out: Path
    """Folder for the shards."""
    vocab_size: int = 4096
    """Token ids."""
    validation_fraction: float = 0.06
    """Share of the documents kept for validation."""


def main(argv: list[str]) -> int:
    """Make shards; a second call with the same settings does no work."""
    args = parse(Args, argv, verb="data")
    from whimbrel.config import DataConfig
    from whimbrel.data import prepare
    from whimbrel.data.shards import read_manifest

    data = DataConfig(corpus=args.corpus, validation_fraction=args.validation_fraction)
    manifest = prepare(data, args.out, vocab_size=args.vocab_size)
    splits = read_manifest(manifest.parent)["splits"]
    for name, split in splits.items():
        print(f"{name:<11} {split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens")
    print(f"shards in {args.out}")
    return 0
