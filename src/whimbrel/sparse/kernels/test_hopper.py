"""Selection's kernel for Hopper against exact masses: its logic on the CPU in fp32, compiled on a GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from whimbrel.sparse import RowLocalConfig
from whimbrel.sparse.kernels.test_kernels import check_masses
from whimbrel.testing.gluon import emulated
from whimbrel.testing.heads import gaussian, mixed, structured

pytest.importorskip("triton.experimental.gluon")
from whimbrel.attend.kernels import hopper_launch
from whimbrel.sparse.kernels import launch


@pytest.fixture
def hopper(monkeypatch):
    """All calls go to the kernel for Hopper, two key blocks to a program."""
    monkeypatch.setattr(hopper_launch, "fits", lambda q, v, block_size: True)
    monkeypatch.setattr(launch, "HOPPER_RUN", 2)
    monkeypatch.setattr(launch, "_selections", {})
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


def test_heads_between_its_sizes_are_padded(monkeypatch):
    q, k, _ = gaussian(4, tokens=400, heads=2, dim=96)
    monkeypatch.setattr(launch, "_selections", {})
    monkeypatch.setattr(hopper_launch, "_suits", lambda q, block_size: True)
    slow = RowLocalConfig(coverage=0.7, impl="torch").build()(4 * q, k).to_mask()
    with emulated("whimbrel.attend.kernels.hopper", "whimbrel.sparse.kernels.hopper"):
        assert torch.equal(slow, RowLocalConfig(coverage=0.7, impl="triton").build()(4 * q, k).to_mask())


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from whimbrel.sparse.kernels.hopper import scores

tile = gl.NVMMASharedLayout(128, 16, 2)
types = {"q": "*bf16", "k": "*bf16", "keys": f"tensordesc<bf16[128,128],{tile!r}>", "out": "*fp32", "scale": "fp32"}
types |= dict.fromkeys(("at", "units", "filled"), "*i32")
constants = {"LISTED": True, "HKV": 8, "GROUP": 4, "P": 16, "S": 1, "Q": 4, "D": 128}
constants |= {"TILES": 2, "KEYS": 2, "STAGES": 4}
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in scores.arg_names}
made = compile(
    GluonASTSource(scores, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
)
assert "wgmma" in made.asm["ptx"]
assert made.metadata.shared <= 232448, made.metadata.shared
"""


def test_compiles_without_a_gpu():
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize(("probe", "dim", "batch"), [(4, 128, 1), (16, 128, 2), (128, 64, 1)])
def test_compiled_masses_are_exact(probe, dim, batch):
    sizes = {"tokens": 5000, "q_len": 3000, "heads": 8, "kv_heads": 2, "dim": dim, "batch": batch}
    q, k, _ = (x.cuda() for x in gaussian(4, dtype=torch.bfloat16, **sizes))
    assert hopper_launch.fits(q, q, 128)
    check_masses(q, k, probe, 2e-5, block_size=128)


@pytest.mark.gpu
@pytest.mark.parametrize("probe", [None, 4, 16])
@pytest.mark.parametrize("kind", ["mixed", "structured"])
def test_compiled_rows_do_not_depend_on_cuts_nor_on_the_run(probe, kind):
    if kind == "mixed":
        q, k, _ = mixed(5, tokens=9000, heads=8, kv_heads=2)
    else:
        q, k, _ = structured(5, tokens=9000, dim=128, dtype=torch.bfloat16)
    check_cuts(q.cuda(), k.cuda(), probe, (0, 2048, 3072, 8192, 9000))


@pytest.mark.gpu
def test_replayed_selections_are_those_of_their_own_tensors():
    """Launches of one shape are kept, and put at work on other tensors."""
    select = RowLocalConfig(impl="triton").build()
    inputs = [[x.cuda() for x in mixed(seed, tokens=5000, heads=8, kv_heads=2)[:2]] for seed in range(5)]
    launched = []
    for q, k in inputs:
        launch._selections.clear()  # and with it what was kept
        launched.append(select(q, k).check().to_mask())
    for _ in range(2):
        for (q, k), want in zip(inputs, launched, strict=True):
            assert torch.equal(want, select(q, k).check().to_mask())


@pytest.mark.gpu
def test_compiled_rows_of_long_prompts():
    """In several strips, of several widths, and with more second looks than are launched blindly."""
    q, k, _ = (x.cuda() for x in mixed(6, tokens=40_000))
    check_cuts(q, k, None, (16_384, 32_768, 40_000))


def check_cuts(q, k, probe, cuts):
    select = RowLocalConfig(probe_rows=probe, impl="triton").build()
    whole = select(q, k).check().to_mask()
    assert all(torch.equal(whole, select(q, k).to_mask()) for _ in range(5))
    for start, stop in itertools.pairwise(cuts):
        part = select(q[:, start:stop], k[:, :stop]).to_mask()
        assert torch.equal(part, whole[:, :, start // 128 : -(-stop // 128), : -(-stop // 128)])
