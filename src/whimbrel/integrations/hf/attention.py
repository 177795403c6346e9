"""Sparse prefill in any transformers model, chosen by name: `attn_implementation="whimbrel_sparse"`.

The selector's settings are read from `config.prefill`, a table with `kind` that is saved with the model (the name of an
attention function is not). A call that is not the prefill of whole prompts runs dense, and the reason is counted.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from whimbrel.errors import UnsupportedError
from whimbrel.integrations.hf.config import selector_of
from whimbrel.sparse.apply import Out, Selector, apply_selector

NAME = "whimbrel_sparse"
_CHANGES_SCORES = ("sliding_window", "softcap", "s_aux", "position_bias")


class LayerPrefill(NamedTuple):
    """What one layer did since the model was loaded."""

    calls: dict[str, int]
    """"sparse", or why a call ran dense -> how many there were."""
    density: float
    """Causal query-key pairs that the sparse calls attended to, as a share of all; nan without any."""


class _Record:
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.densities: list[Tensor] = []


def register() -> None:
    """Make the name known to transformers; a second call changes nothing."""
    AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, sparse_attention_mask)


def prefill_report(model: nn.Module) -> dict[str, LayerPrefill]:
    """Name of a layer -> what it did, for the layers that were called under this attention."""
    report = {}
    for name, module in model.named_modules():
        record = getattr(module, "_whimbrel_prefill", None)
        if record is not None:
            density = float(torch.stack(record.densities).mean()) if record.densities else float("nan")
            report[name] = LayerPrefill(dict(record.calls), density)
    return report


def sparse_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What the attention is told, in one of three forms.

    None: nothing is padded, and the queries are all of the keys or a single last one. [B, kv_length] bool: the keys
    that are tokens, of which the queries are the last. [B, 1, q_length, kv_length] bool, as transformers makes it:
    anything else.
    """
    special = (not allow_is_causal_skip and q_length > 1) or local_size is not None or kv_offset
    if special:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            local_size=local_size,
            device=device,
            **kwargs,
        )
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (kv_length == q_length or (q_length == 1 and kv_length == int(q_offset) + 1)):
        return None
    keys = torch.arange(kv_length, device=device)
    # A static cache has room behind the tokens.
    real = (keys < q_offset + q_length).expand(batch_size, -1)
    if attention_mask is not None:
        known = attention_mask.shape[1]
        real = real & nn.functional.pad(attention_mask.bool(), (0, kv_length - known))[:, :kv_length]
    return real


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, Tq, D], key, value [B, Hkv, Tk, D] -> [B, Tq, H, D], sparse where it is a prefill."""
    if kwargs.get("cache") is not None:
        raise UnsupportedError(f"attn_implementation = '{NAME}' does not serve continuous batching; use 'sdpa' for it")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    record = module.__dict__.setdefault("_whimbrel_prefill", _Record())
    reason = _why_dense(module, query, key, attention_mask, causal=causal, dropout=dropout, options=kwargs)
    record.calls[reason or "sparse"] += 1
    if reason is None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        y, densities = _prefill(
            q, k, v, attention_mask, partial(apply_selector, selector=_selector(module), scale=scaling)
        )
        record.densities += densities
        return y, None
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = _causal_over(attention_mask, query.shape[2])
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _why_dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    dropout: float,
    options: dict[str, Any],
) -> str | None:
    """Why this call cannot be sparse; None if it can."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == 1:
        return "decoding"
    if module.training or dropout:
        return "training"
    if not causal:
        return "not causal"
    changed = [name for name in _CHANGES_SCORES if options.get(name) is not None]
    if changed:
        return changed[0]
    if mask is None:
        return None if queries == keys else "static cache"
    if mask.dim() != 2:
        return "packed or custom mask"
    return None if bool((_begins(mask).sum(1) <= 1).all()) else "holes in the mask"


def _begins(real: Tensor) -> Tensor:
    """[B, keys] bool: where a run of tokens begins."""
    return real & ~nn.functional.pad(real, (1, 0))[:, :-1]


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, run: Callable[[Tensor, Tensor, Tensor], Out]
) -> tuple[Tensor, list[Tensor]]:
    """The output [B, Tq, H, D], zero at padding, and densities; rows of unequal padding go one by one."""
    if real is None:
        out = run(q, k, v)
        return out.y, [out.density.mean().cpu()]
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    starts = _begins(real).int().argmax(1)
    spans = torch.stack((starts, starts + real.sum(1)), 1).tolist()
    same = all(span == spans[0] for span in spans)
    y, densities = q.new_zeros(*q.shape[:3], v.shape[3]), []
    for row in [0] if same else range(batch):
        rows = slice(None) if same else slice(row, row + 1)
        start, stop = spans[row]
        offset = 0 if queries == keys else stop - queries
        asked = slice(max(0, start - offset), stop - offset)
        if asked.start < asked.stop:
            out = run(q[rows, asked], k[rows, start:stop], v[rows, start:stop])
            y[rows, asked] = out.y
            densities.append(out.density.mean().cpu())
    return y, densities


def _causal_over(real: Tensor, queries: int) -> Tensor:
    """[B, 1, queries, keys] bool for keys that are tokens [B, keys]; the last key that is one is the last query's."""
    keys = torch.arange(real.shape[1], device=real.device)
    first = 0 if queries == real.shape[1] else (real * (keys + 1)).amax(1)[:, None, None, None] - queries
    rows = torch.arange(queries, device=real.device)[:, None] + first
    return real[:, None, None] & (keys <= rows)


def _selector(module: nn.Module) -> Selector:
    table = getattr(getattr(module, "config", None), "prefill", None)
    return _build(json.dumps(table, sort_keys=True))


@functools.lru_cache(maxsize=32)
def _build(table: str) -> Callable:
    return selector_of(json.loads(table)).build()
