"""The decoder: loss, cache, packing, names, initialisation, and what it says about bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from whimbrel.config import ModelConfig
from whimbrel.errors import ConfigError, DataError, UnsupportedError
from whimbrel.mixers.rdn import RDNConfig
from whimbrel.mixers.softmax import SoftmaxConfig
from whimbrel.model import build_model, cache_bytes, set_prefill
from whimbrel.testing.budget import assert_close

HYBRID = ModelConfig(
    vocab_size=53,
    hidden_size=24,
    num_layers=4,
    mlp_size=40,
    softmax_every=2,
    mixer=RDNConfig(num_heads=2, head_dim=8, num_value_heads=4),
    softmax=SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=6),
    init_std=0.2,
)
LINEAR = replace(HYBRID, softmax_every=0)


def make_tokens(batch, time, seed=0):
    return torch.randint(HYBRID.vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def make_model(config=HYBRID):
    return build_model(config, seed=0).double().eval()


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_cross_entropy_of_the_logits(tied):
    model = make_model(replace(HYBRID, tie_embeddings=tied))
    tokens, targets = make_tokens(3, 21), make_tokens(3, 21, seed=1)
    targets[0, 4:9] = -100
    expected = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())
    want = torch.autograd.grad(expected, list(model.parameters()))
    loss = model.loss(tokens, targets)
    got = torch.autograd.grad(loss, list(model.parameters()))
    assert_close("loss", expected, loss, 1e-12)
    for name, a, b in zip(dict(model.named_parameters()), want, got, strict=True):
        assert_close(name, a, b, 1e-9)


def test_mask_leaves_positions_out():
    model, tokens, targets = make_model(), make_tokens(2, 9), make_tokens(2, 9, seed=1)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    per_token = model.per_token_loss(tokens, targets)
    assert per_token.shape == (2, 9)
    assert not per_token.requires_grad
    assert_close("masked", per_token[mask].mean(), model.loss(tokens, targets, mask=mask), 1e-12)


@pytest.mark.parametrize("config", [HYBRID, LINEAR], ids=["hybrid", "linear"])
def test_cached_generation_gives_the_logits_of_one_pass(config):
    model, tokens = make_model(config), make_tokens(2, 80)
    with torch.no_grad():
        whole = model(tokens)
        for prompt in (1, 3, 70):
            logits, cache = model(tokens[:, :prompt])
            pieces = [logits]
            for t in range(prompt, 80):
                logits, cache = model(tokens[:, t : t + 1], cache)
                pieces.append(logits)
            assert_close(f"prompt of {prompt}", whole.logits, torch.cat(pieces, 1), 1e-9)
            assert cache_bytes(cache) == cache_bytes(whole.cache)


def test_chunked_prefill_gives_the_logits_of_one_pass():
    model, tokens = make_model(), make_tokens(2, 75)
    pieces, cache = [], None
    for piece in tokens.split((64, 1, 10), 1):
        logits, cache = model(piece, cache)
        pieces.append(logits)
    assert_close("logits", model(tokens).logits, torch.cat(pieces, 1), 1e-9)


def test_packed_sequences_give_what_each_gives_alone():
    model, lengths = make_model(), (7, 1, 30)
    tokens, targets = make_tokens(1, 38), make_tokens(1, 38, seed=1)
    edges = torch.tensor([0, 7, 8, 38])
    packed = model(tokens, cu_seqlens=edges).logits
    alone = torch.cat([model(t).logits for t in tokens.split(lengths, 1)], 1)
    assert_close("logits", alone, packed, 1e-9)
    expected = F.cross_entropy(alone[0], targets[0])
    assert_close("loss", expected, model.loss(tokens, targets, cu_seqlens=edges), 1e-9)
    rows = model.per_token_loss(tokens, targets, cu_seqlens=edges)
    assert_close("rows", expected, rows.mean(), 1e-9)


def test_a_linear_model_goes_on_from_a_packed_pass():
    model, tokens, edges = make_model(LINEAR), make_tokens(1, 12), torch.tensor([0, 5, 12])
    cache = model(tokens, cu_seqlens=edges).cache
    following = make_tokens(2, 1, seed=1)
    expected = [
        model(torch.cat((t, f[None]), 1)).logits[:, -1:]
        for t, f in zip(tokens.split((5, 7), 1), following, strict=True)
    ]
    assert_close("logits", torch.cat(expected), model(following, cache).logits, 1e-9)


def test_logits_to_keep_keeps_the_last_positions():
    model, tokens = make_model(), make_tokens(2, 9)
    assert_close("logits", model(tokens).logits[:, -2:], model(tokens, logits_to_keep=2).logits, 1e-12)
    assert model(tokens, logits_to_keep=50).logits.shape[1] == 9
    with pytest.raises(ConfigError, match=r"logits_to_keep = -1 is not allowed; use 0 \(all positions\)"):
        model(tokens, logits_to_keep=-1)


def test_parameter_names_are_those_that_optimizers_and_checkpoints_rely_on():
    names = [name for name, _ in build_model(replace(HYBRID, tie_embeddings=False)).named_parameters()]
    linear = ["A_log", "dt_bias", "q_proj", "k_proj", "v_proj", "gate_proj", "gates", "conv", "norm", "o_proj"]
    softmax = ["q_proj", "k_proj", "v_proj", "o_proj"]
    expected = ["embed.weight"]
    for i, mixer in enumerate((linear, softmax, linear, softmax)):
        expected.append(f"blocks.{i}.norm_mixer.weight")
        expected += [f"blocks.{i}.mixer.{n}" + ("" if n in ("A_log", "dt_bias") else ".weight") for n in mixer]
        expected += [f"blocks.{i}.{n}.weight" for n in ("norm_mlp", "mlp.gate", "mlp.up", "mlp.down")]
    assert names == [*expected, "norm.weight", "head.weight"]


def test_the_head_is_tied_by_default():
    model = make_model()
    assert "head.weight" not in model.state_dict()
    hidden = model.hidden(make_tokens(1, 3)).y
    assert_close("logits", hidden @ model.embed.weight.T, model(make_tokens(1, 3)).logits, 1e-12)


@pytest.mark.parametrize(("every", "expected"), [(0, "LLLLL"), (1, "SSSSS"), (2, "LSLSL"), (4, "LLLSL"), (9, "LLLLL")])
def test_every_nth_block_is_softmax(every, expected):
    model = build_model(replace(HYBRID, softmax_every=every, num_layers=5), seed=0)
    kinds = ["S" if type(block.mixer).__name__ == "SoftmaxAttention" else "L" for block in model.blocks]
    assert "".join(kinds) == expected


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(HYBRID, seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    with torch.device("meta"):
        second = build_model(HYBRID, seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(HYBRID, seed=2).state_dict()
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    torch.manual_seed(1)
    assert torch.equal(build_model(HYBRID).state_dict()["embed.weight"], first["embed.weight"])


def test_initial_widths():
    config = replace(HYBRID, hidden_size=96, mlp_size=160, init_std=0.05)
    model = build_model(config, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.05 / 8**0.5 if name.endswith(("o_proj.weight", "down.weight")) else 0.05
            assert abs(float(parameter.detach().std()) / std - 1) < 0.1, name
        if name.endswith(("norm.weight", "norm_mixer.weight", "norm_mlp.weight")):
            assert (parameter == 1).all(), name


def test_only_the_decay_parameters_are_marked():
    model = build_model(HYBRID, seed=0).double()
    marked = {n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {f"blocks.{i}.mixer.{n}" for i in (0, 2) for n in ("A_log", "dt_bias")}


def test_set_prefill_reaches_the_softmax_blocks_and_can_be_taken_off():
    model, tokens, calls = make_model(), make_tokens(1, 6), []

    def prefill(q, k, v, scale):
        calls.append(q.shape)
        return torch.zeros_like(q)

    plain = model(tokens).logits
    assert set_prefill(model, prefill) == 2
    assert not torch.allclose(plain, model(tokens).logits)
    assert len(calls) == 2
    assert set_prefill(model, None) == 2
    assert torch.equal(plain, model(tokens).logits)
    assert set_prefill(make_model(LINEAR), prefill) == 0


def test_bf16_and_autocast_stay_near():
    tokens, targets = make_tokens(2, 40), make_tokens(2, 40, seed=1)
    expected = make_model().loss(tokens, targets).item()
    assert abs(make_model().bfloat16().loss(tokens, targets).item() - expected) < 0.03 * expected
    model = make_model().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.parameters())
    assert abs(loss.item() - expected) < 0.03 * expected


def test_tokens_are_integers():
    with pytest.raises(DataError, match=r"tokens has dtype torch.float32; give ids as torch.int64 or torch.int32"):
        make_model()(torch.ones(1, 5))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (4,), (1, 2, 3)])
def test_an_empty_or_misshapen_batch_is_refused(shape):
    tokens = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(DataError, match=r"tokens has shape \[.*\]; give \[batch, time\] with at least one sequence"):
        make_model()(tokens)
    with pytest.raises(DataError, match="tokens has shape"):
        make_model().loss(tokens, tokens)


def test_ids_outside_of_the_vocabulary_are_refused():
    model, tokens = make_model(), make_tokens(2, 5)
    for bad in (53, -1, -100):
        wrong = tokens.clone()
        wrong[1, 2] = bad
        with pytest.raises(DataError, match=f"tokens holds the id {bad}; ids go from 0 to model.vocab_size - 1 = 52$"):
            model(wrong)
    wrong[1, 2] = 99
    with pytest.raises(DataError, match="targets holds the id 99; ids go from 0 to"):
        model.loss(tokens, wrong)


def test_misshapen_targets_and_masks_are_refused():
    model, tokens = make_model(), make_tokens(2, 5)
    with pytest.raises(DataError, match=r"targets has shape \[2, 4\]; give that of tokens, \[2, 5\]"):
        model.loss(tokens, tokens[:, 1:])
    with pytest.raises(DataError, match=r"mask has shape \[5\]; give that of tokens, \[2, 5\]"):
        model.loss(tokens, tokens, mask=torch.ones(5, dtype=torch.bool))


def test_a_cache_that_does_not_fit_is_refused():
    model, tokens = make_model(), make_tokens(1, 5)
    cache = model(tokens).cache
    with pytest.raises(UnsupportedError, match="cache has 3 states, the model has 4 blocks; pass the cache of this"):
        model(tokens, cache[:3])
    packed = model(tokens, cu_seqlens=torch.tensor([0, 2, 5])).cache
    with pytest.raises(UnsupportedError, match="cache has no state for block 1: a packed pass"):
        model(tokens, packed)
