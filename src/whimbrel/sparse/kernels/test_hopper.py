"""Selection's kernel for Hopper against exact masses: its logic on the CPU in fp32, compiled on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from whimbrel.sparse import RowLocalConfig
from whimbrel.sparse.kernels.test_kernels import check_masses
from whimbrel.testing.gluon import emulated
from whimbrel.testing.heads import gaussian, mixed

pytest.importorskip("triton.experimental.gluon")
from whimbrel.attend.kernels import hopper_launch
from whimbrel.sparse.kernels import launch


@pytest.fixture
def hopper(monkeypatch):
    """All calls go to the kernel for Hopper, two key blocks to a program."""
    monkeypatch.setattr(hopper_launch, "fits", lambda q, v, block_size: True)
    monkeypatch.setattr(launch, "HOPPER_RUN", 2)
    with emulated("whimbrel.attend.kernels.hopper", "whimbrel.sparse.kernels.hopper"):
        yield


@pytest.mark.parametrize(("probe", "heads", "kv_heads"), [(1, 2, 2), (4, 8, 2), (16, 6, 2), (128, 2, 1)])
def test_masses_are_exact(hopper, probe, heads, kv_heads):
    q, k, _ = gaussian(1, tokens=650, q_len=300, batch=2, heads=heads, kv_heads=kv_heads, dim=64)
    check_masses(3 * q, k, probe, 1e-5, block_size=128)


def test_heads_first_keys(hopper):
    q, k, _ = gaussian(2, tokens=300, heads=4, kv_heads=2, dim=128)
    check_masses(q, k.transpose(1, 2).contiguous().transpose(1, 2), 4, 1e-5, block_size=128)


def test_rows_do_not_depend_on_cuts(hopper):
    q, k, _ = gaussian(3, tokens=1000, heads=2, dim=64)
    select = RowLocalConfig(coverage=0.7, probe_rows=4, impl="triton").build()
    whole = select(4 * q, k).to_mask()
    for start, stop in itertools.pairwise((0, 384, 640, 1000)):
        part = select(4 * q[:, start:stop], k[:, :stop]).to_mask()
        assert torch.equal(part, whole[:, :, start // 128 : -(-stop // 128), : -(-stop // 128)])


@pytest.mark.gpu
@pytest.mark.parametrize(("probe", "dim", "batch"), [(4, 128, 1), (16, 128, 2), (128, 64, 1)])
def test_compiled_masses_are_exact(probe, dim, batch):
    sizes = {"tokens": 5000, "q_len": 3000, "heads": 8, "kv_heads": 2, "dim": dim, "batch": batch}
    q, k, _ = (x.cuda() for x in gaussian(4, dtype=torch.bfloat16, **sizes))
    assert hopper_launch.fits(q, q, 128)
    check_masses(q, k, probe, 2e-5, block_size=128)


@pytest.mark.gpu
@pytest.mark.parametrize("probe", [4, 16])
def test_compiled_rows_do_not_depend_on_cuts_nor_on_the_run(probe):
    q, k, _ = (x.cuda() for x in mixed(5, tokens=9000, heads=8, kv_heads=2))
    select = RowLocalConfig(coverage=0.9, probe_rows=probe, impl="triton").build()
    whole = select(q, k).to_mask()
    assert all(torch.equal(whole, select(q, k).to_mask()) for _ in range(5))
    for start, stop in itertools.pairwise((0, 2048, 3072, 8192, 9000)):
        part = select(q[:, start:stop], k[:, :stop]).to_mask()
        assert torch.equal(part, whole[:, :, start // 128 : -(-stop // 128), : -(-stop // 128)])
