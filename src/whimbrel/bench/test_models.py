"""What models are compared: equal in size, and equal in result where only somebody else's code computes it."""

from __future__ import annotations

import pytest
import torch

from whimbrel import recipes
from whimbrel.bench.models import (
    Shape,
    Variant,
    _against_softmax,
    _build,
    _case,
    _prefill,
    _training_step,
    _with_mixer,
    prefill_tokens,
    train_tokens,
)
from whimbrel.model.memory import parameter_counts
from whimbrel.scan.delta.op import delta_scan

SHAPE = Shape(2, 40, "cpu")


def gdn():
    return Variant(_with_mixer(recipes.get("tiny-rdn"), "gdn", 4))


def delta(*tensors):
    return delta_scan(*tensors).y


@pytest.mark.parametrize("recipe", ["tiny-rdn", "rdn-360m"])
def test_softmax_and_linear_models_have_equally_many_parameters(recipe):
    found = _against_softmax(recipes.get(recipe))
    linear, softmax = (parameter_counts(found[name].config.model)["total"] for name in ("rdn", "softmax"))
    assert abs(softmax - linear) < 0.01 * linear
    assert found["softmax"].config.model.softmax_every == found["rdn"].config.model.softmax_every == 0
    assert found["rdn hybrid"].config.model.mixer == found["rdn"].config.model.mixer


def test_cuda_cases_can_be_listed_without_a_device():
    trained, prefilled = train_tokens(device="cuda"), prefill_tokens(device="cuda")
    assert [(x.params["B"], x.params["T"], x.params["softmax_every"]) for x in trained] == [
        (4, 4096, 4),
        (4, 4096, 0),
        (16, 2048, 0),
        (4, 8192, 0),
        (1, 32_768, 0),
        (1, 131_072, 0),
    ]
    assert list(trained[0].impls) == ["rdn", "gdn"]
    assert list(trained[0].rivals) == ["gdn, fla", "gdn, flash-qla"]
    assert list(prefilled[0].impls) == ["rdn", "rdn hybrid", "softmax"]
    assert [x.tokens for x in prefilled] == [32_768, 32_768, 32_768, 131_072]


@pytest.mark.parametrize("run", [_training_step, _prefill])
def test_another_recurrence_or_recomputation_changes_no_result(run):
    want = run(gdn(), SHAPE)()
    for variant in (gdn()._replace(recurrence=delta), gdn()._replace(recompute=True)):
        torch.testing.assert_close(run(variant, SHAPE)(), want, rtol=1e-6, atol=0)


def test_recomputation_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model, tokens, targets = _build(gdn()._replace(recompute=recompute), SHAPE)
        model.loss(tokens, targets).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_trains():
    call = _training_step(gdn(), SHAPE)
    first, second = float(call()), float(call())
    assert first != second


def test_a_rival_that_computes_something_else_is_refused():
    theirs = {
        "right": gdn()._replace(recurrence=delta),
        "wrong": gdn()._replace(recurrence=lambda *tensors: 0 * tensors[2]),
    }
    rivals = _case("toy", {"gdn": gdn()}, theirs, SHAPE, _training_step).rivals
    assert rivals["right"].check() == ""
    with pytest.raises(AssertionError, match=r"^loss \d\.\d+, want \d\.\d+$"):
        rivals["wrong"].check()
