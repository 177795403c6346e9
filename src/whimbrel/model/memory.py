"""Parameters and memory of a model, from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from whimbrel.config import Config, MixerConfig, ModelConfig, kind_of

LENGTHS = (1024, 8192, 65_536, 524_288)
"""Context lengths in tokens that a report shows."""


class StateBytes(NamedTuple):
    """What a model keeps for one sequence, in bytes."""

    tokens: int
    """Length of the sequence."""
    recurrent: int
    """State that does not grow with the sequence."""
    kv_cache: int
    """State that does."""
    all_softmax: int
    """State of the same model with its softmax attention in every block."""


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the decoder, in its order."""
    width, inner = model.hidden_size, model.mlp_size
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (model.vocab_size, width)}
    for i, mixer in enumerate(model.layers()):
        parts = {
            "norm_mixer.weight": (width,),
            **{f"mixer.{name}": shape for name, shape in _mixer_shapes(mixer, model).items()},
            "norm_mlp.weight": (width,),
            "mlp.gate.weight": (inner, width),
            "mlp.up.weight": (inner, width),
            "mlp.down.weight": (width, inner),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in parts.items()}
    shapes["norm.weight"] = (width,)
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.vocab_size, width)
    return shapes


def _mixer_shapes(mixer: MixerConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """From the mixer's `parameter_shapes` if it has one; else from its layer, built without storage."""
    declared = getattr(mixer, "parameter_shapes", None)
    if declared is not None:
        return declared(model.hidden_size)
    import torch

    with torch.device("meta"):
        layer = mixer.build(model.hidden_size, model.norm_eps)
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters by part: embedding, each kind of mixer, mlp, norms, head if it is not tied, total."""
    counts = {"embedding": model.vocab_size * model.hidden_size}
    for mixer in model.layers():
        kind = kind_of(mixer)
        counts[kind] = counts.get(kind, 0) + mixer.num_params(model.hidden_size)
    counts["mlp"] = 3 * model.num_layers * model.hidden_size * model.mlp_size
    counts["norms"] = (2 * model.num_layers + 1) * model.hidden_size
    if not model.tie_embeddings:
        counts["head"] = model.vocab_size * model.hidden_size
    return counts | {"total": sum(counts.values())}


def state_bytes(model: ModelConfig, tokens: int, *, bytes_per_element: int = 4) -> StateBytes:
    """What the model keeps for one sequence of `tokens` tokens; `bytes_per_element` is that of the activations."""

    def size(mixer: MixerConfig, length: int) -> int:
        return mixer.state_bytes(model.hidden_size, length, bytes_per_element=bytes_per_element)

    constant = sum(size(mixer, 0) for mixer in model.layers())
    return StateBytes(
        tokens,
        constant,
        sum(size(mixer, tokens) for mixer in model.layers()) - constant,
        model.num_layers * size(model.softmax, tokens),
    )


def model_report(config: Config, *, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """Plain data for `whimbrel show` and the report; `whimbrel.optim.memory_report` is that of a model at hand.

    `parameters`: by part. `training`: bytes of weights, gradients and optimizer state (fp32; activations come on
    top). `inference`: a row of StateBytes for each of `lengths`.
    """
    shapes = parameter_shapes(config.model)
    weights = 4 * sum(math.prod(shape) for shape in shapes.values())
    element = 2 if config.dtype == "bfloat16" else 4
    return {
        "parameters": parameter_counts(config.model),
        "training": {
            "weights": weights,
            "gradients": weights,
            "optimizer": config.optim.state_bytes(shapes),
        },
        "inference": [state_bytes(config.model, tokens, bytes_per_element=element)._asdict() for tokens in lengths],
    }
