"""Generated tasks: what they ask, and that readers of the answers score 1 and dealers of them score chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from whimbrel.config import Config, with_overrides
from whimbrel.data.draws import Draws
from whimbrel.data.synthetic import IGNORE
from whimbrel.data.tokenizer import NUM_SYMBOLS, Symbols
from whimbrel.errors import ConfigError, DataError
from whimbrel.evals.grid import DENSE, Method, evaluate_grid, mean_of_cells
from whimbrel.evals.recall import held_out_text
from whimbrel.evals.score import score
from whimbrel.evals.tasks import TASKS, Made, fillers, make_task
from whimbrel.model import build_model
from whimbrel.model.decoder import ModelOut
from whimbrel.testing.text import open_shards
from whimbrel.testing.tiny import tiny_overrides

VOCAB = 448
IDS = np.arange(VOCAB)
SYMBOLS = Symbols(IDS[1 : 1 + NUM_SYMBOLS], IDS[100 : 100 + NUM_SYMBOLS], IDS[200:])


class Reader(nn.Module):
    """Gives the answers that stand in `made`, however the sequences are batched."""

    def __init__(self, *tasks: Made) -> None:
        super().__init__()
        self.answers = {
            row.tobytes(): answers for made in tasks for row, answers in zip(made.tokens, made.answers, strict=True)
        }

    def forward(self, tokens: Tensor, *, logits_to_keep: int = 0) -> ModelOut:
        logits = torch.zeros(*tokens.shape, VOCAB)
        for row, ids in zip(logits, tokens, strict=True):
            answers = torch.from_numpy(self.answers[ids.numpy().tobytes()])
            for place in torch.nonzero(answers[:, 0] != IGNORE)[:, 0]:
                row[place, answers[place]] = 1.0
        return ModelOut(logits[:, -logits_to_keep:], ())


def shuffled(made: Made) -> Made:
    """The same answers, dealt out to the questions of all sequences at random."""
    asked = made.answers[..., 0] != IGNORE
    answers = made.answers.copy()
    answers[asked] = answers[asked][Draws(5).orders(int(asked.sum()))]
    return made._replace(answers=answers)


def make(task: str, *, batch: int = 6, length: int = 64, seed: int = 1) -> Made:
    return make_task(task, seed=seed, batch=batch, length=length, symbols=SYMBOLS)


@pytest.mark.parametrize("task", TASKS)
def test_a_reader_of_the_answers_scores_one_and_a_dealer_chance(task: str) -> None:
    made = make(task, batch=300)
    found = score(Reader(made), made.tokens, made.answers, SYMBOLS)
    assert found.interval().value == 1.0
    dealt = score(Reader(shuffled(made)), made.tokens, made.answers, SYMBOLS)
    spread = math.sqrt(dealt.chance / len(dealt.rows))
    assert abs(dealt.interval().value - dealt.chance) < 4 * spread
    assert dealt.chance == made.answers.shape[2] / 64
    assert dealt.chance_seen >= dealt.chance


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [64, 201])
def test_sequences_fill_the_length_and_depend_on_the_seed(task: str, length: int) -> None:
    made = make(task, length=length)
    assert length - 2 <= made.tokens.shape[1] <= length
    assert made.answers.shape[:2] == made.places.shape == made.tokens.shape
    asked = made.answers[..., 0] != IGNORE
    assert asked.any(1).all()
    assert np.isin(made.answers[asked], SYMBOLS.values).all()
    assert ((made.answers != IGNORE).all(2) == asked).all()
    assert np.isnan(made.places[~asked]).all()
    assert np.array_equal(make(task, length=length).tokens, made.tokens)
    assert not np.array_equal(make(task, length=length, seed=2).tokens, made.tokens)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_asked_for_is_unsaid_at_one_question_and_follows_from_the_text(task: str) -> None:
    """Each task solved by its own rule from the tokens before the question."""
    made = make(task, batch=20, length=160)
    keys, values = set(SYMBOLS.keys.tolist()), set(SYMBOLS.values.tolist())
    for tokens, answers, places in zip(made.tokens.tolist(), made.answers, made.places, strict=True):
        questions = np.flatnonzero(answers[:, 0] != IGNORE)
        for question in questions:
            said = _solve(task, tokens[: question + 1], keys, values, answers.shape[1])
            assert task == "regression" or said == set(answers[question].tolist())
            if task in ("needle_single", "needle_multi_key", "list_recall"):
                start = round(places[question] * len(tokens))
                assert tokens[start + (1 if task != "list_recall" else 2)] == answers[question, 0]


def _solve(task: str, tokens: list[int], keys: set[int], values: set[int], wanted: int) -> set[int]:
    question, before = tokens[-1], tokens[:-1]
    if task in ("common_words", "frequent_words"):
        counts = {value: before.count(value) for value in values}
        return set(sorted(values, key=lambda value: -counts[value])[:wanted])
    if task == "copying":
        return {tokens[len(before) - tokens.index(SYMBOLS.keys[0])]}
    if task == "list_recall":
        name = tokens[-2:]
        return {before[i + 2] for i in range(len(before) - 2) if before[i : i + 2] == name}
    bound: dict[int, set[int]] = {}
    for name, value in itertools.pairwise(before):
        if name in keys and value in values:
            bound.setdefault(name, set()).add(value)
        elif name in keys and value in bound and name not in bound and task == "variable_tracking":
            bound[name] = bound[value]
    return bound.get(question, set())


def test_regression_is_solved_by_least_squares_and_better_with_more_examples() -> None:
    from statistics import NormalDist

    made = make("regression", batch=20, length=180)
    levels = np.array([NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)])
    examples = made.tokens.reshape(20, 60, 3)
    inputs, outputs = levels[examples[..., :2] - SYMBOLS.keys[0]], examples[..., 2] - SYMBOLS.values[0]
    errors = []
    for seen in (4, 50):
        wrong = []
        for x, y in zip(inputs, outputs, strict=True):
            weights = np.linalg.lstsq(x[:seen], levels[y[:seen]], rcond=None)[0]
            wrong.append(abs(np.argmin(abs(levels - x[seen] @ weights)) - y[seen]))
        errors.append(np.mean(wrong))
    assert errors[1] < errors[0] < 8
    assert errors[1] < 1
    values, counts = np.unique(outputs, return_counts=True)
    assert len(values) == 64
    assert counts.max() < 4 * counts.mean()


def test_places_of_a_list_are_even_and_split_the_accuracy() -> None:
    made = make("list_recall", batch=80, length=200)
    found = score(Reader(made), made.tokens, made.answers, SYMBOLS)
    # Only what stands in the first half is known.
    right = np.where(made.places[found.rows, found.columns] < 0.5, 1.0, 0.0)
    parts = found._replace(right=right).by_place(made.places, 4)
    assert [(first, part.value) for first, part, _ in parts] == [(0.0, 1.0), (0.25, 1.0), (0.5, 0.0), (0.75, 0.0)]
    assert all(18 <= count <= 22 for *_, count in parts)
    assert all(part.low < part.high for _, part, _ in parts)


def test_a_haystack_of_text_is_used(tmp_path) -> None:
    shards = open_shards(tmp_path / "shards", "validation")
    symbols = shards.tokenizer().symbols
    options = {"seed": 0, "batch": 2, "length": 60, "symbols": symbols}
    made = make_task("needle_single", haystack=held_out_text(shards), **options)
    text = shards.read(0, shards.num_tokens).tolist()
    rest = [token for token in made.tokens[0].tolist() if token in symbols.fillers]
    assert any(text[i : i + len(rest)] == rest for i in range(len(text)))
    with pytest.raises(DataError, match="a haystack takes 99997; use a shorter length or more text"):
        make_task("needle_single", haystack=held_out_text(shards), **options | {"length": 100_000})


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_is_refused_with_the_least(task: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(task, length=1)
    message, least = str(caught.value).rsplit(" ", 1)
    assert message == f"length = 1 has no room for the task '{task}'; use at least"
    made = make(task, length=int(least))
    assert (made.answers != IGNORE).any()


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'copyng'; did you mean 'copying'\?"):
        make("copyng")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> nn.Module:
    overrides = tiny_overrides(tmp_path_factory.mktemp("none")) | {"model.vocab_size": VOCAB}
    return build_model(with_overrides(Config(), {k: v for k, v in overrides.items() if k.startswith("model.")}).model)


def test_the_grid_holds_every_combination_and_its_worst_task(decoder) -> None:
    def blind(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.zeros_like(q)

    methods = (DENSE, Method("blind", "nothing", blind, lambda: 0.25))
    tasks = ("copying", "needle_single", "regression")
    found = evaluate_grid(decoder, SYMBOLS, tasks=tasks, lengths=(30, 40), methods=methods, num_sequences=4)
    assert [(c["length"], c["task"], c["method"]) for c in found["cells"]] == [
        (length, task, method) for length in (30, 40) for task in tasks for method in ("dense", "blind")
    ]
    assert [(r["method"], r["length"]) for r in found["rows"]] == [
        ("dense", 30),
        ("dense", 40),
        ("blind", 30),
        ("blind", 40),
    ]
    for row in found["rows"]:
        mine = [c for c in found["cells"] if (c["method"], c["length"]) == (row["method"], row["length"])]
        assert row["mean"]["value"] == pytest.approx(np.mean([c["value"] for c in mine]))
        assert row["worst"]["value"] == min(c["value"] for c in mine)
        assert row["worst_task"] in [c["task"] for c in mine if c["value"] == row["worst"]["value"]]
        assert row["density"] == (0.25 if row["method"] == "blind" else None)
        assert row["largest_fall"]["value"] == min(c["difference"]["value"] for c in mine)
    assert found["rows"][1]["state_bytes"] > found["rows"][0]["state_bytes"] > 0
    dense = [c for c in found["cells"] if c["method"] == "dense"]
    assert all(c["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0} for c in dense)
    assert decoder.blocks[1].mixer.prefill is None


def test_a_method_that_loses_one_task_shows_in_the_worst_not_much_in_the_mean() -> None:
    tasks = ("copying", "needle_single", "needle_multi_key", "list_recall")
    all_made = [make_task(t, seed=0, batch=8, length=50, symbols=SYMBOLS) for t in tasks]
    model = Reader(all_made[0], all_made[1], shuffled(all_made[2]), all_made[3])
    found = evaluate_grid(model, SYMBOLS, tasks=tasks, lengths=(50,), num_sequences=8)["rows"][0]
    assert found["worst_task"] == "needle_multi_key"
    assert found["worst"]["value"] < 0.3
    assert found["mean"]["value"] >= 0.75
    assert found["mean"]["low"] < found["mean"]["value"] <= found["mean"]["high"]
    assert found["state_bytes"] is None


def test_the_mean_is_surer_than_its_parts() -> None:
    part = {"value": 0.5, "low": 0.3, "high": 0.7}
    assert mean_of_cells([part] * 4) == pytest.approx((0.5, 0.4, 0.6))


def test_the_grid_refuses_what_it_cannot_do(decoder) -> None:
    for changes in ({"tasks": ()}, {"lengths": (30, 30)}, {"methods": (DENSE, DENSE)}):
        name = next(iter(changes))
        with pytest.raises(ConfigError, match=rf"{name} = .* is not allowed; name one at least, and none twice"):
            evaluate_grid(decoder, SYMBOLS, num_sequences=2, **changes)
    with pytest.raises(ConfigError, match="method 'blind' needs softmax blocks, and the model has none; leave it out"):
        evaluate_grid(
            Reader(make_task("copying", seed=0, batch=2, length=30, symbols=SYMBOLS)),
            SYMBOLS,
            tasks=("copying",),
            lengths=(30,),
            num_sequences=2,
            methods=(Method("blind", "", lambda *a: a[0]),),
        )


def test_fillers_are_ordinary_tokens() -> None:
    drawn = fillers(SYMBOLS)(Draws(0), 2, 30)
    assert drawn.shape == (2, 30)
    assert drawn.min() >= 200
