"""Whole models: tokens a second in training and in prefill, the same model with one mixer or another.

The model is that of a recipe, in bf16 autocast with fp32 weights as the trainer runs it. Softmax attention is cuDNN's
where cuDNN serves. A model whose mixer is replaced keeps everything else, so a softmax model gets a wider MLP to have
the parameters of the linear one.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from whimbrel import recipes
from whimbrel.bench.case import Case, Rival
from whimbrel.config import Config, ModelConfig
from whimbrel.mixers.base import Out
from whimbrel.mixers.gdn.config import GDNConfig
from whimbrel.mixers.rdn.config import RDNConfig
from whimbrel.mixers.softmax.config import SoftmaxConfig
from whimbrel.model.decoder import Decoder
from whimbrel.model.memory import parameter_counts
from whimbrel.scan import rivals

TRAINED_LENGTH = 4096
"""Tokens of a sequence where mixers are compared in training."""
LENGTHS = (2048, 8192, 32_768, 131_072)
"""Tokens of a sequence where linear mixers are compared with softmax."""
TOKENS = 32_768
"""Tokens of a call; a longer sequence is a call by itself."""


class Variant(NamedTuple):
    """A model: a recipe's, with another mixer or with another recurrence in it."""

    config: Config
    recurrence: Callable[..., Tensor] | None = None
    """In place of every linear mixer's: f(q, k, v, log_decay, beta) -> y."""
    recompute: bool = False
    """Keep each block's input alone for the backward."""


class Shape(NamedTuple):
    """Sequences of one call."""

    batch: int
    time: int
    device: str


def train_tokens(*, device: str, quick: bool = False) -> list[Case]:
    """Forward, backward, clipping and optimizer step on random tokens."""
    base, shape = (
        _recipe(device),
        Shape(2, 64, device) if device != "cuda" or quick else Shape(4, TRAINED_LENGTH, device),
    )
    cases = []
    for every in (0,) if quick else (base.model.softmax_every, 0):
        own = {kind: Variant(_with_mixer(base, kind, every)) for kind in ("rdn", "gdn")}
        theirs = {
            f"gdn, {name}": own["gdn"]._replace(recurrence=scan)
            for name, scan in (("fla", rivals.fla_delta), ("flash-qla", rivals.flash_qla_delta))
        }
        cases.append(_case("train_tokens", own, theirs if device == "cuda" else {}, shape, _training_step))
    for shape in _shapes(device, quick):
        own = {name: variant._replace(recompute=True) for name, variant in _against_softmax(base).items()}
        cases.append(_case("train_tokens", own, {}, shape, _training_step))
    return cases


def prefill_tokens(*, device: str, quick: bool = False) -> list[Case]:
    """A prompt's forward pass with the logits of its last position, without gradients."""
    own = _against_softmax(_recipe(device))
    return [_case("prefill_tokens", own, {}, shape, _prefill) for shape in _shapes(device, quick)]


def _recipe(device: str) -> Config:
    return recipes.get("rdn-360m" if device == "cuda" else "tiny-rdn")


def _shapes(device: str, quick: bool) -> list[Shape]:
    if device != "cuda" or quick:
        return [Shape(1, 128, device)]
    return [Shape(max(1, TOKENS // time), time, device) for time in LENGTHS]


def _against_softmax(base: Config) -> dict[str, Variant]:
    return {
        "rdn": Variant(_with_mixer(base, "rdn", 0)),
        "rdn hybrid": Variant(_with_mixer(base, "rdn", base.model.softmax_every)),
        "softmax": Variant(_with_mixer(base, "softmax", 0)),
    }


def _with_mixer(base: Config, kind: str, softmax_every: int) -> Config:
    model, mixer = base.model, base.model.mixer
    assert isinstance(mixer, RDNConfig)
    heads, dim = mixer.num_heads, mixer.head_dim
    impl = "triton" if base.name == "rdn-360m" else "chunked"
    found: dict[str, Any] = {
        "rdn": replace(mixer, impl=impl),
        "gdn": GDNConfig(num_heads=heads, head_dim=dim, impl=impl),
        "softmax": SoftmaxConfig(num_heads=heads, head_dim=dim),
    }
    changed = replace(model, mixer=found[kind], softmax_every=softmax_every)
    return replace(base, model=widened(changed, replace(model, softmax_every=0)) if kind == "softmax" else changed)


def widened(model: ModelConfig, like: ModelConfig) -> ModelConfig:
    """`model` with the MLP that gives it the parameters of `like`, to a multiple of 32 channels."""
    missing = parameter_counts(like)["total"] - parameter_counts(model)["total"]
    channel = 3 * model.hidden_size * model.num_layers
    return replace(model, mlp_size=model.mlp_size + 32 * round(missing / channel / 32))


Run = Callable[[Variant, Shape], Callable[[], Tensor]]
"""Builds the model and its tokens and returns the call, which gives a number that tells right from wrong."""


def _case(name: str, own: Mapping[str, Variant], theirs: Mapping[str, Variant], shape: Shape, run: Run) -> Case:
    some = next(iter(own.values()))
    params = {
        "B": shape.batch,
        "T": shape.time,
        "recipe": some.config.name,
        "softmax_every": some.config.model.softmax_every,
        "recompute": some.recompute,
    }
    # One number for each model, since a build costs more than a call.
    first = cache(lambda variant: float(run(variant, shape)()))
    firsts = {impl: partial(first, variant) for impl, variant in {**own, **theirs}.items()}
    return Case(
        name=name,
        params=params,
        impls={impl: partial(run, variant, shape) for impl, variant in own.items()},
        check=partial(_check_finite, {impl: firsts[impl] for impl in own}),
        rivals={
            impl: Rival(partial(run, variant, shape), partial(_check_equal, firsts["gdn"], firsts[impl]))
            for impl, variant in theirs.items()
        },
        metric="throughput",
        tokens=shape.batch * shape.time,
    )


def _check_finite(values: Mapping[str, Callable[[], float]]) -> None:
    for impl, value in values.items():
        assert math.isfinite(found := value()), f"{impl}: the result is {found}"


def _check_equal(want: Callable[[], float], got: Callable[[], float]) -> str:
    """Equal weights and tokens must give an equal loss."""
    a, b = want(), got()
    assert abs(a - b) <= 1e-3 * abs(a), f"loss {b:.5f}, want {a:.5f}"
    return ""


def _training_step(variant: Variant, shape: Shape) -> Callable[[], Tensor]:
    config = variant.config
    model, tokens, targets = _build(variant, shape)
    optimizer = config.optim.build(config.optim.groups(model))
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3  # random tokens teach nothing, and the weights should not run away

    def call() -> Tensor:
        with _as_trained(variant, shape.device):
            loss = model.loss(tokens, targets)
        with _attention(config, shape.device):  # blocks that are recomputed run in here
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return call


def _prefill(variant: Variant, shape: Shape) -> Callable[[], Tensor]:
    model, tokens, _ = _build(variant, shape)
    model.eval()

    @torch.no_grad()
    def call() -> Tensor:
        with _as_trained(variant, shape.device):
            return model(tokens, logits_to_keep=1).logits.float().square().mean()

    return call


def _build(variant: Variant, shape: Shape) -> tuple[Decoder, Tensor, Tensor]:
    """The model with weights from seed 0, and tokens and targets [B, T]."""
    config = variant.config.model
    gc.collect()  # a model that recomputes holds itself, and the next one may need its memory
    with torch.random.fork_rng(), torch.device(shape.device):
        torch.manual_seed(0)
        model = Decoder(config)
        tokens = torch.randint(config.vocab_size, (shape.batch, shape.time + 1))
    if variant.recurrence is not None:
        for module in model.modules():
            if hasattr(module, "recurrence"):
                module.recurrence = partial(_without_state, variant.recurrence)  # pyrefly: ignore
    if variant.recompute:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model, tokens[:, :-1], tokens[:, 1:]


def _without_state(scan: Callable[..., Tensor], *tensors: Tensor, state: None, cu_seqlens: None) -> Out:
    return Out(scan(*tensors), None)


def _as_trained(variant: Variant, device: str) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=variant.config.dtype == "bfloat16"))
    stack.enter_context(_attention(variant.config, device))
    return stack


def _attention(config: Config, device: str) -> AbstractContextManager[object]:
    """cuDNN alone where softmax is the mixer, so that it is what is timed; cuDNN first in a hybrid."""
    if device != "cuda":
        return ExitStack()
    if isinstance(config.model.mixer, SoftmaxConfig):
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
