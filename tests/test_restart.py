"""A worker that is killed at a random moment: torchrun starts all of them again, and little is lost."""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks import cards
from whimbrel.config import load_config, to_toml
from whimbrel.testing.tiny import tiny_overrides


def test_killed_workers_cost_the_steps_since_the_last_checkpoint(tmp_path: Path, corpus: Path) -> None:
    """What is trained again comes out as before, bit for bit, and the end is that of a run in one process."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(to_toml(load_config("demo", {**tiny_overrides(corpus), "schedule.warmup_steps": 0})))
    options = {
        "recipe": recipe,
        "processes": 2,
        "batch-tokens": 256,
        "micro-batch-tokens": 128,
        "seq-len": 64,
        "steps": 27,
        "every": 5,
        "total": 27,
        "seed": random.randrange(1000),
        "words": 20,
        "device": "cpu",
        "out": tmp_path,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    cards.main([*words, "--kill-after", str(random.randint(6, 13)), str(random.randint(16, 23))])
    lines = [json.loads(line) for line in (tmp_path / "cards.jsonl").read_text().splitlines()]
    found = {(line["impl"], line["metric"]): line for line in lines}
    assert found["2 processes", "loss_gap"]["params"]["largest"] < 1e-4
    assert found["2 processes", "restart_gap"]["value"] < 1e-4
    lost = found["2 processes", "steps_lost"]
    assert lost["n"] == 2
    assert 0 <= lost["value"] <= lost["params"]["most"] < 5 + 1
    assert all(line["value"] == 0.0 for line in lines if line["metric"] == "repeat_gap")
    assert found["1 process", "throughput"]["value"] > 0
