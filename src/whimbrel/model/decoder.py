"""One decoder for every mixer: pre-norm blocks of a token mixer and a SwiGLU, tied or separate head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whimbrel.config import ModelConfig, require
from whimbrel.errors import DataError, UnsupportedError
from whimbrel.mixers.base import Out
from whimbrel.mixers.norm import RMSNorm
from whimbrel.model.loss import IGNORE, cross_entropy_per_row, mean_cross_entropy

Cache = tuple[Any, ...]
"""The state of every block's mixer, first to last."""


class ModelOut(NamedTuple):
    """Result of a forward pass."""

    logits: Tensor
    """[B, T, vocabulary], or the last `logits_to_keep` positions of it."""
    cache: Cache
    """What the next call takes to go on after these tokens."""


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, size, bias=False)
        self.up = nn.Linear(hidden_size, size, bias=False)
        self.down = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.norm_mixer = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = mixer
        self.norm_mlp = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> Out:
        """x [B, T, hidden_size] -> Out(y of the same shape, state of the mixer)."""
        mixed, state = self.mixer(self.norm_mixer(x), state, cu_seqlens=cu_seqlens)
        x = x + mixed
        return Out(x + self.mlp(self.norm_mlp(x)), state)


class Decoder(nn.Module):
    """A causal language model made from a ModelConfig.

    Tokens are [B, T] int64. A call with a cache goes on after the tokens that made it; any cut of a sequence into
    calls gives the same result. cu_seqlens [N + 1] marks N packed sequences in a batch of 1. Every call raises
    DataError for an empty batch or (on the CPU, where looking is free) an id outside of the vocabulary.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        width, eps = config.hidden_size, config.norm_eps
        self.blocks = nn.ModuleList(Block(config, mixer.build(width, eps)) for mixer in config.layers())
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        _initialise(self, config)

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary, hidden_size]: the matrix that turns hidden states into logits."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> ModelOut:
        """Logits of the next token at the last `logits_to_keep` positions (0: at all), and the cache to go on."""
        require(logits_to_keep >= 0, "logits_to_keep", logits_to_keep, "0 (all positions) or a positive number")
        hidden, cache = self.hidden(tokens, cache, cu_seqlens=cu_seqlens)
        return ModelOut(F.linear(hidden[:, -logits_to_keep:], self.head_weight), cache)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, *, cu_seqlens: Tensor | None = None) -> Out:
        """Out(y [B, T, hidden_size] after the final norm, cache)."""
        self._check_tokens(tokens)
        states = self._check_cache(cache)
        x = self.embed(tokens)
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, state, cu_seqlens=cu_seqlens)
            after.append(state)
        return Out(self.norm(x), tuple(after))

    def loss(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Mean cross entropy in nats a token, a scalar.

        targets [B, T] int64 holds the token that follows each position; positions where it is -100, or where `mask`
        [B, T] bool is False, do not count. The loss is 0 if none counts. The logits are formed a few rows at a time.
        """
        targets = self._check_targets(tokens, targets, mask)
        hidden = self.hidden(tokens, cu_seqlens=cu_seqlens).y
        return mean_cross_entropy(hidden.flatten(0, 1), self.head_weight, targets.flatten())

    @torch.no_grad()
    def per_token_loss(self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Cross entropy of every position in nats, [B, T], without a gradient; 0 where the target is -100."""
        targets = self._check_targets(tokens, targets, None)
        hidden = self.hidden(tokens, cu_seqlens=cu_seqlens).y
        rows = cross_entropy_per_row(hidden.flatten(0, 1), self.head_weight, targets.flatten())
        return rows.view(targets.shape)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise DataError(
                f"tokens has shape {list(tokens.shape)}; give [batch, time] with at least one sequence and one token"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise DataError(f"tokens has dtype {tokens.dtype}; give ids as torch.int64 or torch.int32")
        self._check_ids("tokens", tokens)

    def _check_targets(self, tokens: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        for name, x in (("targets", targets), ("mask", mask)):
            if x is not None and x.shape != tokens.shape:
                raise DataError(f"{name} has shape {list(x.shape)}; give that of tokens, {list(tokens.shape)}")
        if mask is not None:
            targets = targets.masked_fill(~mask, IGNORE)
        if targets.numel():
            self._check_ids("targets", targets.where(targets != IGNORE, 0))
        return targets

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if ids.device.type != "cpu":
            return
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(
                f"{name} holds the id {low if low < 0 else high}; "
                f"ids go from 0 to model.vocab_size - 1 = {self.config.vocab_size - 1}"
            )

    def _check_cache(self, cache: Cache | None) -> Cache:
        if cache is None:
            return (None,) * len(self.blocks)
        if len(cache) != len(self.blocks):
            raise UnsupportedError(
                f"cache has {len(cache)} states, the model has {len(self.blocks)} blocks; pass the cache of this model"
            )
        missing = [i for i, state in enumerate(cache) if state is None]
        if missing:
            raise UnsupportedError(
                f"cache has no state for block {missing[0]}: a packed pass (cu_seqlens) leaves none in softmax blocks; "
                "prefill the sequences without packing to go on from them"
            )
        return cache


def build_model(config: ModelConfig, *, seed: int | None = None) -> Decoder:
    """The model on the CPU, its weights drawn from `seed`; None draws from torch's global generator.

    The weights do not depend on the device the model is moved to, and the global generator is left as it was when
    a seed is given.
    """
    with torch.random.fork_rng(devices=(), enabled=seed is not None), torch.device("cpu"):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return Decoder(config)


def set_prefill(model: nn.Module, fn: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None) -> int:
    """Let `fn(q, k, v, scale) -> y` compute the attention of prompts in all softmax blocks; None takes it off.

    Shapes as in `whimbrel.mixers.softmax.layer.Prefill`. Returns how many blocks it reached.
    """
    layers = [module for module in model.modules() if hasattr(module, "prefill")]
    for layer in layers:
        layer.prefill = fn  # pyrefly: ignore
    return len(layers)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in a cache or in a part of one."""
    if isinstance(cache, Tensor):
        return cache.numel() * cache.element_size()
    return 0 if cache is None else sum(cache_bytes(part) for part in cache)


@torch.no_grad()
def _initialise(model: Decoder, config: ModelConfig) -> None:
    """Normal weights, those that write to the residual stream narrower by sqrt(2 blocks), as in GPT-2."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            narrow = name.endswith(("mixer.o_proj", "mlp.down"))
            module.weight.normal_(std=config.init_std / (math.sqrt(2 * config.num_layers) if narrow else 1))
