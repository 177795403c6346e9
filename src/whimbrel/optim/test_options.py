"""What is said about an option that is not allowed, in a config and in an argument alike."""

from __future__ import annotations

import pytest
import torch

from whimbrel.errors import ConfigError
from whimbrel.optim import Fira, FiraConfig

REFUSED = [
    ("lr", -0.1, "a number of at least 0"),
    ("rank", 0, "a positive whole number"),
    ("rank", 2.0, "a positive whole number"),
    ("rank", True, "a positive whole number"),
    ("alpha", 0.0, "a positive number"),
    ("gamma", 0.99, "0 (no limiter) or a number of at least 1"),
    ("refresh_steps", 0, "a positive number of steps"),
    ("betas", (0.9, 1.0), "two numbers of at least 0 and below 1"),
    ("betas", (0.9,), "two numbers of at least 0 and below 1"),
    ("eps", -1.0, "a number of at least 0"),
    ("weight_decay", -1.0, "a number of at least 0"),
    ("seed", -1, "a whole number of at least 0"),
    ("side", "full", "one of std, reverse_std, left, right"),
    ("refresh", "svd", "one of power, exact"),
    ("on_refresh", "drop", "one of keep, rotate, reset"),
    ("residual_mode", "code", "one of official, paper"),
    ("scaling", "row", "one of column, matrix"),
    ("gamma", None, "0 (no limiter) or a number of at least 1"),
    ("betas", 0.9, "two numbers of at least 0 and below 1"),
    ("stagger", "no", "true or false"),
    ("stochastic_rounding", None, "true or false"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_refused_values(name, value, allowed):
    with pytest.raises(ConfigError) as error:
        FiraConfig(**{name: value})
    assert str(error.value) == f"optim.{name} = {value!r} is not allowed; use {allowed}"
    weight = torch.nn.Parameter(torch.zeros(300, 300))
    with pytest.raises(ConfigError) as error:
        Fira([{"params": [weight], "low_rank": True}], **{name: value})
    assert str(error.value) == f"{name} = {value!r} is not allowed; use {allowed}"


def test_refused_min_dim():
    with pytest.raises(ConfigError, match=r"^optim.min_dim = 0 is not allowed; use a positive whole number$"):
        FiraConfig(min_dim=0)


def test_bytes_of_a_model_by_hand():
    """A 40 x 64 matrix at rank 8, projected on the rows: basis 40 x 8, two moments 8 x 64, two scalars."""
    shapes = {"blocks.0.up": (40, 64), "blocks.0.norm": (64,), "embed.weight": (10, 40)}
    assert FiraConfig(rank=8).state_bytes(shapes, bytes_per_element=2) == 4 * (
        (40 * 8 + 2 * 8 * 64 + 2) + (2 * 64 + 1) + (2 * 400 + 1)
    )
    with pytest.raises(ConfigError, match=r"^rank = 41 exceeds the smaller side 40 of blocks.0.up; choose at most 40$"):
        FiraConfig(rank=41).state_bytes(shapes)
