"""Which calls may go past PyTorch's dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
from whimbrel.scan.kernels.operators import plain


class Watched(torch.Tensor):
    pass


def test_ordinary_tensors_do():
    x = torch.zeros(2, requires_grad=True)
    assert plain(x, None, torch.nn.Parameter(x), x.detach())
    assert plain()


def test_what_somebody_else_looks_at_does_not():
    x = torch.zeros(2)
    assert not plain(x, x.as_subclass(Watched))
    with FakeTensorMode():
        assert not plain(torch.zeros(2))
    with FlopCounterMode(display=False):
        assert not plain(x)
    seen = []
    torch.func.vmap(lambda x: seen.append(plain(torch.zeros(2))) or x)(x)
    assert seen == [False]


def test_nor_do_calls_that_are_compiled():
    assert torch.compile(lambda x: x + plain(x), backend="eager", fullgraph=True)(torch.zeros(1)).item() == 0
