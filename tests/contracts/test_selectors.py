"""Every selector in the table keeps the contract; a new kind is covered without an edit here."""

from __future__ import annotations

import dataclasses

import pytest

from whimbrel.config import kind_class, kind_of
from whimbrel.sparse import KINDS
from whimbrel.testing import selectors


def small(kind):
    """The kind's defaults with blocks of 16 tokens in place of 128; settings in tokens shrink with them."""
    config = kind_class("whimbrel.sparse", kind)()
    changes = {"block_size": 16}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.endswith(("_tokens", "_budget")) and value is not None:
            changes[field.name] = value // 8
    return dataclasses.replace(config, **changes)


CONFIGS = {kind: small(kind) for kind in KINDS}
WITH_COVERAGE = [kind for kind, config in CONFIGS.items() if hasattr(config, "coverage")]
ROW_LOCAL = [kind for kind, config in CONFIGS.items() if getattr(config, "ROW_LOCAL", False)]


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_found_by_its_name(kind):
    assert kind_of(CONFIGS[kind]) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_plans(kind):
    selectors.check_plans(CONFIGS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_at_a_time(kind):
    selectors.check_one_sequence_at_a_time(CONFIGS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_refuses(kind):
    selectors.check_refuses(CONFIGS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_scale(kind):
    selectors.check_scale(CONFIGS[kind])


@pytest.mark.parametrize("kind", WITH_COVERAGE)
def test_full_coverage(kind):
    selectors.check_full_coverage(CONFIGS[kind])


@pytest.mark.parametrize("kind", WITH_COVERAGE)
def test_monotone(kind):
    selectors.check_monotone(CONFIGS[kind])


@pytest.mark.parametrize("kind", ROW_LOCAL)
def test_row_local(kind):
    selectors.check_row_local(CONFIGS[kind])


def test_the_lists_are_not_empty():
    assert {"flex_prefill", "row_local"} <= set(WITH_COVERAGE)
    assert {"dense", "window", "row_local"} <= set(ROW_LOCAL)
    assert "flex_prefill" not in ROW_LOCAL
