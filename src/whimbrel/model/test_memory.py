"""What is said about memory without building a model is what the model takes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from whimbrel.config import Config, MixerConfig, ModelConfig
from whimbrel.mixers.gdn import GDNConfig
from whimbrel.mixers.rdn import RDNConfig
from whimbrel.mixers.softmax import SoftmaxConfig
from whimbrel.model import build_model, cache_bytes
from whimbrel.model.memory import model_report, parameter_counts, parameter_shapes, state_bytes
from whimbrel.optim.adamw.config import AdamWConfig

SMALL = ModelConfig(
    vocab_size=31,
    hidden_size=20,
    num_layers=5,
    mlp_size=28,
    softmax_every=2,
    mixer=RDNConfig(num_heads=2, head_dim=8, num_value_heads=4, value_head_dim=6, conv_size=3),
    softmax=SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True),
)
MODELS = {
    "hybrid": SMALL,
    "untied": replace(SMALL, tie_embeddings=False),
    "linear": replace(SMALL, softmax_every=0, mixer=GDNConfig()),
    "softmax": replace(SMALL, mixer=SMALL.softmax),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name):
    config = MODELS[name]
    model = build_model(config, seed=0)
    found = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert parameter_shapes(config) == found
    assert list(parameter_shapes(config)) == list(found)
    counts = parameter_counts(config)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["mlp"] == sum(p.numel() for b in model.blocks for p in b.mlp.parameters())
    assert counts.get("rdn", 0) == sum(
        p.numel() for b in model.blocks if type(b.mixer).__name__ == "RDN" for p in b.mixer.parameters()
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_state_is_that_of_the_cache(name, tokens):
    config = MODELS[name]
    model = build_model(config, seed=0).eval()
    cache = model(torch.zeros(1, tokens, dtype=torch.int64)).cache
    said = state_bytes(config, tokens)
    assert said.recurrent + said.kv_cache == cache_bytes(cache)
    growing = [s for s in cache if type(s).__name__ == "KVCache"]
    assert said.kv_cache == sum(cache_bytes(s) for s in growing)
    everywhere = build_model(replace(config, mixer=config.softmax), seed=0).eval()
    assert said.all_softmax == cache_bytes(everywhere(torch.zeros(1, tokens, dtype=torch.int64)).cache)


def test_report_is_plain_data_for_show():
    config = Config(model=SMALL, optim=AdamWConfig())
    report = model_report(config, lengths=(10, 20))
    weights = 4 * parameter_counts(SMALL)["total"]
    assert report["parameters"] == parameter_counts(SMALL)
    assert report["training"]["weights"] == report["training"]["gradients"] == weights
    assert report["training"]["optimizer"] == AdamWConfig().state_bytes(parameter_shapes(SMALL))
    assert [row["tokens"] for row in report["inference"]] == [10, 20]
    assert report["inference"][0] == state_bytes(SMALL, 10)._asdict()
    halved = model_report(replace(config, dtype="bfloat16"), lengths=(10,))["inference"][0]
    assert halved["kv_cache"] == report["inference"][0]["kv_cache"] / 2


@dataclass(frozen=True, kw_only=True)
class ForeignConfig(MixerConfig):
    """A third party's mixer that declares no shapes."""

    def build(self, hidden_size, norm_eps):
        return torch.nn.Linear(hidden_size, hidden_size)


def test_shapes_of_a_mixer_that_declares_none_come_from_its_layer():
    shapes = parameter_shapes(replace(SMALL, num_layers=1, mixer=ForeignConfig()))
    mixer = {name: shape for name, shape in shapes.items() if ".mixer." in name}
    assert mixer == {"blocks.0.mixer.weight": (20, 20), "blocks.0.mixer.bias": (20,)}


WITHOUT_TORCH = """
import sys
from whimbrel.config import Config
from whimbrel.model.memory import model_report
from whimbrel.optim.adamw.config import AdamWConfig
model_report(Config(optim=AdamWConfig()))
sys.exit("torch" in sys.modules)
"""


def test_needs_no_torch():
    assert subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=False).returncode == 0
