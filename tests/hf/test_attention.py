"""Sparse prefill by name in models of transformers: every situation of a call against SDPA, and what is counted."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.integrations.hf import attention, prefill_report
from whimbrel.integrations.hf import model as hf_model
from whimbrel.integrations.hf.fixtures.models import HYBRID, MODELS, left_padded, pair, tokens
from whimbrel.mixers.softmax.layer import decoding_kernels
from whimbrel.sparse.flex_prefill.config import FlexPrefillConfig
from whimbrel.sparse.row_local.config import RowLocalConfig
from whimbrel.testing.budget import assert_close

NAME = "whimbrel_sparse"
KEEP_ALL = {"kind": "row_local", "coverage": 1.0, "estimate": "exact", "block_size": 8}
WINDOW = {"kind": "window", "window_tokens": 8, "sink_tokens": 8, "block_size": 8}


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **options,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.fixture(params=["llama", "whimbrel"])
def model(request):
    model = llama() if request.param == "llama" else pair(HYBRID)[1].double()
    model.config.prefill = KEEP_ALL
    return model


def under(model, name, call):
    model.set_attn_implementation(name)
    with torch.no_grad():
        return call(model)


def calls(model):
    total = {}
    for layer in prefill_report(model).values():
        for reason, count in layer.calls.items():
            total[reason] = total.get(reason, 0) + count
    return total


ROWS = [tokens(1, n, seed=n)[0] for n in (29, 17, 5)]
LEFT = left_padded(ROWS)


@pytest.mark.parametrize(
    ("situation", "arguments", "reason"),
    [
        ("plain", {"input_ids": tokens(2, 37)}, "sparse"),
        ("left-padded", {"input_ids": LEFT[0], "attention_mask": LEFT[1]}, "sparse"),
        ("right-padded", {"input_ids": LEFT[0].flip(1), "attention_mask": LEFT[1].flip(1)}, "sparse"),
        ("all real", {"input_ids": tokens(2, 37), "attention_mask": torch.ones(2, 37)}, "sparse"),
        (
            "holes",
            {"input_ids": tokens(2, 9), "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] + [1] * 3])},
            "holes in the mask",
        ),
        (
            "packed",
            {
                "input_ids": tokens(1, 20),
                "position_ids": torch.cat((torch.arange(13), torch.arange(7)))[None],
                "use_cache": False,
            },
            "packed or custom mask",
        ),
    ],
)
def test_a_forward_is_that_of_sdpa(model, situation, arguments, reason):
    expected, got = (under(model, name, lambda m: m(**arguments).logits) for name in ("sdpa", NAME))
    mask = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"])).bool()
    assert_close(situation, expected[mask], got[mask], 1e-6)
    assert set(calls(model)) == {reason}


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({}, {"sparse", "decoding"}),
        ({"padded": True}, {"sparse", "decoding"}),
        ({"prefill_chunk_size": 8}, {"sparse", "decoding"}),
        ({"prefill_chunk_size": 8, "padded": True}, {"sparse", "decoding"}),
        ({"num_beams": 3}, {"sparse", "decoding"}),
        ({"cache_implementation": "static"}, None),
        ({"cache_implementation": "static", "padded": True}, None),
    ],
    ids=["plain", "padded", "chunked", "chunked, padded", "beams", "static", "static, padded"],
)
def test_greedy_generation_is_that_of_sdpa(model, options, reasons):
    options = dict(options)
    ids, mask = LEFT if options.pop("padded", False) else (tokens(2, 29), torch.ones(2, 29))
    if "cache_implementation" in options and model.config.model_type == "whimbrel":
        with pytest.raises(UnsupportedError, match="cache_implementation = 'static'"):
            model.generate(tokens(1, 4), max_new_tokens=2, **options)
        return
    options |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    expected, got = (
        under(model, name, lambda m: m.generate(ids, attention_mask=mask, **options)) for name in ("sdpa", NAME)
    )
    assert torch.equal(expected, got)
    assert reasons is None or set(calls(model)) == reasons


def test_a_prefill_is_the_selectors(model):
    """A selector that leaves blocks out changes the result and says how much it read."""
    ids = tokens(1, 64)
    dense = under(model, "sdpa", lambda m: m(ids).logits)
    model.config.prefill = WINDOW
    sparse = under(model, NAME, lambda m: m(ids).logits)
    assert not torch.allclose(dense, sparse)
    # Of 8 blocks of 8 tokens each row reads its own, the one before and the first.
    expected = (8 * 36 + (7 + 6) * 64) / (64 * 65 / 2)
    assert [layer.density for layer in prefill_report(model).values()] == pytest.approx([expected, expected])


def test_padded_rows_are_prefilled_as_if_alone(model):
    """With a selector that leaves blocks out, whole and in pieces; blocks begin at the first real token."""
    model.config.prefill = WINDOW
    rows = [tokens(1, n, seed=n)[0] for n in (64, 40, 24)]
    ids, mask = left_padded(rows)
    together = under(model, NAME, lambda m: m(ids, attention_mask=mask).logits)
    for i, row in enumerate(rows):
        alone = under(model, NAME, lambda m, row=row: m(row[None]).logits[0])
        assert_close("row", alone, together[i, -len(row) :], 1e-6)
    assert set(calls(model)) == {"sparse"}


def test_settings_are_saved_and_the_name_is_given_again(model, tmp_path):
    model.config.prefill = WINDOW
    ids = tokens(1, 64)
    expected = under(model, NAME, lambda m: m(ids).logits)
    model.save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path, attn_implementation=NAME, dtype=torch.float64).eval()
    assert_close("reloaded", expected, loaded(ids).logits, 1e-9)
    assert set(calls(loaded)) == {"sparse"}
    plain = load(tmp_path, dtype=torch.float64).eval()
    assert prefill_report(plain) == {}
    assert not torch.allclose(expected, plain(ids).logits)


def test_the_selector_of_a_run_is_taken_over():
    for selector in (FlexPrefillConfig(coverage=0.8), RowLocalConfig(block_size=16)):
        model = pair(HYBRID, prefill=selector)[1]
        assert model.config.prefill["kind"] in ("flex_prefill", "row_local")
        under(model, NAME, lambda m: m(tokens(1, 40)))
        assert set(calls(model)) == {"sparse"}


def test_calls_that_are_no_prefill_run_dense(model):
    model.set_attn_implementation(NAME)
    model.train()(tokens(1, 12))
    assert set(calls(model)) == {"training"}
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=1,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,
        )
    ).eval()
    ids = tokens(1, 20)
    assert_close("window", *(under(mistral, name, lambda m: m(ids).logits) for name in ("sdpa", NAME)), 1e-6)
    assert set(calls(mistral)) == {"sliding_window"}
    windows = pair(MODELS["window"])[1].double()
    assert_close("ours", *(under(windows, name, lambda m: m(ids).logits) for name in ("sdpa", NAME)), 1e-6)
    reports = prefill_report(windows)
    assert [reports[f"blocks.{i}.mixer"].calls for i in range(4)] == [{"sliding_window": 1}, {"sparse": 1}] * 2


def test_room_in_a_static_cache_is_not_taken_for_tokens():
    from whimbrel.integrations.hf.attention import sparse_attention_mask

    for offset in (2, torch.tensor(2)):
        assert sparse_attention_mask(2, 3, 8, q_offset=offset).tolist() == [[True] * 5 + [False] * 3] * 2
    short = torch.tensor([[0, 1, 1, 1, 1]])
    assert sparse_attention_mask(1, 3, 7, q_offset=2, attention_mask=short).tolist() == [
        [False] + [True] * 4 + [False] * 2
    ]


def test_a_selector_that_is_not_known_is_an_error(model):
    model.config.prefill = {"kind": "flex_prefil"}
    with pytest.raises(ConfigError, match=r"kind = 'flex_prefil' is not known; did you mean 'flex_prefill'\?"):
        under(model, NAME, lambda m: m(tokens(1, 12)))


def test_continuous_batching_is_refused(model):
    from whimbrel.integrations.hf.attention import sparse_attention_forward

    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(UnsupportedError, match="does not serve continuous batching"):
        sparse_attention_forward(model, q, q, q, None, cache=object())


def test_one_new_token_leaves_out_kernels_that_plan_for_each_length(model, monkeypatch):
    """cuDNN's plan for each number of keys takes longer than many a decoded token; seen here as on a GPU."""
    seen = []

    def on_cuda(queries, device):
        return decoding_kernels(queries, torch.device("cuda"))

    def spy(module, query, *args, **kwargs):
        seen.append((query.shape[2], torch.backends.cuda.cudnn_sdp_enabled()))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    sdpa_attention_forward = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    for user in (attention, hf_model):
        monkeypatch.setattr(user, "decoding_kernels", on_cuda)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert before
    model.config.prefill = {"kind": "dense"}
    under(model, NAME, lambda model: model.generate(tokens(1, 9), max_new_tokens=3, do_sample=False, pad_token_id=0))
    assert {queries for queries, _ in seen} == {1, 9}
    assert all(enabled == (queries > 1) for queries, enabled in seen)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
