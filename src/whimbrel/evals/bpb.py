"""Bits per byte of held-out text: what the model would need to store it, whatever its tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from torch.nn import functional as F

from whimbrel.data.shards import TokenShards
from whimbrel.data.synthetic import IGNORE
from whimbrel.errors import ConfigError, DataError
from whimbrel.evals.intervals import Interval, paired_difference, ratio_interval
from whimbrel.evals.model import evaluating, row_chunks, to_tokens

POSITION_PARTS = 8


class BpbResult(NamedTuple):
    """Loss on held-out text, in all and by block; a block is one window of the text."""

    bits_per_byte: float
    low: float
    high: float
    """Ends of the bootstrap interval of `bits_per_byte` over blocks; nan for a single block."""
    nats_per_token: float
    nats_low: float
    nats_high: float
    """Ends of the interval of `nats_per_token`."""
    num_tokens: int
    num_bytes: int
    block_nats: np.ndarray
    """Sum of the loss over the tokens of each block, float64 [blocks]."""
    block_tokens: np.ndarray
    block_bytes: np.ndarray
    by_position: tuple[tuple[int, Interval], ...]
    """Bits per byte in `POSITION_PARTS` equal stretches of the window: (first position, bits per byte)."""

    def summary(self) -> dict[str, Any]:
        """The figures without the arrays, for JSON; an end of an interval that is not known is None."""
        names = (
            *("bits_per_byte", "low", "high", "nats_per_token", "nats_low", "nats_high"),
            *("num_tokens", "num_bytes"),
        )
        values = {name: getattr(self, name) for name in names}
        return {name: None if math.isnan(value) else value for name, value in values.items()} | {
            "blocks": len(self.block_nats),
            "by_position": [
                [first, *(None if math.isnan(value) else value for value in bits)] for first, bits in self.by_position
            ],
        }


def evaluate_bpb(
    model: nn.Module, shards: TokenShards, *, seq_len: int, max_tokens: int = 0, seed: int = 0
) -> BpbResult:
    """Bits per byte over the first `max_tokens` tokens of `shards`, 0 meaning all of them.

    model: `model(tokens).logits` gives [B, T, vocabulary] for int64 tokens [B, T]. seq_len: window in tokens;
    windows do not overlap and each begins without memory of the one before, but with its last token as input,
    and the first of all with the separator, so that every token is predicted exactly once. The loss of the
    separators counts, their bytes (none) do not.
    seed: of the bootstrap. Raises ConfigError for sizes that are not allowed, DataError for an empty split.
    """
    if seq_len < 1:
        raise ConfigError(f"seq_len = {seq_len} is not allowed; use a positive number of tokens")
    if max_tokens < 0:
        raise ConfigError(f"max_tokens = {max_tokens} is not allowed; use 0 (all) or a positive number")
    count = min(max_tokens or shards.num_tokens, shards.num_tokens)
    if not count:
        raise DataError(f"split '{shards.split}' of {shards.folder} is empty; nothing can be evaluated on it")
    targets = shards.read(0, count)
    inputs = np.concatenate([[shards.end_of_text], targets[:-1]])
    nats = _windows(_token_nats(model, inputs, targets, seq_len), seq_len, 0.0)
    sizes = _windows(shards.tokenizer().token_bytes[targets], seq_len, 0)
    block_nats, block_bytes = nats.sum(1), sizes.sum(1)
    block_tokens = _windows(np.ones(count, dtype=np.int64), seq_len, 0).sum(1)
    bits = ratio_interval(block_nats / math.log(2), block_bytes, seed=seed)
    loss = ratio_interval(block_nats, block_tokens, seed=seed)
    return BpbResult(
        bits_per_byte=bits.value,
        low=bits.low,
        high=bits.high,
        nats_per_token=loss.value,
        nats_low=loss.low,
        nats_high=loss.high,
        num_tokens=count,
        num_bytes=int(block_bytes.sum()),
        block_nats=block_nats,
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        by_position=tuple(_by_position(nats, sizes, seed)),
    )


def _by_position(nats: np.ndarray, sizes: np.ndarray, seed: int) -> Iterator[tuple[int, Interval]]:
    """(first position, bits per byte) of each stretch that has bytes; nats, sizes [windows, seq_len]."""
    edges = np.linspace(0, nats.shape[1], POSITION_PARTS + 1).astype(int)
    for first, last in itertools.pairwise(edges):
        size = sizes[:, first:last].sum(1)
        held = size > 0
        if held.any():
            yield int(first), ratio_interval(nats[held, first:last].sum(1) / math.log(2), size[held], seed=seed)


def _windows(values: np.ndarray, seq_len: int, fill: float) -> np.ndarray:
    """[n] -> [windows, seq_len], the last window filled up."""
    rows = -(-len(values) // seq_len)
    padded = np.full(rows * seq_len, fill, dtype=values.dtype)
    padded[: len(values)] = values
    return padded.reshape(rows, seq_len)


def _token_nats(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, seq_len: int) -> np.ndarray:
    """Loss of each target in nats, float64 [n]."""
    rows, wanted = _windows(inputs, seq_len, 0), _windows(targets, seq_len, IGNORE)
    nats = np.empty(rows.shape, dtype=np.float64)
    with evaluating(model) as device:
        for part in row_chunks(len(rows), seq_len, device):
            logits = model(to_tokens(rows[part], device)).logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), to_tokens(wanted[part], device).flatten(), reduction="none")
            nats[part] = loss.view(-1, seq_len).double().cpu().numpy()
    return nats.reshape(-1)[: len(targets)]


def compare_bpb(a: BpbResult, b: BpbResult, *, seed: int = 0) -> Interval:
    """Loss of `a` minus loss of `b` in nats per token, with a bootstrap over the blocks that both were given.

    Raises ConfigError if the two were not evaluated on the same blocks.
    """
    if not np.array_equal(a.block_tokens, b.block_tokens) or not np.array_equal(a.block_bytes, b.block_bytes):
        raise ConfigError(
            f"two evaluations of {len(a.block_tokens)} and {len(b.block_tokens)} blocks ({a.num_bytes} and "
            f"{b.num_bytes} bytes) are not of the same text; evaluate both with the same shards and sizes"
        )
    return paired_difference(a.block_nats, b.block_nats, a.block_tokens, seed=seed)
