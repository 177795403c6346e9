"""From which length on a call is made sparse, and what is said of it."""

from __future__ import annotations

import logging

import pytest
import torch

from whimbrel.sparse import crossover
from whimbrel.sparse.crossover import NEVER, sparse_from

TABLE = {"row_local": {128: {32: 16_384, 8: 32_768}, 256: {16: 20_000}}, "flex_prefill": {128: {32: 65_536}}}


@pytest.fixture
def measured(monkeypatch):
    crossover._say.cache_clear()
    monkeypatch.setattr(crossover, "PAYS_FROM", {(9, 0): TABLE})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("heads", "head_dim", "kind", "keys"),
    [
        (32, 128, "row_local", 16_384),
        (64, 128, "row_local", 16_384),
        (31, 128, "row_local", 32_768),
        (8, 128, "row_local", 32_768),
        (7, 128, "row_local", NEVER),
        (16, 256, "row_local", 20_000),
        (15, 256, "row_local", NEVER),
        (512, 96, "row_local", NEVER),
        (32, 128, "flex_prefill", 65_536),
        (16, 256, "flex_prefill", NEVER),
        (32, 128, "window", 16_384),
        (16, 256, "somebodys:Selector", 20_000),
    ],
)
def test_a_call_counts_as_the_measured_one_with_no_more_heads(measured, heads, head_dim, kind, keys):
    assert sparse_from(torch.device("cuda"), heads=heads, head_dim=head_dim, kind=kind) == keys


def test_other_devices_have_no_such_length(measured, monkeypatch):
    assert sparse_from(torch.device("cpu"), heads=4, head_dim=64) == 0
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert sparse_from(torch.device("cuda"), heads=32, head_dim=128) == 0


def test_what_was_found_is_said_once(measured, caplog):
    with caplog.at_level(logging.INFO, logger="whimbrel.sparse"):
        for _ in range(2):
            sparse_from(torch.device("cuda"), heads=32, head_dim=128)
            sparse_from(torch.device("cuda"), heads=2, head_dim=128)
            sparse_from(torch.device("cpu"), heads=2, head_dim=128)
    assert [r.message for r in caplog.records] == [
        "sparse prefill: below 16384 keys dense attention is the faster one for 32 heads of 128 under 'row_local', as"
        " measured",
        "sparse prefill: 2 heads of 128 under 'row_local' were not measured to be faster than dense attention at any"
        " length",
        "sparse prefill: on cpu nothing says below which length dense attention is the faster one",
    ]
