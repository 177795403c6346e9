"""A worker that is killed at a random moment: torchrun starts all of them again, and little is lost."""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks import cards
from whimbrel.config import load_config, to_toml
from whimbrel.testing.tiny import tiny_overrides


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(tmp_path: Path, corpus: Path) -> None:
    """What is trained again comes out as before, bit for bit."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(to_toml(load_config("demo", {**tiny_overrides(corpus), "schedule.warmup_steps": 0})))
    options = {
        "recipe": recipe,
        "processes": 2,
        "batch-tokens": 256,
        "micro-batch-tokens": 128,
        "seq-len": 64,
        "steps": 4,
        "every": 5,
        "total": 26,
        "kill-after": random.randint(6, 13),
        "seed": random.randrange(1000),
        "words": 20,
        "device": "cpu",
        "out": tmp_path,
    }
    cards.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    lines = [json.loads(line) for line in (tmp_path / "cards.jsonl").read_text().splitlines()]
    found = {(line["impl"], line["metric"]): line["value"] for line in lines}
    (gaps,) = (line["params"] for line in lines if line["metric"] == "loss_gap")
    assert gaps["largest"] < 1e-4
    assert 0 <= found["2 processes", "steps_lost"] < 5 + 1
    assert found.get(("2 processes", "repeat_gap"), 0.0) == 0.0
    assert found["1 process", "throughput"] > 0
