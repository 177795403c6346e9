"""The dense selector."""

from __future__ import annotations

import pytest

from whimbrel.errors import ConfigError
from whimbrel.sparse import DenseConfig
from whimbrel.testing.heads import gaussian


def test_density_is_one():
    q, k, _ = gaussian(1, tokens=75, q_len=33, heads=2)
    assert (DenseConfig(block_size=16).build()(q, k).density() == 1).all()


def test_refuses():
    with pytest.raises(ConfigError, match=r"dense.block_size = 0 is not allowed; use a positive number of tokens"):
        DenseConfig(block_size=0)
