"""The RLA layer hands its options to the recurrence."""

from __future__ import annotations

import pytest
import torch

from whimbrel.errors import ConfigError
from whimbrel.mixers import RLA
from whimbrel.mixers.rla import RLAConfig, rla
from whimbrel.testing.budget import assert_close

WIDTH = 10


def make_x(time):
    return 3 * torch.randn(2, time, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make_layer(**options):
    torch.manual_seed(0)
    layer = RLA(WIDTH, num_heads=2, head_dim=4, **options).double()
    with torch.no_grad():
        layer.v_proj.weight.mul_(5)
    return layer


@pytest.mark.parametrize("options", [{}, {"clip": None}, {"clip": 0.3}, {"combine": "sum"}, {"residual": "decayed"}])
def test_options_reach_the_recurrence(options):
    layer, x, calls = make_layer(**options), make_x(13), []
    inner = layer.recurrence

    def record(*tensors, **keywords):
        calls.append((tensors, inner(*tensors, **keywords)))
        return calls[-1][1]

    layer.recurrence = record
    layer(x)
    tensors, got = calls[0]
    assert_close("y", rla(*tensors, **options, impl="reference").y, got.y, 1e-9)
    if options:
        assert not torch.allclose(rla(*tensors).y, got.y), "the option makes no difference here"


def test_a_layer_gives_output_and_state_and_goes_on_from_it():
    layer, x = make_layer(), make_x(9)
    y, state = layer(x[:, :6])
    rest, _ = layer(x[:, 6:], state)
    assert state.conv.shape == (2, 24, 3)
    assert state.recurrent.base.shape == state.recurrent.residual.shape == (2, 2, 4, 4)
    assert_close("y", layer(x).y, torch.cat((y, rest), 1), 1e-9)


def test_clip_zero_in_a_config_means_off():
    x = make_x(13)
    for clip, expected in ((0.0, None), (0.3, 0.3)):
        torch.manual_seed(0)
        layer = RLAConfig(num_heads=2, head_dim=4, clip=clip).build(WIDTH, 1e-5).double()
        with torch.no_grad():
            layer.v_proj.weight.mul_(5)
        assert_close("y", make_layer(clip=expected)(x).y, layer(x).y, 1e-12)


def test_config_says_what_is_wrong():
    with pytest.raises(ConfigError, match=r"mixer.clip = -1.0 is not allowed; use 0 \(off\) or a positive bound"):
        RLAConfig(clip=-1.0)


def test_parts_that_run_again_reach_the_recurrence():
    layer = RLAConfig(num_heads=2, head_dim=4, recompute=3).build(WIDTH, 1e-5)
    assert layer.recurrence.keywords["recompute"] == 3  # pyrefly: ignore
    with pytest.raises(ConfigError, match=r"mixer.recompute = -1 is not allowed; use 0 \(off\) or a number of parts"):
        RLAConfig(recompute=-1)
