"""Training batches as a pure function of seed and step, so a run resumes exactly at any world size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from whimbrel.data.draws import Draws
from whimbrel.data.shards import TokenShards
from whimbrel.data.synthetic import IGNORE, mqar, scattered
from whimbrel.data.tokenizer import Symbols
from whimbrel.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

# Purposes of random streams, so that no two share numbers.
_EPOCH, _ROWS, _RECALL, _TASK = range(4)

_MIN_RECALL_LEN = 20
_TOKENS_PER_NEEDLE = 20
_SEGMENT = 32


class _Kind(NamedTuple):
    """Sizes that the episodes of a row are drawn from."""

    pairs: tuple[int, ...]
    spreads: tuple[int, ...]
    """Tokens after the bindings for each question; 1 leaves no filler between the questions."""


# Recall is learnt all at once or not at all. Many short episodes without filler give each step many bindings to
# learn from; on the demo's model only such a start led there within a few hundred steps. Long episodes, filler
# and text come after, and some short ones stay for a model that is late.
_FIRST = _Kind((1, 2), (1,))
_SECOND = _Kind((1, 2, 4), (1,))
_LATER = (_SECOND, _Kind((1, 2, 4, 8, 16, 32), (1,)), _Kind((2, 4, 8, 16, 32), (1, 2, 4, 8)))


class Batch(NamedTuple):
    """`tokens` int64 [B, T] and `targets` int64 [B, T]: the token to predict at each position, or -100."""

    tokens: Tensor
    targets: Tensor


class Arrays(NamedTuple):
    """The same as `Batch`, in NumPy."""

    tokens: np.ndarray
    targets: np.ndarray


class Loader:
    """Batches of text windows and, where asked for, generated recall sequences.

    Text is cut into windows of `seq_len` tokens that do not overlap; each epoch visits every window once, in
    an order that depends on (seed, epoch) alone. `recall_fraction` of a batch's sequences are recall tasks: in
    the first `recall_warmup_steps` short MQAR episodes without filler; then in equal parts such episodes,
    longer ones, ones with filler, and stretches of the text with needles. The position in the data is the
    step and nothing else.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        batch_sequences: int,
        seed: int,
        recall_fraction: float = 0.0,
        recall_warmup_steps: int = 200,
    ) -> None:
        """seq_len: tokens of a sequence. batch_sequences: sequences of a batch over all processes.
        recall_fraction: share of them that are recall tasks. recall_warmup_steps: see the class.

        Raises ConfigError for sizes that are not allowed, DataError if the text is shorter than one window.
        """
        if batch_sequences <= 0:
            raise ConfigError(f"batch_sequences = {batch_sequences} is not allowed; use a positive number")
        if not 0 <= recall_fraction <= 1:
            raise ConfigError(f"data.recall_fraction = {recall_fraction} is not allowed; use a share from 0 to 1")
        self.num_recall = round(recall_fraction * batch_sequences)
        if self.num_recall and seq_len < _MIN_RECALL_LEN:
            raise ConfigError(
                f"data.seq_len = {seq_len} is too short for recall tasks; use at least {_MIN_RECALL_LEN}, "
                "or data.recall_fraction = 0"
            )
        self.num_windows = (shards.num_tokens - 1) // seq_len
        if self.num_windows < 1:
            raise DataError(
                f"split '{shards.split}' of {shards.folder} has {shards.num_tokens} tokens, fewer than one window of "
                f"data.seq_len + 1 = {seq_len + 1}; use a shorter data.seq_len or more text"
            )
        self.shards = shards
        self.seq_len = seq_len
        self.batch_sequences = batch_sequences
        self.seed = seed
        self.recall_warmup_steps = recall_warmup_steps
        self.rank, self.world = 0, 1
        self._symbols = shards.tokenizer().symbols if self.num_recall else None
        self._epoch_orders: dict[int, np.ndarray] = {}

    @property
    def windows_per_batch(self) -> int:
        """Text windows of a batch."""
        return self.batch_sequences - self.num_recall

    def epochs(self, steps: int) -> float:
        """Passes over the text in `steps` batches."""
        return steps * self.windows_per_batch / self.num_windows

    def rank_slice(self, rank: int, world: int) -> Loader:
        """The loader of process `rank` of `world`; the ranks' batches in their order are the whole batch.

        Raises ConfigError if the batch does not divide by `world`.
        """
        if world <= 0 or self.batch_sequences % world:
            raise ConfigError(
                f"a batch of {self.batch_sequences} sequences cannot be shared by {world} processes; "
                f"make batch_tokens a multiple of {world} x data.seq_len = {world * self.seq_len}"
            )
        if not 0 <= rank < world:
            raise ConfigError(f"rank = {rank} is not allowed; use 0 to {world - 1}")
        part = copy.copy(self)
        part.rank, part.world = rank, world
        return part

    def batch(self, step: int) -> Batch:
        """This rank's share of the batch of `step`, counted from 0; tensors on the CPU."""
        import torch

        arrays = self.arrays(step)
        return Batch(torch.from_numpy(arrays.tokens), torch.from_numpy(arrays.targets))

    def arrays(self, step: int) -> Arrays:
        """The same as `batch`, in NumPy."""
        share = self.batch_sequences // self.world
        # The shuffle of the rows spreads the recall sequences over the ranks.
        order = Draws(self.seed, _ROWS, step).orders(self.batch_sequences)
        rows = [self._row(step, int(i)) for i in order[self.rank * share : (self.rank + 1) * share]]
        return Arrays(np.stack([row.tokens for row in rows]), np.stack([row.targets for row in rows]))

    def _row(self, step: int, index: int) -> Arrays:
        """Row `index` of the batch before the shuffle: text first, then recall tasks."""
        if index < self.windows_per_batch:
            window = self._window(step * self.windows_per_batch + index)
            return Arrays(window[:-1], window[1:])
        return self._recall_row(step, index)

    def _recall_row(self, step: int, index: int) -> Arrays:
        assert self._symbols is not None
        draws = Draws(self.seed, _RECALL, step, index)
        counters = (self.seed, _TASK, step, index)
        if step < self.recall_warmup_steps:
            kind = _FIRST if 2 * step < self.recall_warmup_steps else _SECOND
            return _episodes(counters, self.seq_len, self._symbols, kind)
        choice = int(draws.below(len(_LATER) + 1, 1)[0])
        if choice < len(_LATER):
            return _episodes(counters, self.seq_len, self._symbols, _LATER[choice])
        start = int(draws.below(self.shards.num_tokens - self.seq_len + 1, 1)[0])
        return _needles_in_text(counters, self.shards.read(start, start + self.seq_len), self._symbols)

    def _window(self, position: int) -> np.ndarray:
        """The text window at `position` of the endless row of epochs, with the token that follows it."""
        epoch, index = divmod(position, self.num_windows)
        if epoch not in self._epoch_orders:
            if len(self._epoch_orders) >= 4:
                self._epoch_orders.clear()
            self._epoch_orders[epoch] = Draws(self.seed, _EPOCH, epoch).orders(self.num_windows)
        start = int(self._epoch_orders[epoch][index]) * self.seq_len
        return self.shards.read(start, start + self.seq_len + 1)


def _episodes(counters: tuple[int, ...], seq_len: int, symbols: Symbols, kind: _Kind) -> Arrays:
    """MQAR episodes one after the other, of one size for at least _SEGMENT tokens; each may bind a key anew."""
    tokens, answers, filled = [], [], 0
    while filled < seq_len:
        draws = Draws(*counters, filled)
        pairs = _pick(draws, [count for count in kind.pairs if 3 * count <= seq_len])
        length = 2 * pairs + pairs * _pick(draws, kind.spreads)
        made = mqar(
            *(*counters, filled, 1),
            batch=-(-_SEGMENT // length),
            seq_len=length,
            num_pairs=pairs,
            symbols=symbols,
            power=1.0,
        )
        tokens.append(made.tokens.reshape(-1))
        answers.append(made.answers.reshape(-1))
        filled += made.tokens.size
    return Arrays(np.concatenate(tokens)[:seq_len], np.concatenate(answers)[:seq_len])


def _needles_in_text(counters: tuple[int, ...], text: np.ndarray, symbols: Symbols) -> Arrays:
    """The text with bindings and questions in place of its end; text tokens stay targets of those before them."""
    count = min(len(text) // _TOKENS_PER_NEEDLE, len(symbols.keys), len(symbols.values))
    made = scattered(*counters, text=text[None, : len(text) - 3 * count], num_needles=count, symbols=symbols)
    tokens, answers = made.tokens[0], made.answers[0]
    following = np.append(tokens[1:], IGNORE)
    marked = np.isin(following, np.concatenate([symbols.keys, symbols.values]))
    return Arrays(tokens, np.where((answers == IGNORE) & ~marked, following, answers))


def _pick(draws: Draws, choices: Sequence[int]) -> int:
    return choices[int(draws.below(len(choices), 1)[0])]
