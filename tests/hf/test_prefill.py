"""Sparse prefill enabled in one call: all situations against SDPA, settings by layer, statistics, refusals."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from packaging.version import Version

transformers = pytest.importorskip("transformers")

from tests.hf.test_attention import LEFT, llama
from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.integrations.hf import enable_sparse_prefill
from whimbrel.integrations.hf.fixtures.models import HYBRID, pair, tokens
from whimbrel.sparse import FlexPrefillConfig, RowLocalConfig, WindowConfig
from whimbrel.sparse.crossover import NEVER
from whimbrel.testing.budget import assert_close

ALL = RowLocalConfig(coverage=1.0, block_size=8)
NARROW = WindowConfig(window_tokens=8, sink_tokens=8, block_size=8)


@pytest.fixture(params=["llama", "whimbrel"])
def model(request):
    return llama() if request.param == "llama" else pair(HYBRID)[1].double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padded": True},
        {"prefill_chunk_size": 8},
        {"prefill_chunk_size": 8, "padded": True},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "padded": True},
    ],
    ids=["plain", "padded", "chunked", "chunked, padded", "beams", "static", "static, padded"],
)
def test_generation_with_everything_kept_is_dense(options):
    model, options = llama(), dict(options)
    ids, mask = LEFT if options.pop("padded", False) else (tokens(2, 29), torch.ones(2, 29))
    options |= {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    expected = model.generate(ids, attention_mask=mask, **options)
    sparse = enable_sparse_prefill(model, ALL)
    assert torch.equal(expected, model.generate(ids, attention_mask=mask, **options))
    # Releases before 5.17 hand over a mask of all pairs where the cache is static, which runs dense.
    old = Version(transformers.__version__) < Version("5.17") and "cache_implementation" in options
    assert sparse.calls["packed or custom mask" if old else "sparse"] >= 2
    sparse.disable()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(expected, model.generate(ids, attention_mask=mask, **options))


def test_statistics_are_those_of_the_last_generation(model):
    sparse = enable_sparse_prefill(model, NARROW, audit_rows=16)
    for _ in range(2):
        model.generate(tokens(1, 64), max_new_tokens=4, do_sample=False, pad_token_id=0)
        softmax = [layer for layer in sparse.layers.values() if layer.calls]
        assert {tuple(layer.calls.items()) for layer in softmax} == {(("sparse", 1), ("decoding", 3))}
    assert 0.3 < sparse.density < 0.7
    for layer in softmax:
        assert layer.coverage["min"] <= layer.coverage["p5"] <= layer.coverage["mean"] < 1
        assert 0 < layer.coverage["certified"] <= layer.coverage["mean"]
    assert str(sparse).count("1 sparse, 3 decoding") == len(softmax)
    sparse.clear()
    assert sparse.layers == {}


def test_a_copy_generates_by_itself():
    model = llama()
    sparse = enable_sparse_prefill(model, NARROW)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    ids = tokens(1, 64)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert not torch.equal(model.generate(ids, **options), other.generate(ids, **options))
    assert sparse.calls == {"sparse": 2, "decoding": 6}
    sparse.disable()
    assert "generate" not in vars(model)


def test_a_repair_keeps_the_coverage(model):
    ids = tokens(1, 64)
    enabled = enable_sparse_prefill(model, NARROW, audit_rows=64)
    model(ids)
    before = [layer.coverage["p5"] for layer in enabled.layers.values()]
    enabled = enable_sparse_prefill(model, NARROW, repair=True, audit_rows=64)
    model(ids)
    after = [layer.coverage["p5"] for layer in enabled.layers.values()]
    assert min(before) < 0.93 < 0.95 - 1e-6 <= min(after)
    assert all(layer.repaired > 0 for layer in enabled.layers.values())


def test_short_prompts_run_dense():
    model = llama()
    sparse = enable_sparse_prefill(model, ALL, min_length=30)
    model(tokens(1, 29))
    assert sparse.calls == {"fewer than 30 keys": 2}
    sparse.clear()
    model(tokens(1, 30))
    assert sparse.calls == {"sparse": 2}


def test_the_measured_length_is_that_of_all_heads_of_a_call(monkeypatch):
    """Of two sequences and four heads of eight elements, by the selector's kind."""
    from whimbrel.integrations.hf import attention

    asked, lengths = [], iter([NEVER, NEVER, 30, 30, 29, 29])
    monkeypatch.setattr(attention, "sparse_from", lambda device, **call: asked.append(call) or next(lengths))
    model = llama()
    sparse = enable_sparse_prefill(model, NARROW)
    for _ in range(3):
        model(tokens(2, 29))
    heads, dim = model.config.num_attention_heads, model.config.head_dim
    assert asked == [{"heads": 2 * heads, "head_dim": dim, "kind": "window"}] * 6
    assert sparse.calls == {"no length measured for such heads": 2, "fewer than 30 keys": 2, "sparse": 2}


def test_settings_by_layer():
    model = llama()
    ids = tokens(1, 64)
    sparse = enable_sparse_prefill(model, RowLocalConfig(block_size=8), 0.5, layers={0: "dense"})
    model(ids)
    first, second = sparse.layers.values()
    assert (first.calls, second.calls) == ({"dense by setting": 1}, {"sparse": 1})
    some = second.density
    sparse = enable_sparse_prefill(model, RowLocalConfig(block_size=8), 0.5, layers={0: NARROW, 1: 0.99})
    model(ids)
    first, second = sparse.layers.values()
    assert first.density == pytest.approx((8 * 36 + (7 + 6) * 64) / (64 * 65 / 2))
    assert second.density > some


def test_settings_are_saved_with_the_model(model, tmp_path):
    ids = tokens(1, 64)
    enable_sparse_prefill(model, NARROW, min_length=10, layers={1: "dense"})
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="whimbrel_sparse", dtype=torch.float64
    ).eval()
    assert_close("reloaded", expected, loaded(ids).logits, 1e-9)
    assert loaded.config.prefill_options["min_length"] == 10


def test_what_cannot_be_served_is_named():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedError, match="cannot serve T5ForConditionalGeneration: it has an encoder"):
        enable_sparse_prefill(t5)
    with pytest.raises(UnsupportedError, match="cannot serve Linear: it is no model of transformers; leave it dense"):
        enable_sparse_prefill(torch.nn.Linear(2, 2))
    small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**small, num_attention_heads=2, num_key_value_heads=1)
    )
    with pytest.raises(UnsupportedError, match=re.escape("caps the logits (attn_logit_softcapping)")):
        enable_sparse_prefill(gemma)
    sinks = llama()
    sinks.model.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    with pytest.raises(UnsupportedError, match="its attention has sinks"):
        enable_sparse_prefill(sinks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selector": "row_lokal"}, "kind = 'row_lokal' is not known; did you mean 'row_local'?"),
        ({"coverage": 1.5}, "row_local.coverage = 1.5 is not allowed"),
        ({"selector": "window", "coverage": 0.9}, "coverage = 0.9 is not allowed; WindowConfig has none, leave it out"),
        ({"layers": {2: "dense"}}, "layers has 2; the model has layers 0 to 1"),
        ({"min_length": -1}, "min_length = -1 is not allowed; use None, or 0 or more keys"),
        ({"audit_rows": -1}, "audit_rows = -1 is not allowed; use 0 or more queries"),
        ({"coverage": "0.9"}, "coverage = '0.9' is not allowed; use a number above 0 and up to 1"),
        ({"selector": 5}, "selector = 5 is not allowed; use a kind such as 'row_local', or a selector's config"),
        ({"layers": [0]}, "layers = [0] is not allowed; use a table from a layer's index to its setting"),
        ({"layers": {"0": "dense"}}, "layers has '0'; the model has layers 0 to 1"),
        ({"layers": {0: None}}, "layers[0] = None is not allowed; use 'dense', a coverage, or a selector's config"),
        ({"min_length": "8k"}, "min_length = '8k' is not allowed; use None, or 0 or more keys"),
        ({"audit_rows": 2.5}, "audit_rows = 2.5 is not allowed; use 0 or more queries"),
        ({"repair": "yes"}, "repair = 'yes' is not allowed; use True or False"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        enable_sparse_prefill(llama(), **settings)


def test_options_of_a_file_are_checked():
    model = llama()
    enable_sparse_prefill(model)
    model.config.prefill_options = {"min_lenght": 3}
    with pytest.raises(ConfigError, match=r"prefill_options\.min_lenght is not known; did you mean 'min_length'"):
        model(tokens(1, 12))


def test_the_official_mode_refuses_chunks():
    model = llama()
    enable_sparse_prefill(model, FlexPrefillConfig(mode="official", block_size=8, min_budget=0))
    with pytest.raises(UnsupportedError, match="needs as many queries as keys"):
        model.generate(tokens(1, 64), max_new_tokens=2, prefill_chunk_size=32, pad_token_id=0)


@pytest.mark.gpu
@torch.no_grad()
def test_long_prompts_on_a_gpu():
    """Kernels under transformers from the measured length on: all kept is dense, and a repair keeps its promise."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        max_position_embeddings=32_768,
    )
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = tokens(1, 16_500).cuda()
    dense = model(ids).logits

    sparse = enable_sparse_prefill(model, "row_local", coverage=1.0, min_length=16_384)
    assert_close("everything kept", dense, model(ids).logits, 2e-2)
    assert sparse.calls == {"sparse": 2}
    assert sparse.density == pytest.approx(1.0)
    model(ids[:, :200])
    assert sparse.calls == {"sparse": 2, "fewer than 16384 keys": 2}

    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 2}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    sparse = enable_sparse_prefill(model, "row_local", coverage=0.9, min_length=0, audit_rows=64)
    whole = model.generate(ids, **options).logits[0]
    assert sparse.calls == {"sparse": 2, "decoding": 2}
    kept = [layer.coverage for layer in sparse.layers.values()]
    assert all(0.88 < layer["p5"] <= layer["mean"] < 1 for layer in kept)
    assert all(0 < layer["certified"] <= layer["mean"] for layer in kept)
    chunked = model.generate(ids, **options, prefill_chunk_size=4096).logits[0]
    assert sparse.calls == {"sparse": 10, "decoding": 2}
    assert_close("in chunks", whole, chunked, 2e-2)

    narrow = WindowConfig(window_tokens=1024, sink_tokens=128)
    enabled = enable_sparse_prefill(model, narrow, min_length=0, repair=True, audit_rows=64)
    model(ids)
    assert all(layer.coverage["p5"] > 0.93 and layer.repaired > 0.5 for layer in enabled.layers.values())
