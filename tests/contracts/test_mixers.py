"""Every kind of mixer holds the mixer contract."""

from __future__ import annotations

import pytest

from whimbrel.config import kind_class, kinds
from whimbrel.testing.mixers import CONTRACTS


@pytest.mark.parametrize("kind", kinds("whimbrel.mixers"))
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_contract(contract, kind):
    contract(kind_class("whimbrel.mixers", kind)())
