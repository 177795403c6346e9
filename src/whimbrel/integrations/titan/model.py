"""The decoder as torchtitan builds it: on no device at first, sharded, then given its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.protocols import BaseModel
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from whimbrel.config import ModelConfig, decode
from whimbrel.mixers.softmax.config import SoftmaxConfig
from whimbrel.model import build_model
from whimbrel.model.decoder import Decoder
from whimbrel.model.loss import IGNORE
from whimbrel.optim.sharding import local, local_part


class TitanDecoder(Decoder, BaseModel):
    """`whimbrel.model.Decoder` with what torchtitan asks of a model; weights have the same names."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        table: dict[str, Any] = field(default_factory=dict)
        """A ModelConfig as a table, as in a run's config.toml."""
        seed: int = 0
        """Seed of the weights."""
        autocast: bool = False
        """Compute in bfloat16; weights stay in float32."""

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Nothing here depends on the rest of the job."""

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and floating-point operations a token, forward and backward; recurrences are left out."""
            total = sum(p.numel() for p in model.parameters())
            config = decode(ModelConfig, self.table)
            used = total - (0 if config.tie_embeddings else config.vocab_size * config.hidden_size)
            attention = sum(
                6 * layer.num_heads * layer.head_dim * min(seq_len, layer.window or seq_len)
                for layer in config.layers()
                if isinstance(layer, SoftmaxConfig)
            )
            return total, 6 * used + attention

    def __init__(self, config: Config) -> None:
        Decoder.__init__(self, decode(ModelConfig, config.table))
        self.seed, self.autocast = config.seed, config.autocast

    def forward(self, tokens: Tensor, *, targets: Tensor | None = None) -> Tensor:  # pyrefly: ignore [bad-override]
        """The sum of the cross entropies of `targets` in nats, a scalar; without targets logits [B, T, vocabulary]."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            if targets is None:
                return Decoder.forward(self, tokens).logits
            return self.loss(tokens, targets) * (targets != IGNORE).sum()

    @torch.no_grad()
    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Give every process its part of the weights that `build_model` draws from the seed.

        Drawing into the shards would give all of them the same numbers on a CPU, and other numbers for every number
        of processes on CUDA. Each process draws all weights on the CPU, so they must fit into its main memory.
        """
        whole = build_model(self.config, seed=self.seed).state_dict()
        for name, parameter in self.named_parameters():
            local(parameter).copy_(local_part(whole[name], parameter))

    def verify_module_protocol(self) -> None:
        """Layers are plain modules; those of torchtitan's own protocol are not asked for."""


class Adapter(StateDictAdapter):
    """Names and shapes of weights are the same in the model type `whimbrel` of transformers, so nothing is changed."""

    def to_hf(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """From torchtitan's names to those of transformers."""
        return dict(state_dict)

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """From transformers' names to those of torchtitan."""
        return dict(hf_state_dict)
