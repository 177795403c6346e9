"""Cases of kernels: their parameters, their inputs, and checks that see what is wrong."""

from __future__ import annotations

import pytest
import torch

from whimbrel._lazy import load_object
from whimbrel.bench import CASES
from whimbrel.scan.bench import BUDGET, Contender, Problem, kernel_cases, outputs, softmax
from whimbrel.scan.delta.op import delta_scan

SMALL = Problem(3, 50, 4, 8, "cpu")


@pytest.mark.parametrize("kind", ["rdn", "rla", "delta", "decay"])
@pytest.mark.parametrize("part", ["fwd", "fwd_bwd", "step"])
def test_cuda_cases_have_the_parameters_that_results_are_read_by(kind, part):
    """Cases can be listed without a device; what they hold is made later."""
    cases = load_object(CASES[f"{kind}_{part}"])(device="cuda", quick=False)
    assert {case.name for case in cases} == {f"{kind}_{part}"}
    plain = [case for case in cases if "gates" not in case.params]
    assert all(list(case.params) == ["B", "T", "H", "D"] and case.metric == "time" for case in cases if case in plain)
    assert all(next(iter(case.impls)) == "triton" for case in cases)
    if part != "step":
        assert [(case.params["B"], case.params["T"]) for case in plain[:3]] == [(16, 2048), (1, 16_384), (1, 32_768)]


def test_parts_that_run_again_are_a_case_of_their_own():
    def parts(name):
        cases = load_object(CASES[name])(device="cuda", quick=False)
        return [(c.params["B"], c.params["T"]) for c in cases if "triton-recompute-2" in c.impls]

    for name in ("rdn_fwd_bwd", "rla_fwd_bwd"):
        assert parts(name)[:4] == [(16, 2048), (1, 16_384), (1, 32_768), (1, 131_072)]
        assert (4, 8192) not in parts(name)
    assert parts("rdn_fwd") == parts("delta_fwd_bwd") == []


def test_gates_are_those_of_a_new_layer():
    problem = Problem(1, 4096, 64, 4, "cpu")
    q, k, v, log_decay, beta, gamma = problem.inputs()
    assert torch.allclose(q.norm(dim=-1), torch.ones(1))
    assert torch.allclose(k.norm(dim=-1), torch.ones(1))
    assert v.min() > -0.3
    per_head = -log_decay.mean(1)[0]
    assert 1e-3 < per_head.min() < 0.05
    assert 0.3 < per_head.max() < 16 * 0.1 * 1.3
    fast = Problem(1, 4096, 64, 4, "cpu", gates="fast")
    assert fast.params == {**problem.params, "gates": "fast"}
    assert -0.9 < fast.inputs()[3].mean() < -0.7  # the mean of log sigmoid(N(0, 1)) is -0.806
    for rate in (beta, gamma):
        assert rate.min() > 0
        assert rate.max() < 1
        assert abs(rate.mean() - 0.5) < 0.01


def test_a_part_of_heads_and_sequences_is_the_truth_of_all():
    contender = Contender(call=outputs(delta_scan), truth=outputs(delta_scan), takes=5)
    assert contender.check(SMALL, dict.fromkeys(BUDGET, 1e-5), backward=True) == ""
    assert Contender(call=softmax, truth=softmax, takes=3, longest=20).check(SMALL, BUDGET, backward=True) == ""


@pytest.mark.parametrize("wrong", ["y", "k", "nan"])
def test_a_wrong_result_is_seen_and_an_excused_gradient_is_said(wrong):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad * (float("nan") if wrong == "nan" else 1.5)

    def call(q, k, v, log_decay, beta):
        y = delta_scan(q, Scaled.apply(k) if wrong != "y" else k, v, log_decay, beta).y
        return 1.5 * y if wrong == "y" else y

    contender = Contender(call=call, truth=outputs(delta_scan), takes=5)
    excused = Contender(call=call, truth=outputs(delta_scan), takes=5, excused=("k",))
    with pytest.raises(
        AssertionError, match=r"^k: not finite" if wrong == "nan" else rf"^{wrong}: RMS ratio 0\.5 above"
    ):
        contender.check(SMALL, BUDGET, backward=True)
    if wrong == "k":
        assert excused.check(SMALL, BUDGET, backward=True) == "the gradient of k is off by 0.5"
        assert contender.check(SMALL, BUDGET, backward=False) == ""
    else:
        with pytest.raises(AssertionError):
            excused.check(SMALL, BUDGET, backward=True)


def test_a_red_check_names_the_implementation(monkeypatch):
    case = kernel_cases("delta", delta_scan, takes=5, others={}, backward=False, device="cpu", quick=True)[0]
    monkeypatch.setattr(Problem, "part", lambda self, x: x[:, 1:] if x.dtype == torch.float32 else x[:, :-1])
    with pytest.raises(AssertionError, match=r"^chunked: y: RMS ratio "):
        case.check()
