"""Jobs for `--module tests.titan.jobs`."""

from __future__ import annotations

import os

from torchtitan.components.optimizer import default_adamw

from whimbrel.config import load_config
from whimbrel.integrations.titan import TitanTrainer, trainer_config


def tiny() -> TitanTrainer.Config:
    """The run that TITAN_TOML describes."""
    return trainer_config(load_config(os.environ["TITAN_TOML"]))


def stock() -> TitanTrainer.Config:
    """The same with torchtitan's own AdamW, for overrides."""
    return trainer_config(load_config(os.environ["TITAN_TOML"]), optimizer=default_adamw())
