"""A corpus and a configuration so small that a test can train on them."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = [
    "the",
    "sea",
    "was",
    "calm",
    "and",
    "a",
    "bird",
    "of",
    "the",
    "shore",
    "went",
    "over",
    "the",
    "sand",
    "to",
    "look",
    "for",
    "shells",
    "while",
    "wind",
    "came",
    "from",
    "north",
    "and",
    "men",
    "spoke",
    "of",
    "ships",
    "that",
    "had",
    "gone",
    "by",
    "in",
    "the",
    "night",
    "with",
    "lights",
    "on",
    "their",
    "masts",
]


def write_corpus(folder: Path, *, documents: int = 24, words: int = 400) -> Path:
    """A folder of text files, each a seeded shuffle of a few words."""
    folder.mkdir(parents=True)
    for number in range(documents):
        draw = random.Random(number)
        text = " ".join(draw.choice(WORDS) for _ in range(words))
        (folder / f"{number:03d}.txt").write_text(f"Chapter {number}. {text}.\n")
    return folder


def tiny_overrides(corpus: Path) -> dict[str, object]:
    """The settings that make the demo recipe tiny."""
    return {
        "name": "tiny",
        "device": "cpu",
        "steps": 6,
        "batch_tokens": 256,
        "log_every": 1,
        "model.vocab_size": 448,
        "model.hidden_size": 32,
        "model.num_layers": 2,
        "model.mlp_size": 64,
        "model.softmax_every": 2,
        "model.mixer.num_heads": 2,
        "model.mixer.head_dim": 16,
        "model.softmax.num_heads": 2,
        "model.softmax.num_kv_heads": 1,
        "model.softmax.head_dim": 16,
        "optim.rank": 8,
        "optim.refresh_steps": 2,
        "schedule.warmup_steps": 2,
        "data.corpus": str(corpus),
        "data.seq_len": 64,
        "data.recall_fraction": 0.0,
        "data.validation_fraction": 0.2,
        "checkpoint.every_steps": 2,
        "averaging.anneal_steps": 2,
        "averaging.last": 2,
        "prefill.block_size": 16,
        "eval.checkpoint_tokens": 256,
        "eval.validation_tokens": 1024,
        "eval.num_sequences": 4,
        "eval.mqar_pairs": [2, 4],
        "eval.needle_lengths": [48],
    }
