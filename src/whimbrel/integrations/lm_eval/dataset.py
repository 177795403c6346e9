"""Generated tasks as documents of lm-eval: one question each, all values as choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from whimbrel.data.draws import Draws
from whimbrel.data.synthetic import IGNORE
from whimbrel.errors import ConfigError, nearest
from whimbrel.evals.tasks import make_task
from whimbrel.integrations.lm_eval.words import SCRIPTS, symbols_of

# Purpose of the random stream that chooses among the questions of a sequence.
_QUESTION = 4


def documents(
    *,
    task: str,
    max_seq_lengths: Sequence[int] = (256, 1024),
    num_samples: int = 64,
    seed: int = 1234,
    words: str = "english",
    **_: Any,
) -> dict[str, Dataset]:
    """The split "test" of a task of `whimbrel.evals.tasks`; lm-eval calls this with the task's metadata.

    max_seq_lengths: words of a prompt, at most; RULER's name for it. num_samples: for each length. words: of
    SCRIPTS. Further metadata, such as the model's arguments, is not used. Raises ConfigError for unknown names and
    lengths that are too short.
    """
    if words not in SCRIPTS:
        raise ConfigError(f"words = '{words}' is not allowed{nearest(words, SCRIPTS)}; use one of {', '.join(SCRIPTS)}")
    rows = [row for length in max_seq_lengths for row in _rows(task, length, num_samples, seed, words)]
    return {"test": Dataset.from_list(rows)}


def _rows(task: str, length: int, num_samples: int, seed: int, words: str) -> Iterator[dict[str, Any]]:
    script = SCRIPTS[words]
    symbols = symbols_of(script)
    made = make_task(task, seed=seed, batch=num_samples, length=length, symbols=symbols)
    choices = [script.words[i] for i in symbols.values]
    draws = Draws(seed, _QUESTION, length)
    for tokens, answers in zip(made.tokens, made.answers, strict=True):
        questions = np.flatnonzero(answers[:, 0] != IGNORE)
        question = int(questions[int(draws.below(len(questions)))])
        yield {
            "prompt": script.write(tokens[: question + 1].tolist()),
            "choices": choices,
            "answers": (answers[question] - symbols.values[0]).tolist(),
            "length": length,
        }


def process_results(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The share of a document's answers among its likeliest choices, as many as it has answers."""
    answers = set(doc["answers"])
    likeliest = np.argsort([-loglikelihood for loglikelihood, _ in results], kind="stable")[: len(answers)]
    share = len(answers & set(likeliest.tolist())) / len(answers)
    return {"accuracy": share, f"accuracy_{doc['length']}": share}


def choices(doc: Mapping[str, Any]) -> list[str]:
    """The choices as they follow a prompt: behind a space between words, with none between reserved tokens."""
    reserved = doc["choices"][0] in SCRIPTS["reserved"].words
    return [word if reserved else f" {word}" for word in doc["choices"]]
