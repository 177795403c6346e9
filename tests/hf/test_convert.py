"""Checkpoints to and from transformers: equal logits on both sides, files that both read, and errors by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import whimbrel
from whimbrel.checkpoint import save_weights
from whimbrel.cli import main
from whimbrel.config import Config, load_config, to_toml
from whimbrel.data import Tokenizer
from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError
from whimbrel.infer import load_tokenizer
from whimbrel.integrations.hf import WhimbrelForCausalLM, convert_checkpoint
from whimbrel.integrations.hf.family import family_config
from whimbrel.integrations.hf.fixtures.models import HYBRID, MODELS, SOFTMAX, pair, tokens
from whimbrel.merge import merge_checkpoints
from whimbrel.model import build_model
from whimbrel.sparse.flex_prefill.config import FlexPrefillConfig
from whimbrel.testing.budget import assert_close

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "bos_token_id": 3,
    "eos_token_id": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
RELEASED = {
    "llama": ("llama", {"rms_norm_eps": 1e-5}),
    "llama, biases": ("llama", {"attention_bias": True, "head_dim": 16}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "mistral, window": ("mistral", {"sliding_window": 7, "head_dim": 8}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def released(folder: Path, name: str = "llama", **options):
    """A random model of the family, saved by transformers."""
    kind, fields = RELEASED[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **(SIZES | fields | options))
    ).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                p.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", RELEASED)
@torch.no_grad()
def test_a_released_model_comes_in_and_goes_back(name, tmp_path, capsys):
    original = released(tmp_path / "released", name)
    ids = tokens(2, 60)
    expected = original(ids).logits
    assert main(["convert", str(tmp_path / "released"), "--out", str(tmp_path / "ours")]) == 0
    assert f"(source: {original.config.model_type})" in capsys.readouterr().out
    own = whimbrel.load_model(tmp_path / "ours")
    assert_close("our decoder", expected, own(ids).logits, 2e-6)
    hosted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert isinstance(hosted, WhimbrelForCausalLM)
    assert_close("in transformers", expected, hosted(ids).logits, 2e-6)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(original.generate(ids, **options), hosted.generate(ids, **options))
    kind = original.config.model_type
    assert main(["convert", str(tmp_path / "ours"), "--out", str(tmp_path / "back"), "--to", kind, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == sum(p.numel() for p in original.parameters())
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(original)
    assert torch.equal(back(ids).logits, expected)
    for field in ("eos_token_id", "bos_token_id", "max_position_embeddings"):
        assert getattr(back.config, field) == getattr(hosted.config, field) == SIZES[field]


def test_a_window_and_a_stretched_context_change_the_logits(tmp_path):
    """Else the comparison above would show nothing about them."""
    ids = tokens(2, 60)
    for name, plain in (("mistral, window", "mistral"), ("llama 3.1", "llama"), ("llama, linear", "llama")):
        a = released(tmp_path / "a", name)(ids).logits
        assert not torch.allclose(a, released(tmp_path / "b", plain)(ids).logits, atol=1e-2)


@torch.no_grad()
def test_many_files_in_half_precision_come_in_unchanged(tmp_path):
    model = released(tmp_path / "small").bfloat16()
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    report = convert_checkpoint(tmp_path / "many", tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert report.written_bytes == sum(2 * p.numel() for p in stored.values())
    assert torch.equal(stored["blocks.1.mixer.q_proj.weight"], model.model.layers[1].self_attn.q_proj.weight)
    hosted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert hosted.dtype == torch.bfloat16
    assert_close(
        "logits", whimbrel.load_model(tmp_path / "ours")(tokens(1, 9)).logits, hosted.float()(tokens(1, 9)).logits, 1e-6
    )


@pytest.fixture(scope="module")
def step(tmp_path_factory) -> Path:
    """A checkpoint as a run leaves it: weights, configuration, tokenizer."""
    folder = tmp_path_factory.mktemp("run") / "step-000010"
    texts = ["the sea was calm, and a bird of the shore went over the sand <|endoftext|> 12 ships"] * 3
    tokenizer = Tokenizer.train(texts, vocab_size=420)
    config = Config(model=replace(HYBRID, vocab_size=420), prefill=FlexPrefillConfig(coverage=0.9))
    folder.mkdir()
    save_weights(folder / "model.safetensors", build_model(config.model, seed=1))
    tokenizer.save(folder / "tokenizer.json")
    (folder / "config.toml").write_text(to_toml(config))
    return folder


@torch.no_grad()
def test_a_checkpoint_of_a_run_loads_in_transformers(step, tmp_path):
    report = convert_checkpoint(step, tmp_path / "out")
    assert (report.source_type, report.model_type) == ("run", "whimbrel")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    own, ours = whimbrel.load_model(step), load_tokenizer(step)
    text = "A bird <|endoftext|> went over 12 ships, naïvely."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == ours.encode(text).tolist()
    assert tokenizer.decode(ids[0]) == text == ours.decode(ids[0])
    assert torch.equal(model(ids).logits, own(ids).logits)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == ours.end_of_text
    assert model.config.prefill["coverage"] == 0.9
    batch = tokenizer(["a bird", "the sea was calm"], return_tensors="pt", padding=True)
    assert batch.attention_mask[0, 0] == 0
    assert batch.attention_mask[0, -1] == 1
    texts = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=5, do_sample=False))
    assert texts[1].startswith("the sea was calm")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_transformers_saved_loads_here(name, tmp_path):
    """Also after a second conversion, and when it was written over what was there."""
    own, model = pair(MODELS[name])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ids = tokens(2, 40)
    for source, out in (("theirs", "ours"), ("ours", "again"), ("theirs", "ours")):
        convert_checkpoint(tmp_path / source, tmp_path / out, overwrite=True)
        assert torch.equal(whimbrel.load_model(tmp_path / out)(ids).logits, own(ids).logits)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


@torch.no_grad()
def test_converted_checkpoints_are_merged_for_both_sides(tmp_path):
    for seed in (0, 1):
        model = WhimbrelForCausalLM(pair()[1].config)
        model.load_state_dict(build_model(HYBRID, seed=seed).state_dict(), strict=False)
        model.save_pretrained(tmp_path / f"theirs-{seed}")
        convert_checkpoint(tmp_path / f"theirs-{seed}", tmp_path / f"ours-{seed}")
    for source in ("ours", "theirs"):
        merge_checkpoints([tmp_path / f"{source}-{seed}" for seed in (0, 1)], tmp_path / f"{source}-merged")
    own = whimbrel.load_model(tmp_path / "ours-merged")
    ids = tokens(1, 30)
    for source in ("ours", "theirs"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{source}-merged").eval()
        assert torch.equal(loaded(ids).logits, own(ids).logits)


@pytest.mark.parametrize(("width", "rank"), [(16, None), (64, 32), (512, 128)])
def test_the_optimizer_that_is_written_fits_the_model(width, rank, tmp_path):
    """Two heads of half the width share the keys of one; matrices of fewer than 32 rows are left to AdamW."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    released(tmp_path / "theirs", hidden_size=width, intermediate_size=2 * width, **heads)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    config = load_config(str(tmp_path / "ours" / "config.toml"))
    optimizer = config.optim.build(config.optim.groups(whimbrel.load_model(tmp_path / "ours")))
    assert getattr(config.optim, "rank", None) == rank
    assert optimizer.param_groups


def test_a_folder_of_transformers_is_told_how_to_come_in(tmp_path):
    pair()[1].save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"run whimbrel convert .*theirs --out DIR"):
        whimbrel.load_model(tmp_path / "theirs")


def test_a_decoder_goes_out_only_to_a_type_that_computes_it(tmp_path):
    plain = replace(HYBRID, mixer=SOFTMAX, softmax_every=0)
    for kind in ("llama", "mistral"):
        assert family_config(plain, kind).model_type == kind
    refused = {
        (
            "llama",
            replace(SOFTMAX, qk_norm=True),
        ): r"softmax.qk_norm = True .* it must be False for the model type 'llama', or keep it",
        ("llama", replace(SOFTMAX, window=4)): "softmax.window = 4",
        ("llama", replace(SOFTMAX, qkv_bias=True)): "softmax.qkv_bias = True",
        ("mistral", replace(SOFTMAX, qkv_bias=True, out_bias=True)): "softmax.qkv_bias = True",
        ("qwen2", SOFTMAX): "softmax.qkv_bias = False",
        ("qwen3", SOFTMAX): "softmax.qk_norm = False",
    }
    for (kind, mixer), message in refused.items():
        with pytest.raises(UnsupportedError, match=message):
            family_config(replace(plain, mixer=mixer), kind)
    with pytest.raises(UnsupportedError, match="has the same softmax attention in every block, this model has not"):
        family_config(HYBRID, "llama")
    with pytest.raises(UnsupportedError, match="model type 'gemma' cannot be written; use one of llama"):
        family_config(plain, "gemma")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot be converted; it must be 'silu'"),
        ({"mlp_bias": True}, "mlp_bias = True cannot be converted; it must be false"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type = 'yarn' cannot be converted; it must be 'default', 'linear' or 'llama3'",
        ),
    ],
)
def test_options_that_the_decoder_lacks_are_named(options, message, tmp_path):
    released(tmp_path / "released", **options)
    with pytest.raises(UnsupportedError, match=message):
        convert_checkpoint(tmp_path / "released", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_of_two_kinds_are_refused(tmp_path):
    released(tmp_path / "released", "qwen2, window", max_window_layers=1)
    with pytest.raises(UnsupportedError, match=r"layer_types = \['full_attention', 'sliding_attention'\]"):
        convert_checkpoint(tmp_path / "released", tmp_path / "out")


def test_another_model_type_is_refused(tmp_path):
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedError, match="model_type = 'gpt2' cannot be converted; use one of llama, mistral"):
        convert_checkpoint(tmp_path / "gpt2", tmp_path / "out")


def test_files_that_do_not_fit_are_refused(tmp_path):
    released(tmp_path / "released")
    file = tmp_path / "released" / "model.safetensors"
    good = load_file(file)
    norm = "model.norm.weight"

    def convert(tensors):
        save_file(tensors, file, metadata={"format": "pt"})
        return convert_checkpoint(tmp_path / "released", tmp_path / "out")

    with pytest.raises(CheckpointError, match=f"tensor '{norm}' is missing from"):
        convert({name: value for name, value in good.items() if name != norm})
    with pytest.raises(CheckpointError, match=rf"tensor '{norm}' in .* has shape \[31\], but \[32\]"):
        convert(good | {norm: torch.ones(31)})
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.9.x' of .* is not in the model"):
        convert(good | {"model.layers.9.x": torch.ones(3)})
    assert not (tmp_path / "out").exists()
    convert(good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    with pytest.raises(ConfigError, match="out exists; choose another folder, or overwrite"):
        convert(good)
    with pytest.raises(ConfigError, match="to = 'gpt2' is not allowed; use one of whimbrel, llama"):
        convert_checkpoint(tmp_path / "released", tmp_path / "new", to="gpt2")
    (tmp_path / "released" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        convert_checkpoint(tmp_path / "released", tmp_path / "new")
    with pytest.raises(CheckpointError, match="is not a folder; name a checkpoint"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "new")
