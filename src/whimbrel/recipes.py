"""Named configurations. Each is a function; a variant changes what differs and nothing else. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from whimbrel.config import (
    AveragingConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ScheduleConfig,
)
from whimbrel.errors import ConfigError, nearest
from whimbrel.mixers.gdn.config import GDNConfig
from whimbrel.mixers.rdn.config import RDNConfig
from whimbrel.mixers.softmax.config import SoftmaxConfig
from whimbrel.optim.adamw.config import AdamWConfig
from whimbrel.optim.fira.config import FiraConfig
from whimbrel.sparse.row_local.config import RowLocalConfig


def tiny_rdn() -> Config:
    """The four methods together in 2.2 M parameters: an RDN hybrid, trained with Fira at a constant rate."""
    softmax = SoftmaxConfig(num_heads=3, num_kv_heads=1, head_dim=64)
    return Config(
        name="tiny-rdn",
        steps=480,
        batch_tokens=2048,
        model=ModelConfig(
            vocab_size=2048,
            hidden_size=192,
            num_layers=4,
            mlp_size=512,
            mixer=RDNConfig(num_heads=3, head_dim=64),
            softmax_every=4,
            softmax=softmax,
        ),
        optim=FiraConfig(lr=5e-3, rank=48, alpha=0.25, refresh_steps=100),
        schedule=ScheduleConfig(warmup_steps=60),
        data=DataConfig(seq_len=256, recall_fraction=0.25),
        checkpoint=CheckpointConfig(every_steps=20),
        averaging=AveragingConfig(last=6, anneal_steps=100),
        prefill=RowLocalConfig(coverage=0.95, block_size=32),
        eval=EvalConfig(validation_tokens=24_576, checkpoint_tokens=24_576),
    )


def demo() -> Config:
    """A smaller `tiny-rdn` for two cores and a few minutes: trained, averaged, judged and prefilled sparsely."""
    base = tiny_rdn()
    return replace(
        base,
        name="demo",
        steps=400,
        batch_tokens=1024,
        model=replace(base.model, num_layers=3, softmax_every=3),
        schedule=ScheduleConfig(warmup_steps=40),
        # As many recall tasks a step as in `tiny-rdn`: with fewer the model does not learn to recall in these steps.
        data=replace(base.data, recall_fraction=0.5, recall_warmup_steps=150),
        averaging=replace(base.averaging, anneal_steps=60),
        # An average gains ten times the interval that so much text gives.
        eval=EvalConfig(validation_tokens=8192, checkpoint_tokens=8192, num_sequences=32, needle_lengths=(256, 512)),
    )


def tiny_gdn() -> Config:
    """A plain stack of gated delta-rule layers with the parameters of `tiny-rdn`."""
    base = tiny_rdn()
    model = replace(base.model, mixer=GDNConfig(num_heads=3, head_dim=64), softmax_every=0, mlp_size=474)
    return replace(base, name="tiny-gdn", model=model)


def tiny_softmax() -> Config:
    """A Transformer with the parameters of `tiny-rdn`."""
    base = tiny_rdn()
    model = replace(
        base.model,
        mixer=SoftmaxConfig(num_heads=3, num_kv_heads=3, head_dim=64),
        softmax_every=0,
        mlp_size=544,
    )
    return replace(base, name="tiny-softmax", model=model)


def fira_60m() -> Config:
    """LLaMA-60M as in GaLore and Fira (arXiv 2403.03507, 2410.01623): 1.3 B tokens of 256-token sequences."""
    return _fira("fira-60m", hidden_size=512, mlp_size=1376, num_layers=8, num_heads=8, rank=128, steps=10_000)


def fira_130m() -> Config:
    """LLaMA-130M as in GaLore and Fira: 2.6 B tokens of 256-token sequences."""
    return _fira("fira-130m", hidden_size=768, mlp_size=2048, num_layers=12, num_heads=12, rank=256, steps=20_000)


def _fira(
    name: str, *, hidden_size: int, mlp_size: int, num_layers: int, num_heads: int, rank: int, steps: int
) -> Config:
    mixer = SoftmaxConfig(num_heads=num_heads, num_kv_heads=num_heads, head_dim=hidden_size // num_heads)
    return Config(
        name=name,
        steps=steps,
        batch_tokens=512 * 256,
        micro_batch_tokens=256 * 256,
        dtype="bfloat16",
        clip_grad_norm=0.0,
        model=ModelConfig(
            vocab_size=32_000,
            hidden_size=hidden_size,
            num_layers=num_layers,
            mlp_size=mlp_size,
            mixer=mixer,
            softmax_every=0,
            softmax=mixer,
            tie_embeddings=False,
            norm_eps=1e-6,
        ),
        optim=FiraConfig(lr=1e-2, rank=rank, min_dim=rank, alpha=0.25, refresh_steps=200),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=steps // 10, min_ratio=0.1),
        data=DataConfig(corpus="data/shards", seq_len=256),
        checkpoint=CheckpointConfig(every_steps=1000),
        eval=EvalConfig(validation_tokens=10_000_000),
    )


def rdn_360m() -> Config:
    """A 366 M RDN hybrid for one GPU: 24 layers, one softmax layer in four, constant rate for averaging."""
    return _rdn(
        "rdn-360m",
        hidden_size=1024,
        mlp_size=2816,
        num_layers=24,
        num_heads=8,
        vocab_size=32_000,
        softmax_every=4,
        steps=20_000,
        batch_tokens=524_288,
    )


def rdn_1_5b() -> Config:
    """The paper's 1.5 B RDN (arXiv 2509.25223): 16 layers of 2048, 16 heads of 128, 100 B tokens, cosine.

    The paper leaves sequence length and vocabulary open; 200,064 tied embeddings give its parameter count.
    """
    base = _rdn(
        "rdn-1.5b",
        hidden_size=2048,
        mlp_size=8192,
        num_layers=16,
        num_heads=16,
        vocab_size=200_064,
        softmax_every=0,
        steps=23_842,
        batch_tokens=4_194_304,
    )
    return replace(
        base,
        model=replace(base.model, init_std=0.006),
        optim=AdamWConfig(lr=3e-4, weight_decay=0.1),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=119, min_ratio=0.1),
    )


def _rdn(
    name: str,
    *,
    hidden_size: int,
    mlp_size: int,
    num_layers: int,
    num_heads: int,
    vocab_size: int,
    softmax_every: int,
    steps: int,
    batch_tokens: int,
) -> Config:
    return Config(
        name=name,
        steps=steps,
        batch_tokens=batch_tokens,
        micro_batch_tokens=32_768,
        dtype="bfloat16",
        model=ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            mlp_size=mlp_size,
            mixer=RDNConfig(num_heads=num_heads, head_dim=128),
            softmax_every=softmax_every,
            softmax=SoftmaxConfig(num_heads=num_heads, num_kv_heads=max(num_heads // 4, 1), head_dim=128),
        ),
        optim=FiraConfig(lr=5e-3, rank=256, min_dim=256, alpha=0.25, refresh_steps=200),
        schedule=ScheduleConfig(warmup_steps=1000),
        data=DataConfig(corpus="data/shards", seq_len=4096),
        checkpoint=CheckpointConfig(every_steps=1000),
        prefill=RowLocalConfig(coverage=0.95, block_size=128),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "tiny-rdn": tiny_rdn,
    "tiny-gdn": tiny_gdn,
    "tiny-softmax": tiny_softmax,
    "fira-60m": fira_60m,
    "fira-130m": fira_130m,
    "rdn-360m": rdn_360m,
    "rdn-1.5b": rdn_1_5b,
}


def get(name: str) -> Config:
    """The recipe of that name; raises ConfigError with the nearest name for an unknown one."""
    if name not in RECIPES:
        raise ConfigError(
            f"unknown recipe '{name}'{nearest(name, RECIPES)}; use one of {', '.join(RECIPES)}, or a TOML file"
        )
    return RECIPES[name]()
