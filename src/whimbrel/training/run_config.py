"""The configuration that a run folder holds, and what of it may change when the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whimbrel.config import Config, encode, parse_toml, to_toml
from whimbrel.errors import ConfigError
from whimbrel.files import atomic_write_text
from whimbrel.training.processes import Processes

CONFIG_FILE = "config.toml"
# What may change between the start of a run and its continuation without changing what has been trained so far.
FREE_ON_RESUME = [
    "name",
    "device",
    "log_every",
    "tensorboard",
    "micro_batch_tokens",
    "steps",
    "checkpoint",
    "averaging",
    "spikes",
    "prefill",
    "eval",
    "schedule.decay_steps",
]


def check_config(config: Config, run_dir: Path) -> None:
    """Raise ConfigError where the configuration does not fit the one that a run in `run_dir` was started with."""
    path = run_dir / CONFIG_FILE
    if path.exists():
        started = parse_toml(path.read_text(encoding="utf-8"), source=str(path))
        for name, was, now in differences(started, config):
            if not any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME):
                raise ConfigError(
                    f"{name} = {now!r}, but the run in {run_dir} was started with {was!r}; "
                    "use the same value or another run folder"
                )


def write_config(config: Config, run_dir: Path, processes: Processes) -> None:
    """Write the resolved configuration, once every process has checked it and built what it names.

    A start that fails before leaves no run behind that other settings would not fit.
    """
    processes.wait()
    if processes.first:
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(run_dir / CONFIG_FILE, to_toml(config))
    processes.wait()


def differences(a: Config, b: Config) -> Iterator[tuple[str, Any, Any]]:
    """The settings in which two configurations differ: dotted name, value in `a`, value in `b`."""
    flat_a, flat_b = dict(_flatten(encode(a))), dict(_flatten(encode(b)))
    for name in [*flat_a, *(n for n in flat_b if n not in flat_a)]:
        if flat_a.get(name) != flat_b.get(name):
            yield name, flat_a.get(name), flat_b.get(name)


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
