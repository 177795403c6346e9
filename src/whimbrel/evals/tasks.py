"""Recall tasks of any length, written in reserved token ids and made from a seed alone.

A question is a position of a sequence; its answer is a value, or a set of values in any order, and stands in `answers`,
so that whoever reads that scores 1. Values are drawn evenly, so chance is known exactly.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from whimbrel.data.draws import Draws
from whimbrel.data.synthetic import IGNORE, mqar
from whimbrel.data.tokenizer import Symbols
from whimbrel.errors import ConfigError, nearest

Haystack = Callable[[Draws, int, int], np.ndarray]
"""(stream, rows, tokens) -> what stands between the facts, int64 [rows, tokens]."""

NUM_PAIRS = 16
NUM_KEYS, NUM_VALUES = 4, 4
NUM_CHAINS, NUM_HOPS = 4, 3
NUM_COMMON, NUM_RARE, TIMES = 4, 28, 10
NUM_FREQUENT, ZIPF = 3, 2.0
REGRESSION_INPUTS = 2

# Purpose of random streams, beside those of whimbrel.evals.recall.
_TASK = 3


class Made(NamedTuple):
    """Sequences with their questions; a question has `S` right answers."""

    tokens: np.ndarray
    """int64 [B, T]."""
    answers: np.ndarray
    """int64 [B, T, S]: the values that are right after this position in any order, IGNORE where nothing is asked."""
    places: np.ndarray
    """float64 [B, T]: how much of the context stands before what is asked for, 0 to 1; the mean over a set, and for
    `regression` the share of the examples that were seen. nan where nothing is asked, or it stands everywhere."""


class Task(NamedTuple):
    """How a task is made, and what it asks."""

    make: Callable[[Draws, int, int, Symbols, Haystack], Made]
    """(stream, rows, tokens of a sequence, symbols, haystack) -> Made; ConfigError for a length that is too short."""
    about: str


def make_task(
    name: str, *, seed: int, batch: int, length: int, symbols: Symbols, haystack: Haystack | None = None
) -> Made:
    """`batch` sequences of the task `name`, one of TASKS, of at most `length` tokens.

    haystack: what stands between the facts of needles and chains; random fillers if None. The sequences depend on the
    seed, the task and the length only. Raises ConfigError for an unknown task or a length without room for it.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task '{name}'{nearest(name, TASKS)}; use one of {', '.join(TASKS)}")
    draws = Draws(seed, _TASK, zlib.crc32(name.encode()), length)
    return TASKS[name].make(draws, batch, length, symbols, haystack or fillers(symbols))


def fillers(symbols: Symbols) -> Haystack:
    """A haystack of random ordinary tokens."""
    return lambda draws, rows, tokens: symbols.fillers[draws.below(len(symbols.fillers), rows, tokens)]


def _mqar(draws: Draws, batch: int, length: int, symbols: Symbols, haystack: Haystack) -> Made:
    _room("mqar_16_pairs", length, 3 * NUM_PAIRS)
    counter = int(draws.below(2**32))
    tokens, answers = mqar(counter, batch=batch, seq_len=length, num_pairs=NUM_PAIRS, symbols=symbols)
    places = np.full(tokens.shape, np.nan)
    for row, place in zip(*np.nonzero(answers != IGNORE), strict=True):
        places[row, place] = np.argmax(tokens[row] == answers[row, place]) / length
    return Made(tokens, answers[..., None], places)


def _needles(name: str, *, num_keys: int, num_values: int) -> Task:
    """`num_keys` keys with `num_values` values each, one key of them asked for at the end."""
    count = num_keys * num_values

    def make(draws: Draws, batch: int, length: int, symbols: Symbols, haystack: Haystack) -> Made:
        _room(name, length, 2 * count + 1)
        keys = _distinct(draws, symbols.keys, batch, num_keys)
        values = _distinct(draws, symbols.values, batch, count)
        order = draws.orders(count, batch)
        facts = np.stack([np.repeat(keys, num_values, axis=1), values], axis=2)
        facts = np.take_along_axis(facts, order[..., None], 1)
        tokens, starts = _scatter(draws, facts, haystack(draws, batch, length - 2 * count - 1))
        asked = np.take_along_axis(starts, np.argsort(order, axis=1)[:, :num_values], 1)
        return _end_question(tokens, keys[:, :1], values[:, :num_values], asked.mean(1))

    what = "its value" if num_values == 1 else f"its {num_values} values"
    return Task(make, f"{num_keys} key{'s' * (num_keys > 1)} in a haystack; one is asked for {what}")


def _variable_tracking(draws: Draws, batch: int, length: int, symbols: Symbols, haystack: Haystack) -> Made:
    """Chains of assignments: the first key gets a value, each further one the key before it; the last is asked for."""
    links = NUM_HOPS + 1
    count = NUM_CHAINS * links
    _room("variable_tracking", length, 2 * count + 1)
    keys = _distinct(draws, symbols.keys, batch, count).reshape(batch, NUM_CHAINS, links)
    values = _distinct(draws, symbols.values, batch, NUM_CHAINS)
    sources = np.concatenate([values[..., None], keys[..., :-1]], axis=2)
    # Chains are interleaved at random, each in its own order.
    order = np.argsort(np.sort(draws.uniform(batch, NUM_CHAINS, links), axis=2).reshape(batch, -1), axis=1)
    facts = np.stack([keys, sources], axis=3).reshape(batch, count, 2)
    facts = np.take_along_axis(facts, order[..., None], 1)
    tokens, starts = _scatter(draws, facts, haystack(draws, batch, length - 2 * count - 1))
    asked = np.take_along_axis(starts, np.argsort(order, axis=1)[:, :links], 1)
    return _end_question(tokens, keys[:, 0, -1:], values[:, :1], asked.mean(1))


def _copying(draws: Draws, batch: int, length: int, symbols: Symbols, haystack: Haystack) -> Made:
    """Random values, a separator, and the same values again, each to be said."""
    _room("copying", length, 2)
    count = length // 2
    values = symbols.values[draws.below(len(symbols.values), batch, count)]
    separator = np.broadcast_to(symbols.keys[:1], (batch, 1))
    tokens = np.concatenate([values, separator, values[:, :-1]], axis=1)
    answers = np.full((*tokens.shape, 1), IGNORE, dtype=np.int64)
    answers[:, count:, 0] = values
    places = np.full(tokens.shape, np.nan)
    places[:, count:] = np.arange(count) / count
    return Made(tokens, answers, places)


def _common_words(draws: Draws, batch: int, length: int, symbols: Symbols, haystack: Haystack) -> Made:
    """A shuffled list in which a few values stand up to ten times as often as the others; they are asked for."""
    least = NUM_RARE + 2 * NUM_COMMON + 1
    _room("common_words", length, least)
    rare = max(1, (length - 1) // (NUM_RARE + TIMES * NUM_COMMON))
    common = (length - 1 - NUM_RARE * rare) // NUM_COMMON
    return _counted(draws, batch, length, symbols, [common] * NUM_COMMON + [rare] * NUM_RARE, asked=NUM_COMMON)


def _frequent_words(draws: Draws, batch: int, length: int, symbols: Symbols, haystack: Haystack) -> Made:
    """A shuffled list whose counts fall as rank**-2; the most frequent three are asked for."""
    _room("frequent_words", length, 32)
    shares = np.arange(1, len(symbols.values) + 1) ** -ZIPF
    counts = np.floor((length - 1) * shares / shares.sum()).astype(int)
    return _counted(draws, batch, length, symbols, counts.tolist(), asked=NUM_FREQUENT)


def _counted(draws: Draws, batch: int, length: int, symbols: Symbols, counts: list[int], *, asked: int) -> Made:
    values = _distinct(draws, symbols.values, batch, len(counts))
    listed = np.repeat(values, counts, axis=1)
    rest = fillers(symbols)(draws, batch, length - 1 - listed.shape[1])
    listed = np.concatenate([listed, rest], axis=1)
    listed = np.take_along_axis(listed, draws.orders(length - 1, batch), 1)
    question = np.broadcast_to(symbols.keys[:1], (batch, 1))
    return _end_question(listed, question, values[:, :asked], np.full(batch, np.nan))


def _list_recall(draws: Draws, batch: int, length: int, symbols: Symbols, haystack: Haystack) -> Made:
    """A list of records that fills the context, each a name of two keys and a value; one name is asked for at the end.

    The records asked for lie evenly over the list (cf. Liu et al., arXiv 2307.03172).
    """
    _room("list_recall", length, 5)
    names = len(symbols.keys) ** 2
    count = min((length - 2) // 3, names)
    chosen = draws.orders(names, batch)[:, :count]
    first, second = symbols.keys[chosen // len(symbols.keys)], symbols.keys[chosen % len(symbols.keys)]
    values = symbols.values[draws.below(len(symbols.values), batch, count)]
    records = np.stack([first, second, values], axis=2)
    asked = ((np.arange(batch) + draws.uniform(batch)) / batch * count).astype(int)
    rows = np.arange(batch)
    lead = haystack(draws, batch, length - 2 - 3 * count)
    listed = np.concatenate([lead, records.reshape(batch, -1), first[rows, asked][:, None]], axis=1)
    starts = lead.shape[1] + 3 * asked
    return _end_question(listed, second[rows, asked][:, None], values[rows, asked][:, None], starts)


def _regression(draws: Draws, batch: int, length: int, symbols: Symbols, haystack: Haystack) -> Made:
    """Examples x1 x2 y of a linear function without noise; y is asked for, from twice as many examples as inputs on.

    Keys and values stand for levels at equal steps of the normal distribution, and the weights lie on the unit circle,
    so that all levels of y are about equally likely (Garg et al., arXiv 2208.01066, in tokens).
    """
    size = REGRESSION_INPUTS + 1
    skipped = 2 * REGRESSION_INPUTS
    _room("regression", length, size * (skipped + 1))
    count = length // size
    normal = NormalDist()
    levels = np.array([normal.inv_cdf((i + 0.5) / len(symbols.keys)) for i in range(len(symbols.keys))])
    edges = np.array([normal.inv_cdf(i / len(symbols.values)) for i in range(1, len(symbols.values))])
    inputs = draws.below(len(levels), batch, count, REGRESSION_INPUTS)
    angle = 2 * math.pi * draws.uniform(batch)
    weights = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    outputs = symbols.values[np.digitize(np.einsum("bni,bi->bn", levels[inputs], weights), edges)]
    tokens = np.concatenate([symbols.keys[inputs], outputs[..., None]], axis=2).reshape(batch, -1)
    answers = np.full((*tokens.shape, 1), IGNORE, dtype=np.int64)
    places = np.full(tokens.shape, np.nan)
    questions = slice(size * skipped + REGRESSION_INPUTS - 1, None, size)
    answers[:, questions, 0] = outputs[:, skipped:]
    places[:, questions] = np.arange(skipped, count) / count
    return Made(tokens, answers, places)


def _room(task: str, length: int, least: int) -> None:
    if length < least:
        raise ConfigError(f"length = {length} has no room for the task '{task}'; use at least {least}")


def _distinct(draws: Draws, ids: np.ndarray, batch: int, count: int) -> np.ndarray:
    """`count` different ids for each row, int64 [batch, count]."""
    return ids[draws.orders(len(ids), batch)[:, :count]]


def _scatter(draws: Draws, facts: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """facts [B, N, W] put into text [B, n] at random places, in their order: tokens [B, n + N * W], starts [B, N]."""
    rows, count, width = facts.shape
    places = np.sort(draws.below(text.shape[1] + 1, rows, count), axis=1)
    starts = places + width * np.arange(count)
    tokens = np.empty((rows, text.shape[1] + count * width), dtype=np.int64)
    inside = np.zeros(tokens.shape, dtype=bool)
    spots = (starts[..., None] + np.arange(width)).reshape(rows, -1)
    np.put_along_axis(inside, spots, True, 1)
    np.put_along_axis(tokens, spots, facts.reshape(rows, -1), 1)
    tokens[~inside] = text.reshape(-1)
    return tokens, starts


def _end_question(tokens: np.ndarray, question: np.ndarray, values: np.ndarray, starts: np.ndarray) -> Made:
    """`tokens` [B, n], then one token of question; values [B, S]; starts [B] of what is asked for."""
    tokens = np.concatenate([tokens, question], axis=1)
    answers = np.full((*tokens.shape, values.shape[1]), IGNORE, dtype=np.int64)
    answers[:, -1] = values
    places = np.full(tokens.shape, np.nan)
    places[:, -1] = starts / tokens.shape[1]
    return Made(tokens, answers, places)


TASKS: Mapping[str, Task] = {
    "mqar_16_pairs": Task(_mqar, "16 pairs, then each key asked among fillers"),
    "needle_single": _needles("needle_single", num_keys=1, num_values=1),
    "needle_multi_key": _needles("needle_multi_key", num_keys=NUM_KEYS * NUM_VALUES, num_values=1),
    "needle_multi_value": _needles("needle_multi_value", num_keys=NUM_KEYS, num_values=NUM_VALUES),
    "variable_tracking": Task(_variable_tracking, "4 interleaved chains of 4 assignments; the end of one is asked for"),
    "copying": Task(_copying, "random values twice over; each is asked for"),
    "common_words": Task(_common_words, "the 4 values that are common among 28 rare ones"),
    "frequent_words": Task(_frequent_words, "the 3 most frequent values, counts falling as rank**-2"),
    "list_recall": Task(_list_recall, "a list of named values that fills the context; one is asked for, at any place"),
    "regression": Task(_regression, "examples of a linear function of two inputs in 64 levels, at any length"),
}
"""Name -> task. After RULER (Hsieh et al., arXiv 2404.06654) for needles, chains and words."""
