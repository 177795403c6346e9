"""What the heads and states of a model do: attention sinks, retrieval heads, state norms, half-lives, clipping."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from whimbrel.config import kind_of
from whimbrel.data.synthetic import mqar
from whimbrel.data.tokenizer import Symbols
from whimbrel.errors import ConfigError
from whimbrel.mixers.linear import LinearMixer
from whimbrel.mixers.softmax.layer import SoftmaxAttention
from whimbrel.model.decoder import Decoder

SINK = 0.3
"""Share of a head's attention on the first token from which the head counts as a sink (arXiv 2410.10781, section 3)."""


class HeadLoss(NamedTuple):
    """What the answers of key-value prompts lose without one head."""

    block: int
    head: int
    kind: str
    """Kind of the block's mixer."""
    rise: float
    """Rise of the loss at the answers in nats, the head's output set to zero."""


class LayerState(NamedTuple):
    """The recurrence of one block over a text."""

    block: int
    kind: str
    norms: list[float]
    """Root mean square of each head's states at the end of the text; of two states both."""
    half_lives: list[float]
    """Tokens in which each head's state falls to a half, by its median decay."""
    clip_rate: float | None
    """Share of the residual's elements that the clip cuts; None without a second state or a clip."""


class Diagnostics(NamedTuple):
    """Figures of one model."""

    sinks: list[tuple[int, int, float]]
    """Block, head and its attention on the first token, averaged over the later ones, of softmax layers."""
    sink_rate: float | None
    """Share of softmax heads above SINK; None without softmax layers."""
    answer_loss: float
    """Loss at the answers with all heads, nats; ln(values) would be a guess."""
    heads: list[HeadLoss]
    """All heads, those that cost most first."""
    layers: list[LayerState]


def diagnose(
    model: Decoder, text: Tensor, symbols: Symbols, *, num_pairs: int = 4, num_prompts: int = 16, seed: int = 1234
) -> Diagnostics:
    """Look into `model` on a text [B, T] int64 and on generated key-value prompts of `num_pairs` bindings.

    Runs the model once for each head. Raises ConfigError for a text of fewer than 16 tokens.
    """
    if text.shape[1] < 16:
        raise ConfigError(f"the text has {text.shape[1]} tokens; give at least 16")
    device = next(model.parameters()).device
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            sinks, layers = _look(model, text.to(device))
            made = mqar(seed, batch=num_prompts, seq_len=4 * num_pairs, num_pairs=num_pairs, symbols=symbols)
            tokens, answers = (torch.from_numpy(x).to(device) for x in (made.tokens, made.answers))
            whole = float(model.loss(tokens, answers))
            heads = [
                HeadLoss(block, head, kind, _without(model, block, head, tokens, answers) - whole)
                for block, kind in enumerate(map(kind_of, model.config.layers()))
                for head in range(_num_heads(model, block))
            ]
    finally:
        model.train(before)
    rate = sum(share > SINK for *_, share in sinks) / len(sinks) if sinks else None
    return Diagnostics(sinks, rate, whole, sorted(heads, key=lambda head: -head.rise), layers)


def _mixer(model: Decoder, block: int) -> Any:
    return model.blocks[block].mixer


def _num_heads(model: Decoder, block: int) -> int:
    mixer = _mixer(model, block)
    return mixer.num_value_heads if isinstance(mixer, LinearMixer) else getattr(mixer, "num_heads", 0)


def _without(model: Decoder, block: int, head: int, tokens: Tensor, answers: Tensor) -> float:
    """The loss with one head's share of the output projection's input set to zero."""

    def silence(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = inputs[0].unflatten(-1, (_num_heads(model, block), -1)).clone()
        heads[..., head, :] = 0
        return (heads.flatten(-2), *inputs[1:])

    handle = _mixer(model, block).o_proj.register_forward_pre_hook(silence)
    try:
        return float(model.loss(tokens, answers))
    finally:
        handle.remove()


def _look(model: Decoder, text: Tensor) -> tuple[list[tuple[int, int, float]], list[LayerState]]:
    """Sinks and states of every layer in one pass over the text."""
    sinks: list[tuple[int, int, float]] = []
    layers: list[LayerState] = []
    with _watched(model) as seen:
        model(text, logits_to_keep=1)
    for block, kind in enumerate(map(kind_of, model.config.layers())):
        mixer = _mixer(model, block)
        if isinstance(mixer, SoftmaxAttention):
            sinks += [(block, head, share) for head, share in enumerate(_first_token(mixer, seen[block]))]
        elif isinstance(mixer, LinearMixer):
            layers.append(_state(block, kind, mixer, *seen[block]))
    return sinks, layers


@contextmanager
def _watched(model: Decoder) -> Iterator[dict[int, Any]]:
    """Collects the input of softmax layers, and arguments and state of recurrences, by block."""
    seen: dict[int, Any] = {}
    handles, replaced = [], []
    for block in range(len(model.blocks)):
        mixer = _mixer(model, block)
        if isinstance(mixer, SoftmaxAttention):
            hook = functools.partial(lambda block, _, inputs: seen.update({block: inputs[0]}), block)
            handles.append(mixer.register_forward_pre_hook(hook))
        elif isinstance(mixer, LinearMixer):
            replaced.append((mixer, mixer.recurrence))
            mixer.recurrence = functools.partial(_recorded, mixer.recurrence, seen, block)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for mixer, recurrence in replaced:
            mixer.recurrence = recurrence


def _recorded(recurrence: Any, seen: dict[int, Any], block: int, *tensors: Tensor, **options: Any) -> Any:
    out = recurrence(*tensors, **options)
    seen[block] = tensors, out.state
    return out


def _first_token(layer: SoftmaxAttention, x: Tensor) -> list[float]:
    """Attention of each head on the first token, averaged over the second half of the text."""
    q, k, _ = layer.heads(x, torch.arange(x.shape[1], device=x.device))
    time = x.shape[1]
    if layer.window and layer.window < time:
        return [0.0] * layer.num_heads
    late = torch.arange(time // 2, time, device=x.device)
    k = k.repeat_interleave(layer.num_heads // layer.num_kv_heads, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, late].float(), k.float()) * layer.head_dim**-0.5
    hidden = torch.arange(time, device=x.device) > late[:, None]
    return scores.masked_fill(hidden, -math.inf).softmax(-1)[..., 0].mean((0, 2)).tolist()


def _state(block: int, kind: str, mixer: LinearMixer, tensors: tuple[Tensor, ...], state: Any) -> LayerState:
    parts = [part.float() for part in state if part is not None]
    norms = torch.stack([part.square().mean((-1, -2)) for part in parts]).mean((0, 1)).sqrt()
    decay = tensors[3].float().flatten(0, 1).median(0).values
    half_lives = (math.log(2) / -decay.clamp_max(-1e-9)).tolist()
    options = _options(mixer.recurrence)
    clipped = None
    if kind in ("rla", "rdn") and options.get("clip") is not None:
        clipped = clip_rate(
            *tensors[:5], delta=kind == "rdn", clip=options["clip"], decayed=options.get("residual") == "decayed"
        )
    return LayerState(block, kind, norms.tolist(), half_lives, clipped)


def _options(recurrence: Any) -> dict[str, Any]:
    return dict(recurrence.keywords) if isinstance(recurrence, functools.partial) else {}


def clip_rate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    delta: bool,
    clip: float,
    decayed: bool = False,
) -> float:
    """Share of the elements of v - S k that the clip of RLA (or, with `delta`, of RDN) cuts, token by token.

    Shapes as for `whimbrel.mixers.rdn.rdn`; S is the base state (arXiv 2509.25223, section 3).
    """
    heads = v.shape[2]
    k, v = k.float().repeat_interleave(heads // k.shape[2], 2), v.float()
    alpha, beta = log_decay.float().exp()[..., None], beta.float()[..., None]
    state = v.new_zeros(v.shape[0], heads, k.shape[3], v.shape[3])
    cut = 0
    for t in range(v.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        residual = v[:, t] - (alpha[:, t] * read if decayed else read)
        cut += int((residual.abs() > clip).sum())
        write = beta[:, t] * (v[:, t] - alpha[:, t] * read if delta else v[:, t])
        state = alpha[:, t, :, None] * state + k[:, t, :, :, None] * write[:, :, None]
    return cut / v.numel()


def plain(found: Diagnostics) -> dict[str, Any]:
    """The figures as plain data for a report: `whimbrel.report.schema.Diagnostics`."""
    data: dict[str, Any] = {
        "answer_loss": found.answer_loss,
        "heads": [head._asdict() for head in found.heads],
        "sinks": [{"block": block, "head": head, "share": share} for block, head, share in found.sinks],
        "layers": [
            {name: value for name, value in layer._asdict().items() if value is not None} for layer in found.layers
        ],
    }
    return data | ({} if found.sink_rate is None else {"sink_rate": found.sink_rate})
