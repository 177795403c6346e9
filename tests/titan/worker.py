"""One of the processes of test_titan.py: runs jobs of torchtitan one after the other and writes down what came out."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

faulthandler.dump_traceback_later(200, exit=True)  # says where a process is stuck

import torch
import torch.distributed as dist

import tests.titan.cpu  # noqa: F401
from whimbrel.checkpoint.together import rank

FOLDER = Path(sys.argv[1])
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def job(name: str, *flags: str, config: str = "tiny") -> Any:
    """The trainer that the command line makes; its losses and gradient norms are collected."""
    from torchtitan.config import ConfigManager

    common = ["--module", "tests.titan.jobs", "--config", config, "--dump-folder", str(FOLDER / name)]
    trainer = ConfigManager().parse_args([*common, *flags]).build()
    trainer.seen = []
    trainer.metrics_processor.log = lambda step, loss, _, norm, **kwargs: trainer.seen.append((step, loss, norm))
    return trainer


def run(name: str, *flags: str, config: str = "tiny") -> Any:
    trainer = job(name, *flags, config=config)
    trainer.train()
    write(name, trainer.seen)
    trainer.close()
    return trainer


def write(name: str, value: Any) -> None:
    if rank() == 0:
        (FOLDER / f"{name}.json").write_text(json.dumps(value))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: full(p).detach().clone() for name, p in trainer.model_parts[0].named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main() -> None:
    import torchtitan.trainer as theirs

    theirs.time = types.SimpleNamespace(sleep=lambda seconds: None, perf_counter=theirs.time.perf_counter)
    whole = run("whole")
    averages = {name: full(t) for name, t in whole.average.average().items()}
    run("parts", "--training.steps", "2", "--checkpoint.interval", "2")
    parts = run("parts", "--checkpoint.interval", "2")
    write("parts_equal", same(weights(whole), weights(parts)))
    write("average_equal", same(averages, {name: full(t) for name, t in parts.average.average().items()}))

    stock = '{"lr": 0.005, "rank": 8, "refresh_steps": 2, "alpha": 0.25}'
    short = ("--training.steps", "3")
    override = ("--override.imports", f"whimbrel.integrations.titan.optim.fira={stock}")
    fresh = job("override", *short, *override, config="stock")
    from whimbrel.model import build_model

    drawn = dict(build_model(fresh.model_parts[0].config, seed=fresh.model_parts[0].seed).named_parameters())
    write("drawn_equal", same(weights(fresh), {name: p.detach() for name, p in drawn.items()}))
    before = weights(fresh)
    primed = fresh.optimizers.state_dict()  # takes a step with gradients of zero to make the state
    steps = {
        int(full(value).max()) for key, value in primed.items() if key.startswith("state.") and key.endswith(".step")
    }
    write("primed", {"steps": sorted(steps), "unchanged": same(before, weights(fresh))})
    fresh.train()
    write("override", fresh.seen)
    fresh.close()

    run("context", *short, "--parallelism.context-parallel-degree", "2", "--training.local-batch-size", "2")
    hf = ("--checkpoint.last-save-in-hf", "--checkpoint.last-save-model-only")
    tensor = run("tensor", *short, *hf, "--parallelism.tensor-parallel-degree", "2")
    tokens = torch.arange(40)[None] % tensor.model_parts[0].config.vocab_size
    with torch.no_grad():
        total = tensor.model_parts[0](tokens, targets=tokens.roll(-1, 1))
    write("loss_of_export", float(total) / tokens.numel())


def alone() -> None:
    """Goes on in one process with what two have left."""
    import torchtitan.trainer as theirs

    theirs.time = types.SimpleNamespace(sleep=lambda seconds: None, perf_counter=theirs.time.perf_counter)
    run("alone")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/join{WORLD}", rank=RANK, world_size=WORLD)
    main() if WORLD > 1 else alone()
    dist.destroy_process_group()
