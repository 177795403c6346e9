"""The learning rate as a function of the step. Pure Python; a run resumes from its step alone."""

from __future__ import annotations

import math

from whimbrel.config import ScheduleConfig


def learning_rate_factor(step: int, cfg: ScheduleConfig, *, steps: int) -> float:
    """Share of the full learning rate that the update of `step` uses, 0 <= step < steps.

    The rate climbs in a straight line over `warmup_steps`: update 0 uses 1/warmup_steps, and update
    warmup_steps - 1 the full rate. `wsd` then stays there and falls to `min_ratio` over its last
    `decay_steps` updates (arXiv 2404.06395); with decay_steps = 0 it stays there for ever, whatever `steps`.
    `cosine` falls to `min_ratio` over all updates after the warm-up. The last update uses `min_ratio`
    exactly.
    """
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    length = steps - cfg.warmup_steps if cfg.kind == "cosine" else cfg.decay_steps
    begin = steps - length
    if length <= 0 or step < begin:
        return 1.0
    done = min((step + 1 - begin) / length, 1.0)
    shape = "cosine" if cfg.kind == "cosine" else cfg.decay_shape
    return cfg.min_ratio + (1 - cfg.min_ratio) * _remaining(done, shape)


def _remaining(done: float, shape: str) -> float:
    """What is left of the rate after the share `done` of the decay: 1 at the beginning, 0 at the end."""
    if shape == "linear":
        return 1 - done
    if shape == "1-sqrt":
        return 1 - math.sqrt(done)
    return 0.5 * (1 + math.cos(math.pi * done))
