"""Statistics of key blocks: by definition, extended chunk by chunk, and what reads them."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from whimbrel.attend import attend
from whimbrel.attend.test_attend import random_plan
from whimbrel.errors import ConfigError
from whimbrel.sparse import RowLocalConfig
from whimbrel.sparse.coverage import bounds
from whimbrel.sparse.statistics import key_statistics
from whimbrel.testing.budget import assert_close
from whimbrel.testing.heads import gaussian


def keys(tokens, seed=1):
    return gaussian(seed, tokens=tokens, batch=2, heads=4, kv_heads=2, dim=8).k


@pytest.mark.parametrize("tokens", [5, 64, 203])
def test_by_definition(tokens):
    k = keys(tokens)
    found = key_statistics(k, 16)
    assert found.counts.tolist() == [len(part) for part in torch.arange(tokens).split(16)]
    for j, block in enumerate(k.double().split(16, 1)):
        mean = block.mean(1)
        assert_close("mean", mean, found.means[:, :, j], 1e-6)
        spread = block - mean.unsqueeze(1)
        assert_close("least", spread.amin(1), found.least[:, :, j], 1e-6)
        assert_close("most", spread.amax(1), found.most[:, :, j], 1e-6)
        assert_close("radius", spread.norm(dim=-1).amax(1), found.radius[:, :, j], 1e-6)


@pytest.mark.parametrize("cuts", [(16, 48, 203), (1, 7, 17, 150, 203), (203, 203)])
def test_chunks_extend_them_without_a_look_at_complete_blocks(cuts):
    k = keys(203)
    want, found = key_statistics(k, 16), None
    for stop in cuts:
        seen = k[:, :stop].clone()
        if found is not None:
            seen[:, : found.keys // 16 * 16] = torch.nan
        found = key_statistics(seen, 16, found)
    assert found[:2] == want[:2]
    for one, other in zip(want[2:], found[2:], strict=True):
        assert torch.equal(one, other)


def test_bounds_and_mean_keys_read_them():
    q, k, v = gaussian(2, tokens=203, q_len=70, batch=2, heads=4, kv_heads=2, dim=8)
    found = key_statistics(k, 16)
    plan = random_plan(q, k)
    lse = attend(q, k, v, plan, impl="reference").lse
    at = partial(bounds, q, k, plan, lse)
    assert torch.equal(at().low, at(statistics=found).low)
    raised = found._replace(means=found.means + 1)
    assert not torch.equal(at().high, at(statistics=raised).high)
    select = RowLocalConfig(estimate="mean", block_size=16, coverage=0.6).build()
    assert torch.equal(select(q, k).to_mask(), select(q, k, statistics=found).to_mask())
    assert not torch.equal(
        select(q, k).to_mask(), select(q, k, statistics=found._replace(means=-found.means)).to_mask()
    )


def test_a_prompt_in_chunks_selects_as_the_whole():
    q, k, _ = gaussian(3, tokens=200, heads=4, kv_heads=2, dim=8)
    select = RowLocalConfig(estimate="mean", block_size=16, coverage=0.8).build()
    want, found = select(q, k).to_mask(), None
    for start in range(0, 200, 48):
        stop = min(200, start + 48)
        found = key_statistics(k[:, :stop], 16, found)
        got = select(q[:, start:stop], k[:, :stop], statistics=found).to_mask()
        rows = want[:, :, start // 16 : start // 16 + got.shape[2]]
        assert torch.equal(rows[..., : got.shape[3]], got)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: key_statistics(k, 0), "block_size = 0"),
        (lambda k: key_statistics(k, 8, key_statistics(k, 16)), "statistics.block_size = 16"),
        (lambda k: key_statistics(k[:, :40], 16, key_statistics(k, 16)), "statistics.keys = 50"),
        (
            lambda k: key_statistics(k[:1], 16, key_statistics(k, 16)),
            "statistics: of batch 2, 2 heads of 8, but k is of",
        ),
        (
            lambda k: RowLocalConfig(estimate="mean", block_size=16).build()(
                k, k, statistics=key_statistics(k[:, :40], 16)
            ),
            "statistics.keys = 40",
        ),
        (
            lambda k: RowLocalConfig(block_size=16).build()(k, k, statistics=key_statistics(k, 16)),
            "estimate='sampled' reads no statistics of keys; leave them out",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        call(keys(50))
