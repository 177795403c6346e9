"""Which parameter goes where, and what is said when a choice does not fit."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from whimbrel.errors import ConfigError
from whimbrel.optim import Fira, GaLore, param_groups
from whimbrel.testing.optim import TinyModel


def names(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def test_groups_of_a_model():
    model = TinyModel()
    groups = param_groups(model, min_dim=4, rank=3, weight_decay=0.1)
    assert names(groups) == {
        "low_rank": [f"blocks.{i}.{part}" for i in (0, 1) for part in ("up", "down", "mix")],
        "decay": ["embed.weight"],
        "no_decay": ["scale", "blocks.0.norm", "blocks.1.norm"],
    }
    assert [(g["low_rank"], g.get("rank"), g["weight_decay"]) for g in groups] == [
        (True, 3, 0.1),
        (False, None, 0.1),
        (False, None, 0.0),
    ]


def test_small_matrices_and_excluded_ones_stay_with_adamw():
    model = TinyModel()
    with torch.no_grad():
        model.gate = nn.Parameter(torch.ones(4, 64))
        model.conv = nn.Parameter(torch.ones(32, 1, 4))
        model.wide = nn.Parameter(torch.ones(32, 33))
        model.marked = nn.Parameter(torch.ones(40, 40))
    model.marked._no_weight_decay = True
    found = names(param_groups(model, low_rank="*", exclude=["blocks.1.*", "embed.*"]))
    assert found["low_rank"] == ["wide"]
    assert {"gate", "conv", "embed.weight", "blocks.1.up"} <= set(found["decay"])
    assert "marked" in found["no_decay"]


def test_frozen_parameters_are_left_out():
    model = TinyModel()
    model.get_parameter("blocks.0.up").requires_grad_(False)
    assert "blocks.0.up" not in names(param_groups(model, min_dim=4))["low_rank"]


def test_no_pattern_means_no_low_rank_group():
    groups = param_groups(TinyModel(), low_rank=())
    assert list(names(groups)) == ["decay", "no_decay"]
    assert "weight_decay" not in groups[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"low_rank": ["blocks.*.up", "block.*"]},
            "low_rank pattern 'block.*' matches no parameter; did you mean 'blocks.*'?",
        ),
        (
            {"exclude": "zzz"},
            "exclude pattern 'zzz' matches no parameter; patterns are for whole names, such as 'scale'",
        ),
        (
            {"low_rank": "*.norm"},
            "low_rank = ['*.norm'] selects no matrix whose smaller side is at least min_dim = 4; "
            "choose other patterns or a smaller min_dim",
        ),
        ({"rank": 14}, "rank = 14 exceeds the smaller side 13 of blocks.0.up; choose at most 13"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError) as error:
        param_groups(TinyModel(), min_dim=4, **options)
    assert str(error.value) == message


def test_rank_above_the_smaller_side_is_refused_when_the_optimizer_is_built():
    model = nn.ModuleDict({"up": nn.Linear(1024, 4096, bias=False, device="meta")})
    with pytest.raises(ConfigError) as error:
        Fira(param_groups(model, low_rank="up.*"), rank=4096)
    assert str(error.value) == "rank = 4096 exceeds the smaller side 1024 of up.weight; choose at most 1024"


class Llama(nn.Module):
    """Names as in other people's models: attention, MLP, experts, an embedding and a head of its own."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 32)
        self.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Module()
            layer.self_attn, layer.mlp, layer.router = nn.Module(), nn.Module(), nn.Linear(32, 40)
            layer.self_attn.q_proj = nn.Linear(32, 32)
            layer.mlp.experts = nn.Module()
            layer.mlp.experts.down = nn.Parameter(torch.ones(4, 32, 64))
            self.layers.append(layer)
        self.lm_head = nn.Linear(32, 50, bias=False)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("all-linear", ["self_attn.q_proj.weight", "router.weight"]),
        (["attn", "mlp"], ["self_attn.q_proj.weight", "mlp.experts.down"]),
        (r"layers\.\d+\.(self_attn\.q_proj|router)", ["self_attn.q_proj.weight", "router.weight"]),
        (re.compile(r".*q_proj"), ["self_attn.q_proj.weight"]),
        (lambda name, module: name.endswith("router"), ["router.weight"]),
    ],
    ids=["all-linear", "parts of names", "regular expression", "compiled", "function"],
)
def test_targets_name_modules(target, parts):
    found = names(param_groups(Llama(), target=target))["low_rank"]
    assert sorted(found) == sorted(f"layers.{i}.{part}" for i in (0, 1) for part in parts)


def test_the_authors_keys_are_taken():
    """As `divide_params` of `fira` and the groups of `galore-torch` have them."""
    groups = param_groups(Llama(), target=["attn"], rank=8, update_proj_gap=50, scale=0.5, proj_type="right")
    group = Fira(groups).param_groups[0]
    assert (group["rank"], group["refresh_steps"], group["alpha"], group["side"]) == (8, 50, 0.5, "right")
    assert (
        GaLore(param_groups(Llama(), target=["attn"], rank=8, projection_type="left")).param_groups[0]["side"] == "left"
    )


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        (["atn"], "a function"),
        ("all_linear", "a function; did you mean 'all-linear'?"),
        ("attn", "a function; for parts of names use a list, ['attn']"),
    ],
)
def test_a_target_that_chooses_nothing_is_named(target, hint):
    with pytest.raises(ConfigError) as error:
        param_groups(Llama(), target=target)
    assert str(error.value) == (
        f"target = {target!r} chooses no nn.Linear and no experts; use 'all-linear', a list of names of modules, a "
        f"regular expression for whole names, or {hint}"
    )
