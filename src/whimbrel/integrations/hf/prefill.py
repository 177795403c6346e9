"""Sparse prefill of a loaded model in one call, and what it did in each generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import MethodType
from typing import Any

from torch import nn

from whimbrel.config import SelectorConfig, encode, require
from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.integrations.hf.attention import NAME, LayerPrefill, Options, clear_report, prefill_report
from whimbrel.integrations.hf.config import selector_of


class SparsePrefill:
    """A model that prefills sparsely: what its last generation did, and the way back."""

    def __init__(self, model: Any, before: str) -> None:
        self.model = model
        self._before = before

    @property
    def layers(self) -> dict[str, LayerPrefill]:
        """Name of a layer -> what it did since the last generation began, forward passes after it included."""
        return prefill_report(self.model)

    @property
    def calls(self) -> dict[str, int]:
        """ "sparse", or why calls ran dense -> how many, over all layers."""
        total: Counter[str] = Counter()
        for layer in self.layers.values():
            total.update(layer.calls)
        return dict(total)

    @property
    def density(self) -> float:
        """Causal query-key pairs attended to, as a share of all: mean over the layers with a sparse call, else nan."""
        found = [layer.density for layer in self.layers.values() if "sparse" in layer.calls]
        return sum(found) / len(found) if found else float("nan")

    def clear(self) -> None:
        """Forget what the layers did; every generation begins with it."""
        clear_report(self.model)

    def disable(self) -> None:
        """Give the model back the attention it had, and its own `generate`."""
        self.model.set_attn_implementation(self._before)
        self.model.__dict__.pop("generate", None)
        config = self.model.config.get_text_config()
        config.prefill = config.prefill_options = None

    def __str__(self) -> str:
        lines = [f"{'layer':<28} {'density':>8} {'cov. p5':>8} {'cov. min':>8}  calls"]
        for name, layer in self.layers.items():
            low = layer.coverage or {}
            figures = [layer.density, low.get("p5", float("nan")), low.get("min", float("nan"))]
            calls = ", ".join(f"{count} {reason}" for reason, count in layer.calls.items())
            lines.append(f"{name:<28} {' '.join(f'{x:8.3f}' for x in figures)}  {calls}")
        return "\n".join(lines)


def enable_sparse_prefill(
    model: Any,
    selector: str | SelectorConfig = "row_local",
    coverage: float | None = None,
    *,
    min_length: int | None = None,
    layers: Mapping[int, str | float | SelectorConfig] | None = None,
    repair: bool = False,
    audit_rows: int = 0,
) -> SparsePrefill:
    """Let a model of transformers prefill its prompts sparsely from now on; decoding stays dense.

    Args:
        model: a loaded decoder whose attention transformers can choose by name.
        selector: a kind (`whimbrel show kinds`), or a config with settings.
        coverage: share of the attention that is kept, in place of the selector's own.
        min_length: prompts with fewer keys run dense; None takes the length measured for the device and so many heads,
            where one was.
        layers: index of a layer -> "dense", a coverage, or a selector of its own.
        repair: query blocks that miss the coverage on audited queries get more keys in a second pass.
        audit_rows: queries of each call whose coverage is measured; `SparsePrefill.layers` tells.

    Returns:
        An object that tells, after each `model.generate`, what every layer did and why a call ran dense.

    The settings stand in the model's configuration and are saved with it; the choice of attention is not, so call this
    again after loading.

    Raises:
        UnsupportedError: the model cannot be served, with the reason.
        ConfigError: a setting is not allowed.
    """
    _refuse(model)
    config = model.config.get_text_config()
    kinds = "a kind such as 'row_local', or a selector's config"
    require(isinstance(selector, (str, SelectorConfig)), "selector", selector, kinds)
    table = "a table from a layer's index to its setting"
    require(layers is None or isinstance(layers, Mapping), "layers", layers, table)
    chosen = selector_of({"kind": selector}) if isinstance(selector, str) else selector
    chosen = _at_coverage(chosen, coverage)
    outside = [index for index in layers or {} if index not in range(config.num_hidden_layers)]
    if outside:
        raise ConfigError(f"layers has {outside[0]!r}; the model has layers 0 to {config.num_hidden_layers - 1}")
    own = {str(index): encode(_of_layer(chosen, index, value)) for index, value in (layers or {}).items()}
    options = Options(min_length=min_length, repair=repair, audit_rows=audit_rows, layers=own)
    before = model.config._attn_implementation
    handle = SparsePrefill(model, "sdpa" if before == NAME else before)
    model.set_attn_implementation(NAME)
    config.prefill, config.prefill_options = encode(chosen), asdict(options)
    model.__dict__["generate"] = MethodType(_generate, model)  # a method, so that a copy of the model calls its own
    handle.clear()
    return handle


def _generate(model: Any, *arguments: Any, **options: Any) -> Any:
    """The model's `generate`, with a new record."""
    clear_report(model)
    return type(model).generate(model, *arguments, **options)


def _at_coverage(selector: SelectorConfig, coverage: float | None) -> SelectorConfig:
    if coverage is None:
        return selector
    if not hasattr(selector, "coverage"):
        raise ConfigError(f"coverage = {coverage} is not allowed; {type(selector).__name__} has none, leave it out")
    require(isinstance(coverage, (int, float)), "coverage", coverage, "a number above 0 and up to 1")
    return replace(selector, coverage=coverage)  # pyrefly: ignore


def _of_layer(chosen: SelectorConfig, index: int, value: str | float | SelectorConfig) -> SelectorConfig:
    allowed = "'dense', a coverage, or a selector's config"
    require(isinstance(value, (str, int, float, SelectorConfig)), f"layers[{index}]", value, allowed)
    if isinstance(value, str):
        return selector_of({"kind": value})
    return value if isinstance(value, SelectorConfig) else _at_coverage(chosen, value)


def _refuse(model: Any) -> None:
    """Raise UnsupportedError for a model that sparse prefill cannot serve."""
    name, why = type(model).__name__, None
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation") or config is None:
        why = "it is no model of transformers"
    elif getattr(config, "is_encoder_decoder", False):
        why = "it has an encoder, and attention in both directions is not prefilled sparsely"
    elif not getattr(type(model), "_can_set_attn_implementation", lambda: True)():
        why = "transformers cannot choose its attention by name"
    elif not hasattr(model, "generate"):
        why = "it does not generate"
    elif getattr(config.get_text_config(), "attn_logit_softcapping", None):
        why = "its attention caps the logits (attn_logit_softcapping)"
    elif any(parameter.endswith(".sinks") for parameter, _ in model.named_parameters()):
        why = "its attention has sinks"
    if why is not None:
        raise UnsupportedError(f"enable_sparse_prefill cannot serve {name}: {why}; leave it dense")
