from __future__ import annotations

import math

import pytest
import torch

from whimbrel.config import ModelConfig
from whimbrel.data.tokenizer import Tokenizer
from whimbrel.errors import ConfigError
from whimbrel.evals.diagnostics import clip_rate, diagnose, plain
from whimbrel.mixers.rdn.config import RDNConfig
from whimbrel.mixers.softmax.config import SoftmaxConfig
from whimbrel.model import build_model
from whimbrel.testing.tiny import WORDS


@pytest.fixture(scope="module")
def symbols():
    return Tokenizer.train([" ".join(WORDS)], vocab_size=448).symbols


@pytest.fixture
def model():
    config = ModelConfig(
        vocab_size=448,
        hidden_size=32,
        num_layers=2,
        mlp_size=32,
        mixer=RDNConfig(num_heads=2, head_dim=16),
        softmax_every=2,
        softmax=SoftmaxConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    )
    return build_model(config, seed=0)


def text(batch: int = 2, time: int = 40) -> torch.Tensor:
    return torch.randint(0, 448, (batch, time), generator=torch.Generator().manual_seed(0))


def test_every_head_and_layer_is_looked_at_and_the_model_is_left_alone(model, symbols) -> None:
    tokens = text()
    before = model(tokens).logits
    found = diagnose(model, tokens, symbols)
    assert torch.equal(model(tokens).logits, before)
    assert model.training
    assert sorted((head.block, head.head, head.kind) for head in found.heads) == [
        (0, 0, "rdn"),
        (0, 1, "rdn"),
        (1, 0, "softmax"),
        (1, 1, "softmax"),
    ]
    assert [head.rise for head in found.heads] == sorted((head.rise for head in found.heads), reverse=True)
    assert found.answer_loss == pytest.approx(math.log(448), abs=0.3)
    (layer,) = found.layers
    assert (layer.block, len(layer.norms), len(layer.half_lives)) == (0, 2, 2)
    # dt from 1e-3 to 0.1 and A from 1 to 16: half-lives from 0.4 to 700 tokens
    assert all(0.1 < half < 2000 for half in layer.half_lives)
    assert plain(found)["sink_rate"] == found.sink_rate


def test_a_head_that_writes_nothing_costs_nothing(model, symbols) -> None:
    with torch.no_grad():
        model.blocks[1].mixer.o_proj.weight[:, 16:] = 0
        model.blocks[0].mixer.o_proj.weight.mul_(50)
    rises = {(head.block, head.head): head.rise for head in diagnose(model, text(), symbols).heads}
    assert rises[1, 1] == 0
    assert abs(rises[0, 0]) > 1e-4


def test_a_head_that_reads_the_first_token_is_a_sink(model, symbols) -> None:
    attention = model.blocks[1].mixer
    even = diagnose(model, text(1), symbols)
    assert even.sink_rate == 0
    assert all(share == pytest.approx(1 / 30, rel=0.5) for *_, share in even.sinks)
    # Keys of the first token alone, and queries along them.
    heads = attention.heads

    def pulled(x, positions):
        q, k, v = heads(x, positions)
        k = torch.zeros_like(k)
        k[:, 0, :, 0] = 100.0
        q = torch.zeros_like(q)
        q[:, :, 1, 0] = 1.0
        return q, k, v

    attention.heads = pulled
    sinks = {head: share for _, head, share in diagnose(model, text(1), symbols).sinks}
    assert sinks[1] > 0.99
    assert sinks[0] < 0.1
    assert diagnose(model, text(1), symbols).sink_rate == 0.5


def test_the_clip_rate_counts_what_is_cut() -> None:
    generator = torch.Generator().manual_seed(1)
    k = torch.nn.functional.normalize(torch.randn(2, 9, 1, 4, generator=generator), dim=-1)
    v = torch.randn(2, 9, 2, 3, generator=generator)
    decay, beta = -torch.rand(2, 9, 2, generator=generator), torch.rand(2, 9, 2, generator=generator)
    q = k
    assert clip_rate(q, k, v, decay, beta, delta=True, clip=100.0) == 0
    assert clip_rate(q, k, v, decay, beta, delta=True, clip=1e-9) == 1
    # Without a write the residual is v itself.
    still = clip_rate(q, k, v, decay, torch.zeros_like(beta), delta=False, clip=1.0)
    assert still == pytest.approx(float((v.abs() > 1).float().mean()))
    # A token that is written twice by the delta rule with beta 1 leaves nothing over the second time.
    k2, v2 = k[:, :1].expand(2, 2, 1, 4), v[:, :1].expand(2, 2, 2, 3)
    none, one = torch.zeros(2, 2, 2), torch.ones(2, 2, 2)
    twice = clip_rate(k2, k2, v2, none, one, delta=True, clip=1e-4)
    assert twice == 0.5


def test_a_text_that_is_too_short(model, symbols) -> None:
    with pytest.raises(ConfigError, match="the text has 7 tokens; give at least 16"):
        diagnose(model, text(1, 7), symbols)
