"""Evaluations against models whose results are known: a uniform one, an oracle, a random one."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from whimbrel.config import EvalConfig
from whimbrel.data.shards import TokenShards, load_tokenizer
from whimbrel.data.tokenizer import MIN_VOCAB, Tokenizer
from whimbrel.errors import ConfigError, DataError
from whimbrel.evals.bpb import compare_bpb, evaluate_bpb
from whimbrel.evals.recall import evaluate_mqar, evaluate_needle
from whimbrel.evals.suite import run_evals
from whimbrel.evals.tasks import TASKS as GRID
from whimbrel.testing.text import make_shards

VOCAB = MIN_VOCAB + 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = make_shards(tmp_path_factory.mktemp("data") / "shards", vocab_size=VOCAB)
    return TokenShards(folder, "validation")


@pytest.fixture(scope="module")
def symbols(shards):
    return shards.tokenizer().symbols


class Logits(NamedTuple):
    logits: Tensor


class Model(nn.Module):
    """Gives `scores(tokens)` [B, T, VOCAB] and notes how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.modes: set[tuple[bool, bool]] = set()
        self.rows: list[int] = []

    def forward(self, tokens: Tensor, cache: None = None, *, logits_to_keep: int = 0) -> Logits:
        self.modes.add((self.training, torch.is_grad_enabled()))
        self.rows.append(len(tokens))
        return Logits(self.scores(tokens)[:, -logits_to_keep:] + self.weight)

    def scores(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, VOCAB)


class Bigram(Model):
    """Scores that depend on the last token only."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))

    def scores(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


class Oracle(Model):
    """Answers a key with the token that followed it when it was last seen in front of a value."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self.values = set(values.tolist())

    def scores(self, tokens: Tensor) -> Tensor:
        scores = torch.zeros(*tokens.shape, VOCAB)
        for row, ids in enumerate(tokens.tolist()):
            bound: dict[int, int] = {}
            for place, token in enumerate(ids):
                if place and token in self.values:
                    bound[ids[place - 1]] = token
                if token in bound:
                    scores[row, place, bound[token]] = 9.0
        return scores


class Random(Model):
    """Scores drawn anew for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def scores(self, tokens: Tensor) -> Tensor:
        return torch.rand(*tokens.shape, VOCAB, generator=self.generator)


class SeenValue(Random):
    """Knows which values occurred, and picks one of them at random."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self.values = torch.from_numpy(values)

    def scores(self, tokens: Tensor) -> Tensor:
        seen = torch.zeros(len(tokens), VOCAB)
        for row, ids in enumerate(tokens):
            seen[row, ids[torch.isin(ids, self.values)]] = 1.0
        return super().scores(tokens) + seen[:, None]


def test_a_uniform_model_needs_log_vocabulary_bits_a_token(shards):
    found = evaluate_bpb(Model(), shards, seq_len=37)
    assert found.num_tokens == shards.num_tokens
    assert found.num_bytes == shards.num_bytes
    assert found.nats_per_token == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(VOCAB) * shards.num_tokens / shards.num_bytes, rel=1e-6)
    assert found.nats_low == pytest.approx(found.nats_high)
    assert found.low < found.bits_per_byte < found.high


@pytest.mark.parametrize("seq_len", [1, 37, 10_000])
def test_every_token_is_counted_once_whatever_the_window(shards, seq_len):
    """The score of a bigram model does not depend on the window, so all windows give one total."""
    model = Bigram()
    tokens = torch.from_numpy(shards.read(0, shards.num_tokens))
    inputs = torch.cat([torch.tensor([shards.end_of_text]), tokens[:-1]])
    want = nn.functional.cross_entropy(model.table[inputs].double(), tokens, reduction="none")
    found = evaluate_bpb(model, shards, seq_len=seq_len)
    assert found.block_nats.sum() == pytest.approx(float(want.sum()), rel=1e-6)
    assert found.nats_per_token == pytest.approx(float(want.mean()), rel=1e-6)
    assert found.block_tokens.sum() == found.num_tokens == shards.num_tokens
    assert found.block_bytes.sum() == found.num_bytes == shards.num_bytes
    assert len(found.block_nats) == -(-shards.num_tokens // seq_len)
    assert found.block_nats[0] == pytest.approx(float(want[:seq_len].sum()), rel=1e-6)


def test_a_part_of_the_text_counts_its_own_bytes(shards):
    found = evaluate_bpb(Model(), shards, seq_len=16, max_tokens=100)
    assert found.num_tokens == 100
    assert found.num_bytes == shards.tokenizer().token_bytes[shards.read(0, 100)].sum()
    assert found.block_tokens.tolist() == [16] * 6 + [4]
    assert evaluate_bpb(Model(), shards, seq_len=16, max_tokens=10**9).num_tokens == shards.num_tokens


def test_bits_by_position_add_up(shards):
    found = evaluate_bpb(Bigram(), shards, seq_len=32)
    assert [first for first, _ in found.by_position] == list(range(0, 32, 4))
    ids = shards.read(0, shards.num_tokens)
    sizes = np.bincount(np.arange(len(ids)) % 32 // 4, weights=shards.tokenizer().token_bytes[ids])
    mean = sum(bits.value * size for (_, bits), size in zip(found.by_position, sizes, strict=True)) / sizes.sum()
    assert mean == pytest.approx(found.bits_per_byte)
    assert all(bits.low < bits.value < bits.high for _, bits in found.by_position)


def test_the_model_is_left_in_its_mode_and_large_jobs_are_cut(shards, monkeypatch):
    monkeypatch.setattr("whimbrel.evals.model.CPU_BATCH_TOKENS", 100)
    model = Model().train()
    evaluate_bpb(model, shards, seq_len=30, max_tokens=300)
    assert model.modes == {(False, False)}
    assert model.training
    assert model.rows == [3, 3, 3, 1]
    model.eval()
    evaluate_bpb(model, shards, seq_len=30, max_tokens=60)
    assert not model.training


def test_the_mode_comes_back_after_an_error(shards):
    class Breaks(Model):
        def scores(self, tokens):
            raise RuntimeError("no")

    model = Breaks().train()
    with pytest.raises(RuntimeError, match="no"):
        evaluate_bpb(model, shards, seq_len=30)
    assert model.training
    assert torch.is_grad_enabled()


def test_two_models_are_compared_block_by_block(shards):
    a, b = (evaluate_bpb(Bigram(seed), shards, seq_len=32) for seed in (0, 1))
    found = compare_bpb(a, b)
    assert found.value == pytest.approx(a.nats_per_token - b.nats_per_token)
    assert found.low < found.value < found.high
    assert compare_bpb(a, a) == (0.0, 0.0, 0.0)
    other = evaluate_bpb(Model(), shards, seq_len=64)
    with pytest.raises(ConfigError) as caught:
        compare_bpb(a, other)
    assert str(caught.value) == (
        f"two evaluations of {len(a.block_nats)} and {len(other.block_nats)} blocks ({a.num_bytes} and "
        f"{other.num_bytes} bytes) are not of the same text; evaluate both with the same shards and sizes"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len = 0 is not allowed; use a positive number of tokens"),
        ({"max_tokens": -1}, "max_tokens = -1 is not allowed; use 0 (all) or a positive number"),
    ],
)
def test_bpb_refuses_sizes(shards, changes, message):
    with pytest.raises(ConfigError) as caught:
        evaluate_bpb(Model(), shards, **({"seq_len": 8} | changes))
    assert str(caught.value) == message


def test_an_empty_split_is_named(tmp_path):
    shards = TokenShards(make_shards(tmp_path / "s", documents={"train": [], "validation": []}), "validation")
    with pytest.raises(DataError, match=r"split .validation. of .* is empty; nothing can be evaluated on it"):
        evaluate_bpb(Model(), shards, seq_len=8)


def test_an_oracle_recalls_everything(shards, symbols):
    found = evaluate_mqar(Oracle(symbols.values), symbols, pairs=(4, 20), num_sequences=8, seq_len=50)
    found += evaluate_needle(Oracle(symbols.values), shards, symbols, lengths=(60,), num_sequences=8)
    assert [cell.accuracy for cell in found] == [1.0] * 5
    assert all(cell.low < cell.high == 1.0 for cell in found)
    assert [(cell.length, cell.num_pairs, cell.num_queries) for cell in found[:2]] == [(50, 4, 32), (60, 20, 160)]
    assert [(cell.task, cell.depth) for cell in found[2:]] == [("needle", d) for d in (0.1, 0.5, 0.9)]
    assert all(cell.num_queries == cell.num_sequences == 8 for cell in found[2:])


def test_a_random_model_is_at_chance(shards, symbols):
    found = evaluate_mqar(Random(), symbols, pairs=(8, 32), num_sequences=40, seq_len=100)
    found += evaluate_needle(Random(), shards, symbols, lengths=(64,), num_sequences=300, depths=(0.5,))
    for cell in found:
        assert cell.chance == 1 / 64
        assert cell.low <= cell.chance <= cell.high
        assert cell.high < 0.07


def test_a_model_that_knows_only_which_values_occurred_is_at_its_own_chance(shards, symbols):
    found = evaluate_mqar(SeenValue(symbols.values), symbols, pairs=(4, 8), num_sequences=60, seq_len=40)
    found += evaluate_needle(
        SeenValue(symbols.values), shards, symbols, lengths=(64,), num_sequences=300, depths=(0.5,), num_needles=5
    )
    assert [cell.chance_seen for cell in found] == [1 / 4, 1 / 8, 1 / 5]
    for cell in found:
        assert cell.low <= cell.chance_seen <= cell.high


def test_two_models_see_the_same_sequences(symbols):
    class Notes(Model):
        def scores(self, tokens):
            seen.append(tokens.clone())
            return super().scores(tokens)

    seen: list[Tensor] = []
    for pairs in [(4, 8), (8,)]:
        evaluate_mqar(Notes(), symbols, pairs=pairs, num_sequences=3, seq_len=40, seed=7)
    assert torch.equal(seen[1], seen[2])
    evaluate_mqar(Notes(), symbols, pairs=(8,), num_sequences=3, seq_len=40, seed=8)
    assert not torch.equal(seen[2], seen[3])


def test_recall_refuses_what_does_not_fit(shards, symbols):
    with pytest.raises(ConfigError, match="num_sequences = 0 is not allowed; use a positive number"):
        evaluate_mqar(Model(), symbols, num_sequences=0)
    with pytest.raises(ConfigError) as caught:
        evaluate_needle(Model(), shards, symbols, lengths=(9,))
    assert str(caught.value) == ("needle length = 9 has no room for 4 needles and a question; use at least 10")
    with pytest.raises(DataError) as error:
        evaluate_needle(Model(), shards, symbols, lengths=(100_000,))
    assert str(error.value) == (
        f"split 'validation' of {shards.folder} has {shards.num_tokens} tokens, a needle length of 100000 takes "
        "99991; use a shorter length or more text"
    )


def test_the_suite_gives_plain_data(shards, symbols, capsys):
    config = EvalConfig(validation_tokens=500, num_sequences=5, mqar_pairs=(4, 8), needle_lengths=(40, 80))
    found = run_evals(Oracle(symbols.values), shards.tokenizer(), shards, config, seq_len=64, quiet=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["bpb"]["num_tokens"] == 500
    assert found["bpb"]["blocks"] == 8
    assert [cell["num_pairs"] for cell in found["mqar"]] == [4, 8]
    assert [(cell["length"], cell["depth"]) for cell in found["needle"]] == [
        (length, depth) for length in (40, 80) for depth in (0.1, 0.5, 0.9)
    ]
    assert {cell["accuracy"] for cell in found["mqar"] + found["needle"]} == {1.0}
    assert capsys.readouterr() == ("", "")
    only = run_evals(Model(), shards.tokenizer(), shards, config, seq_len=500, tasks=("bpb",), quiet=True)
    assert list(only) == ["bpb"]
    assert only["bpb"]["low"] is None


def test_the_suite_refuses_unknown_tasks_and_foreign_tokenizers(shards):
    with pytest.raises(ConfigError) as caught:
        run_evals(Model(), shards.tokenizer(), shards, EvalConfig(), tasks=("neddle",))
    assert str(caught.value) == (
        f"unknown task 'neddle'; did you mean 'needle'?; use one of bpb, mqar, needle, grid, {', '.join(GRID)}"
    )
    other = Tokenizer.train(["other words"], vocab_size=MIN_VOCAB)
    with pytest.raises(DataError) as error:
        run_evals(Model(), other, shards, EvalConfig())
    assert str(error.value) == (
        f"the shards in {shards.folder} were made with another tokenizer than the model's; "
        "evaluate on shards made for this model"
    )
    assert load_tokenizer(shards.folder).to_json() == shards.tokenizer().to_json()
