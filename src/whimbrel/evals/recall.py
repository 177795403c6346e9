"""Recall accuracy: multi-query associative recall by number of pairs, needles in text by length and depth.

An answer is the most likely of the reserved values, so the chance level is exact: one in their number for a
model that knows nothing, one in the number of bindings for a model that knows which values occurred but not
their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import nn

from whimbrel.data.draws import Draws
from whimbrel.data.shards import TokenShards
from whimbrel.data.synthetic import Recall, mqar, needle
from whimbrel.data.tokenizer import Symbols
from whimbrel.errors import ConfigError, DataError
from whimbrel.evals.score import check_sequences, score
from whimbrel.evals.tasks import Haystack

DEPTHS = (0.1, 0.5, 0.9)
NUM_NEEDLES = 4

# Purposes of random streams.
_MQAR, _NEEDLE, _TEXT = range(3)


class RecallResult(NamedTuple):
    """Accuracy in one cell of a task."""

    task: str
    """"mqar" or "needle"."""
    length: int
    """Tokens of a sequence."""
    num_pairs: int
    """Bindings in a sequence."""
    depth: float | None
    """Share of the text before the needle that is asked for; None for MQAR."""
    accuracy: float
    low: float
    high: float
    """Ends of Wilson's interval (see `accuracy_interval`)."""
    chance: float
    """Accuracy of any value picked at random."""
    chance_seen: float
    """Accuracy of a value picked at random from those in the sequence."""
    num_queries: int
    num_sequences: int


def evaluate_mqar(
    model: nn.Module,
    symbols: Symbols,
    *,
    pairs: Sequence[int] = (4, 8, 16, 32),
    num_sequences: int = 64,
    seq_len: int = 256,
    seed: int = 0,
) -> list[RecallResult]:
    """Accuracy of multi-query associative recall for each number of pairs; each key is asked once.

    model: `model(tokens).logits` gives [B, T, vocabulary]. seq_len: tokens of a sequence; a number of pairs
    that does not fit with its queries gets the least length that holds them. Sequences depend on seed and
    pairs only, so two models see the same. Raises ConfigError for sizes that are not allowed.
    """
    check_sequences(num_sequences)
    results = []
    for count in pairs:
        made = mqar(
            *(seed, _MQAR, count),
            batch=num_sequences,
            seq_len=max(seq_len, 3 * count),
            num_pairs=count,
            symbols=symbols,
        )
        results.append(_score(model, made, symbols, task="mqar", num_pairs=count, depth=None))
    return results


def evaluate_needle(
    model: nn.Module,
    shards: TokenShards,
    symbols: Symbols,
    *,
    lengths: Sequence[int] = (256, 512, 1024),
    depths: Sequence[float] = DEPTHS,
    num_needles: int = NUM_NEEDLES,
    num_sequences: int = 64,
    seed: int = 0,
) -> list[RecallResult]:
    """Accuracy of finding one of several needles in held-out text, for each length and depth.

    model: `model(tokens, logits_to_keep=1).logits` gives [B, 1, vocabulary]. shards: the text, usually the
    validation split. lengths: tokens of a sequence, needles and question included. num_needles: bindings,
    one of which is asked for at the end. Raises ConfigError for sizes that are not allowed, DataError if the
    text is shorter than a sequence.
    """
    check_sequences(num_sequences)
    results = []
    for length in lengths:
        room = length - 2 * num_needles - 1
        if room < 1:
            raise ConfigError(
                f"needle length = {length} has no room for {num_needles} needles and a question; "
                f"use at least {2 * num_needles + 2}"
            )
        if room > shards.num_tokens:
            raise DataError(
                f"split '{shards.split}' of {shards.folder} has {shards.num_tokens} tokens, a needle length of "
                f"{length} takes {room}; use a shorter length or more text"
            )
        text = held_out_text(shards)(Draws(seed, _TEXT, length), num_sequences, room)
        for index, depth in enumerate(depths):
            made = needle(
                *(seed, _NEEDLE, length, index),
                text=text,
                num_needles=num_needles,
                symbols=symbols,
                depth=depth,
            )
            results.append(_score(model, made, symbols, task="needle", num_pairs=num_needles, depth=depth))
    return results


def held_out_text(shards: TokenShards) -> Haystack:
    """A haystack of stretches of `shards`; drawing raises DataError where they are shorter than a stretch."""

    def draw(draws: Draws, rows: int, tokens: int) -> np.ndarray:
        if tokens > shards.num_tokens:
            raise DataError(
                f"split '{shards.split}' of {shards.folder} has {shards.num_tokens} tokens, a haystack takes {tokens}; "
                "use a shorter length or more text"
            )
        starts = draws.below(shards.num_tokens - tokens + 1, rows)
        return np.stack([shards.read(int(start), int(start) + tokens) for start in starts])

    return draw


def _score(
    model: nn.Module, made: Recall, symbols: Symbols, *, task: str, num_pairs: int, depth: float | None
) -> RecallResult:
    scores = score(model, made.tokens, made.answers, symbols)
    found = scores.interval()
    return RecallResult(
        task=task,
        length=made.tokens.shape[1],
        num_pairs=num_pairs,
        depth=depth,
        accuracy=found.value,
        low=found.low,
        high=found.high,
        chance=scores.chance,
        chance_seen=scores.chance_seen,
        num_queries=len(scores.rows),
        num_sequences=scores.num_sequences,
    )
