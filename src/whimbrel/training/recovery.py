"""Spikes in a run: each step judged, what happens written down, and the way back to an average of checkpoints."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from whimbrel.checkpoint import list_checkpoints, read_meta
from whimbrel.checkpoint.full import Extra
from whimbrel.checkpoint.together import on_first
from whimbrel.config import SpikesConfig
from whimbrel.errors import TrainingError
from whimbrel.files import fsync_folder
from whimbrel.merge.recover import load_average
from whimbrel.merge.spikes import SpikeDetector, Verdict
from whimbrel.training.metrics import METRICS_FILE
from whimbrel.training.processes import Processes

EVENTS_FILE = "events.jsonl"
_KEY = "spikes"
_NORMAL = Verdict("none", -1, 0.0, 0.0, is_first=False)


class Recovery:
    """What a run knows about spikes; its state is saved with every checkpoint, so that a resumed run knows it too."""

    def __init__(self, config: SpikesConfig, run_dir: Path, processes: Processes) -> None:
        self.config, self.run_dir, self.processes = config, run_dir, processes
        self.detector = SpikeDetector(config)
        self.restarts = 0
        """How often the run has gone back."""
        self.skipped_batches = 0
        """How far the data is ahead of the step, after restarts that skip data."""
        self._restart_step = 0

    def rate(self, step: int) -> float:
        """What the scheduled learning rate is multiplied by in the step after `step` steps."""
        factor = self.config.rate_factor**self.restarts
        if self.restarts and self.config.optimizer == "reset":
            factor *= min(1.0, (step - self._restart_step + 1) / self.config.rewarm_steps)
        return factor

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """The verdict on step `step` (from 1), before its update; anything not normal is written down."""
        if self.config.action == "off":
            return _NORMAL
        verdict = self.detector.check(step, loss, grad_norm)
        if verdict.is_first or verdict.action == "skip":
            event = "spike" if verdict.action == "log" else verdict.action
            self._record(event, step, loss=loss, grad_norm=grad_norm, **_scores(verdict))
        return verdict

    def go_back(self, step: int, verdict: Verdict, *, model: nn.Module, optimizer: Optimizer) -> tuple[Path, Extra]:
        """Put the average of the checkpoints before the onset into model and optimizer.

        Returns the newest of these checkpoints and its `extra`; the run goes on from its step. What was written
        after it is moved to RUN/before-restart-N, together with a copy of it. Raises TrainingError where no
        checkpoint is left, or the run has gone back too often.
        """
        config = self.config
        what = f"the loss has collapsed: it left its range at step {verdict.onset} and has not come back by {step + 1}"
        if self.restarts >= config.max_restarts:
            raise TrainingError(
                f"{what}, after spikes.max_restarts = {config.max_restarts} restarts; lower optim.lr or "
                f"spikes.rate_factor, or set spikes.skip_data; {self.run_dir / EVENTS_FILE} tells what happened"
            )
        sources = on_first(lambda: self._sources(verdict.onset))
        if not sources:
            raise TrainingError(
                f"{what}, and no checkpoint lies {config.margin_steps} steps or more before that; "
                "save more often (checkpoint.every_steps) or lower optim.lr"
            )
        extra = load_average(sources, model=model, optimizer=optimizer, policy=config.optimizer)
        back_to = int(extra["step"])
        self.restarts += 1
        self._restart_step = back_to
        if config.skip_data:
            self.skipped_batches += step - back_to
        self.detector.begin_anew()
        names = [path.name for path in sources]
        self._record(
            "restart", step + 1, back_to=back_to, averaged=names, optimizer=config.optimizer, **_scores(verdict)
        )
        on_first(lambda: set_aside(self.run_dir, back_to, self.run_dir / f"before-restart-{self.restarts}"))
        if self.processes.first:
            warnings.warn(f"{what}; going on from step {back_to} with the average of {', '.join(names)}", stacklevel=2)
        return sources[-1], extra

    def _sources(self, onset: int) -> list[Path]:
        """The checkpoints to average: the newest ones whose step, and the margin after it, lie before the onset."""
        last = onset - 1 - self.config.margin_steps
        early = [path for path in list_checkpoints(self.run_dir) if read_meta(path).step <= last]
        return early[-self.config.checkpoints :]

    def _record(self, event: str, step: int, **values: Any) -> None:
        if self.processes.first:
            # JSON knows neither NaN nor infinity.
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            line = {"event": event, "step": step, **plain, "time": time.time()}
            with (self.run_dir / EVENTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def extra(self) -> dict[str, str]:
        """The state for a checkpoint's `extra`."""
        state = {
            "detector": self.detector.state_dict(),
            "restarts": self.restarts,
            "skipped_batches": self.skipped_batches,
            "restart_step": self._restart_step,
        }
        return {_KEY: json.dumps(state)}

    def load(self, extra: Mapping[str, Any]) -> None:
        """Go on with what a checkpoint's `extra` holds; one from before there was such a state changes nothing."""
        if _KEY in extra:
            state = json.loads(str(extra[_KEY]))
            self.detector.load_state_dict(state["detector"])
            self.restarts, self.skipped_batches = state["restarts"], state["skipped_batches"]
            self._restart_step = state["restart_step"]


def _scores(verdict: Verdict) -> dict[str, Any]:
    scores = {"loss_score": verdict.loss_score, "norm_score": verdict.norm_score}
    return {"onset": verdict.onset, **{name: round(score, 2) for name, score in scores.items()}}


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/events.jsonl; none where there is no such file."""
    path = run_dir / EVENTS_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def set_aside(run_dir: Path, step: int, aside: Path) -> None:
    """Move what lies after `step` in a run folder to the folder `aside`, and copy the checkpoint of `step` there.

    The newest checkpoint goes first: a run that is killed in between goes on from one that is older, never from one
    of the collapse alone.
    """
    aside.mkdir(parents=True, exist_ok=True)
    for kind in ("step", "average"):
        found = [(int(path.name.partition("-")[2]), path) for path in run_dir.glob(f"{kind}-*") if path.is_dir()]
        for number, path in sorted(found, reverse=True):
            if number > step:
                path.rename(aside / path.name)
            elif number == step and kind == "step":
                shutil.copytree(path, aside / path.name, copy_function=_link, dirs_exist_ok=True)
    if (run_dir / METRICS_FILE).exists():
        shutil.copyfile(run_dir / METRICS_FILE, aside / METRICS_FILE)
    fsync_folder(run_dir)


def _link(source: str, target: str) -> None:
    """A second name for the file, which needs no room; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
