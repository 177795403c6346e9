"""`whimbrel demo`: the main job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from whimbrel.cli import INTERRUPTED
from whimbrel.cli.args import parse_with_config
from whimbrel.config import Config


@dataclass(frozen=True)
class Args:
    """Train a small hybrid model on real text, average it, judge it, prefill it sparsely, and write a report."""

    run_dir: Path = Path("runs/demo")
    """Folder for everything; a second run of the same settings keeps what is there."""
    config: Annotated[Config, tyro.conf.arg(name="")] = Config()
    """Settings"""


def main(argv: list[str]) -> int:
    """Run the demo; exit status 130 after a signal."""
    args = parse_with_config(lambda _, config: Args(config=config), argv, verb="demo", default_source="demo")
    from whimbrel.demo import run_demo

    report = run_demo(args.config, args.run_dir)
    if report is None:
        return INTERRUPTED
    print(f"report    {report.resolve()}")
    return 0
