"""torchtitan's trainer with an average kept beside the weights, and models that Whimbrel's command reads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchtitan.components.loss import BaseLoss
from torchtitan.trainer import Trainer

from whimbrel.checkpoint.together import on_first
from whimbrel.config import OnlineConfig
from whimbrel.errors import ConfigError
from whimbrel.merge.online import OnlineAverage

AVERAGE = "average"
"""Folder of the averaged model in the dump folder."""


if not hasattr(dist, "set_timeout"):
    # torchtitan 0.3 calls it after the first step; torch 2.13 has it under a name of its own only.
    dist.set_timeout = dist.distributed_c10d._set_pg_timeout  # pyrefly: ignore [missing-attribute]


class SummedLoss(BaseLoss):
    """The model forms its loss itself, a few rows of logits at a time; what is left is to divide by the tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.fn = lambda pred, labels: pred


class _State:
    """An OnlineAverage as torch.distributed.checkpoint sees it."""

    def __init__(self, average: OnlineAverage) -> None:
        self.average = average

    def state_dict(self) -> dict[str, Tensor]:
        return self.average.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.average.load_state_dict(state)


class TitanTrainer(Trainer):
    """Trains a TitanDecoder; the last checkpoint in the Hugging Face format is also a model of Whimbrel's."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        average: OnlineConfig = field(default_factory=OnlineConfig)
        """Average kept during training; written to DUMP_FOLDER/average."""
        run_toml: str = ""
        """config.toml of the run, written beside exported weights."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        parts = getattr(self.dataloader, "parts", self.gradient_accumulation_steps)
        if parts != self.gradient_accumulation_steps:
            raise ConfigError(
                f"training.global_batch_size = {config.training.global_batch_size} does not fit the "
                f"{parts} parts of the data's batches; set dataloader.batch_sequences to the same number"
            )
        self.average: OnlineAverage | None = None
        online = config.average
        if online.every_steps:
            self.average = OnlineAverage(
                self.model_parts[0],
                every=online.every_steps,
                count=online.count,
                windows=online.windows,
                method=online.method,
                device=online.device,
                accumulate=online.accumulate,
            )
            self.checkpointer.states[AVERAGE] = _State(self.average)

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Tokens and targets for the model; with context parallelism this process's stretch of every sequence."""
        tokens = input_dict["input"]
        if self.parallel_dims.cp_enabled:
            mesh = self.parallel_dims.get_mesh("cp")
            tokens, labels = (x.chunk(mesh.size(), 1)[mesh.get_local_rank()] for x in (tokens, labels))
        self.ntokens_seen += labels.numel()
        return tokens, labels, {"targets": labels}

    def train_step(self, data_iterator: Any) -> None:
        """One optimizer step, and a sample of the average if it is due."""
        super().train_step(data_iterator)
        if self.average is not None:
            self.average.update(self.step)

    def train(self) -> None:
        """Train to the last step; write the average, and what a model needs beside its weights."""
        super().train()
        if self.average is not None and self.average.samples:
            folder = Path(self.config.dump_folder) / AVERAGE
            on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
            self.average.save(folder / "model.safetensors")
            on_first(lambda: self._complete(folder))
        checkpoint: Any = self.config.checkpoint
        if checkpoint.enable and checkpoint.last_save_in_hf and self.step == self.config.training.steps:
            last = Path(self.config.dump_folder) / checkpoint.folder / f"step-{self.step}"
            on_first(lambda: self._complete(last))

    def _complete(self, folder: Path) -> None:
        (folder / "config.toml").write_text(self.config.run_toml, encoding="utf-8")
        path = getattr(self.config.tokenizer, "path", "")
        if path:
            shutil.copyfile(path, folder / "tokenizer.json")
