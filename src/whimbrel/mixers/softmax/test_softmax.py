"""Softmax attention against its definition written out, the prefill hook, and its errors."""

from __future__ import annotations

import pytest
import torch

from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.mixers import SoftmaxAttention
from whimbrel.mixers.softmax import SoftmaxConfig
from whimbrel.mixers.softmax.config import RopeScaling
from whimbrel.testing.budget import assert_close

WIDTH, HEADS, KV, DIM, THETA = 12, 6, 2, 8, 100.0


def make_layer(**options):
    torch.manual_seed(0)
    defaults = {"num_heads": HEADS, "num_kv_heads": KV, "head_dim": DIM, "rope_theta": THETA}
    return SoftmaxAttention(WIDTH, **(defaults | options)).double().eval()


def make_x(batch, time, seed=0):
    return torch.randn(batch, time, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(layer, x, positions, rates=None):
    """Query by query and head by head, rotary positions as products of complex numbers."""
    if rates is None:
        rates = THETA ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))

    def heads(projection, count, norm):
        h = projection(x).unflatten(-1, (count, DIM))
        if norm is not None:
            h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        return h

    def turn(h):
        angles = positions[:, None] * rates
        turned = torch.complex(h[..., : DIM // 2], h[..., DIM // 2 :]) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        return torch.cat((turned.real, turned.imag), -1)

    q_norm, k_norm = (n if hasattr(n, "weight") else None for n in (layer.q_norm, layer.k_norm))
    q, k = turn(heads(layer.q_proj, HEADS, q_norm)), turn(heads(layer.k_proj, KV, k_norm))
    v = heads(layer.v_proj, KV, None)
    y = torch.zeros_like(q)
    for t in range(x.shape[1]):
        first = max(0, t + 1 - layer.window) if layer.window else 0
        for head in range(HEADS):
            group = head // (HEADS // KV)
            scores = (k[:, first : t + 1, group] @ q[:, t, head, :, None])[..., 0] / DIM**0.5
            y[:, t, head] = (scores.softmax(-1)[..., None] * v[:, first : t + 1, group]).sum(1)
    return layer.o_proj(y.flatten(2))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_is_grouped_rotary_attention(qk_norm):
    layer, x = make_layer(qk_norm=qk_norm), make_x(2, 11)
    if qk_norm:
        with torch.no_grad():
            layer.q_norm.weight.uniform_(0.5, 2)
    assert_close("y", written_out(layer, x, torch.arange(11)), layer(x).y, 1e-12)


def test_positions_go_on_after_the_cache_and_scores_depend_on_distance_only():
    layer, x = make_layer(), make_x(1, 9)
    _, cache = layer(x[:, :4])
    y = layer(x[:, 4:], cache).y
    assert_close("after a cache", written_out(layer, x, torch.arange(9))[:, 4:], y, 1e-12)
    assert_close("all positions moved", written_out(layer, x, torch.arange(9) + 1000), layer(x).y, 1e-9)


@pytest.mark.parametrize("window", [1, 3, 9, 20])
def test_a_window_leaves_older_tokens_out_in_every_kind_of_call(window):
    layer, x = make_layer(window=window), make_x(2, 11)
    y = written_out(layer, x, torch.arange(11))
    assert_close("whole", y, layer(x).y, 1e-12)
    state, pieces = None, []
    for piece in x.split((5, 1, 4, 1), 1):
        part, state = layer(piece, state)
        pieces.append(part)
    assert_close("in pieces", y, torch.cat(pieces, 1), 1e-12)
    packed = layer(x[:1], cu_seqlens=torch.tensor([0, 4, 11])).y
    assert_close("packed", layer(x[:1, 4:]).y, packed[:, 4:], 1e-12)


def test_a_prefill_that_knows_no_window_is_asked_only_where_it_cuts_nothing_off():
    layer, x, seen = make_layer(window=6), make_x(1, 9), []
    expected = layer(x).y

    def prefill(q, k, v, scale):
        seen.append(k.shape[1])
        return torch.zeros_like(q)

    layer.prefill = prefill
    assert_close("longer than the window", expected, layer(x).y, 1e-12)
    layer(x[:, :6])
    assert seen == [6]


def test_biases_are_added():
    layer, x = make_layer(qkv_bias=True, out_bias=True), make_x(2, 7)
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            projection.bias.uniform_(-1, 1)
    assert_close("y", written_out(layer, x, torch.arange(7)), layer(x).y, 1e-12)
    config = SoftmaxConfig(num_heads=HEADS, num_kv_heads=KV, head_dim=DIM, qkv_bias=True, out_bias=True)
    assert config.parameter_shapes(WIDTH) == {name: tuple(p.shape) for name, p in layer.named_parameters()}


def test_scaled_frequencies():
    """As Llama 3.1 has them: what turns once or less in 32 tokens is slowed by 8, four times or more not at all."""
    rates = THETA ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
    x = make_x(1, 40)
    linear = make_layer(rope_scaling=RopeScaling(kind="linear", factor=4.0))
    assert_close("linear", written_out(linear, x, torch.arange(40), rates / 4), linear(x).y, 1e-12)
    llama3 = make_layer(rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_tokens=32))
    turns = [32 * float(rate) / (2 * torch.pi) for rate in rates]
    assert turns[0] > 4 > turns[1] > 1 > turns[2]
    share = (turns[1] - 1) / 3
    expected = torch.stack((rates[0], (1 - share) * rates[1] / 8 + share * rates[1], rates[2] / 8, rates[3] / 8))
    assert_close("llama3", written_out(llama3, x, torch.arange(40), expected), llama3(x).y, 1e-12)


def test_prefill_gets_all_keys_and_the_last_queries():
    layer, x, seen = make_layer(), make_x(2, 9), []

    def prefill(q, k, v, scale):
        seen.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), scale))
        return torch.full_like(q, 2.0)

    layer.prefill = prefill
    y, cache = layer(x[:, :5])
    assert_close("y", layer.o_proj(torch.full((2, 5, HEADS * DIM), 2.0, dtype=torch.float64)), y, 1e-12)
    layer(x[:, 5:], cache)
    assert seen == [
        ((2, 5, HEADS, DIM), (2, 5, KV, DIM), (2, 5, KV, DIM), DIM**-0.5),
        ((2, 4, HEADS, DIM), (2, 9, KV, DIM), (2, 9, KV, DIM), DIM**-0.5),
    ]


def test_prefill_is_left_out_of_decoding_training_and_packing():
    layer, x = make_layer(), make_x(1, 5)
    expected = layer(x).y

    def refuse(q, k, v, scale):
        raise AssertionError("called")

    _, cache = layer(x[:, :4])
    layer.prefill = refuse
    assert_close("decode", expected[:, 4:], layer(x[:, 4:], cache).y, 1e-12)
    assert_close("packed", expected, layer(x, cu_seqlens=torch.tensor([0, 5])).y, 1e-12)
    assert_close("training", expected, layer.train()(x).y, 1e-12)
    with pytest.raises(AssertionError, match="called"):
        layer.eval()(x)


def test_empty_packed_sequences_are_allowed():
    layer, x = make_layer(), make_x(1, 5)
    packed = layer(x, cu_seqlens=torch.tensor([0, 0, 3, 3, 5])).y
    assert_close("y", torch.cat((layer(x[:, :3]).y, layer(x[:, 3:]).y), 1), packed, 1e-12)


def test_a_packed_call_keeps_no_cache_and_takes_none():
    layer, x = make_layer(), make_x(1, 5)
    assert layer(x, cu_seqlens=torch.tensor([0, 2, 5])).state is None
    with pytest.raises(UnsupportedError, match=r"cache was given together with cu_seqlens.*run the sequences one by"):
        layer(x, layer(x).state, cu_seqlens=torch.tensor([0, 2, 5]))
    with pytest.raises(ConfigError, match="cu_seqlens runs from 0 to 4"):
        layer(x, cu_seqlens=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, r"softmax.num_heads = 0 is not allowed; use a positive number"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"softmax.num_kv_heads = 3 .* 0 or a divisor of softmax.num_heads = 4"),
        ({"num_kv_heads": -1}, r"softmax.num_kv_heads = -1 is not allowed"),
        ({"head_dim": 7}, r"softmax.head_dim = 7 is not allowed; use a positive even number"),
        ({"rope_theta": 0.0}, r"softmax.rope_theta = 0.0 is not allowed; use a positive base"),
        ({"window": -1}, r"softmax.window = -1 is not allowed; use 0 \(all tokens\) or a positive number of tokens"),
    ],
)
def test_config_says_what_is_wrong(options, message):
    with pytest.raises(ConfigError, match=message):
        SoftmaxConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.0}, r"softmax.rope_scaling.factor = 0.0 is not allowed; use a positive divisor"),
        ({"low_turns": 4.0}, r"softmax.rope_scaling.low_turns = 4.0 is not allowed; use less than high_turns = 4.0"),
        ({"original_tokens": 0}, r"softmax.rope_scaling.original_tokens = 0 .* a positive number of tokens"),
    ],
)
def test_scaling_says_what_is_wrong(options, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**options)


def test_layer_says_what_is_wrong():
    with pytest.raises(ConfigError, match="num_kv_heads = 4 is not allowed; use a divisor of num_heads = 6"):
        make_layer(num_kv_heads=4)
    with pytest.raises(ConfigError, match="head_dim = 5 is not allowed; use an even number"):
        make_layer(head_dim=5)
    layer = make_layer()
    with pytest.raises(ConfigError, match=r"softmax: x has dtype torch.int64, the layer torch.float64"):
        layer(torch.zeros(1, 5, layer.hidden_size, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"softmax: x has shape \[5, 3\]; give \[batch, time, hidden_size\]"):
        layer(torch.zeros(5, 3))
