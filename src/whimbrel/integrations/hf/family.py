"""The Llama family (Llama, SmolLM2, Mistral, Qwen 2 and 3) as Whimbrel decoders, and back: options and names."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from whimbrel.config import ModelConfig
from whimbrel.errors import UnsupportedError
from whimbrel.mixers.softmax.config import RopeScaling, SoftmaxConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of transformers that are read and written. SmolLM2 is a Llama."""

_PARTS = {
    "norm_mixer.": "input_layernorm.",
    "mixer.": "self_attn.",
    "norm_mlp.": "post_attention_layernorm.",
    "mlp.gate.": "mlp.gate_proj.",
    "mlp.up.": "mlp.up_proj.",
    "mlp.down.": "mlp.down_proj.",
}
_ENDS = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def family_name(name: str) -> str:
    """The name that the family has for the weight that a Decoder calls `name`."""
    if name in _ENDS:
        return _ENDS[name]
    _, index, rest = name.split(".", 2)
    part = next(part for part in _PARTS if rest.startswith(part))
    return f"model.layers.{index}.{_PARTS[part]}{rest.removeprefix(part)}"


def model_of(config: PreTrainedConfig) -> ModelConfig:
    """The decoder that computes what a model with this configuration does.

    Raises UnsupportedError for a model type outside of FAMILIES and for options that the decoder lacks.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise UnsupportedError(f"model_type = '{kind}' cannot be converted; use one of {', '.join(FAMILIES)}")
    _refuse("hidden_act", config.hidden_act, config.hidden_act in ("silu", "swish"), "'silu'")
    _refuse("mlp_bias", getattr(config, "mlp_bias", False), not getattr(config, "mlp_bias", False), "false")
    heads = config.num_attention_heads
    bias = bool(getattr(config, "attention_bias", False))
    softmax = SoftmaxConfig(
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        rope_scaling=_scaling_of(config.rope_parameters),
        qk_norm=kind == "qwen3",
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        window=_window_of(config),
    )
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        mlp_size=config.intermediate_size,
        mixer=softmax,
        softmax_every=0,
        softmax=softmax,
        tie_embeddings=bool(config.tie_word_embeddings),
        norm_eps=float(config.rms_norm_eps),
        init_std=float(config.initializer_range),
    )


def family_config(model: ModelConfig, kind: str, **extra: Any) -> PreTrainedConfig:
    """The configuration of the model type `kind` that computes what the decoder does; `extra` goes into it as it is.

    Raises UnsupportedError for a decoder with a part that `kind` lacks.
    """
    if kind not in FAMILIES:
        raise UnsupportedError(f"model type '{kind}' cannot be written; use one of {', '.join(FAMILIES)}")
    layers = set(model.layers())
    softmax = next(iter(layers))
    if len(layers) > 1 or not isinstance(softmax, SoftmaxConfig):
        raise UnsupportedError(
            f"the model type '{kind}' has the same softmax attention in every block, this model has not; "
            "keep it as whimbrel"
        )
    wanted = {
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2" or (softmax.out_bias and kind != "mistral"),
        "out_bias": softmax.out_bias and kind in ("llama", "qwen3"),
        "window": 0 if kind == "llama" else softmax.window,
    }
    for name, value in wanted.items():
        found = getattr(softmax, name)
        _refuse(
            f"softmax.{name}", found, found == value, f"{value} for the model type '{kind}', or keep it as whimbrel"
        )
    fields: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "intermediate_size": model.mlp_size,
        "num_attention_heads": softmax.num_heads,
        "num_key_value_heads": softmax.kv_heads,
        "head_dim": softmax.head_dim,
        "rope_parameters": _rope_parameters(softmax),
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = softmax.out_bias
    if kind == "mistral":
        fields["sliding_window"] = softmax.window or None
    if kind in ("qwen2", "qwen3") and softmax.window:
        fields |= {"use_sliding_window": True, "sliding_window": softmax.window, "max_window_layers": 0}
    return AutoConfig.for_model(kind, **fields, **extra)


def _refuse(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise UnsupportedError(f"{name} = {value!r} cannot be converted; it must be {allowed}")


def _window_of(config: PreTrainedConfig) -> int:
    types = getattr(config, "layer_types", None)
    if types is None:
        return getattr(config, "sliding_window", None) or 0
    _refuse("layer_types", sorted(set(types)), len(set(types)) == 1, "one type for all layers")
    return (config.sliding_window or 0) if types[0] == "sliding_attention" else 0


def _scaling_of(rope: dict[str, Any]) -> RopeScaling:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    _refuse("rope_type", kind, kind == "llama3", "'default', 'linear' or 'llama3'")
    return RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_turns=float(rope["low_freq_factor"]),
        high_turns=float(rope["high_freq_factor"]),
        original_tokens=int(rope["original_max_position_embeddings"]),
    )


def _rope_parameters(softmax: SoftmaxConfig) -> dict[str, Any]:
    scaling = softmax.rope_scaling
    rope: dict[str, Any] = {"rope_theta": softmax.rope_theta, "rope_type": "default"}
    if scaling.kind != "none":
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_turns,
            "high_freq_factor": scaling.high_turns,
            "original_max_position_embeddings": scaling.original_tokens,
        }
    return rope
