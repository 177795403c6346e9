"""The training loop: batches in, checkpoints and metrics out, under plain `python` or `torchrun`.

A run is a folder: config.toml (resolved, written before step 0), metrics.jsonl, and step-NNNNNN checkpoints. A batch
is a pure function of seed and step, so the position in the data is the step, at any number of processes.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whimbrel import checkpoint as checkpoints
from whimbrel.config import Config, to_toml
from whimbrel.data import Loader, TokenShards
from whimbrel.data.pipeline import shards_for
from whimbrel.errors import CheckpointError, TrainingError
from whimbrel.evals.bpb import evaluate_bpb
from whimbrel.merge.spikes import Verdict
from whimbrel.model import build_model
from whimbrel.optim.schedule import learning_rate_factor
from whimbrel.optim.sharding import local
from whimbrel.progress import track
from whimbrel.training.averages import keep_average, restore_average, save_average
from whimbrel.training.metrics import Metrics
from whimbrel.training.prefetch import Prefetcher
from whimbrel.training.processes import Processes, joined, shard
from whimbrel.training.recovery import Recovery
from whimbrel.training.run_config import check_config, write_config
from whimbrel.training.signals import stop_signals


class TrainResult(NamedTuple):
    """How a call of `train` ended."""

    run_dir: Path
    """Folder of the run."""
    step: int
    """Steps done."""
    tokens: int
    """Training tokens seen."""
    loss: float
    """Mean training loss over the last logged steps, nats a token; nan if no step was run."""
    checkpoint: Path | None
    """The newest checkpoint."""
    interrupted: bool
    """Whether a signal ended the call before the last step."""
    restarts: int = 0
    """How often the run has gone back to an average of checkpoints, earlier calls included."""


def train(
    config: Config,
    *,
    run_dir: str | Path | None = None,
    branch_from: str | Path | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train to `config.steps`, going on from the newest complete checkpoint in `run_dir` if there is one.

    `run_dir` defaults to runs/NAME. `branch_from` names a checkpoint of another run, or that run for its newest, whose
    whole state (weights, optimizer, data position) a new run starts from, for example to anneal a constant-rate run.
    Under torchrun every process calls this with the same arguments. SIGINT and SIGTERM save a checkpoint and end the
    call early.

    Raises ConfigError (settings that do not fit the run or the processes), DataError, CheckpointError, and
    TrainingError when a loss or gradient is not finite.
    """
    with joined(config) as processes:
        folder = Path(run_dir) if run_dir is not None else Path("runs") / config.name
        trainer = _Trainer(config, folder, processes, quiet=quiet or not processes.first)
        return trainer.run(Path(branch_from) if branch_from is not None else None)


class _Trainer:
    def __init__(self, config: Config, run_dir: Path, processes: Processes, *, quiet: bool) -> None:
        self.config, self.run_dir, self.processes, self.quiet = config, run_dir, processes, quiet
        check_config(config, run_dir)
        if processes.first:
            shards_for(config, quiet=quiet)
        processes.wait()
        self.data_dir = shards_for(config, quiet=True)
        self.loader = Loader(
            TokenShards(self.data_dir, "train"),
            seq_len=config.data.seq_len,
            batch_sequences=config.batch_sequences,
            seed=config.seed,
            recall_fraction=config.data.recall_fraction,
            recall_warmup_steps=config.data.recall_warmup_steps,
        ).rank_slice(processes.rank, processes.world)
        # On a CPU the thread would take the cores that compute.
        self.batches = Prefetcher(self.loader.batch) if processes.device.type == "cuda" else self.loader.batch
        self.model = build_model(config.model, seed=config.seed).to(processes.device)
        shard(self.model, processes)
        self.optimizer = config.optim.build(config.optim.groups(self.model))
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = keep_average(config.averaging.online, self.model, self.optimizer)
        self.recovery = Recovery(config.spikes, run_dir, processes)
        write_config(config, run_dir, processes)

    def run(self, branch_from: Path | None) -> TrainResult:
        step = self._restore(branch_from)
        config, processes = self.config, self.processes
        last_saved = step if step else None
        loss = math.nan
        metrics = Metrics(self.run_dir, last_step=step, tensorboard=config.tensorboard) if processes.first else None
        window = _Window(step)
        with (
            stop_signals(processes.peers) as stop,
            track("train", (config.steps - step) * config.batch_tokens, "token", quiet=self.quiet) as bar,
        ):
            while step < config.steps:
                step_loss, norm, stopping, verdict = self._step(step, stop)
                if verdict.action == "restart":
                    gone, step = step, self._go_back(step, verdict)
                    bar.advance((step - gone) * config.batch_tokens, f"back at step {step}")
                    if metrics is not None:
                        metrics.close()
                        metrics = Metrics(self.run_dir, last_step=step, tensorboard=config.tensorboard)
                    self._save(step, metrics)
                    last_saved, window = step, _Window(step)
                    continue
                step += 1
                if self.average is not None:
                    self.average.update(step)
                window.add(step_loss)
                bar.advance(config.batch_tokens, f"step {step}, loss {step_loss:.3f}")
                saving = step % config.checkpoint.every_steps == 0 or step == config.steps or stopping
                if step % config.log_every == 0 or saving:
                    loss = window.mean()
                    if metrics is not None:
                        rate = window.steps(step) * config.batch_tokens / window.seconds()
                        metrics.write(**self._line(step, loss, norm, rate))
                    window = _Window(step)
                if saving:
                    self._save(step, metrics)
                    last_saved = step
                    window.restart_clock()
                if stopping:
                    break
        if metrics is not None:
            metrics.close()
        newest = checkpoints.step_dir(self.run_dir, last_saved) if last_saved is not None else None
        return TrainResult(
            self.run_dir,
            step,
            step * config.batch_tokens,
            loss,
            newest,
            interrupted=step < config.steps,
            restarts=self.recovery.restarts,
        )

    def _restore(self, branch_from: Path | None) -> int:
        source = checkpoints.latest_checkpoint(self.run_dir)
        if source is None and branch_from is not None:
            source = checkpoints.latest_checkpoint(branch_from) or branch_from
        if source is None:
            return 0
        extra = checkpoints.load_checkpoint(source, model=self.model, optimizer=self.optimizer)
        checkpoints.restore_rng(extra)
        self.recovery.load(extra)
        if self.average is not None:
            restore_average(self.average, source)
        step = int(extra["step"])
        if step > self.config.steps:
            raise CheckpointError(
                f"{source} is at step {step}, beyond steps = {self.config.steps}; train for more steps or use "
                "another run folder"
            )
        return step

    def _go_back(self, step: int, verdict: Verdict) -> int:
        """Go on from an average of checkpoints before the onset of a collapse; returns the step to go on from."""
        source, extra = self.recovery.go_back(step, verdict, model=self.model, optimizer=self.optimizer)
        checkpoints.restore_rng(extra)
        if self.average is not None:
            restore_average(self.average, source)
        return int(extra["step"])

    def _step(self, step: int, stop: threading.Event) -> tuple[float, float, bool, Verdict]:
        """One optimizer step, unless the verdict on it is to leave it out or to go back.

        Returns the mean loss over the step's targets, the gradient norm, whether a process was told to stop, and the
        verdict.
        """
        config, processes = self.config, self.processes
        factor = learning_rate_factor(step, config.schedule, steps=config.steps) * self.recovery.rate(step)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        batch = self.batches(step + self.recovery.skipped_batches)
        tokens, targets = batch.tokens.to(processes.device), batch.targets.to(processes.device)
        num_targets = processes.sum((targets != -100).sum())
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=processes.device)
        for part_tokens, part_targets in self._parts(tokens, targets):
            share = (part_targets != -100).sum() / num_targets
            with torch.autocast(processes.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                part = self.model.loss(part_tokens, part_targets) * share
            # FSDP2 averages gradients over the processes; the loss is a sum of shares.
            (part * processes.world).backward()
            total += part.detach()
        # What this process holds of each gradient: operations on DTensors would cost more than those on their parts.
        gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        norm = processes.norm(gradients).to(total.device)
        # The only wait for the device in a step: a step that is not finite must not reach the weights.
        told = total.new_full((), float(stop.is_set()))
        loss, norm_value, stopping = processes.largest(torch.stack([processes.sum(total), norm, told])).tolist()
        verdict = self.recovery.judge(step + 1, loss, norm_value)
        if verdict.action not in ("skip", "restart"):
            if not (math.isfinite(loss) and math.isfinite(norm_value)):
                self._refuse(step, loss)
            if config.clip_grad_norm:
                torch._foreach_mul_(gradients, (config.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.step()
        return loss, norm_value, bool(stopping), verdict

    def _parts(self, tokens: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rows = (self.config.micro_batch_tokens // self.config.data.seq_len) or len(tokens)
        yield from zip(tokens.split(rows), targets.split(rows), strict=True)

    def _refuse(self, step: int, loss: float) -> None:
        """Raise TrainingError naming the step, the first bad parameter and the last good checkpoint."""
        bad = "no parameter's gradient"
        for name, parameter in self.model.named_parameters():
            grad = parameter.grad
            local = getattr(grad, "to_local", lambda grad=grad: grad)() if grad is not None else None
            if self.processes.any(local is not None and not bool(torch.isfinite(local).all())):
                bad = f"the gradient of {name}"
                break
        good = checkpoints.latest_checkpoint(self.run_dir)
        advice = f"the last good checkpoint is {good}" if good else "no checkpoint had been saved yet"
        raise TrainingError(
            f"step {step + 1}: loss = {loss} and {bad} is not finite; the weights were left as they were; "
            f"{advice}; lower optim.lr or go back to an earlier checkpoint"
        )

    def _line(self, step: int, loss: float, norm: float, rate: float) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": step * self.config.batch_tokens,
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens_per_second": rate,
            "time": time.time(),
        }

    def _save(self, step: int, metrics: Metrics | None) -> None:
        config, average = self.config, self.average
        checkpoints.save_checkpoint(
            self.run_dir,
            step=step,
            tokens=step * config.batch_tokens,
            model=self.model,
            optimizer=self.optimizer,
            extra={"step": step, **checkpoints.rng_state(), **self.recovery.extra()},
            config_toml=to_toml(config),
            tokenizer_path=self.data_dir / "tokenizer.json",
            tensors=average.state_dict() if average is not None else None,
        )
        if config.checkpoint.keep:
            checkpoints.prune(self.run_dir, config.checkpoint.keep)
        has_average = average is not None and average.samples > 0
        if has_average and (step == config.steps or config.averaging.online.save == "every"):
            save_average(average, self.run_dir, step, config, tokenizer_path=self.data_dir / "tokenizer.json")
        if config.eval.checkpoint_tokens:
            line = self._validate()
            if has_average:
                with average.swapped():
                    line |= {f"average_{name}": value for name, value in self._validate().items()}
            if metrics is not None:
                metrics.write(step=step, tokens=step * config.batch_tokens, **line, time=time.time())

    def _validate(self) -> dict[str, float]:
        config = self.config
        held_out = TokenShards(self.data_dir, "validation")
        result = evaluate_bpb(
            self.model, held_out, seq_len=config.data.seq_len, max_tokens=config.eval.checkpoint_tokens
        )
        return {"validation_loss": result.nats_per_token, "validation_bits_per_byte": result.bits_per_byte}


class _Window:
    """Loss and time since the last logged step."""

    def __init__(self, first_step: int) -> None:
        self._first = first_step
        self._losses: list[float] = []
        self._start = time.perf_counter()

    def add(self, loss: float) -> None:
        self._losses.append(loss)

    def mean(self) -> float:
        return sum(self._losses) / len(self._losses)

    def steps(self, step: int) -> int:
        return step - self._first

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def restart_clock(self) -> None:
        self._start = time.perf_counter()


def annealed(config: Config, *, from_step: int) -> Config:
    """`config` for a branch that starts at `from_step` and decays to zero over `averaging.anneal_steps`."""
    steps = config.averaging.anneal_steps
    return dataclasses.replace(
        config,
        name=f"{config.name}-annealed",
        steps=from_step + steps,
        schedule=dataclasses.replace(config.schedule, kind="wsd", decay_steps=steps),
    )
