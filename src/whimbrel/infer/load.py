"""Models and tokenizers from a checkpoint or merge folder."""

from __future__ import annotations

from pathlib import Path

import torch

from whimbrel.checkpoint import latest_checkpoint, load_weights
from whimbrel.config import Config, parse_toml
from whimbrel.data import Tokenizer
from whimbrel.errors import CheckpointError
from whimbrel.model import Decoder, build_model


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> Decoder:
    """The model of a checkpoint, merge or run folder, in evaluation mode.

    A run folder stands for its newest complete checkpoint. Raises CheckpointError where the folder holds no
    model, or weights that do not fit its config.toml.
    """
    folder = model_dir(path)
    model = build_model(load_run_config(folder).model)
    load_weights(folder, model)
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer beside a model; raises CheckpointError where there is none."""
    file = model_dir(path) / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"{file} does not exist; copy the tokenizer that the model was trained with there")
    return Tokenizer.load(file)


def load_run_config(path: str | Path) -> Config:
    """The configuration that a checkpoint or merge was made with; raises CheckpointError where there is none."""
    file = model_dir(path) / "config.toml"
    if not file.exists() and (file.parent / "config.json").exists():
        raise CheckpointError(
            f"{file} does not exist, but config.json of transformers does; run whimbrel convert {file.parent} --out DIR"
        )
    if not file.exists():
        raise CheckpointError(f"{file} does not exist; a checkpoint folder holds config.toml and model.safetensors")
    return parse_toml(file.read_text(encoding="utf-8"), source=str(file))


def model_dir(path: str | Path) -> Path:
    """The folder that holds model.safetensors: `path` itself, or the newest checkpoint of the run `path`.

    Raises CheckpointError where `path` is no folder, or holds neither.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' is not a folder; name a checkpoint, a merge or a run")
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return folder
    newest = latest_checkpoint(folder)
    if newest is None:
        raise CheckpointError(f"'{folder}' holds neither model.safetensors nor a complete checkpoint")
    return newest
