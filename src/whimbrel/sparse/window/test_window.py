"""The window selector."""

from __future__ import annotations

import re

import pytest
import torch

from whimbrel.attend.reference import token_mask
from whimbrel.errors import ConfigError
from whimbrel.sparse import WindowConfig
from whimbrel.testing.heads import gaussian


@pytest.mark.parametrize("sink", [0, 1, 16, 17])
@pytest.mark.parametrize("window", [1, 16, 17, 18, 40, 500])
def test_smallest_blocks_that_hold_sinks_and_window(sink, window):
    q, k, _ = gaussian(1, tokens=203)
    plan = WindowConfig(sink_tokens=sink, window_tokens=window, block_size=16).build()(q, k)
    at = torch.arange(203)
    wanted = ((at[:, None] - at < window) | (at < sink)) & (at <= at[:, None])
    assert (token_mask(plan)[0, 0] | ~wanted).all()
    needed = torch.nn.functional.pad(wanted, (0, 5, 0, 5)).unflatten(1, (13, 16)).unflatten(0, (13, 16)).any(3).any(1)
    assert torch.equal(plan.to_mask()[0, 0], needed)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sink_tokens": -1}, "window.sink_tokens = -1 is not allowed; use 0 or more tokens"),
        ({"window_tokens": 0}, "window.window_tokens = 0 is not allowed; use a positive number of tokens"),
        ({"block_size": -4}, "window.block_size = -4 is not allowed; use a positive number of tokens"),
    ],
)
def test_refuses(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        WindowConfig(**setting)
