"""The decoder as a transformers model: the same layers, weights and names, with masks, caches and attention by name.

Names of weights are those of `whimbrel.model.Decoder`, so one model.safetensors serves both.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from whimbrel.config import MixerConfig, ModelConfig
from whimbrel.errors import UnsupportedError
from whimbrel.integrations.hf.cache import WhimbrelCache
from whimbrel.integrations.hf.config import WhimbrelConfig, layer_type
from whimbrel.mixers.linear import LinearMixer, ShortConv
from whimbrel.mixers.linear import _decay_parameters as decay_parameters
from whimbrel.mixers.norm import RMSNorm
from whimbrel.mixers.softmax.config import SoftmaxConfig
from whimbrel.mixers.softmax.layer import SoftmaxAttention, decoding_kernels
from whimbrel.model.decoder import Block

CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What the transformers at hand calls a model's cache: `cache` since 5.24."""

_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class WhimbrelAttention(SoftmaxAttention):
    """Softmax attention through the function that `attn_implementation` names."""

    is_causal = True

    def __init__(self, hidden_size: int, *, config: WhimbrelConfig, layer_idx: int, **options: Any) -> None:
        super().__init__(hidden_size, **options)
        self.config, self.layer_idx = config, layer_idx

    def forward(  # pyrefly: ignore [bad-override]
        self,
        x: Tensor,
        *,
        attention_mask: Any,
        position_ids: Tensor,
        cache: WhimbrelCache | None,
        **kwargs: Any,
    ) -> Tensor:
        """x [B, T, hidden_size] at position_ids [1 or B, T] -> the same shape; the cache takes the new keys."""
        q, k, v = (x.transpose(1, 2) for x in self.heads(x, position_ids))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if self.window:
            kwargs["sliding_window"] = self.window
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        scale = self.head_dim**-0.5
        how = {"dropout": 0.0, "scaling": scale, "position_ids": position_ids, **kwargs}
        with decoding_kernels(q.shape[2], q.device):
            y, _ = attend(self, q, k, v, attention_mask, **how)
        return self.o_proj(y.flatten(2))

    @property
    def num_key_value_groups(self) -> int:
        """Query heads to a key head."""
        return self.num_heads // self.num_kv_heads


def eager_attention_forward(
    module: WhimbrelAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with its weights [B, H, Tq, Tk]; the mask is added to the scores."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class WhimbrelBlock(GradientCheckpointingLayer, Block):
    """A block of the decoder that reads and writes a WhimbrelCache."""

    def __init__(self, config: WhimbrelConfig, model: ModelConfig, mixer: MixerConfig, index: int) -> None:
        layer: nn.Module
        if isinstance(mixer, SoftmaxConfig):
            attention = partial(WhimbrelAttention, config=config, layer_idx=index)
            layer = mixer.make(attention, model.hidden_size, model.norm_eps)
        else:
            layer = mixer.build(model.hidden_size, model.norm_eps)
        super().__init__(model, layer)
        self.index, self.layer_type = index, layer_type(mixer)
        for writer in (getattr(layer, "o_proj", None), self.mlp.down):
            if writer is not None:
                writer.writes_to_stream = True  # pyrefly: ignore

    def forward(  # pyrefly: ignore [bad-override]
        self,
        x: Tensor,
        *,
        masks: dict[str, Any],
        position_ids: Tensor,
        real: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: WhimbrelCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x [B, T, hidden_size] -> the same shape.

        masks: attention mask by type of layer. real [B, T, 1] bool is False at padding; cu_seqlens [N + 1] marks the
        sequences packed in the rows of x one after another.
        """
        normed = self.norm_mixer(x)
        if isinstance(self.mixer, WhimbrelAttention):
            mixed = self.mixer(
                normed,
                attention_mask=masks[self.layer_type],
                position_ids=position_ids,
                cache=cache,
                **kwargs,
            )
        else:
            mixed = self._recur(normed, real, cu_seqlens, cache)
        x = x + mixed
        return x + self.mlp(self.norm_mlp(x))

    def _recur(self, x: Tensor, real: Tensor | None, cu_seqlens: Tensor | None, cache: WhimbrelCache | None) -> Tensor:
        if cu_seqlens is not None:
            return self.mixer(x.flatten(0, 1)[None], cu_seqlens=cu_seqlens).y.view_as(x)
        if real is not None:
            # A linear mixer has no biases, so a zero writes nothing: after padding the state is that of the start.
            x = x * real
        past: Any = None if cache is None else cache.layers[self.index]
        y, state = self.mixer(x, None if past is None else past.state)
        if past is not None:
            past.store(state, x.shape[1])
        return y


class WhimbrelPreTrainedModel(PreTrainedModel):
    """Embedding, blocks and final norm, and what transformers asks about them."""

    config_class = WhimbrelConfig
    config: WhimbrelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["WhimbrelBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["A_log", "dt_bias"]

    def __init__(self, config: WhimbrelConfig) -> None:
        super().__init__(config)
        model = config.model_config
        self.embed = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(
            WhimbrelBlock(self.config, model, mixer, index) for index, mixer in enumerate(model.layers())
        )
        self.norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self._is_stateful = "linear_attention" in config.layer_types

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.embed = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As whimbrel.model.build_model draws them."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_range
            if getattr(module, "writes_to_stream", False):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ShortConv):
            bound = module.weight.shape[2] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, LinearMixer):
            for parameter, drawn in zip((module.A_log, module.dt_bias), decay_parameters(module.A_log.shape[0])):
                init.copy_(parameter, drawn)

    def _hidden(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: WhimbrelCache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The pass through all blocks; arguments as in transformers' decoders.

        Returns hidden states after the final norm and what every kind of output holds beside its own.
        """
        if kwargs.pop("output_attentions", None):
            raise UnsupportedError("output_attentions is not available: linear blocks have no attention weights")
        if (input_ids is None) == (inputs_embeds is None):
            raise UnsupportedError("give exactly one of input_ids and inputs_embeds")
        if self.training and torch.is_grad_enabled() and any(block.gradient_checkpointing for block in self.blocks):
            cache, use_cache = None, False  # blocks that run twice would write to it twice
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        cu_seqlens = None
        if cache is None and attention_mask is None:
            cu_seqlens = _packed(x, position_ids, kwargs.get("cu_seq_lens_q"))
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if use_cache and cache is None:
            if cu_seqlens is not None:
                raise UnsupportedError("several sequences packed in a row leave no cache; pass use_cache=False")
            cache = WhimbrelCache(self.config)
        seen = 0 if cache is None else _tokens_in(cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        real = self._real(attention_mask, x.shape[1], cache)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        masks = {
            kind: _MASKS[kind](
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
            )
            for kind in set(self.config.layer_types) - {"linear_attention"}
        }
        states = [x]
        for block in self.blocks:
            x = block(
                x,
                masks=masks,
                position_ids=position_ids,
                real=real,
                cu_seqlens=cu_seqlens,
                cache=cache,
                **kwargs,
            )
            if output_hidden_states:
                states.append(x)
        x = self.norm(x)
        states[-1] = x
        hidden_states = tuple(states) if output_hidden_states else None
        return x, {CACHE_NAME: cache if use_cache else None, "hidden_states": hidden_states}

    def _real(self, attention_mask: Tensor | None, time: int, past: WhimbrelCache | None) -> Tensor | None:
        """attention_mask for linear blocks: [B, time, 1] bool, False at padding; None where all is real."""
        if attention_mask is None or not self._is_stateful:
            return None
        if attention_mask.dim() != 2:
            raise UnsupportedError(
                f"attention_mask has {attention_mask.dim()} dimensions; linear blocks read tokens in order and take "
                "[batch, time] masks of padding only"
            )
        mask = attention_mask.bool()
        if past is not None and time > 1 and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            past.unusable = (
                "attention_mask leaves out tokens behind others, and a recurrent state cannot pass over those; "
                "pad on the left (tokenizer.padding_side = 'left')"
            )
        return mask[:, -time:, None]


def _one_of(cache: WhimbrelCache | None, past_key_values: WhimbrelCache | None) -> WhimbrelCache | None:
    if cache is not None and past_key_values is not None:
        raise UnsupportedError("cache and past_key_values are two names of one argument; pass one of them")
    return past_key_values if cache is None else cache


def _tokens_in(cache: WhimbrelCache) -> int:
    if not isinstance(cache, WhimbrelCache):
        raise UnsupportedError(
            f"{CACHE_NAME} is a {type(cache).__name__}, which cannot hold recurrent states; "
            "pass WhimbrelCache(model.config), or None"
        )
    if cache.unusable:
        raise UnsupportedError(cache.unusable)
    return cache.get_seq_length()


def _packed(x: Tensor, position_ids: Tensor | None, edges: Tensor | None) -> Tensor | None:
    """Bounds [N + 1] int64 of the sequences in the rows of x, laid one after another; None if each row is one."""
    batch, time, _ = x.shape
    if edges is not None:
        return edges.flatten().long()
    if position_ids is None:
        return None
    first = torch.ones(batch, time, dtype=torch.bool, device=x.device)
    first[:, 1:] = (position_ids.diff(dim=1) != 1).expand(batch, -1)
    if int(first.sum()) == batch:
        return None
    starts = first.flatten().nonzero()[:, 0]
    return torch.cat((starts, starts.new_tensor([batch * time])))


class WhimbrelModel(WhimbrelPreTrainedModel):
    """The decoder without its head: hidden states after the final norm."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["head.weight"]

    def __init__(self, config: WhimbrelConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: WhimbrelCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: WhimbrelCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, hidden_size] -> hidden states [B, T, hidden_size] and the cache.

        `cache` and `past_key_values` are two names of one argument, the newer and the older.
        """
        x, others = self._hidden(
            input_ids,
            attention_mask,
            position_ids,
            _one_of(cache, past_key_values),
            inputs_embeds,
            use_cache,
            output_hidden_states,
            **kwargs,
        )
        return BaseModelOutputWithPast(last_hidden_state=x, **others)


class WhimbrelForCausalLM(WhimbrelPreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "embed.weight"}

    def __init__(self, config: WhimbrelConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: WhimbrelCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: WhimbrelCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, hidden_size] -> logits [B, T or logits_to_keep, vocab_size].

        labels [B, T], -100 where nothing is asked, are shifted by one here, as everywhere in transformers.
        `num_items_in_batch` and other arguments of the loss go through. `cache` and `past_key_values` are two names of
        one argument, the newer and the older.
        """
        x, others = self._hidden(
            input_ids,
            attention_mask,
            position_ids,
            _one_of(cache, past_key_values),
            inputs_embeds,
            use_cache,
            output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **others)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """Begin generation with a WhimbrelCache: prompts in pieces need one from the first piece on."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "dynamic_full"):
            raise UnsupportedError(
                f"cache_implementation = '{kind}' is not available for the model type whimbrel; leave it out"
            )
        if model_kwargs.get(CACHE_NAME) is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = WhimbrelCache(self.config)
