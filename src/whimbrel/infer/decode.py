"""Generation with the cache: one prefill of the prompt, then one token at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whimbrel.config import require
from whimbrel.errors import ConfigError
from whimbrel.model import Decoder


class Generation(NamedTuple):
    """Tokens that a model appended to a prompt."""

    tokens: Tensor
    """[B, new] int64."""
    cache: object
    """State after the last token fed, for going on."""


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop_token: int | None = None,
    chunk_tokens: int = 0,
) -> Generation:
    """Continue `prompt` [B, T] int64 (T >= 1) by up to `max_new_tokens` tokens.

    `temperature` 0 takes the likeliest token; otherwise tokens are drawn from the softmax at that temperature,
    among the `top_k` likeliest if given, with a generator seeded by `seed`. `stop_token` ends the call when every
    row has produced it. `chunk_tokens` prefills the prompt in pieces of that length (0: at once).
    Raises ConfigError for a prompt that is not token ids or is empty, and for a negative number.
    """
    if not isinstance(prompt, Tensor):
        raise ConfigError(
            f"prompt is a {type(prompt).__name__}; give token ids [B, T], such as "
            "torch.tensor([load_tokenizer(path).encode(text)])"
        )
    if prompt.ndim != 2 or prompt.shape[0] == 0 or prompt.shape[1] == 0:
        raise ConfigError(f"prompt has shape {tuple(prompt.shape)}; generation needs [B, T] with at least one token")
    numbers = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
    for name, value in (numbers | {"chunk_tokens": chunk_tokens}).items():
        require(value >= 0, name, value, "0 or more")
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    cache = None
    logits = torch.empty(0)
    for piece in prompt.split(chunk_tokens or prompt.shape[1], dim=1):
        logits, cache = model(piece, cache, logits_to_keep=1)
    produced: list[Tensor] = []
    stopped = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        token = _pick(logits[:, -1], temperature, top_k, generator)
        produced.append(token)
        if stop_token is not None:
            stopped |= token[:, 0] == stop_token
            if bool(stopped.all()):
                break
        logits, cache = model(token, cache, logits_to_keep=1)
    tokens = torch.cat(produced, dim=1) if produced else prompt[:, :0]
    return Generation(tokens, cache)


def _pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """The next token of each row, [B, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
