"""`whimbrel train SOURCE`: run a recipe or a TOML file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from whimbrel.cli import INTERRUPTED
from whimbrel.cli.args import parse_with_config
from whimbrel.config import Config


@dataclass(frozen=True)
class Args:
    """Train from a recipe or a TOML file (the first argument); goes on where the run folder left off."""

    run_dir: Path | None = None
    """Run folder; default runs/NAME."""
    branch_from: Path | None = None
    """Checkpoint of another run, or that run for its newest, whose whole state a new run starts from."""
    config: Annotated[Config, tyro.conf.arg(name="")] = Config()
    """Settings"""


def main(argv: list[str]) -> int:
    """Train; exit status 130 after a signal."""
    args = parse_with_config(lambda _, config: Args(config=config), argv, verb="train")
    from whimbrel.training.loop import train
    from whimbrel.training.recovery import EVENTS_FILE

    result = train(args.config, run_dir=args.run_dir, branch_from=args.branch_from)
    status = INTERRUPTED if result.interrupted else 0
    if os.environ.get("RANK", "0") != "0":
        return status
    if result.interrupted:
        print(
            f"stopped at step {result.step} of {args.config.steps}; saved {result.checkpoint}; "
            "run the same command again to go on"
        )
        return status
    if result.restarts:
        times = "once" if result.restarts == 1 else f"{result.restarts} times"
        print(f"went back {times} to an average of checkpoints; {result.run_dir / EVENTS_FILE} tells when and why")
    print(
        f"trained {result.step} steps, {result.tokens:,} tokens; loss {result.loss:.4f} nats a token; "
        f"newest checkpoint {result.checkpoint}"
    )
    return status
