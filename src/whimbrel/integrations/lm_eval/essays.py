"""RULER's essay tasks over a text of one's own, without a network: not the published tasks, and named so."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from whimbrel.data.corpus import read_documents
from whimbrel.errors import DataError
from whimbrel.integrations.lm_eval.copies import datasets_from

PUBLISHED = "baber/paul_graham_essays"
"""The data set that lm-eval 0.4.13 takes essays from."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@contextmanager
def essays_from(path: str | Path, count: Callable[[str], int], longest: int) -> Iterator[None]:
    """Inside, lm-eval's tasks with essays get the text in `path` in place of Paul Graham's.

    path: as in `whimbrel data`, a .txt or .jsonl file or a folder of them. count: tokens of a text. longest: the most
    tokens of a prompt; prompts are cut out of the beginning of the text. Sentences, between which needles are put, are
    nltk's where its data is on this machine, and otherwise end at a full stop, question or exclamation mark.
    Raises DataError for a text that is missing or too short.
    """
    text = "\n".join(document.text for document in read_documents(Path(path)).documents)
    if (held := count(text)) < longest:
        raise DataError(
            f"the essays in {path} have {held:,} tokens, a prompt takes up to {longest:,}; give more text or shorter "
            "lengths"
        )
    logging.getLogger("nltk").setLevel(logging.ERROR)
    from lm_eval.tasks.ruler import prepare_niah

    split = prepare_niah.sent_tokenize

    def sentences(text: str) -> list[str]:
        try:
            return split(text)
        except LookupError:
            return _SENTENCE_END.split(text)

    _forget(prepare_niah)
    try:
        with (
            datasets_from({PUBLISHED: lambda: {"text": [text]}}),
            patch.object(prepare_niah, "sent_tokenize", sentences),
        ):
            yield
    finally:
        _forget(prepare_niah)


def _forget(prepare_niah: Any) -> None:
    """Texts and their sentences are kept by lm-eval for the life of the process."""
    for function in (prepare_niah.get_haystack, prepare_niah.cached_sent_tokenize):
        function.cache_clear()
