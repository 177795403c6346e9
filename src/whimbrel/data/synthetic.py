"""Recall tasks written in reserved token ids: what was bound to this key, some or many tokens ago?

A binding is the two tokens `key value`; a query is a key that was bound before, and its answer is the bound
value. Sequences are pure functions of the seed. Answers never stand in the input.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from whimbrel.data.draws import Draws
from whimbrel.data.tokenizer import Symbols
from whimbrel.errors import ConfigError

IGNORE = -100
"""Target at positions that are not scored; torch's cross entropy leaves it out."""

PAPER_POWER = 0.01
"""Exponent of the gaps between bindings and queries in the MQAR paper's experiments."""


class Recall(NamedTuple):
    """`tokens` int64 [B, T] and `answers` int64 [B, T]: the value at each query, IGNORE elsewhere."""

    tokens: np.ndarray
    answers: np.ndarray


def mqar(
    *counters: int,
    batch: int,
    seq_len: int,
    num_pairs: int,
    symbols: Symbols,
    num_queries: int | None = None,
    power: float = PAPER_POWER,
) -> Recall:
    """Multi-query associative recall (Arora et al., arXiv 2312.04927, section 3 and appendix E).

    A sequence is `num_pairs` bindings with different keys and different values, then queries among filler
    tokens. counters: seed, and further integers that name the sequences. num_queries: default `num_pairs`,
    so each key is asked once; more ask all keys in rounds. power: a query stands g tokens after the bindings
    with a weight of g**(power - 1); 1 spreads the queries evenly. Guessing any value is right once in
    `len(symbols.values)` times, guessing one of the values of the sequence once in `num_pairs` times.
    Raises ConfigError if the sequence is too short or the symbols are too few.
    """
    queries = num_pairs if num_queries is None else num_queries
    tail = seq_len - 2 * num_pairs
    _check_pairs("num_pairs", num_pairs, symbols)
    if not 0 < queries <= tail:
        raise ConfigError(
            f"seq_len = {seq_len} has {max(tail, 0)} tokens after {num_pairs} pairs, num_queries = {queries}; "
            f"use a seq_len of at least {2 * num_pairs + queries} and a positive num_queries"
        )
    draws = Draws(*counters)
    keys, values = _bindings(draws, batch, num_pairs, symbols)
    # Smallest exponential clocks first: draws without replacement in proportion to the weights.
    clocks = -np.log(draws.uniform(batch, tail)) / np.arange(1, tail + 1) ** (power - 1.0)
    places = 2 * num_pairs + np.argsort(clocks, axis=1, kind="stable")[:, :queries]
    rounds = -(-queries // num_pairs)
    asked = draws.orders(num_pairs, batch, rounds).reshape(batch, -1)[:, :queries]

    tokens = symbols.fillers[draws.below(len(symbols.fillers), batch, seq_len)]
    tokens[:, 0 : 2 * num_pairs : 2] = keys
    tokens[:, 1 : 2 * num_pairs : 2] = values
    np.put_along_axis(tokens, places, np.take_along_axis(keys, asked, 1), 1)
    answers = np.full((batch, seq_len), IGNORE, dtype=np.int64)
    np.put_along_axis(answers, places, np.take_along_axis(values, asked, 1), 1)
    return Recall(tokens, answers)


def needle(
    *counters: int,
    text: np.ndarray,
    num_needles: int,
    symbols: Symbols,
    depth: float | None = None,
    num_queries: int = 1,
) -> Recall:
    """Needles in real text: bindings are inserted into the text and some of their keys asked at its end.

    text: token ids, int64 [B, n]; the result has n + 2 * num_needles + num_queries tokens.
    depth: share of the text that stands before the first needle asked for, 0 to 1; other needles, and all of
    them where it is None, are placed evenly at random. Each key is asked at most once. Guessing any value is
    right once in `len(symbols.values)` times, guessing one of the values of the sequence once in
    `num_needles` times.
    Raises ConfigError for a depth outside 0 to 1, more queries than needles, or too few symbols.
    """
    batch, length = text.shape
    _check_pairs("num_needles", num_needles, symbols)
    if not 0 < num_queries <= num_needles:
        raise ConfigError(f"num_queries = {num_queries} is not allowed; use 1 to num_needles = {num_needles}")
    if depth is not None and not 0 <= depth <= 1:
        raise ConfigError(f"depth = {depth} is not allowed; use a share of the text from 0 to 1")
    draws = Draws(*counters)
    keys, values = _bindings(draws, batch, num_needles, symbols)
    places = draws.below(length + 1, batch, num_needles)
    if depth is not None:
        places[:, 0] = round(depth * length)

    tokens = np.empty((batch, length + 2 * num_needles + num_queries), dtype=np.int64)
    for row in range(batch):
        pairs = np.stack([keys[row], values[row]], axis=1).reshape(-1)
        tokens[row, : length + 2 * num_needles] = np.insert(text[row], np.repeat(places[row], 2), pairs)
    tokens[:, length + 2 * num_needles :] = keys[:, :num_queries]
    answers = np.full(tokens.shape, IGNORE, dtype=np.int64)
    answers[:, length + 2 * num_needles :] = values[:, :num_queries]
    return Recall(tokens, answers)


def scattered(*counters: int, text: np.ndarray, num_needles: int, symbols: Symbols) -> Recall:
    """Needles throughout real text, each asked for once, a log-uniform number of text tokens later.

    text: token ids, int64 [B, n]; the result has n + 3 * num_needles tokens. Meant for training: far more
    questions a sequence than `needle`, at every distance. Raises ConfigError for too few symbols.
    """
    batch, length = text.shape
    _check_pairs("num_needles", num_needles, symbols)
    draws = Draws(*counters)
    keys, values = _bindings(draws, batch, num_needles, symbols)
    places = draws.below(length + 1, batch, num_needles)
    gaps = np.exp(draws.uniform(batch, num_needles) * np.log(length - places + 1.0)) - 1.0
    asked = np.minimum(places + gaps.astype(np.int64), length)

    tokens = np.empty((batch, length + 3 * num_needles), dtype=np.int64)
    answers = np.empty_like(tokens)
    nothing = np.full(num_needles, IGNORE)
    for row in range(batch):
        # At one place of the text all bindings are inserted before all questions.
        where = np.concatenate([np.repeat(places[row], 2), asked[row]])
        pairs = np.stack([keys[row], values[row]], axis=1).reshape(-1)
        tokens[row] = np.insert(text[row], where, np.concatenate([pairs, keys[row]]))
        marks = np.concatenate([np.repeat(nothing, 2), values[row]])
        answers[row] = np.insert(np.full(length, IGNORE), where, marks)
    return Recall(tokens, answers)


def _check_pairs(name: str, pairs: int, symbols: Symbols) -> None:
    most = min(len(symbols.keys), len(symbols.values))
    if not 0 < pairs <= most:
        raise ConfigError(f"{name} = {pairs} is not allowed; use 1 to {most}, the number of reserved keys and values")


def _bindings(draws: Draws, batch: int, pairs: int, symbols: Symbols) -> tuple[np.ndarray, np.ndarray]:
    """Different keys and different values for each sequence, int64 [batch, pairs] each."""
    keys = symbols.keys[draws.orders(len(symbols.keys), batch)[:, :pairs]]
    values = symbols.values[draws.orders(len(symbols.values), batch)[:, :pairs]]
    return keys, values
