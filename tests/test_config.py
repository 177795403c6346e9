"""Configuration: strict in, complete out, and an error that says what to do."""

from __future__ import annotations

import dataclasses

import pytest

from whimbrel.config import (
    Config,
    MixerConfig,
    decode,
    encode,
    kind_class,
    kind_of,
    load_config,
    parse_toml,
    to_toml,
    with_overrides,
)
from whimbrel.errors import ConfigError
from whimbrel.mixers.softmax.config import SoftmaxConfig
from whimbrel.recipes import RECIPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutsideMixer(MixerConfig):
    """A mixer of someone else's package."""

    width: int = 3
    """Anything."""


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_toml(name: str) -> None:
    config = RECIPES[name]()
    assert parse_toml(to_toml(config)) == config


def test_precedence_defaults_recipe_file_flags(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('recipe = "demo"\nsteps = 77\n[schedule]\nwarmup_steps = 7\n')
    config = load_config(path, {"steps": 88})
    assert config.steps == 88  # flag over file
    assert config.schedule.warmup_steps == 7  # file over recipe
    assert config.data.recall_fraction == RECIPES["demo"]().data.recall_fraction  # recipe over default
    assert config.schedule.min_ratio == 0.0  # default


def test_a_new_kind_starts_from_its_own_defaults() -> None:
    config = load_config("demo", {"optim.kind": "adamw"})
    assert kind_of(config.optim) == "adamw"
    assert config.optim.lr == kind_class("whimbrel.optim", "adamw")().lr


def test_a_setting_without_kind_keeps_the_kind() -> None:
    config = load_config("demo", {"optim.rank": 8})
    assert kind_of(config.optim) == "fira"
    assert config.optim.rank == 8


def test_kind_from_outside(monkeypatch) -> None:
    kind = f"{__name__}:OutsideMixer"
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules[OutsideMixer.__module__])
    config = with_overrides(Config(), {"model.mixer.kind": kind, "model.mixer.width": 5})
    assert encode(config)["model"]["mixer"] == {"kind": kind, "width": 5}


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("stpes = 5", "unknown setting 'stpes'; did you mean 'steps'?"),
        ("[model.mixer]\nclpi = 1.0", "unknown setting 'model.mixer.clpi'; did you mean 'clip'?"),
        (
            '[model.mixer]\nkind = "rnd"',
            "model.mixer.kind = 'rnd' is not known; did you mean 'rdn'?; use one of",
        ),
        ('[optim]\nkind = "sgdd"', "optim.kind = 'sgdd' is not known"),
        ('[optim]\nkind = "nowhere:Thing"', "optim.kind = 'nowhere:Thing' cannot be loaded"),
        ('[model.mixer]\nkind = "whimbrel.config:Config"', "is not a MixerConfig"),
        ('steps = "many"', "steps = 'many' is not allowed; use a whole number"),
        ("steps = true", "steps = True is not allowed; use a whole number"),
        ("steps = 0", "steps = 0 is not allowed; use a positive number"),
        ("model = 3", "model = 3 is not a table; write [model] with its settings"),
        ('dtype = "float16"', "dtype = 'float16' is not allowed; did you mean 'bfloat16'?; use one of"),
        ("[eval]\nmqar_pairs = 4", "eval.mqar_pairs = 4 is not a list"),
        ('[eval]\nmqar_pairs = ["x"]', "eval.mqar_pairs[0] = 'x' is not allowed; use a whole number"),
        (
            "batch_tokens = 1000",
            "batch_tokens = 1000 is not allowed; use a positive multiple of data.seq_len = 256",
        ),
        ("clip_grad_norm = nan", "clip_grad_norm = nan is not finite"),
        ("steps = 10", "schedule.warmup_steps + schedule.decay_steps = 50 exceeds steps = 10"),
        ('[averaging]\nmethods = ["smaa"]', "kind = 'smaa' is not known; did you mean 'sma'?"),
        ('name = "a/b"', "name = 'a/b' is not allowed; use a name without '/'"),
        ("steps = ", "configuration is not valid TOML"),
    ],
)
def test_wrong_settings_say_what_to_do(toml: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_toml(toml)
    assert message in str(error.value)
    assert "\n" not in str(error.value).replace(str(error.value.__cause__), "")


def test_missing_file_and_recipe() -> None:
    with pytest.raises(ConfigError, match=r"configuration file 'nowhere\.toml' does not exist"):
        load_config("nowhere.toml")
    with pytest.raises(ConfigError, match="unknown recipe 'dmeo'; did you mean 'demo'"):
        load_config("dmeo")


def test_hybrid_layers() -> None:
    kinds = [kind_of(layer) for layer in load_config("tiny-rdn").model.layers()]
    assert kinds == ["rdn", "rdn", "rdn", "softmax"]
    assert isinstance(load_config("tiny-softmax").model.layers()[0], SoftmaxConfig)


def test_numbers_that_toml_writes_without_a_point() -> None:
    assert decode(Config, {"clip_grad_norm": 2}).clip_grad_norm == 2.0


def test_every_field_has_a_docstring() -> None:
    """tyro and the reference are made from them, so none may be missing."""
    import ast
    import inspect

    from whimbrel import config as module

    classes = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
    for cls in classes:
        for here, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(here, ast.AnnAssign) and getattr(here.target, "id", "") != "FAMILY":
                assert isinstance(following, ast.Expr), f"{cls.name}.{here.target.id} has no docstring"
