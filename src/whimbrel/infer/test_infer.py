"""Generation and sparse prefill of a model with random weights: what they promise for any weights."""

from __future__ import annotations

import pytest
import torch

from whimbrel.config import ModelConfig
from whimbrel.errors import ConfigError
from whimbrel.infer import compare_prefill, generate
from whimbrel.mixers.rdn.config import RDNConfig
from whimbrel.mixers.softmax.config import SoftmaxConfig
from whimbrel.model import Decoder, build_model
from whimbrel.sparse.dense.config import DenseConfig
from whimbrel.sparse.window.config import WindowConfig


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = ModelConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        mlp_size=48,
        mixer=RDNConfig(num_heads=2, head_dim=16),
        softmax_every=2,
        softmax=SoftmaxConfig(num_heads=2, num_kv_heads=1, head_dim=16),
        init_std=0.3,  # so that logits are far apart
    )
    return build_model(config, seed=0).eval()


def prompt(batch: int = 2, time: int = 50) -> torch.Tensor:
    return torch.randint(0, 97, (batch, time), generator=torch.Generator().manual_seed(time))


def test_greedy_tokens_are_the_likeliest_of_the_whole_sequence_so_far(model):
    tokens = prompt()
    made = generate(model, tokens, max_new_tokens=5).tokens
    for n in range(5):
        whole = torch.cat([tokens, made[:, :n]], 1)
        with torch.no_grad():
            assert torch.equal(model(whole).logits[:, -1].argmax(-1), made[:, n])


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_a_prompt_in_pieces_gives_the_same_tokens(model, chunk):
    whole = generate(model, prompt(), max_new_tokens=4).tokens
    assert torch.equal(generate(model, prompt(), max_new_tokens=4, chunk_tokens=chunk).tokens, whole)


def test_a_generation_goes_on_from_its_cache(model):
    tokens = prompt()
    made = generate(model, tokens, max_new_tokens=3)
    with torch.no_grad():
        following = model(prompt(2, 1), made.cache).logits[:, -1]
        whole = model(torch.cat([tokens, made.tokens, prompt(2, 1)], 1)).logits[:, -1]
    torch.testing.assert_close(following, whole, rtol=1e-3, atol=1e-4)


def test_draws_follow_the_seed_and_the_likeliest(model):
    greedy = generate(model, prompt(), max_new_tokens=6).tokens
    assert torch.equal(generate(model, prompt(), max_new_tokens=6, temperature=5.0, top_k=1).tokens, greedy)
    one, same, other = (
        generate(model, prompt(), max_new_tokens=6, temperature=5.0, seed=seed).tokens for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with torch.no_grad():
        likeliest = model(prompt()).logits[:, -1].topk(3).indices
    for seed in range(20):
        drawn = generate(model, prompt(), max_new_tokens=1, temperature=5.0, top_k=3, seed=seed).tokens
        assert (drawn == likeliest).any(-1).all()


def test_the_end_is_when_every_row_has_stopped(model):
    made = generate(model, prompt(), max_new_tokens=30, temperature=3.0, seed=3).tokens
    stop = int(made[0, 4])
    first = [int((row == stop).nonzero()[0, 0]) if (row == stop).any() else None for row in made]
    expected = 30 if None in first else max(first) + 1
    ended = generate(model, prompt(), max_new_tokens=30, temperature=3.0, seed=3, stop_token=stop).tokens
    assert torch.equal(ended, made[:, :expected])
    alone = generate(model, prompt(1), max_new_tokens=30).tokens
    assert generate(model, prompt(1), max_new_tokens=30, stop_token=int(alone[0, 2])).tokens.shape[1] <= 3


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "top_k", "chunk_tokens"])
def test_negative_numbers_are_named(model, name):
    with pytest.raises(ConfigError) as error:
        generate(model, prompt(), **({"max_new_tokens": 1} | {name: -1}))
    assert str(error.value) == f"{name} = -1 is not allowed; use 0 or more"


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0)])
def test_an_empty_prompt_is_named(model, shape):
    with pytest.raises(ConfigError) as error:
        generate(model, torch.zeros(shape, dtype=torch.long), max_new_tokens=1)
    assert str(error.value) == f"prompt has shape {shape}; generation needs [B, T] with at least one token"


def test_prefill_over_all_blocks_changes_nothing(model):
    tokens = prompt(1, 200)
    found = compare_prefill(model, tokens, DenseConfig(block_size=32), audit_rows=16, repeats=2)
    assert found.max_logit_difference < 1e-4
    assert found.top1_agreement == 1
    assert found.loss_sparse == pytest.approx(found.loss_dense, abs=1e-5)
    (layer,) = found.layers  # one of the two blocks is softmax
    assert layer.density == 1
    assert layer.coverage_low == pytest.approx(1, abs=1e-5)
    assert len(found.seconds_dense) == len(found.seconds_sparse) == 2


def test_what_a_window_leaves_out_is_measured_and_taken_off_again(model):
    tokens = prompt(1, 200)
    with torch.no_grad():
        before = model(tokens).logits
    window = WindowConfig(sink_tokens=0, window_tokens=32, block_size=32)
    found = compare_prefill(model, tokens, window, audit_rows=16, repeats=1)
    (layer,) = found.layers
    assert layer.density < 0.5
    assert 0 < layer.coverage_low < layer.coverage_mean < 1
    assert found.max_logit_difference > 1e-3
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


def test_a_comparison_without_a_run_is_refused(model):
    with pytest.raises(ConfigError) as error:
        compare_prefill(model, prompt(1), DenseConfig(), repeats=0)
    assert str(error.value) == "repeats = 0 is not allowed; use a positive number"
