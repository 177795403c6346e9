"""The configuration of the model type `whimbrel`: a ModelConfig in the words that transformers' tools read."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from whimbrel.config import ModelConfig, SelectorConfig, decode, encode, kind_class
from whimbrel.errors import UnsupportedError
from whimbrel.mixers.softmax.config import SoftmaxConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "mlp_size": "intermediate_size",
    "mixer": "mixer",
    "softmax_every": "softmax_every",
    "softmax": "softmax",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
"""Field of ModelConfig -> its name here."""

_DEFAULT = ModelConfig()


class WhimbrelConfig(PreTrainedConfig):
    """A Whimbrel decoder. `mixer` and `softmax` are tables with `kind`, as in a run's config.toml.

    `layer_types`, `sliding_window` and the numbers of heads follow from the rest; they are there for tools that read
    them. Raises ConfigError for a setting that ModelConfig refuses, UnsupportedError for two windows of unequal length.
    """

    model_type: ClassVar[str] = "whimbrel"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size: int = _DEFAULT.vocab_size
    hidden_size: int = _DEFAULT.hidden_size
    num_hidden_layers: int = _DEFAULT.num_layers
    intermediate_size: int = _DEFAULT.mlp_size
    mixer: dict | None = None
    softmax_every: int = _DEFAULT.softmax_every
    softmax: dict | None = None
    tie_word_embeddings: bool = _DEFAULT.tie_embeddings
    rms_norm_eps: float = _DEFAULT.norm_eps
    initializer_range: float = _DEFAULT.init_std
    prefill: dict | None = None
    """Selector of `attn_implementation="whimbrel_sparse"`, a table with `kind`; None takes `row_local`."""
    max_position_embeddings: int | None = None
    """Tokens of the longest training sequence, for tools that ask; no limit of the model."""
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        model = self.model_config
        layers = model.layers()
        data = encode(model)
        self.mixer, self.softmax = data["mixer"], data["softmax"]
        softmax = [layer for layer in layers if isinstance(layer, SoftmaxConfig)]
        windows = sorted({layer.window for layer in softmax if layer.window})
        if len(windows) > 1:
            raise UnsupportedError(f"softmax windows of {windows} tokens in one model: transformers knows a single one")
        heads: Any = (softmax or layers)[0]
        kwargs |= {
            "layer_types": [layer_type(layer) for layer in layers],
            "sliding_window": windows[0] if windows else None,
            "num_attention_heads": getattr(heads, "num_heads", None),
            "num_key_value_heads": heads.kv_heads if softmax else getattr(heads, "num_heads", None),
            "head_dim": getattr(heads, "head_dim", None),
        }
        super().__post_init__(**kwargs)

    @property
    def model_config(self) -> ModelConfig:
        """The same decoder as Whimbrel's own configuration."""
        values = {ours: getattr(self, theirs) for ours, theirs in FIELDS.items()}
        return decode(ModelConfig, {name: value for name, value in values.items() if value is not None}, where="model.")

    @classmethod
    def from_model(cls, model: ModelConfig, *, prefill: SelectorConfig | None = None, **extra: Any) -> WhimbrelConfig:
        """The configuration of a decoder; `extra` are fields of this class such as `eos_token_id`."""
        data = encode(model)
        fields = {theirs: data[ours] for ours, theirs in FIELDS.items()}
        return cls(**fields, prefill=None if prefill is None else encode(prefill), **extra)


def layer_type(mixer: Any) -> str:
    """The word that transformers has for a block with this mixer."""
    if not isinstance(mixer, SoftmaxConfig):
        return "linear_attention"
    return "sliding_attention" if mixer.window else "full_attention"


def selector_of(table: dict | None) -> SelectorConfig:
    """The selector that a `prefill` table describes; `row_local` as it comes for None."""
    settings = dict(table or {})
    return decode(kind_class(SelectorConfig.FAMILY, settings.pop("kind", "row_local")), settings, where="prefill.")
