"""Sparse prefill in any transformers model, chosen by name: `attn_implementation="whimbrel_sparse"`.

The selector's settings are read from `config.prefill`, a table with `kind`, and those of the calls from
`config.prefill_options`, a table of `Options`; both are saved with the model (the name of an attention function is
not). `whimbrel.integrations.hf.enable_sparse_prefill` writes them. A call that is not the prefill of whole prompts runs
dense, and the reason is counted.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from whimbrel.config import SelectorConfig, kind_of, require
from whimbrel.errors import ConfigError, UnsupportedError, nearest
from whimbrel.integrations.hf.config import selector_of
from whimbrel.mixers.softmax.layer import decoding_kernels
from whimbrel.sparse.apply import Out, Target, apply_selector
from whimbrel.sparse.coverage import Audit
from whimbrel.sparse.crossover import NEVER, sparse_from
from whimbrel.sparse.dense.config import DenseConfig

NAME = "whimbrel_sparse"
_CHANGES_SCORES = ("sliding_window", "softcap", "s_aux", "position_bias")


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """How calls are prefilled, whatever the selector."""

    min_length: int | None = None
    """Keys below which a call runs dense; None is what was measured for the device (`sparse.crossover.sparse_from`)."""
    repair: bool = False
    """Whether query blocks that miss the selector's coverage get a second pass over more keys."""
    audit_rows: int = 0
    """Queries of each call whose coverage is measured."""
    layers: Mapping[str, Any] = field(default_factory=dict)
    """Index of a layer -> the table of its own selector; kind "dense" leaves it alone."""

    def __post_init__(self) -> None:
        # Tables of a file get here too, so kinds are checked as well.
        least, rows = self.min_length, self.audit_rows
        require(least is None or (type(least) is int and least >= 0), "min_length", least, "None, or 0 or more keys")
        require(type(rows) is int and rows >= 0, "audit_rows", rows, "0 or more queries")
        require(type(self.repair) is bool, "repair", self.repair, "True or False")


class LayerPrefill(NamedTuple):
    """What one layer did since the model was loaded, or its record was cleared."""

    calls: dict[str, int]
    """"sparse", or why a call ran dense -> how many there were."""
    density: float
    """Causal query-key pairs that the sparse calls attended to, as a share of all; nan without any."""
    coverage: dict[str, float] | None = None
    """`Audit.summary` over the audited queries of the sparse calls; None without an audit."""
    repaired: float = 0.0
    """Share of the query blocks that were repaired, mean over the sparse calls."""


class _Record:
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.outs: list[_Kept] = []

    def summary(self) -> LayerPrefill:
        if not self.outs:
            return LayerPrefill(dict(self.calls), float("nan"))
        density = float(torch.stack([kept.density for kept in self.outs]).mean())
        repaired = sum(kept.repaired for kept in self.outs) / len(self.outs)
        audits = [kept.audit for kept in self.outs if kept.audit is not None]
        coverage = None
        if audits:
            parts = ([x.flatten() for x in (audit.rows, audit.achieved, audit.certified)] for audit in audits)
            coverage = Audit(*(torch.cat(some) for some in zip(*parts))).summary()
        return LayerPrefill(dict(self.calls), density, coverage, repaired)


class _Kept(NamedTuple):
    """What is remembered of a call."""

    density: Tensor
    audit: Audit | None
    repaired: float


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
            report[name] = record.summary()
    return report


def clear_report(model: nn.Module) -> None:
    """Forget what the layers did."""
    for module in model.modules():
        module.__dict__.pop("_whimbrel_prefill", None)


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
    settings, table = _settings(module)
    reason = _why_dense(module, query, key, attention_mask, causal=causal, dropout=dropout, options=kwargs)
    reason = reason or _why_not_worth_it(query, key, settings, table)
    record.calls[reason or "sparse"] += 1
    if reason is None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        run = partial(apply_selector, **_how(settings, table), scale=scaling)
        y, kept = _prefill(q, k, v, attention_mask, run)
        record.outs += kept
        return y, None
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = _causal_over(attention_mask, query.shape[2])
    with decoding_kernels(query.shape[2], query.device):
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
) -> tuple[Tensor, list[_Kept]]:
    """The output [B, Tq, H, D], zero at padding, and what is remembered; rows of unequal padding go one by one."""
    if real is None:
        out = run(q, k, v)
        return out.y, [_kept(out)]
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    starts = _begins(real).int().argmax(1)
    spans = torch.stack((starts, starts + real.sum(1)), 1).tolist()
    same = all(span == spans[0] for span in spans)
    y, kept = q.new_zeros(*q.shape[:3], v.shape[3]), []
    for row in [0] if same else range(batch):
        rows = slice(None) if same else slice(row, row + 1)
        start, stop = spans[row]
        offset = 0 if queries == keys else stop - queries
        asked = slice(max(0, start - offset), stop - offset)
        if asked.start < asked.stop:
            out = run(q[rows, asked], k[rows, start:stop], v[rows, start:stop])
            y[rows, asked] = out.y
            kept.append(_kept(out))
    return y, kept


def _kept(out: Out) -> _Kept:
    return _Kept(out.density.mean(), out.audit, out.repaired)


def _causal_over(real: Tensor, queries: int) -> Tensor:
    """[B, 1, queries, keys] bool for keys that are tokens [B, keys]; the last key that is one is the last query's."""
    keys = torch.arange(real.shape[1], device=real.device)
    first = 0 if queries == real.shape[1] else (real * (keys + 1)).amax(1)[:, None, None, None] - queries
    rows = torch.arange(queries, device=real.device)[:, None] + first
    return real[:, None, None] & (keys <= rows)


def _settings(module: nn.Module) -> tuple[Options, str]:
    """The options of a layer's calls, and the table of its selector as JSON."""
    config = getattr(module, "config", None)
    options = _options(json.dumps(getattr(config, "prefill_options", None) or {}, sort_keys=True))
    own = options.layers.get(str(getattr(module, "layer_idx", None)))
    table = own if own is not None else getattr(config, "prefill", None)
    return options, json.dumps(table, sort_keys=True)


@functools.lru_cache(maxsize=32)
def _options(table: str) -> Options:
    given = json.loads(table)
    names = [f.name for f in fields(Options)]
    for name in given:
        if name not in names:
            raise ConfigError(f"prefill_options.{name} is not known{nearest(name, names)}; use {', '.join(names)}")
    return Options(**given)


@functools.lru_cache(maxsize=32)
def _config(table: str) -> SelectorConfig:
    return selector_of(json.loads(table))


@functools.lru_cache(maxsize=64)
def _how(options: Options, table: str) -> dict[str, Any]:
    """Arguments of `apply_selector`."""
    config = _config(table)
    target = None
    if options.repair:
        target = Target(
            getattr(config, "coverage", Target().coverage), getattr(config, "row_share", Target().row_share)
        )
    return {"selector": config.build(), "audit_rows": options.audit_rows, "repair": target}


def _why_not_worth_it(query: Tensor, key: Tensor, options: Options, table: str) -> str | None:
    """Why a prefill that could be sparse shall not be."""
    config, least = _config(table), options.min_length
    if isinstance(config, DenseConfig):
        return "dense by setting"
    if least is None:
        batch, heads, _, dim = query.shape
        least = sparse_from(key.device, heads=batch * heads, head_dim=dim, kind=kind_of(config))
    if least == NEVER:
        return "no length measured for such heads"
    return f"fewer than {least} keys" if key.shape[2] < least else None
