"""A byte-level BPE tokenizer with single digits and reserved symbols for recall tasks."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from whimbrel.errors import ConfigError, DataError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Core

END_OF_TEXT = "<|endoftext|>"
NUM_SYMBOLS = 64
KEY_TOKENS = tuple(f"<|key-{i:02d}|>" for i in range(NUM_SYMBOLS))
VALUE_TOKENS = tuple(f"<|value-{i:02d}|>" for i in range(NUM_SYMBOLS))
SPECIAL_TOKENS = (END_OF_TEXT, *KEY_TOKENS, *VALUE_TOKENS)
MIN_VOCAB = len(SPECIAL_TOKENS) + 256


class Symbols(NamedTuple):
    """Token ids that recall tasks are written in; `fillers` are the ids that stand between them."""

    keys: np.ndarray
    values: np.ndarray
    fillers: np.ndarray


class Tokenizer:
    """Text to token ids and back, lossless; special tokens that are spelt out in a text stay plain text."""

    def __init__(self, core: Core) -> None:
        self._core = core
        core.encode_special_tokens = True
        end = core.token_to_id(END_OF_TEXT)
        if end is None:
            raise DataError(f"the tokenizer has no token {END_OF_TEXT}, which separates documents")
        self.end_of_text: int = end

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
        """A tokenizer of at most `vocab_size` ids learnt from `texts`; equal texts give an equal tokenizer.

        Raises ConfigError if `vocab_size` leaves no room for the special tokens and the 256 bytes.
        """
        from tokenizers import Tokenizer as Core
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < MIN_VOCAB:
            raise ConfigError(
                f"vocab_size = {vocab_size} is not allowed; use at least {MIN_VOCAB} "
                f"({len(SPECIAL_TOKENS)} special tokens and 256 bytes)"
            )
        core = Core(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        return cls(core)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer saved in `path`; raises DataError if the file is missing or damaged."""
        from tokenizers import Tokenizer as Core

        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from error
        try:
            core = Core.from_str(text)
        # The library raises a bare Exception for text that it cannot parse.
        except Exception as error:
            raise DataError(f"tokenizer {path} is damaged: {error}") from error
        return cls(core)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json file."""
        return self._core.to_str(pretty=True)

    def save(self, path: Path) -> None:
        """Write tokenizer.json to `path`."""
        path.write_text(self.to_json(), encoding="utf-8")

    @property
    def sha256(self) -> str:
        """SHA-256 of the saved file."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Token ids in use."""
        return self._core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int64 [n]."""
        return np.array(self._core.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text."""
        encoded = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int64) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are written out, incomplete UTF-8 becomes U+FFFD."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=False)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int64 [vocab_size]; 0 for special tokens."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        special = {i for i, token in self._core.get_added_tokens_decoder().items() if token.special}
        for token, index in self._core.get_vocab(with_added_tokens=True).items():
            # A byte-level token is written with one character for each byte.
            sizes[index] = 0 if index in special else len(token)
        return sizes

    @property
    def symbols(self) -> Symbols:
        """Ids for recall tasks; raises UnsupportedError if this tokenizer has none reserved."""
        keys = [self._core.token_to_id(token) for token in KEY_TOKENS]
        values = [self._core.token_to_id(token) for token in VALUE_TOKENS]
        if None in keys or None in values:
            raise UnsupportedError(
                f"the tokenizer reserves no tokens {KEY_TOKENS[0]} .. {VALUE_TOKENS[-1]} for recall tasks; "
                "train one with `whimbrel data`, or set data.recall_fraction = 0 and leave the recall tasks "
                "out"
            )
        fillers = np.flatnonzero(self.token_bytes)
        return Symbols(np.array(keys), np.array(values), fillers)
