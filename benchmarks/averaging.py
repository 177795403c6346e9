"""Record how a demo run's averages compare: python benchmarks/averaging.py runs/demo"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from whimbrel.bench.results import record
from whimbrel.config import load_config


def main(run_dir: Path) -> None:
    config = load_config(run_dir / "constant" / "config.toml")
    judged = json.loads((run_dir / "stages" / "judge.json").read_text(encoding="utf-8"))["result"]
    shared = {
        "tokens": config.steps * config.batch_tokens,
        "seed": config.seed,
        "checkpoints": config.averaging.last,
        "every_steps": config.checkpoint.every_steps,
        "anneal_steps": config.averaging.anneal_steps,
        "blocks": judged["blocks"],
    }
    for name, row in judged["rows"].items():
        difference, low, high = row["difference"]
        params = shared | {"difference_nats": difference, "difference_low": low, "difference_high": high}
        record("quality-averaging", name, params, "validation loss", row["bits_per_byte"], "bits per byte")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
