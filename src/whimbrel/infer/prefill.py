"""Sparse prefill of a model's softmax blocks, and what it changes."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.attend import Plan
from whimbrel.config import SelectorConfig, require
from whimbrel.model import Decoder, set_prefill
from whimbrel.sparse.apply import apply_selector
from whimbrel.sparse.coverage import coverage as plan_coverage


class LayerPrefill(NamedTuple):
    """What one softmax block attended to in one prefill."""

    density: float
    """Causal query-key pairs attended to, as a share of all."""
    coverage_mean: float
    """Softmax mass inside the plan, mean over the audited rows and heads; nan without an audit."""
    coverage_low: float
    """The least of the same."""
    plan: Plan


class SparsePrefill:
    """Attention for `set_prefill`: selects blocks, attends to them, and remembers what each block did.

    `audit_rows` > 0 also computes, for that many evenly spaced rows, the exact softmax mass that the plan holds.
    """

    def __init__(self, config: SelectorConfig, *, audit_rows: int = 0) -> None:
        self._select = config.build()
        self._audit_rows = audit_rows
        self.layers: list[LayerPrefill] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """y [B, Tq, H, D] for q [B, Tq, H, D] and k, v [B, Tk, Hkv, D]; the queries are the last Tq positions."""
        y, plan, *_ = apply_selector(q, k, v, self._select, scale=scale)
        mean = low = float("nan")
        if self._audit_rows:
            rows = torch.linspace(0, q.shape[1] - 1, min(self._audit_rows, q.shape[1])).long().unique()
            mass = plan_coverage(q, k, plan, scale=scale, rows=rows).float()
            mean, low = float(mass.mean()), float(mass.min())
        self.layers.append(LayerPrefill(plan.mean_density(), mean, low, plan))
        return y


class PrefillComparison(NamedTuple):
    """A sparse prefill beside the dense one of the same prompt."""

    tokens: int
    layers: tuple[LayerPrefill, ...]
    """One entry for each softmax block, first to last."""
    max_logit_difference: float
    rms_logit_ratio: float
    """RMS of the logit difference over RMS of the dense logits."""
    top1_agreement: float
    """Share of positions whose likeliest token is the same."""
    loss_dense: float
    """Next-token loss over the prompt with dense attention, nats a token."""
    loss_sparse: float
    seconds_dense: tuple[float, ...]
    """Wall time of each repeat."""
    seconds_sparse: tuple[float, ...]


@torch.no_grad()
def compare_prefill(
    model: Decoder, tokens: Tensor, config: SelectorConfig, *, audit_rows: int = 64, repeats: int = 3
) -> PrefillComparison:
    """Run `tokens` [1, T] through `model` densely and with `config`'s selector.

    `repeats` forward passes of each are timed, the audit apart. Raises ConfigError for none.
    """
    require(repeats > 0, "repeats", repeats, "a positive number")
    model.eval()
    dense_logits, dense_seconds = _timed(model, tokens, repeats)
    try:
        audited = SparsePrefill(config, audit_rows=audit_rows)
        set_prefill(model, audited)
        model(tokens)
        set_prefill(model, SparsePrefill(config))
        sparse_logits, sparse_seconds = _timed(model, tokens, repeats)
    finally:
        set_prefill(model, None)
    difference = (sparse_logits - dense_logits).float()
    return PrefillComparison(
        tokens=tokens.shape[1],
        layers=tuple(audited.layers),
        max_logit_difference=float(difference.abs().max()),
        rms_logit_ratio=float(difference.square().mean().sqrt() / dense_logits.float().square().mean().sqrt()),
        top1_agreement=float((sparse_logits.argmax(-1) == dense_logits.argmax(-1)).float().mean()),
        loss_dense=_next_token_loss(dense_logits, tokens),
        loss_sparse=_next_token_loss(sparse_logits, tokens),
        seconds_dense=dense_seconds,
        seconds_sparse=sparse_seconds,
    )


def _timed(model: Decoder, tokens: Tensor, repeats: int) -> tuple[Tensor, tuple[float, ...]]:
    seconds, logits = [], torch.empty(0)
    for _ in range(repeats):
        if tokens.is_cuda:
            torch.cuda.synchronize()  # what came before is not waited for in here
        start = time.perf_counter()
        logits = model(tokens).logits
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return logits, tuple(seconds)


def _next_token_loss(logits: Tensor, tokens: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]))
