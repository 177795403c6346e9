"""The backend: vLLM's FlashAttention, with long prefills diverted. Written against vLLM 0.33, imported by it alone."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from whimbrel.integrations.vllm import NAME
from whimbrel.integrations.vllm.paged import KEY, Request, Settings, long_ones, prefill, requests, without


class SparseBackend(FlashAttentionBackend):
    """FlashAttention's cache, cache writes and decoding; long prefills over a block plan."""

    @staticmethod
    def get_name() -> str:
        """What the registry calls it."""
        return NAME

    @staticmethod
    def get_impl_cls() -> type[SparseImpl]:
        """The layer's attention."""
        return SparseImpl

    @staticmethod
    def get_builder_cls() -> type[SparseBuilder]:
        """What makes a batch's metadata."""
        return SparseBuilder


class SparseBuilder(FlashAttentionMetadataBuilder):
    """Notes each request's tokens and length on the host, where they are known, so that no layer waits for them."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """FlashAttention's metadata with the field `whimbrel_batch`."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        lengths = common_attn_metadata.seq_lens_cpu_upper_bound
        metadata.whimbrel_batch = (
            None
            if lengths is None  # exact for requests in prefill, which are the only ones that are diverted
            else requests(common_attn_metadata.query_start_loc_cpu.tolist(), lengths.tolist())
        )
        return metadata


class SparseImpl(FlashAttentionImpl):
    """Long prefills over a block plan, everything else by FlashAttention."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config = get_current_vllm_config_or_none()
        self._settings = Settings.of(None if config is None else (config.additional_config or {}).get(KEY))
        self._selector = self._settings.selector.build()
        self.dense_because = self._why_dense()
        """Why this layer is always dense; None if it need not be."""
        self.last_densities: list[Tensor] = []
        """Of the requests that the last batch prefilled sparsely, the mean density of their heads."""

    def _why_dense(self) -> str | None:
        if self.attn_type != AttentionType.DECODER:
            return "it is no decoder's"
        if tuple(self.sliding_window) != (-1, -1):
            return "it has a sliding window"
        for name in ("alibi_slopes", "logits_soft_cap", "sinks"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, Tensor) or value != 0):  # no cap is 0 there
                return f"it uses {name}"
        if self.kv_cache_dtype not in ("auto", "bfloat16", "float16", "half"):
            return f"its cache is {self.kv_cache_dtype}"
        return None

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [tokens, H, D], kv_cache [pages, Hkv, page size, 2 D], output as query; the tokens of all requests."""
        batch = getattr(attn_metadata, "whimbrel_batch", None)
        chosen: list[Request] = []
        if batch is not None and self._can_divert(attn_metadata, output_scale, output_block_scale):
            chosen = long_ones(batch, self._settings)
        dense = super().forward
        if not chosen:
            return dense(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        assert batch is not None
        shaped = output.view(-1, self.num_heads, self.head_size)
        self.last_densities = prefill(
            query,
            kv_cache,
            attn_metadata.block_table,
            chosen,
            self._selector,
            scale=self.scale,
            output=shaped,
        )
        rest = without(batch, chosen, query.device)
        if len(rest.rows):
            part = torch.empty_like(shaped[: len(rest.tokens)])
            some = [x[rest.tokens] for x in (query, key, value)]
            dense(layer, *some, kv_cache, _metadata_of(attn_metadata, rest), part)
            shaped[rest.tokens] = part.view_as(shaped[rest.tokens])
        return output

    def _can_divert(self, metadata: Any, *scales: Tensor | None) -> bool:
        """Whether nothing in this batch asks for what the sparse path lacks."""
        special = (metadata.mm_prefix_query_range_tensor, metadata.rswa_prefix_lens, *scales)
        alone = getattr(self, "dcp_world_size", 1) <= 1
        return self.dense_because is None and metadata.causal is True and alone and all(x is None for x in special)


def _metadata_of(metadata: FlashAttentionMetadata, rest: Any) -> FlashAttentionMetadata:
    """The metadata of some of the requests, whose tokens lie one behind the other. Without a schedule made ahead."""
    starts, rows = rest.starts, rest.rows
    lengths = metadata.seq_lens
    return dataclasses.replace(
        metadata,
        num_actual_tokens=starts[-1],
        max_query_len=max(stop - start for start, stop in itertools.pairwise(starts)),
        query_start_loc=torch.tensor(starts, dtype=metadata.query_start_loc.dtype, device=lengths.device),
        max_seq_len=max(rest.lengths),
        seq_lens=lengths[rows],
        block_table=metadata.block_table[rows],
        slot_mapping=metadata.slot_mapping[rest.tokens],
        scheduler_metadata=None,
        max_num_splits=0,
    )
