"""Whimbrel's batches in torchtitan: the same as `whimbrel train` would see, at any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from whimbrel.data import Loader, TokenShards
from whimbrel.data.tokenizer import Tokenizer
from whimbrel.errors import ConfigError


class TokenData(BaseDataLoader):
    """Micro-batches of a folder of token shards. The position is the optimizer step, so it fits any number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        dataset_path: str | None = None
        """Folder that `whimbrel data` has made."""
        batch_sequences: int = 0
        """Sequences of one optimizer step over all processes: training.global_batch_size."""
        seed: int = 0
        recall_fraction: float = 0.0
        recall_warmup_steps: int = 200

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **kwargs: Any
    ) -> None:
        whole = config.batch_sequences or local_batch_size * dp_world_size
        loader = Loader(
            TokenShards(Path(config.dataset_path or ""), "train"),
            seq_len=seq_len,
            batch_sequences=whole,
            seed=config.seed,
            recall_fraction=config.recall_fraction,
            recall_warmup_steps=config.recall_warmup_steps,
        )
        self.loader = loader.rank_slice(dp_rank, dp_world_size)
        share = whole // dp_world_size
        if share % local_batch_size:
            raise ConfigError(
                f"training.local_batch_size = {local_batch_size} does not divide the {share} sequences of each of "
                f"{dp_world_size} processes; use a divisor"
            )
        self.rows, self.parts = local_batch_size, share // local_batch_size
        self.step = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            batch = self.loader.batch(self.step)
            # Counted before the last part is handed out: a checkpoint is taken between two steps.
            for part, (tokens, targets) in enumerate(
                zip(batch.tokens.split(self.rows), batch.targets.split(self.rows))
            ):
                self.step += part == self.parts - 1
                yield {"input": tokens}, targets

    def state_dict(self) -> dict[str, Any]:
        """The optimizer step to go on with."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved position, of any number of processes."""
        self.step = int(state_dict["step"])


class TitanTokenizer(BaseTokenizer):
    """The tokenizer beside the token shards."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        path: str = ""
        """tokenizer.json."""

    def __init__(self, config: Config, *, tokenizer_path: str | None = None) -> None:
        super().__init__()
        self.core = Tokenizer.load(Path(config.path))
        self.eos_id = self.core.end_of_text

    def encode(self, text: str, **kwargs: Any) -> list[int]:  # pyrefly: ignore [bad-override]
        """Token ids of a text."""
        return self.core.encode(text).tolist()

    def decode(self, ids: Any, **kwargs: Any) -> str:  # pyrefly: ignore [bad-override]
        """The text of token ids."""
        return self.core.decode(ids)

    def get_vocab_size(self) -> int:
        """Token ids."""
        return self.core.vocab_size
