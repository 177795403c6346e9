"""How often a model knows the answers of generated sequences."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from torch import nn

from whimbrel.data.synthetic import IGNORE
from whimbrel.data.tokenizer import Symbols
from whimbrel.errors import ConfigError
from whimbrel.evals.intervals import Interval, accuracy_interval
from whimbrel.evals.model import evaluating, row_chunks, to_tokens


class Scores(NamedTuple):
    """What was right, question by question."""

    rows: np.ndarray
    """The sequence of each question, int64 [questions]."""
    columns: np.ndarray
    """Its position in the sequence."""
    right: np.ndarray
    """The share of its answers that were given, float64; 0 or 1 where there is one."""
    chance: float
    """The share that values picked at random would give."""
    chance_seen: float
    """The share that values picked at random from those of the sequence would give."""
    num_sequences: int

    def by_row(self) -> tuple[np.ndarray, np.ndarray]:
        """Right answers and questions of each sequence, [sequences]."""
        right = np.bincount(self.rows, weights=self.right, minlength=self.num_sequences)
        return right, np.bincount(self.rows, minlength=self.num_sequences)

    def interval(self) -> Interval:
        """The share that was right, with Wilson's interval (see `accuracy_interval`)."""
        return accuracy_interval(*self.by_row())

    def by_place(self, places: np.ndarray, parts: int = 8) -> list[tuple[float, Interval, int]]:
        """The same in `parts` equal stretches of `places` [B, T], from 0 to 1: (first place, interval, questions)."""
        where = places[self.rows, self.columns]
        found = []
        for first, last in itertools.pairwise(np.linspace(0, 1, parts + 1)):
            inside = (where >= first) & ((where < last) | (last == 1))
            if inside.any():
                part = self._replace(rows=self.rows[inside], right=self.right[inside])
                right, trials = part.by_row()
                asked = trials > 0
                found.append((float(first), accuracy_interval(right[asked], trials[asked]), int(inside.sum())))
        return found


def check_sequences(num_sequences: int) -> None:
    """ConfigError unless there is one at least."""
    if num_sequences < 1:
        raise ConfigError(f"num_sequences = {num_sequences} is not allowed; use a positive number")


def score(model: nn.Module, tokens: np.ndarray, answers: np.ndarray, symbols: Symbols) -> Scores:
    """How many of each question's answers are among the model's likeliest values, as many as it has answers.

    model: `model(tokens, logits_to_keep=n).logits` gives [B, n, vocabulary]. tokens: int64 [B, T]. answers: int64
    [B, T, S], or [B, T] for one answer each; IGNORE where nothing is asked.
    """
    answers = answers.reshape(*tokens.shape, -1)
    asked = answers[..., 0] != IGNORE
    rows, columns = np.nonzero(asked)
    count, length = tokens.shape
    # Logits before the first question are not needed; where it stands at the end that is all but the last position.
    skipped = int(np.argmax(asked.any(0)))
    right = np.zeros(len(rows))
    with evaluating(model) as device:
        values = to_tokens(symbols.values, device)
        for part in row_chunks(count, length, device):
            logits = model(to_tokens(tokens[part], device), logits_to_keep=length - skipped).logits[..., values]
            picked = symbols.values[logits.topk(answers.shape[2], dim=-1).indices.cpu().numpy()]
            here = (rows >= part.start) & (rows < part.stop)
            said = picked[rows[here] - part.start, columns[here] - skipped]
            wanted = answers[rows[here], columns[here]]
            right[here] = (said[:, :, None] == wanted[:, None]).any(1).mean(1)
    return Scores(
        rows=rows,
        columns=columns,
        right=right,
        chance=answers.shape[2] / len(symbols.values),
        chance_seen=_chance_seen(tokens, answers, rows, columns, symbols),
        num_sequences=count,
    )


def _chance_seen(
    tokens: np.ndarray, answers: np.ndarray, rows: np.ndarray, columns: np.ndarray, symbols: Symbols
) -> float:
    """Answers of a question over the different values of its sequence, the mean over all questions."""
    is_value = np.isin(tokens, symbols.values)
    seen = [
        len(np.union1d(ids[marks], asked[asked != IGNORE]))
        for ids, marks, asked in zip(tokens, is_value, answers, strict=True)
    ]
    return math.fsum(answers.shape[2] / seen[row] for row in rows) / max(1, len(rows))
