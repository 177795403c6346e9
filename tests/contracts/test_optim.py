"""Every kind of optimizer holds the optimizer contract."""

from __future__ import annotations

import pytest

from whimbrel.config import kind_class, kinds
from whimbrel.testing.optim import CONTRACTS, shrink


@pytest.mark.parametrize("kind", kinds("whimbrel.optim"))
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_contract(contract, kind):
    contract(shrink(kind_class("whimbrel.optim", kind)()))
