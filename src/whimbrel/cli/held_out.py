"""The model of a checkpoint and the held-out text that it is judged on, for the commands that compare checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from whimbrel.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from whimbrel.evals import BpbResult
    from whimbrel.model import Decoder


class HeldOut(NamedTuple):
    """What a comparison of checkpoints works with."""

    model: Decoder
    """A model of their shapes."""
    config: Config
    """Its configuration."""
    evaluate: Callable[[nn.Module], BpbResult]
    """The loss of a model on the same held-out text each time."""


def held_out(checkpoint: Path, *, data: Path | None, tokens: int | None, device: str) -> HeldOut:
    """Model and text of `checkpoint`; `data` and `tokens` in place of the run's own where they are given."""
    from whimbrel.data import TokenShards
    from whimbrel.data.pipeline import shards_for
    from whimbrel.evals import evaluate_bpb
    from whimbrel.infer.load import load_model, load_run_config
    from whimbrel.training.processes import pick_device

    model = load_model(checkpoint, device=pick_device(device))
    config = load_run_config(checkpoint)
    shards = TokenShards(data or shards_for(config), "validation")
    size = config.eval.validation_tokens if tokens is None else tokens

    def evaluate(candidate: nn.Module) -> BpbResult:
        return evaluate_bpb(candidate, shards, seq_len=config.data.seq_len, max_tokens=size, seed=config.eval.seed)

    return HeldOut(model, config, evaluate)


def run_checkpoints(run: Path, *, every: int) -> list[Path]:
    """Every `every`-th complete checkpoint of a run counted from the newest, oldest first."""
    from whimbrel.checkpoint import list_checkpoints
    from whimbrel.config import require
    from whimbrel.errors import CheckpointError

    require(every >= 1, "--every", every, "a positive number of checkpoints")
    found = list(itertools.islice(reversed(list_checkpoints(run)), 0, None, every))[::-1] if run.is_dir() else []
    if len(found) < 2:
        others = any(run.glob("*/model*.safetensors")) and not found
        hint = (
            "; those of another trainer are averaged by whimbrel merge sweep, and judged where their models are"
            if others
            else "; name a run folder with two or more"
        )
        raise CheckpointError(f"'{run}' holds {len(found)} complete checkpoints of whimbrel train{hint}")
    return found
