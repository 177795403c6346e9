"""Batches: pure in (seed, step), equal at every number of processes, each window once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.data.loader import Loader
from whimbrel.data.shards import TokenShards, load_tokenizer
from whimbrel.data.synthetic import IGNORE
from whimbrel.errors import ConfigError, DataError, UnsupportedError
from whimbrel.testing.text import make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return TokenShards(make_shards(tmp_path_factory.mktemp("data") / "shards", shard_tokens=700), "train")


def loader(shards, *, seq_len=33, batch_sequences=6, seed=5, recall_fraction=0.5, recall_warmup_steps=4) -> Loader:
    return Loader(
        shards,
        seq_len=seq_len,
        batch_sequences=batch_sequences,
        seed=seed,
        recall_fraction=recall_fraction,
        recall_warmup_steps=recall_warmup_steps,
    )


def test_a_batch_depends_on_seed_and_step_alone(shards):
    forward = [loader(shards).arrays(step) for step in range(5)]
    resumed = loader(shards)
    for step in (3, 4, 0):
        assert np.array_equal(resumed.arrays(step).tokens, forward[step].tokens)
        assert np.array_equal(resumed.arrays(step).targets, forward[step].targets)
    assert not np.array_equal(forward[0].tokens, forward[1].tokens)
    assert not np.array_equal(forward[0].tokens, loader(shards, seed=6).arrays(0).tokens)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_ranks_batches_together_are_the_whole_batch(shards, world):
    whole = loader(shards)
    for step in (0, 7, 1000):
        parts = [whole.rank_slice(rank, world).arrays(step) for rank in range(world)]
        assert np.array_equal(np.concatenate([p.tokens for p in parts]), whole.arrays(step).tokens)
        assert np.array_equal(np.concatenate([p.targets for p in parts]), whole.arrays(step).targets)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(1, 7), st.integers(0, 2**40))
def test_no_window_comes_twice_in_an_epoch_and_all_come(shards, seq_len, batch, seed):
    text = loader(shards, seq_len=seq_len, batch_sequences=batch, seed=seed, recall_fraction=0.0)
    steps = -(-2 * text.num_windows // batch)
    rows, targets = [], []
    for step in range(steps):
        # The order of rows within a batch is shuffled; put the windows back in the order of the epoch.
        arrays = [text._row(step, index) for index in range(batch)]
        rows += [row.tokens for row in arrays]
        targets += [row.targets for row in arrays]
        together = sorted(map(bytes, (row.tokens for row in arrays)))
        assert together == sorted(map(bytes, text.arrays(step).tokens))
    data = shards.read(0, shards.num_tokens)
    count = text.num_windows
    windows = sorted(bytes(data[i * seq_len : (i + 1) * seq_len]) for i in range(count))
    assert count == (shards.num_tokens - 1) // seq_len
    assert sorted(map(bytes, rows[:count])) == windows == sorted(map(bytes, rows[count : 2 * count]))
    follow = sorted(bytes(data[i * seq_len + 1 : (i + 1) * seq_len + 1]) for i in range(count))
    assert sorted(map(bytes, targets[:count])) == follow
    assert text.epochs(count) == batch


def test_recall_sequences_take_no_text_from_the_epoch(shards):
    mixed = loader(shards, seq_len=40)
    count = mixed.num_windows
    rows = [bytes(mixed._row(step, index).tokens) for step in range(-(-count // 3)) for index in range(3)]
    assert mixed.windows_per_batch == 3
    assert len(set(rows[:count])) == count
    assert mixed.epochs(count) == 3


def test_recall_sequences_are_spread_over_the_rows(shards):
    symbols = load_tokenizer(shards.folder).symbols
    counts = np.zeros(6)
    for step in range(60):
        counts += np.isin(loader(shards).arrays(step).tokens, symbols.keys).any(1)
    assert counts.sum() == 3 * 60
    assert counts.min() >= 15


def test_recall_starts_with_short_episodes_without_filler(shards):
    """Half of the warm-up with one and two pairs, half with up to four, then everything."""
    symbols = load_tokenizer(shards.folder).symbols
    task = loader(shards, seq_len=200, recall_fraction=1.0, batch_sequences=4, recall_warmup_steps=20)
    runs: dict[str, set[int]] = {"first": set(), "second": set(), "later": set()}
    with_filler = dict.fromkeys(runs, 0)
    for step in range(60):
        name = "first" if step < 10 else "second" if step < 20 else "later"
        for row in task.arrays(step).tokens:
            with_filler[name] += int(np.isin(row, symbols.fillers).any())
            bindings = np.flatnonzero(np.isin(row, symbols.values))
            breaks = np.flatnonzero(np.diff(bindings) != 2)
            runs[name] |= set(np.diff(np.concatenate([[-1], breaks])).tolist())
    assert runs["first"] == {1, 2}
    assert runs["second"] == {1, 2, 4}
    assert runs["later"] >= {1, 2, 4, 8, 16, 32}
    assert with_filler["first"] == with_filler["second"] == 0
    assert 0.3 < with_filler["later"] / 160 < 0.7


def test_epochs_differ_in_order(shards):
    text = loader(shards, batch_sequences=1, recall_fraction=0.0)
    orders = [[text._window(e * text.num_windows + i).tolist() for i in range(text.num_windows)] for e in range(2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_text_targets_are_the_next_tokens(shards):
    arrays = loader(shards, recall_fraction=0.0).arrays(4)
    assert np.array_equal(arrays.tokens[:, 1:], arrays.targets[:, :-1])


@pytest.mark.parametrize(("fraction", "batch", "count"), [(0.0, 6, 0), (0.5, 6, 3), (1.0, 4, 4), (0.25, 16, 4)])
def test_the_share_of_recall_sequences_is_as_asked(shards, fraction, batch, count):
    symbols = load_tokenizer(shards.folder).symbols
    mixed = loader(shards, recall_fraction=fraction, batch_sequences=batch, seq_len=64)
    for step in (0, 1, 3, 4, 5, 6, 40):
        arrays = mixed.arrays(step)
        assert np.isin(arrays.tokens, symbols.keys).any(1).sum() == count == mixed.num_recall
        answered = np.isin(arrays.targets, symbols.values)
        assert answered.any(1).sum() == count
        # What is asked is a key, and its answer stood right behind the same key before.
        for row, targets in zip(arrays.tokens, arrays.targets, strict=True):
            for place in np.flatnonzero(np.isin(targets, symbols.values)):
                assert row[place] in symbols.keys
                bound = [i for i in range(place) if row[i] == row[place] and row[i + 1] in symbols.values]
                assert row[bound[-1] + 1] == targets[place]


def test_targets_of_recall_sequences_are_answers_or_the_text(shards):
    """Bindings and noise cannot be predicted, so nothing asks for them."""
    symbols = load_tokenizer(shards.folder).symbols
    for step in range(12):
        arrays = loader(shards, recall_fraction=1.0, seq_len=64).arrays(step)
        assert not np.isin(arrays.targets, symbols.keys).any()
        asked = arrays.targets[:, :-1]
        follow = arrays.tokens[:, 1:]
        answers = np.isin(asked, symbols.values)
        assert (asked[~answers & (asked != IGNORE)] == follow[~answers & (asked != IGNORE)]).all()


def test_batches_are_tensors_of_their_own(shards):
    import torch

    part = loader(shards).rank_slice(1, 2)
    batch = part.batch(3)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.shape == batch.targets.shape == (3, 33)
    batch.tokens.zero_()
    assert part.batch(3).tokens.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sequences": 0}, "batch_sequences = 0 is not allowed; use a positive number"),
        ({"recall_fraction": 1.5}, "data.recall_fraction = 1.5 is not allowed; use a share from 0 to 1"),
        (
            {"seq_len": 19},
            "data.seq_len = 19 is too short for recall tasks; use at least 20, or data.recall_fraction = 0",
        ),
    ],
)
def test_sizes_that_are_not_allowed_are_named(shards, changes, message):
    with pytest.raises(ConfigError) as caught:
        loader(shards, **changes)
    assert str(caught.value) == message


def test_a_batch_that_does_not_divide_is_named_with_both_numbers(shards):
    with pytest.raises(ConfigError) as caught:
        loader(shards).rank_slice(0, 4)
    assert str(caught.value) == (
        "a batch of 6 sequences cannot be shared by 4 processes; make batch_tokens a multiple of 4 x data.seq_len = 132"
    )
    with pytest.raises(ConfigError, match="rank = 2 is not allowed; use 0 to 1"):
        loader(shards).rank_slice(2, 2)


def test_too_little_text_is_named_with_its_numbers(shards):
    with pytest.raises(DataError) as caught:
        loader(shards, seq_len=10_000)
    assert str(caught.value) == (
        f"split 'train' of {shards.folder} has {shards.num_tokens} tokens, fewer than one window of "
        "data.seq_len + 1 = 10001; use a shorter data.seq_len or more text"
    )


def test_recall_needs_a_tokenizer_with_symbols(shards, monkeypatch):
    monkeypatch.setattr("whimbrel.data.tokenizer.KEY_TOKENS", ("<|no-such-token|>",))
    with pytest.raises(UnsupportedError, match="reserves no tokens"):
        loader(shards)
    assert loader(shards, recall_fraction=0.0).num_recall == 0
