"""The vLLM backend with stand-ins for vLLM's classes, whose attention is dense over the same pages. No engine runs."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch

from whimbrel.errors import ConfigError
from whimbrel.integrations.vllm import BACKEND, NAME, register
from whimbrel.integrations.vllm.paged import Settings, gather, long_ones, requests
from whimbrel.sparse import RowLocalConfig, apply_selector
from whimbrel.testing.budget import assert_close
from whimbrel.testing.selectors import causal_attention

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 8


@dataclass
class Metadata:
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    max_seq_len: int
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    scheduler_metadata: object = "made ahead"
    max_num_splits: int = 4
    causal: object = True
    mm_prefix_query_range_tensor: object = None
    rswa_prefix_lens: object = None


class FlashImpl:
    """Dense attention over pages; keeps what it was called with."""

    def __init__(self, num_heads, head_size, scale, num_kv_heads, **options):
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.alibi_slopes = options.get("alibi_slopes")
        self.sliding_window = options.get("sliding_window", (-1, -1))
        self.logits_soft_cap = options.get("logits_soft_cap") or 0
        self.sinks = options.get("sinks")
        self.kv_cache_dtype = options.get("kv_cache_dtype", "auto")
        self.attn_type = options.get("attn_type", "decoder")
        self.dcp_world_size = 1
        self.seen = []

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        if attn_metadata is None:
            return output.fill_(0)
        self.seen.append(attn_metadata)
        starts = attn_metadata.query_start_loc.tolist()
        assert starts[-1] == attn_metadata.num_actual_tokens
        shaped = output.view(-1, self.num_heads, self.head_size)
        for i, length in enumerate(attn_metadata.seq_lens.tolist()):
            keys, values = gather(kv_cache, attn_metadata.block_table[i], length)
            some = slice(starts[i], starts[i + 1])
            shaped[some] = causal_attention(query[None, some], keys, values)[0].to(query.dtype)
        return output


class FlashBuilder:
    def build(self, common_prefix_len, common, fast_build=False):
        lengths = common.seq_lens
        return Metadata(
            int(common.query_start_loc[-1]),
            int(common.query_start_loc.diff().max()),
            common.query_start_loc,
            int(lengths.max()),
            lengths,
            common.block_table,
            torch.arange(int(common.query_start_loc[-1])),
        )


@pytest.fixture
def engine(monkeypatch):
    """vLLM's modules as far as the backend imports them, and the backend."""
    known: dict[str, str] = {}

    class Registry(dict):
        __members__ = known

        def __class_getitem__(cls, name):
            return SimpleNamespace(name=name)

    def register_backend(which, path):
        if isinstance(which, str) and which in known:
            raise ValueError("already exists")
        known[which if isinstance(which, str) else which.name] = path

    config = SimpleNamespace(additional_config={})
    support = Enum("AttentionCGSupport", "ALWAYS UNIFORM_SINGLE_TOKEN_DECODE")
    made = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: config},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionCGSupport": support,
            "AttentionType": SimpleNamespace(DECODER="decoder"),
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": Registry,
            "register_backend": register_backend,
        },
        "vllm.v1.attention.backends.flash_attn": {
            "FlashAttentionBackend": type("FlashAttentionBackend", (), {}),
            "FlashAttentionImpl": FlashImpl,
            "FlashAttentionMetadata": Metadata,
            "FlashAttentionMetadataBuilder": FlashBuilder,
        },
    }
    for name, contents in made.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "whimbrel.integrations.vllm.backend", raising=False)
    yield SimpleNamespace(known=known, config=config)
    sys.modules.pop("whimbrel.integrations.vllm.backend", None)


def backend():
    return importlib.import_module("whimbrel.integrations.vllm.backend").SparseBackend


def batch(spans, seed=0):
    """Requests of (tokens, length): q, k and v of the tokens, a cache of shuffled pages, what builders are given."""
    g = torch.Generator().manual_seed(seed)
    pages = sum(-(-length // PAGE) for _, length in spans)
    order = torch.randperm(pages + 3, generator=g)
    cache = torch.randn(pages + 3, KV_HEADS, PAGE, 2 * DIM, generator=g)
    width = max(-(-length // PAGE) for _, length in spans)
    table, at = torch.zeros(len(spans), width, dtype=torch.int32), 0
    for i, (_, length) in enumerate(spans):
        count = -(-length // PAGE)
        table[i, :count] = order[at : at + count]
        at += count
    starts = torch.tensor([0, *(tokens for tokens, _ in spans)]).cumsum(0).int()
    lengths = torch.tensor([length for _, length in spans], dtype=torch.int32)
    tokens = int(starts[-1])
    q = torch.randn(tokens, HEADS, DIM, generator=g)
    k, v = (torch.randn(tokens, KV_HEADS, DIM, generator=g) for _ in range(2))
    common = SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        block_table=table,
    )
    return (q, k, v), cache, common


def run(engine, spans, prefill, **options):
    engine.config.additional_config = {"whimbrel_prefill": prefill}
    tensors, cache, common = batch(spans)
    cls = backend()
    impl = cls.get_impl_cls()(HEADS, DIM, DIM**-0.5, KV_HEADS, **options)
    made = cls.get_builder_cls()().build(0, common)
    got = impl.forward(None, *tensors, cache, made, torch.full_like(tensors[0], torch.nan))
    want = FlashImpl(HEADS, DIM, DIM**-0.5, KV_HEADS).forward(None, *tensors, cache, made, torch.empty_like(tensors[0]))
    return impl, got, want, (tensors, cache, common)


SPANS = [(1, 40), (5, 5), (100, 100), (1, 7), (64, 150), (30, 33)]
"""Decoding, a short prompt, a long one, decoding, a chunk of a long one, a chunk of a short one."""
LONG = [2, 4]


def test_a_mixed_batch_with_everything_kept_is_dense(engine):
    prefill = {"kind": "row_local", "coverage": 1.0, "block_size": 16, "min_length": 80}
    impl, got, want, _ = run(engine, SPANS, prefill)
    assert_close("output", want, got, 1e-6)
    (rest,) = impl.seen
    assert rest.seq_lens.tolist() == [40, 5, 7, 33]
    assert rest.query_start_loc.tolist() == [0, 1, 6, 7, 37]
    assert (rest.max_query_len, rest.max_seq_len, rest.scheduler_metadata) == (30, 40, None)
    assert [float(density) for density in impl.last_densities] == [1.0, 1.0]


def test_long_requests_get_what_the_selector_gives_and_the_others_what_they_got(engine):
    prefill = {"kind": "row_local", "coverage": 0.5, "block_size": 16, "min_length": 80}
    impl, got, want, ((q, _, _), cache, common) = run(engine, SPANS, prefill)
    selector = RowLocalConfig(coverage=0.5, block_size=16).build()
    starts = common.query_start_loc.tolist()
    for i, (_, length) in enumerate(SPANS):
        some = slice(starts[i], starts[i + 1])
        if i in LONG:
            keys, values = gather(cache, common.block_table[i], length)
            assert_close("sparse", apply_selector(q[None, some], keys, values, selector).y[0], got[some], 1e-6)
            assert not torch.allclose(got[some], want[some], atol=1e-3)
        else:
            assert_close("dense", want[some], got[some], 1e-6)
    assert all(0.2 < float(density) < 0.9 for density in impl.last_densities)


def test_a_batch_of_long_prompts_alone_never_asks_flash_attention(engine):
    prefill = {"block_size": 16, "min_length": 64}
    impl, got, _, _ = run(engine, [(100, 100), (64, 150)], prefill)
    assert impl.seen == []
    assert got.isfinite().all()


def test_a_batch_without_long_prompts_goes_through_untouched(engine):
    impl, got, want, _ = run(engine, SPANS, {"min_length": 1000})
    assert torch.equal(got, want)
    assert impl.seen[0].scheduler_metadata == "made ahead"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sliding_window": (31, 0)}, "it has a sliding window"),
        ({"alibi_slopes": torch.ones(4)}, "it uses alibi_slopes"),
        ({"logits_soft_cap": 30.0}, "it uses logits_soft_cap"),
        ({"sinks": torch.ones(4)}, "it uses sinks"),
        ({"kv_cache_dtype": "fp8"}, "its cache is fp8"),
        ({"attn_type": "encoder"}, "it is no decoder's"),
        ({}, None),
    ],
)
def test_layers_that_cannot_be_served_stay_dense(engine, options, why):
    impl, got, want, _ = run(engine, SPANS, {"coverage": 0.3, "block_size": 16, "min_length": 80}, **options)
    assert impl.dense_because == why
    assert torch.equal(got, want) == (why is not None)


def test_batches_that_cannot_be_served_stay_dense(engine):
    impl, _, _, (tensors, cache, common) = run(engine, SPANS, {"coverage": 0.3, "block_size": 16, "min_length": 80})
    for field, value in (("causal", False), ("rswa_prefix_lens", torch.ones(6)), ("whimbrel_batch", None)):
        made = backend().get_builder_cls()().build(0, common)
        setattr(made, field, value)
        impl.seen.clear()
        impl.forward(None, *tensors, cache, made, torch.empty_like(tensors[0]))
        assert impl.seen == [made]
    assert impl.forward(None, *tensors, cache, None, torch.ones(3)).sum() == 0


def test_chunks_are_what_the_whole_prompt_is(engine):
    """A prompt whose cache is filled chunk by chunk, each chunk a batch."""
    prefill = {"coverage": 0.6, "block_size": 16, "min_length": 16}
    _, whole, _, ((q, k, v), cache, common) = run(engine, [(96, 96)], prefill)
    impl = backend().get_impl_cls()(HEADS, DIM, DIM**-0.5, KV_HEADS)
    for start in range(0, 96, 32):
        some = slice(start, start + 32)
        chunk = SimpleNamespace(**vars(common))
        chunk.query_start_loc = chunk.query_start_loc_cpu = torch.tensor([0, 32], dtype=torch.int32)
        chunk.seq_lens = chunk.seq_lens_cpu_upper_bound = torch.tensor([start + 32], dtype=torch.int32)
        made = backend().get_builder_cls()().build(0, chunk)
        got = impl.forward(None, q[some], k[some], v[some], cache, made, torch.empty_like(q[some]))
        assert_close("chunk", whole[some], got, 1e-6)


def test_registration_is_idempotent_and_names_a_class(engine):
    register()
    register()
    assert engine.known == {NAME: BACKEND}
    module, _, name = BACKEND.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert cls.get_name() == NAME
    assert cls.get_builder_cls()._cudagraph_support.name == "UNIFORM_SINGLE_TOKEN_DECODE"


def test_the_entry_point_names_the_function():
    text = (importlib.resources.files("whimbrel").parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nwhimbrel = "whimbrel.integrations.vllm:register"' in text
    for point in metadata.entry_points(group="vllm.general_plugins"):
        if point.name == "whimbrel":
            assert point.load() is register


def test_settings():
    assert Settings.of(None) == Settings(selector=RowLocalConfig())
    settings = Settings.of({"kind": "window", "window_tokens": 256, "min_length": 64, "block_size": 32})
    assert (settings.min_length, settings.least_tokens) == (64, 32)
    spans = requests([0, 31, 63, 95], [70, 64, 63])
    assert [request.index for request in long_ones(spans, settings)] == [1]
    for table, message in (
        ({"min_length": 0}, "whimbrel_prefill.min_length = 0 is not allowed; use a positive number of tokens"),
        ({"kind": "row_lokal"}, "kind = 'row_lokal' is not known; did you mean 'row_local'?"),
        ({"coverrage": 0.9}, "whimbrel_prefill.coverrage"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            Settings.of(table)
