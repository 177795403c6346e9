"""The two passes are what they claim to be: RLA and RDN, whatever single-state operator they are made of."""

from __future__ import annotations

import pytest
import torch

from whimbrel.errors import UnsupportedError
from whimbrel.mixers.rdn.op import rdn
from whimbrel.mixers.rla.op import rla
from whimbrel.scan import rivals
from whimbrel.scan.decay.op import decay_scan
from whimbrel.scan.delta.op import delta_scan
from whimbrel.testing.budget import assert_close
from whimbrel.testing.recurrence import FP64, RECURRENCES, Shape, make_inputs


def leaves():
    inputs = make_inputs(RECURRENCES["rdn"], Shape(), seed=21)
    return [x.requires_grad_() for x in inputs.tensors]


def assert_same(want, got, tensors):
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close("y", want, got, FP64)
    pairs = zip(*(torch.autograd.grad(y, tensors, weight) for y in (want, got)))
    for name, (a, b) in zip(("q", "k", "v", "log_decay", "beta", "gamma"), pairs):
        assert_close(f"gradient of {name}", a, b, FP64)


@pytest.mark.parametrize(("scan", "op"), [(delta_scan, rdn), (decay_scan, rla)], ids=("rdn", "rla"))
def test_three_reads_of_a_single_state_make_two(scan, op):
    tensors = leaves()
    got = rivals.by_shifts(lambda *args, **kwargs: scan(*args, **kwargs).y, *tensors)
    assert_same(op(*tensors).y, got, tensors)


def test_what_the_delta_rule_writes_gives_the_residual():
    """As `rdn_by_fla` does it, with what is written taken from the recurrence: S_t k = alpha S_(t-1) k + (k k) u."""
    tensors = q, k, v, log_decay, beta, gamma = leaves()
    at_keys = delta_scan(k, k, v, log_decay, beta, scale=1.0).y
    written = beta[..., None] * (v - at_keys) / (1 - beta[..., None])  # for keys of unit length
    read, residual = rivals._apart(delta_scan(q, k, v, log_decay, beta).y, written, q, k, v, log_decay, beta)
    got = rivals._joined(read, delta_scan(q, k, residual, log_decay, gamma).y, gamma)
    assert_close("y", rdn(*tensors).y, got, 1e-8)  # dividing by 1 - beta loses digits


@pytest.mark.parametrize(
    ("call", "package"), [(rivals.fla_delta, "fla-core==0.6.0"), (rivals.flash_qla_delta, "flash-qla==0.1.3")]
)
def test_a_missing_package_is_named(call, package, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr("whimbrel.scan.rivals.importlib.import_module", missing)
    rivals._fla.cache_clear()
    rivals._flash_qla.cache_clear()
    with pytest.raises(UnsupportedError, match=rf"^(fla|flash_qla) is not installed; pip install {package}"):
        call(*leaves()[:5])
