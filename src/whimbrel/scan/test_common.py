"""The checks of arguments and the choice of code: every message that a caller can meet."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.scan import common
from whimbrel.scan.base import Out, State
from whimbrel.testing.recurrence import RECURRENCES, Recurrence, Shape, make_inputs

every = pytest.mark.parametrize("recurrence", RECURRENCES.values(), ids=list(RECURRENCES))
Q, K, V, LOG_DECAY, BETA = range(5)


def op_name(recurrence: Recurrence) -> str:
    return recurrence.target.partition(":")[2]


def expect(recurrence: Recurrence, message: str, change, error=ConfigError, **kwargs) -> None:
    """A good call whose tensors or states `change` alters must fail with "NAME: message"."""
    inputs = make_inputs(recurrence, Shape(2, 5, 2, 4, 3, 6), dtype=torch.float32)
    change(inputs.tensors, inputs.states)
    with pytest.raises(error, match=f"^{op_name(recurrence)}: {re.escape(message)}$"):
        recurrence(inputs.tensors, inputs.states, **kwargs)


def replace(index: int, make):
    def change(tensors, states):
        tensors[index] = make(tensors[index])

    return change


def nothing(tensors, states):
    pass


@every
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("q has shape [2, 5, 2]; give [batch, time, heads, dim]", replace(Q, lambda x: x[..., 0])),
        ("v has dtype torch.int32; give a floating dtype", replace(V, lambda x: x.int())),
        ("k has shape [2, 4, 2, 3], q has [2, 5, 2, 3]; they must be equal", replace(K, lambda x: x[:, :4])),
        ("v has batch and time [2, 4], q has [2, 5]; they must be equal", replace(V, lambda x: x[:, :4])),
        (
            "q, k, v have dtypes torch.float32, torch.float32, torch.float64; give all three the same dtype",
            replace(V, lambda x: x.double()),
        ),
        ("v has 3 heads; give a multiple of the 2 heads of q and k", replace(V, lambda x: x[:, :, :3])),
        ("v has 0 heads; give a multiple of the 2 heads of q and k", replace(V, lambda x: x[:, :, :0])),
        ("beta has shape [2, 5, 2]; give [batch, time, value heads] = [2, 5, 4]", replace(BETA, lambda x: x[..., :2])),
        ("beta has dtype torch.bool; give a floating dtype", replace(BETA, lambda x: x > 0)),
        (
            "log_decay has the value 0.5; it is the natural logarithm of the decay and at most 0, pass decay.log()",
            replace(LOG_DECAY, lambda x: torch.full_like(x, 0.5)),
        ),
        ("k is on meta, q is on cpu; move them to one device", replace(K, lambda x: x.to("meta"))),
        ("q is of type list; give a tensor", replace(Q, lambda x: x.tolist())),
        ("beta is of type float; give a tensor", replace(BETA, lambda _: 0.5)),
    ],
)
def test_bad_tensors_are_named(recurrence: Recurrence, message: str, change):
    expect(recurrence, message, change)


@every
def test_a_state_of_another_shape_is_named(recurrence: Recurrence):
    def change(tensors, states):
        states[-1] = states[-1][:, :2]

    name = "state.residual" if recurrence.states == 2 else "state"
    expect(recurrence, f"{name} has shape [2, 2, 3, 6]; give [sequences, value heads, K, V] = [2, 4, 3, 6]", change)


@every
@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (
            torch.tensor([0.0, 5.0]),
            "cu_seqlens has shape [2] and dtype torch.float32; give int32 or int64 [sequences + 1]",
        ),
        (
            torch.tensor([[0, 5]]),
            "cu_seqlens has shape [1, 2] and dtype torch.int64; give int32 or int64 [sequences + 1]",
        ),
        (torch.tensor([0]), "cu_seqlens has shape [1] and dtype torch.int64; give int32 or int64 [sequences + 1]"),
        (
            torch.tensor([0, 5]),
            "cu_seqlens goes with batch 1, but the batch is 2; concatenate the sequences along time",
        ),
    ],
)
def test_bad_cu_seqlens_are_named(recurrence: Recurrence, edges, message):
    expect(recurrence, message, nothing, cu_seqlens=edges)


@every
def test_edges_in_a_list_are_named(recurrence: Recurrence):
    message = "cu_seqlens is of type list; give a tensor, int32 or int64 [sequences + 1]"
    expect(recurrence, message, nothing, cu_seqlens=[0, 5])


@every
@pytest.mark.parametrize("scale", ["1", float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_named(recurrence: Recurrence, scale):
    message = f"scale = {scale!r} is not allowed; give a finite number, or None for K ** -0.5"
    expect(recurrence, message, nothing, scale=scale)


@every
@pytest.mark.parametrize("edges", [[1, 5], [0, 4], [0, 3, 2, 5]])
def test_cu_seqlens_must_rise_from_the_first_token_to_the_last(recurrence: Recurrence, edges):
    def one_row(tensors, states):
        tensors[:] = [x[:1] for x in tensors]

    message = f"cu_seqlens runs from {edges[0]} to {edges[-1]}; it must rise from 0 to the time length 5"
    expect(recurrence, message, one_row, cu_seqlens=torch.tensor(edges))


def test_edges_are_looked_at_again_after_a_refusal_and_after_a_change():
    def check(time: int) -> None:
        common.check_cu_seqlens("op", edges, 1, time)

    edges = torch.tensor([0, 3, 2, 5])
    for _ in range(2):
        with pytest.raises(ConfigError, match="must rise from 0 to the time length 5"):
            check(5)
    edges[1] = 1
    check(5)
    check(5)
    with pytest.raises(ConfigError, match="time length 6"):
        check(6)
    edges[1] = 4
    with pytest.raises(ConfigError, match="must rise"):
        check(5)


@every
def test_states_must_match_the_number_of_packed_sequences(recurrence: Recurrence):
    def one_row(tensors, states):
        tensors[:] = [x[:1] for x in tensors]

    name = "state.base" if recurrence.states == 2 else "state"
    message = f"{name} has shape [2, 4, 3, 6]; give [sequences, value heads, K, V] = [3, 4, 3, 6]"
    expect(recurrence, message, one_row, cu_seqlens=torch.tensor([0, 1, 3, 5]))


@every
def test_kernels_refuse_by_name_what_they_cannot_take(recurrence: Recurrence, monkeypatch):
    def refused(why: str, change) -> None:
        message = f"impl = 'triton' is not available here: {why}; impl='chunked' runs on any device"
        expect(recurrence, message, change, error=UnsupportedError, impl="triton")

    def wide(tensors, states):
        tensors[:3] = [torch.zeros(2, 5, h, 300) for h in (2, 2, 4)]
        states[:] = [torch.zeros(2, 4, 300, 300) for _ in states]

    def fp64(tensors, states):
        tensors[:3] = [x.double() for x in tensors[:3]]

    refused("they compute in fp32, and an input is neither bf16, fp16 nor fp32", fp64)
    refused("K = 300 and V = 300, of which they take at most 256", wide)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused("the tensors are on cpu, not on a CUDA device", nothing)
    monkeypatch.setattr(common, "HAS_TRITON", False)
    refused("Triton is not installed", nothing)


@every
def test_an_unknown_impl_names_the_nearest(recurrence: Recurrence):
    message = "impl = 'chunky' is unknown; choose one of auto, reference, chunked, triton; did you mean 'chunked'?"
    expect(recurrence, message, nothing, impl="chunky")


@every
def test_auto_says_once_what_it_chose(recurrence: Recurrence, caplog, monkeypatch):
    monkeypatch.setattr(common, "_announced", set())
    op = op_name(recurrence)
    with caplog.at_level(logging.INFO, logger="whimbrel"):
        for time, grad in ((1, True), (5, False), (1, False), (5, True), (1, False)):
            inputs = make_inputs(recurrence, Shape(time=time))
            inputs.tensors[V].requires_grad_(grad)
            recurrence(inputs.tensors, inputs.states)
        recurrence(inputs.tensors, inputs.states, impl="reference")
    assert [record.getMessage() for record in caplog.records] == [
        f"{op}: impl='auto' chose 'chunked' (plain PyTorch on any device; no kernel: the tensors are on cpu, "
        "not on a CUDA device)",
        f"{op}: impl='auto' chose 'step' (one token, no gradient)",
    ]


@every
def test_one_token_with_gradients_is_differentiable(recurrence: Recurrence):
    inputs = make_inputs(recurrence, Shape(time=1))
    leaf = inputs.tensors[V].requires_grad_()
    y, _ = recurrence(inputs.tensors, inputs.states)
    assert y.requires_grad
    assert torch.autograd.grad(y.sum(), leaf)[0].abs().sum() > 0


@pytest.fixture
def no_forms(monkeypatch):
    monkeypatch.setattr(common, "_forms", {})


def form_after_one(tensors, state=None, cu_seqlens=None, options=(1,), grad=True):
    """How often two calls are checked: a fixed one on a device whose values are not looked at, and the one given."""
    found = []

    def find():
        found.append(None)
        return lambda: None

    common._forms.clear()
    common.form_of(find, "op", meta(), None, None, (1,))
    with torch.set_grad_enabled(grad):
        common.form_of(find, "op", tensors, state, cu_seqlens, options)
    return len(found)


def meta(shape=(2, 3), dtype=torch.float32, **kwargs):
    return [
        torch.empty(2, 3, device="meta", requires_grad=True),
        torch.empty(shape, dtype=dtype, device="meta", **kwargs),
    ]


def test_a_call_alike_is_not_checked_again(no_forms):
    assert form_after_one(meta()) == 1
    assert form_after_one([x.detach().requires_grad_(x.requires_grad) for x in meta()]) == 1


class Other(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "call",
    [
        {"tensors": meta((3, 2))},
        {"tensors": meta(dtype=torch.float16)},
        {"tensors": meta(requires_grad=True)},
        {"tensors": meta()[:1]},
        {"tensors": [meta()[0], 0.5]},
        {"tensors": [meta()[0], None]},
        {"tensors": [meta()[0], meta()[1].as_subclass(Other)]},
        {"tensors": [x.detach().new_zeros(2, 3, device="cpu") for x in meta()]},
        {"tensors": meta(), "grad": False},
        {"tensors": meta(), "options": (1.0,)},
        {"tensors": meta(), "options": (True,)},
        {"tensors": meta(), "options": ([1],)},
        {"tensors": meta(), "state": meta()[1]},
        {"tensors": meta(), "state": tuple(meta())},
        {"tensors": meta(), "cu_seqlens": torch.tensor([0, 3])},
    ],
)
def test_any_other_call_is_checked(no_forms, call):
    assert form_after_one(**call) == 2


def test_what_values_decide_is_checked_each_time(no_forms):
    for tensors, edges in ((meta(), torch.tensor([0, 3])), ([torch.zeros(2, 3)], None)):
        checks = []
        for _ in range(2):
            common.form_of(lambda checks=checks: checks.append(None) or len, "op", tensors, None, edges, (1,))
        assert len(checks) == 2


def test_a_state_and_a_tuple_of_it_are_not_alike(no_forms):
    x, checks = meta()[1], []
    for state in (x, (x,), (x,), x):
        common.form_of(lambda: checks.append(None) or len, "op", meta(), state, None, ())
    assert len(checks) == 2


def test_forms_do_not_pile_up(no_forms, monkeypatch):
    monkeypatch.setattr(common, "MOST_FORMS", 3)
    for n in range(10):
        common.form_of(lambda: len, "op", meta(), None, None, (n,))
        assert 1 <= len(common._forms) <= 3


@every
def test_a_bad_call_after_a_good_one_is_named(recurrence: Recurrence, no_forms, monkeypatch):
    """On a device whose values nobody looks at, and which computes nothing."""
    for module in ("scan.one_state", "mixers.two_state.op"):
        monkeypatch.setattr(f"whimbrel.{module}.chunked", lambda q, k, v, *_, **__: Out(v, State(v, v)))
    inputs = [x.to("meta") for x in make_inputs(recurrence, Shape(2, 5, 2, 4, 3, 6), dtype=torch.float32).tensors]
    for _ in range(2):
        assert recurrence(inputs, None, impl="chunked")[0].shape == (2, 5, 4, 6)
    assert len(common._forms) == 1
    op = op_name(recurrence)
    with pytest.raises(ConfigError, match=f"{op}: k has shape .2, 4, 2, 3., q has .2, 5, 2, 3.; they must be equal"):
        recurrence([inputs[0], inputs[1][:, :4], *inputs[2:]], None, impl="chunked")
    with pytest.raises(ConfigError, match=f"{op}: beta is on cpu, q is on meta"):
        recurrence([*inputs[:4], torch.zeros(2, 5, 4), *inputs[5:]], None, impl="chunked")
    with pytest.raises(ConfigError, match=f"{op}: impl = 'chunky' is unknown"):
        recurrence(inputs, None, impl="chunky")
    with pytest.raises(ConfigError, match=f"{op}: scale = nan is not allowed"):
        recurrence(inputs, None, impl="chunked", scale=float("nan"))
    assert len(common._forms) == 1
