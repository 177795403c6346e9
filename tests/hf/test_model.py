"""The transformers model against the decoder: weights, logits, masks, packing, gradients, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from whimbrel.config import ModelConfig
from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.integrations.hf import WhimbrelCache, WhimbrelConfig, WhimbrelForCausalLM, WhimbrelModel
from whimbrel.integrations.hf.fixtures.models import HYBRID, MODELS, SOFTMAX, left_padded, pair, tokens
from whimbrel.sparse.flex_prefill.config import FlexPrefillConfig
from whimbrel.testing.budget import assert_close


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_the_decoders_to_the_bit(name):
    own, model = pair(MODELS[name])
    ids = tokens(2, 75)
    expected = own(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids, logits_to_keep=3).logits, own(ids, logits_to_keep=3).logits)
    cache, past = None, None
    for piece in ids.split((40, 1, 1, 33), 1):
        logits, cache = own(piece, cache)
        out = model(piece, past_key_values=past)
        past = out.past_key_values
        assert_close("in pieces", logits, out.logits, 2e-6)  # a mask instead of a flag for the causal order
    assert past.get_seq_length() == 75


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saved_models_are_loaded_without_remote_code(name, tmp_path):
    own, model = pair(MODELS[name], prefill=FlexPrefillConfig(coverage=0.9))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config
    assert config["model_type"] == "whimbrel"
    assert config["prefill"]["kind"] == "flex_prefill"
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, WhimbrelForCausalLM)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(2, 33)
    assert torch.equal(loaded.eval()(ids).logits, own(ids).logits)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_config == MODELS[name]
    body = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(body, WhimbrelModel)
    assert torch.equal(body(ids).last_hidden_state, own.hidden(ids).y)


def test_the_type_is_unknown_before_the_import(tmp_path):
    pair()[1].save_pretrained(tmp_path)
    code = """
import sys
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "whimbrel" in str(error)
else:
    sys.exit("known already")
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_names_of_weights_are_the_decoders():
    for config in MODELS.values():
        own, model = pair(config)
        tied = {"head.weight"} if config.tie_embeddings else set()
        assert set(model.state_dict()) == set(own.state_dict()) | tied
        assert (model.head.weight is model.embed.weight) == config.tie_embeddings


def test_config_says_what_other_tools_read():
    config = WhimbrelConfig.from_model(HYBRID, eos_token_id=3)
    assert config.layer_types == ["linear_attention", "full_attention"] * 2
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.sliding_window is None
    assert config.eos_token_id == 3
    assert WhimbrelConfig.from_model(MODELS["window"]).sliding_window == 9
    assert WhimbrelConfig.from_model(MODELS["gdn"]).num_attention_heads == 2
    assert WhimbrelConfig().model_config == ModelConfig()
    assert WhimbrelConfig(mixer={"kind": "gdn", "num_heads": 5}).mixer["num_heads"] == 5


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"mixer": {"kind": "rdm"}}, ConfigError, r"model.mixer.kind = 'rdm' is not known; did you mean 'rdn'\?"),
        ({"mixer": {"kind": "rdn", "haed_dim": 3}}, ConfigError, r"'model.mixer.haed_dim'; did you mean 'head_dim'\?"),
        ({"num_hidden_layers": 0}, ConfigError, "model.num_layers = 0 is not allowed"),
        (
            {"mixer": {"kind": "softmax", "window": 4}, "softmax": {"kind": "softmax", "window": 9}},
            UnsupportedError,
            r"softmax windows of \[4, 9\] tokens in one model",
        ),
    ],
)
def test_config_refuses_what_the_decoder_refuses(fields, error, message):
    with pytest.raises(error, match=message):
        WhimbrelConfig(**fields)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_changes_nothing(name, attention):
    model = pair(MODELS[name])[1].double()
    model.set_attn_implementation(attention)
    rows = [tokens(1, n, seed=n)[0] for n in (23, 9, 1)]
    ids, mask = left_padded(rows)
    left = model(ids, attention_mask=mask).logits
    right = model(ids.flip(1), attention_mask=mask.flip(1)).logits
    for i, row in enumerate(rows):
        assert_close("on the left", model(row[None]).logits[0], left[i, -len(row) :], 1e-11)
        assert_close("on the right", model(row.flip(0)[None]).logits[0], right[i, : len(row)], 1e-11)


@torch.no_grad()
def test_a_state_behind_padding_on_the_right_is_not_gone_on_from():
    _, model = pair()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    out = model(tokens(2, 4), attention_mask=mask)
    with pytest.raises(UnsupportedError, match=r"pad on the left \(tokenizer.padding_side = 'left'\)"):
        model(tokens(2, 1), attention_mask=torch.ones(2, 5), past_key_values=out.past_key_values)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_sequences_are_separate(name):
    model = pair(MODELS[name])[1].double()
    ids = tokens(2, 30)
    positions = torch.cat([torch.arange(n) for n in (11, 2, 17)])[None]
    packed, cache = model(ids, position_ids=positions, return_dict=False)[0], model(ids).past_key_values
    assert model(ids, position_ids=positions).past_key_values is None
    with pytest.raises(UnsupportedError, match="leave no cache; pass use_cache=False"):
        model(ids, position_ids=positions, use_cache=True)
    assert cache.get_seq_length() == 30
    parts = [model(part).logits for part in ids.split((11, 2, 17), 1)]
    assert_close("by position_ids", torch.cat(parts, 1), packed, 1e-11)
    edges = torch.tensor([0, 11, 13, 30], dtype=torch.int32)
    again = model(ids[:1], position_ids=positions, cu_seq_lens_q=edges, use_cache=False).logits
    assert_close("by bounds", packed[:1], again, 1e-11)
    rows = torch.stack((positions[0], torch.arange(30)))
    mixed = model(ids, position_ids=rows, use_cache=False).logits
    assert_close("one row only", torch.stack((packed[0], model(ids[1:]).logits[0])), mixed, 1e-11)


@pytest.mark.parametrize("name", ["rdn-hybrid", "rla-untied", "softmax"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    _, model = pair(MODELS[name])
    ids = tokens(2, 21)
    model.train()(ids, labels=ids).loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    model.blocks[0].norm_mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2
    for key, p in model.named_parameters():
        assert torch.equal(expected[key], p.grad), key


def test_loss_is_the_decoders_and_takes_the_number_of_items():
    own, model = pair()
    ids = tokens(3, 19)
    labels = ids.clone()
    labels[0, :7] = -100
    targets = torch.cat((labels[:, 1:], torch.full((3, 1), -100)), 1)
    loss = model(ids, labels=labels).loss
    assert_close("loss", own.loss(ids, targets), loss, 1e-6)
    count = int((targets != -100).sum())
    halved = model(ids, labels=labels, num_items_in_batch=torch.tensor(2 * count)).loss
    assert_close("over twice the items", loss / 2, halved, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu(name, dtype):
    own, model = pair(MODELS[name])
    own, model, ids = own.to("cuda", dtype), model.to("cuda", dtype), tokens(2, 200).cuda()
    assert_close("logits", own(ids).logits, model(ids).logits, 1e-5 if dtype == torch.float32 else 3e-2)
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    if dtype == torch.float32:  # these weights carry roundings far, and chunks begin elsewhere without the padding
        assert_close("padded", model(ids[:1, 60:]).logits[0], model(ids, attention_mask=mask).logits[0, 60:], 1e-3)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 205)


@torch.no_grad()
def test_other_forms_of_call():
    _, model = pair()
    ids = tokens(2, 12)
    out = model(ids, output_hidden_states=True)
    assert torch.equal(out.logits, model(inputs_embeds=model.get_input_embeddings()(ids)).logits)
    assert len(out.hidden_states) == 5
    model.config.output_hidden_states = True
    assert torch.equal(model(ids).hidden_states[2], out.hidden_states[2])
    model.config.output_hidden_states = False
    assert model(ids).hidden_states is None
    assert torch.equal(model.head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    kept = torch.tensor([0, 5])
    assert torch.equal(model.eval()(ids, logits_to_keep=kept).logits, out.logits[:, kept])


def test_the_vocabulary_can_grow():
    _, model = pair()
    model.resize_token_embeddings(70)
    assert model(tokens(1, 4)).logits.shape == (1, 4, 70)
    assert model.head.weight is model.embed.weight
    assert model.config.model_config.vocab_size == 70


def test_new_weights_are_drawn_as_ours_are(tmp_path):
    config = replace(HYBRID, hidden_size=64, mlp_size=128, vocab_size=400, init_std=0.02, tie_embeddings=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(WhimbrelConfig.from_model(config))

    def check(model):
        narrow = 0.02 / 8**0.5
        for name, p in model.state_dict().items():
            if name.endswith(("norm.weight", "norm_mixer.weight", "norm_mlp.weight")):
                assert bool((p == 1).all()), name
            elif name.endswith("A_log"):
                assert 0 <= float(p.min()) <= float(p.max()) <= 2.8, name
            elif name.endswith("dt_bias"):
                assert -7 <= float(p.min()) <= float(p.max()) <= -2.2, name
            elif name.endswith("conv.weight"):
                assert 0.4 <= float(p.abs().max()) <= 0.5, name
            else:
                std = narrow if name.endswith(("o_proj.weight", "mlp.down.weight")) else 0.02
                assert abs(float(p.std()) / std - 1) < 0.15, name

    check(model)
    # What a file lacks is drawn in the same way; what it has stays.
    state = {name: p for name, p in model.state_dict().items() if "blocks.0." not in name and "blocks.1." not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = WhimbrelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[1] for key in info["missing_keys"]} == {"0", "1"}
    check(loaded)
    assert torch.equal(loaded.blocks[2].mixer.q_proj.weight, model.blocks[2].mixer.q_proj.weight)


def test_decays_stay_in_fp32_in_half_precision(tmp_path):
    pair()[1].save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert dtypes["A_log"] == dtypes["dt_bias"] == torch.float32
    assert model.embed.weight.dtype == torch.bfloat16
    assert bool(model(tokens(1, 20)).logits.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m: {"past_key_values": transformers.DynamicCache()}, "is a DynamicCache, which cannot hold recurrent"),
        (lambda m: {"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask has 4 dimensions"),
        (lambda m: {"output_attentions": True}, "output_attentions is not available"),
        (lambda m: {"inputs_embeds": torch.zeros(1, 3, 32)}, "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_calls_that_are_refused(arguments, message):
    _, model = pair()
    with pytest.raises(UnsupportedError, match=message):
        model(tokens(1, 3), **arguments(model))


def test_a_recurrent_cache_does_not_go_back():
    _, model = pair()
    cache = model(tokens(2, 5)).past_key_values
    with pytest.raises(UnsupportedError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(UnsupportedError, match="keeps no keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    cache.reset()
    assert cache.layers[0].get_seq_length() == 0
    assert cache.layers[0].state is None
    dense = pair(replace(HYBRID, mixer=SOFTMAX))[1]
    assert not dense._is_stateful
    assert WhimbrelCache(dense.config).get_seq_length() == 0
