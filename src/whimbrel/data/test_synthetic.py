"""Generated recall tasks: what stands where, what is asked, what guessing gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.data.draws import Draws
from whimbrel.data.synthetic import IGNORE, mqar, needle, scattered
from whimbrel.data.tokenizer import Symbols
from whimbrel.errors import ConfigError

SYMBOLS = Symbols(np.arange(1, 17), np.arange(21, 41), np.arange(50, 90))


def test_draws_are_named_by_all_their_counters_and_fixed_for_good():
    assert Draws(1, 2).below(1000, 6).tolist() == Draws(1, 2).below(1000, 6).tolist()
    streams = {tuple(Draws(*c).below(2**32, 4)) for c in [(1, 2), (2, 1), (1, 2, 0), (1,), (2 * 2**32 + 1,)]}
    assert len(streams) == 5
    # Recorded: a change here would change the data of every run.
    assert Draws(1, 2).below(1000, 4).tolist() == [87, 854, 586, 204]
    assert Draws(3).orders(6).tolist() == [5, 2, 1, 4, 3, 0]


def test_draws_are_uniform():
    counts = np.bincount(Draws(5).below(7, 70_000), minlength=7)
    assert np.abs(counts - 10_000).max() < 400
    firsts = np.bincount(Draws(6).orders(5, 50_000)[:, 0], minlength=5)
    assert np.abs(firsts - 10_000).max() < 400
    uniform = Draws(7).uniform(50_000)
    assert 0 < uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01


def bound_values(tokens: np.ndarray, answers: np.ndarray) -> None:
    """Check each answer against the binding that a reader of the sequence would find, and its uniqueness."""
    for row, wanted in zip(tokens, answers, strict=True):
        values = np.flatnonzero(np.isin(row, SYMBOLS.values))
        assert np.isin(row[values - 1], SYMBOLS.keys).all()
        table = dict(zip(row[values - 1].tolist(), row[values].tolist(), strict=True))
        assert len(table) == len(values) == len(set(table.values()))
        queries = np.flatnonzero(wanted != IGNORE)
        assert len(queries)
        assert [table[k] for k in row[queries].tolist()] == wanted[queries].tolist()
        # Every key that is no binding is a question.
        keys = np.flatnonzero(np.isin(row, SYMBOLS.keys))
        assert sorted(set(keys) - set(values - 1)) == queries.tolist()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 16), st.integers(0, 50), st.integers(0, 9), st.sampled_from([0.01, 0.5, 1.0]), st.data())
def test_mqar_asks_after_the_bindings_and_answers_from_them(pairs, spare, seed, power, data):
    length = 3 * pairs + spare
    queries = data.draw(st.one_of(st.none(), st.integers(1, length - 2 * pairs)))
    made = mqar(seed, batch=3, seq_len=length, num_pairs=pairs, symbols=SYMBOLS, num_queries=queries, power=power)
    assert made.tokens.shape == made.answers.shape == (3, length)
    assert made.tokens.dtype == made.answers.dtype == np.int64
    bound_values(made.tokens, made.answers)
    asked = made.answers != IGNORE
    assert (asked.sum(1) == (queries or pairs)).all()
    assert not asked[:, : 2 * pairs].any()
    rest = made.tokens[:, 2 * pairs :][~asked[:, 2 * pairs :]]
    assert np.isin(rest, SYMBOLS.fillers).all()
    for row, mask in zip(made.tokens, asked, strict=True):
        times = np.unique(row[mask], return_counts=True)[1]
        assert times.max() - times.min() <= 1 or queries is not None
        if queries is None:
            assert len(times) == pairs


def test_mqar_is_a_function_of_its_counters():
    def make(*counters):
        return mqar(*counters, batch=2, seq_len=40, num_pairs=5, symbols=SYMBOLS).tokens.tolist()

    assert make(1, 2) == make(1, 2)
    assert make(1, 2) != make(1, 3)
    assert make(1, 2)[0] != make(1, 2)[1]


def test_gaps_follow_the_power_law():
    """With exponent a, a single question stands g tokens behind with probability in proportion to g**(a - 1)."""
    for power in (0.01, 1.0):
        made = mqar(3, batch=20_000, seq_len=12, num_pairs=1, symbols=SYMBOLS, power=power)
        found = np.bincount(np.argmax(made.answers != IGNORE, axis=1) - 2, minlength=10) / 20_000
        weights = np.arange(1, 11) ** (power - 1)
        assert np.abs(found - weights / weights.sum()).max() < 0.015


def test_guessing_a_seen_value_is_right_once_in_the_number_of_pairs():
    made = mqar(4, batch=4000, seq_len=40, num_pairs=8, symbols=SYMBOLS)
    guess = made.tokens[np.arange(4000), 1 + 2 * Draws(9).below(8, 4000)]
    asked = made.answers != IGNORE
    assert abs((made.answers == guess[:, None])[asked].mean() - 1 / 8) < 0.01
    blind = SYMBOLS.values[Draws(10).below(20, 4000)]
    assert abs((made.answers == blind[:, None])[asked].mean() - 1 / 20) < 0.01


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 16), st.integers(0, 60), st.integers(0, 9), st.data())
def test_needles_keep_the_text_and_are_asked_at_its_end(needles, length, seed, data):
    queries = data.draw(st.integers(1, needles))
    depth = data.draw(st.one_of(st.none(), st.floats(0, 1)))
    text = SYMBOLS.fillers[Draws(seed, 77).below(40, 3, length)]
    made = needle(seed, text=text, num_needles=needles, symbols=SYMBOLS, depth=depth, num_queries=queries)
    assert made.tokens.shape == (3, length + 2 * needles + queries)
    bound_values(made.tokens, made.answers)
    assert (made.answers[:, -queries:] != IGNORE).all()
    assert (made.answers[:, :-queries] == IGNORE).all()
    for row, original in zip(made.tokens, text, strict=True):
        assert row[np.isin(row, SYMBOLS.fillers)].tolist() == original.tolist()
        assert len(set(row[-queries:])) == queries
        if depth is not None:
            place = row.tolist().index(row[-queries])
            assert np.isin(row[:place], SYMBOLS.fillers).sum() == round(depth * length)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 16), st.integers(0, 80), st.integers(0, 9))
def test_scattered_needles_are_each_asked_once_behind_their_binding(needles, length, seed):
    text = SYMBOLS.fillers[Draws(seed, 77).below(40, 3, length)]
    made = scattered(seed, text=text, num_needles=needles, symbols=SYMBOLS)
    assert made.tokens.shape == made.answers.shape == (3, length + 3 * needles)
    bound_values(made.tokens, made.answers)
    for row, answers, original in zip(made.tokens, made.answers, text, strict=True):
        assert row[np.isin(row, SYMBOLS.fillers)].tolist() == original.tolist()
        questions = np.flatnonzero(answers != IGNORE)
        assert len(set(row[questions])) == len(questions) == needles
        for place in questions:
            assert row.tolist().index(row[place]) < place


def test_scattered_questions_come_at_every_distance():
    text = np.full((200, 1000), SYMBOLS.fillers[0])
    made = scattered(1, text=text, num_needles=8, symbols=SYMBOLS)
    gaps = []
    for row, answers in zip(made.tokens, made.answers, strict=True):
        gaps += [p - row.tolist().index(row[p]) for p in np.flatnonzero(answers != IGNORE)]
    shares = np.histogram(gaps, [0, 4, 16, 64, 256, 2000])[0] / len(gaps)
    assert shares.min() > 0.08


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pairs": 0}, "num_pairs = 0 is not allowed; use 1 to 16, the number of reserved keys and values"),
        ({"num_pairs": 17}, "num_pairs = 17 is not allowed; use 1 to 16, the number of reserved keys and values"),
        (
            {"seq_len": 11},
            "seq_len = 11 has 3 tokens after 4 pairs, num_queries = 4; "
            "use a seq_len of at least 12 and a positive num_queries",
        ),
        (
            {"num_queries": 0},
            "seq_len = 20 has 12 tokens after 4 pairs, num_queries = 0; "
            "use a seq_len of at least 8 and a positive num_queries",
        ),
    ],
)
def test_mqar_refuses_sizes_that_do_not_fit(change, message):
    with pytest.raises(ConfigError) as caught:
        mqar(0, **({"batch": 1, "seq_len": 20, "num_pairs": 4, "symbols": SYMBOLS} | change))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_needles": 17}, "num_needles = 17 is not allowed; use 1 to 16, the number of reserved keys and values"),
        ({"num_queries": 3}, "num_queries = 3 is not allowed; use 1 to num_needles = 2"),
        ({"depth": 1.5}, "depth = 1.5 is not allowed; use a share of the text from 0 to 1"),
    ],
)
def test_needle_refuses_sizes_that_do_not_fit(change, message):
    text = np.full((1, 10), 50)
    with pytest.raises(ConfigError) as caught:
        needle(0, **({"text": text, "num_needles": 2, "symbols": SYMBOLS} | change))
    assert str(caught.value) == message
