"""One of the processes of test_processes_of_trainer_train_as_one_does: trains and writes down losses and weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.hf.test_training import MODEL, ROWS, losses, trainer
from whimbrel.integrations.hf.fixtures.models import pair


def train(folder: Path, rows: int, **options: Any) -> dict[str, Any]:
    """Three steps over rows of unequal length, `rows` at a time in each process."""
    labels = [row["labels"].where(torch.arange(16) >= 3 * (i % 5), -100) for i, row in enumerate(ROWS)]
    uneven = [row | {"labels": label} for row, label in zip(ROWS, labels, strict=True)]
    sizes = {"max_steps": 3, "per_device_train_batch_size": rows, "save_strategy": "no"}
    run = trainer(pair(MODEL)[1], folder, rows=uneven, **sizes, **options)
    run.train()
    weights = {name: p.detach().flatten()[:4].tolist() for name, p in run.model.named_parameters()}
    return {"world": run.args.world_size, "losses": losses(run), "weights": weights}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = train(Path(sys.argv[1]), 2, ddp_backend="gloo")
    if torch.distributed.get_rank() == 0:
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
