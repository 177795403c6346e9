"""The learning rate over steps."""

from __future__ import annotations

import pytest

from whimbrel.config import ScheduleConfig
from whimbrel.optim import learning_rate_factor


def factors(steps, **options):
    cfg = ScheduleConfig(**options)
    return [learning_rate_factor(step, cfg, steps=steps) for step in range(steps)]


def test_warm_up_then_constant_for_ever():
    got = factors(10, warmup_steps=4)
    assert got == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    cfg = ScheduleConfig(warmup_steps=4)
    assert learning_rate_factor(1_000_000, cfg, steps=10) == 1


def test_no_warm_up_starts_at_the_full_rate():
    assert factors(3, warmup_steps=0) == [1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "tail"),
    [
        ("linear", [0.75, 0.5, 0.25, 0]),
        ("1-sqrt", [0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0]),
        ("cosine", [0.8535533905932737, 0.5, 0.1464466094067262, 0]),
    ],
)
def test_decay_over_the_last_steps(shape, tail):
    got = factors(10, warmup_steps=2, decay_steps=4, decay_shape=shape)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, *tail])
    floor = factors(10, warmup_steps=2, decay_steps=4, decay_shape=shape, min_ratio=0.1)
    assert floor == pytest.approx([0.5, 1, 1, 1, 1, 1, *(0.1 + 0.9 * value for value in tail)])


def test_cosine_falls_from_the_warm_up_to_the_last_step():
    got = factors(12, kind="cosine", warmup_steps=2, min_ratio=0.1)
    assert got[:2] == [0.5, 1]
    assert got[6] == pytest.approx(0.55)
    assert got[-1] == pytest.approx(0.1)
    assert got[1:] == sorted(got[1:], reverse=True)


def test_steps_beyond_the_end_keep_the_last_rate():
    cfg = ScheduleConfig(warmup_steps=0, decay_steps=4, min_ratio=0.2)
    assert learning_rate_factor(99, cfg, steps=10) == pytest.approx(0.2)
