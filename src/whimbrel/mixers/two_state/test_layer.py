"""The layers of RLA and RDN hand their options to their recurrence."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from whimbrel.errors import ConfigError
from whimbrel.mixers import RDN, RLA
from whimbrel.mixers.rdn import RDNConfig, rdn
from whimbrel.mixers.rla import RLAConfig, rla
from whimbrel.testing.budget import assert_close

WIDTH = 10


class Kind(NamedTuple):
    """A mixer of two states: its layer, its configuration and its recurrence."""

    layer: Any
    config: Any
    op: Any

    def make(self, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return large_values(self.layer(WIDTH, num_heads=2, head_dim=4, **options))

    def build(self, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return large_values(self.config(num_heads=2, head_dim=4, **options).build(WIDTH, 1e-5))


every = pytest.mark.parametrize("kind", [Kind(RDN, RDNConfig, rdn), Kind(RLA, RLAConfig, rla)], ids=["rdn", "rla"])


def large_values(layer: nn.Module) -> nn.Module:
    """So large that the clip acts."""
    layer = layer.double()
    with torch.no_grad():
        layer.v_proj.weight.mul_(5)
    return layer


def make_x(time: int) -> Tensor:
    return 3 * torch.randn(2, time, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every
@pytest.mark.parametrize("options", [{}, {"clip": None}, {"clip": 0.3}, {"combine": "sum"}, {"residual": "decayed"}])
def test_options_reach_the_recurrence(kind, options):
    layer, x, calls = kind.make(**options), make_x(13), []
    inner = layer.recurrence

    def record(*tensors, **keywords):
        calls.append((tensors, inner(*tensors, **keywords)))
        return calls[-1][1]

    layer.recurrence = record
    layer(x)
    tensors, got = calls[0]
    assert_close("y", kind.op(*tensors, **options, impl="reference").y, got.y, 1e-9)
    if options:
        assert not torch.allclose(kind.op(*tensors).y, got.y), "the option makes no difference here"


@every
def test_a_layer_gives_output_and_state_and_goes_on_from_it(kind):
    layer, x = kind.make(), make_x(9)
    y, state = layer(x[:, :6])
    rest, _ = layer(x[:, 6:], state)
    assert state.conv.shape == (2, 24, 3)
    assert state.recurrent.base.shape == state.recurrent.residual.shape == (2, 2, 4, 4)
    assert_close("y", layer(x).y, torch.cat((y, rest), 1), 1e-9)


def test_the_two_layers_differ():
    x = make_x(13)
    one, other = (Kind(layer, None, None).make()(x).y for layer in (RDN, RLA))
    assert not torch.allclose(one, other)


@every
def test_clip_zero_in_a_config_means_off(kind):
    x = make_x(13)
    for clip, expected in ((0.0, None), (0.3, 0.3)):
        assert_close("y", kind.make(clip=expected)(x).y, kind.build(clip=clip)(x).y, 1e-12)


@every
def test_config_says_what_is_wrong(kind):
    with pytest.raises(ConfigError, match=r"mixer.clip = -1.0 is not allowed; use 0 \(off\) or a positive bound"):
        kind.config(clip=-1.0)
    with pytest.raises(ConfigError, match=r"mixer.combine = 'mean' is not allowed; use one of 'gated', 'sum'"):
        kind.config(combine="mean")


@every
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"impl": "triten"},
            "impl = 'triten' is unknown; choose one of auto, reference, chunked, triton; did you mean 't",
        ),
        ({"combine": "mean"}, "combine = 'mean' is unknown; choose one of gated, sum"),
        ({"residual": "none"}, "residual = 'none' is unknown; choose one of undecayed, decayed"),
        ({"clip": 0.0}, "clip = 0.0 is not allowed; give a number above 0, or None for no clipping"),
        ({"recompute": -1}, "recompute = -1 is not allowed; give 0"),
    ],
)
def test_a_layer_refuses_wrong_options_when_it_is_made(kind, options, message):
    with pytest.raises(ConfigError, match=f"R[DL][NA]: {message}"):
        kind.layer(8, num_heads=2, head_dim=4, **options)


@every
def test_parts_that_run_again_reach_the_recurrence(kind):
    assert kind.build(recompute=3).recurrence.keywords["recompute"] == 3
    with pytest.raises(ConfigError, match=r"mixer.recompute = -1 is not allowed; use 0 \(off\) or a number of parts"):
        kind.config(recompute=-1)
