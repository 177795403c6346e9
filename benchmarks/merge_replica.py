"""The studies of merge_quality.py at 60 M parameters on one GPU, in minutes: arXiv 2505.12082, figures 3 to 7, again.

    python benchmarks/merge_replica.py anneal benchmarks/recipes/pma-60m.toml --seeds 0 1 2 --apart data/other-shards
    python benchmarks/merge_replica.py collapse benchmarks/recipes/pma-60m.toml --rates 6e-3 1.2e-2 2.4e-2

merge_quality.py runs `whimbrel train`, with checkpoints on the disk. Here they stay in the GPU's memory, blocks are
compiled, and the host waits for the device only where it must. Averages are made by whimbrel.merge.OnlineAverage, a
collapse is seen by whimbrel.merge.SpikeDetector. Work that would begin after --seconds is left out and named. A process
for each seed, side by side, keeps a large card busy; each needs about 35 GB.

Lines go to benchmarks/results/merge_quality.jsonl, named as those of merge_quality.py: losses on the first
--validation-tokens of the held-out text, differences paired over blocks of one training sequence.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from merge_quality import COUNTS, METHODS, write_line
from torch import Tensor, nn

from whimbrel.config import MergeConfig, ScheduleConfig, SpikesConfig, load_config
from whimbrel.data import Loader, TokenShards
from whimbrel.evals.intervals import paired_difference
from whimbrel.merge import OnlineAverage
from whimbrel.merge.config import SMAConfig
from whimbrel.merge.spikes import SpikeDetector
from whimbrel.model import build_model
from whimbrel.optim.schedule import learning_rate_factor

STRIDES = (1, 2, 4, 8)
"""Intervals between averaged checkpoints, in distances of checkpoints."""
METHOD_STRIDE = 2
"""The interval at which methods other than the plain mean are compared."""
WAYS = {"average": "average", "newest": "newest", "reset": "reset", "half-rate": "average"}
"""Ways on from a collapse: their optimizer state."""
REWARM_STEPS = 50


class Snapshot(NamedTuple):
    """A checkpoint in the device's memory."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    """Both moments of AdamW, named `first.NAME` and `second.NAME`; empty where only weights were kept."""


class Score(NamedTuple):
    """Loss on held-out text, and its sum over each block of equal size."""

    loss: float
    blocks: np.ndarray


class Job:
    """The model, its optimizer and its text; what is trained is put into it and taken out of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.began = time.perf_counter()
        data = {} if args.corpus is None else {"data.corpus": str(args.corpus)}
        self.config = config = load_config(args.recipe, data)
        self.seq_len, self.batch = config.data.seq_len, config.batch_sequences
        self.corpus = Path(config.data.corpus)
        self.model = build_model(config.model, seed=0).to(self.device)
        if args.compile:
            for block in self.model.blocks:
                block.compile()
        self.optimizer = config.optim.build(config.optim.groups(self.model))
        self.rate = self.optimizer.param_groups[0]["lr"]
        for group in self.optimizer.param_groups:
            group["fused"] = True
            group["betas"] = (group["betas"][0], args.beta2 or group["betas"][1])
        self.params = dict(self.model.named_parameters())
        self.text = TokenShards(self.corpus, "validation")

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def has_time(self, what: str, need: float = 0.0) -> bool:
        """Whether the time allowed is not used up; says what is left out if it is."""
        if self.seconds() + need < self.args.seconds:
            return True
        print(f"left out for lack of time: {what}", flush=True)
        return False

    def loader(self, seed: int, corpus: Path | None = None) -> Loader:
        """Batches of the training text, or of another folder's."""
        shards = TokenShards(corpus or self.corpus, "train")
        return Loader(shards, seq_len=self.seq_len, batch_sequences=self.batch, seed=seed)

    def weights(self) -> dict[str, Tensor]:
        """A copy of what the model holds now."""
        return {name: value.detach().clone() for name, value in self.params.items()}

    def start(self, seed: int) -> None:
        """Weights drawn from `seed`, and an optimizer that has seen nothing."""
        fresh = build_model(self.config.model, seed=seed)
        with torch.no_grad():
            for name, value in fresh.named_parameters():
                self.params[name].copy_(value)
        self.forget()

    def forget(self) -> None:
        """Empty the optimizer's state."""
        self.optimizer.state.clear()

    def take(self, step: int, *, moments: bool) -> Snapshot:
        """What the model, and on request the optimizer, hold now."""
        kept: dict[str, Tensor] = {}
        if moments:
            for name, value in self.params.items():
                state = self.optimizer.state[value]
                kept |= {f"first.{name}": state["exp_avg"].clone(), f"second.{name}": state["exp_avg_sq"].clone()}
        return Snapshot(step, self.weights(), kept)

    @torch.no_grad()
    def put(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; without moments the optimizer begins anew."""
        for name, value in self.params.items():
            value.copy_(snapshot.weights[name])
        self.forget()
        if snapshot.moments:
            for name, value in self.params.items():
                self.optimizer.state[value] = {
                    "step": torch.tensor(float(snapshot.step), device=self.device),
                    "exp_avg": snapshot.moments[f"first.{name}"].clone(),
                    "exp_avg_sq": snapshot.moments[f"second.{name}"].clone(),
                }

    def update(self, loader: Loader, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns loss and norm of the gradient before clipping, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = (self._moved(part) for part in loader.batch(step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model.loss(tokens, targets)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])
        if self.args.clip:
            nn.utils.clip_grads_with_norm_(self.params.values(), self.args.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def _moved(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    @torch.no_grad()
    def score(self, weights: dict[str, Tensor], text: TokenShards | None = None) -> Score:
        """The loss of `weights` on held-out text; the model's weights are overwritten."""
        text, args = text or self.text, self.args
        for name, value in self.params.items():
            value.copy_(weights[name])
        rows = min(args.validation_tokens, text.num_tokens - 1) // self.seq_len
        ids = torch.from_numpy(text.read(0, rows * self.seq_len + 1)).to(self.device)
        inputs, targets = ids[:-1].view(rows, -1), ids[1:].view(rows, -1)
        sums = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            for part, wanted in zip(inputs.split(self.batch), targets.split(self.batch), strict=True):
                sums.append(self.model.per_token_loss(part, wanted).double().sum(1))
        blocks = torch.cat(sums).cpu().numpy()
        return Score(float(blocks.sum()) / (rows * self.seq_len), blocks)

    def line(self, method: str, score: Score, *, seed: int, step: int, raw: Score | None = None, **params: Any) -> None:
        """Record and print one loss; with `raw` also the paired difference to it."""
        sizes = np.full(len(score.blocks), self.seq_len)
        difference = None if raw is None else paired_difference(score.blocks, raw.blocks, sizes, draws=1000)
        given = {"recipe": self.config.name, "tokens": step * self.config.batch_tokens, "method": method}
        write_line(given | {"seed": seed, **params}, score.loss, difference, device=self.device.type, out=self.args.out)


def mean(snapshots: Sequence[Snapshot], method: MergeConfig, *, moments: bool = False) -> Snapshot:
    """The average of snapshots, oldest first; it stands at the newest one's step."""
    current: dict[str, Tensor] = {}

    def tensors() -> dict[str, Tensor]:
        return current

    def use(snapshot: Snapshot) -> None:
        current.update(snapshot.weights | (snapshot.moments if moments else {}))

    use(snapshots[0])
    average = OnlineAverage(tensors, count=len(snapshots), method=method, device="same")
    for number, snapshot in enumerate(snapshots):
        use(snapshot)
        average.update(number)
    found = average.average()
    newest = snapshots[-1]
    return Snapshot(
        newest.step,
        {name: found[name] for name in newest.weights},
        {name: found[name] for name in newest.moments} if moments else {},
    )


def train(
    job: Job, loader: Loader, first: int, last: int, *, decay: int = 0, rate: float | None = None, warmup: int = 0
) -> Iterator[int]:
    """Steps `first` to `last`, decaying to zero over the last `decay` of them; yields the step that has been done."""
    schedule = ScheduleConfig(kind="wsd", warmup_steps=warmup, decay_steps=decay)
    for step in range(first, last):
        factor = learning_rate_factor(step, schedule, steps=last)
        job.update(loader, step, (rate or job.rate) * factor)
        yield step + 1


def finish(steps: Iterator[int]) -> None:
    """Train to the end."""
    for _ in steps:
        pass


def anneal(job: Job, seed: int) -> None:
    """One run at a constant rate. At each fork the last checkpoint, averages, and branches; then fine-tuning."""
    args, every = job.args, job.args.every
    loader = job.loader(seed)
    forks = [round(args.steps * share / every) * every for share in args.forks]
    branches = [end for end in forks if end - args.anneal_steps >= args.count * every and end >= args.steps // 4]
    # Moments are large; they are kept where a branch begins and where they are averaged for one.
    starts = {end - args.anneal_steps - i * every for end in branches for i in range(args.count)}
    job.start(seed)
    kept: dict[int, Snapshot] = {}
    began = time.perf_counter()
    for step in train(job, loader, 0, args.steps, warmup=args.warmup):
        if step % every == 0:
            kept[step] = job.take(step, moments=step in starts)
    _speak(job, f"seed {seed}: constant rate, {loader.epochs(args.steps):.1f} epochs", args.steps, began)
    if args.apart:
        _tune(job, seed, [kept[args.steps - i * every] for i in reversed(range(args.count))])
    # Should time run out: the end of the run says most, and places without branches cost little.
    for end in sorted(forks, key=lambda end: (end != args.steps, end in branches, -end)):
        if not job.has_time(f"seed {seed}, fork {end}"):
            return
        raw = job.score(kept[end].weights)
        job.line("last", raw, seed=seed, step=end)
        if end in branches:
            _branch(job, loader, seed, end, kept, raw)
        for stride, method, count in _windows():
            oldest = end - (count - 1) * stride * every
            if oldest < every:
                continue
            chosen = [kept[step] for step in range(oldest, end + 1, stride * every)]
            score = job.score(mean(chosen, METHODS[method]).weights)
            job.line(
                method, score, seed=seed, step=end, raw=raw, count=count, interval_tokens=_tokens(job, stride * every)
            )


def _windows() -> Iterator[tuple[int, str, int]]:
    """(stride, method, count): the plain mean at every interval, other methods at one."""
    for stride in STRIDES:
        for method in METHODS if stride == METHOD_STRIDE else ("sma",):
            for count in COUNTS:
                yield stride, method, count


def _tokens(job: Job, steps: int) -> int:
    return steps * job.config.batch_tokens


def _branch(job: Job, loader: Loader, seed: int, end: int, kept: dict[int, Snapshot], raw: Score) -> None:
    """Annealing up to `end`, from the checkpoint and from the average of those before it, moments too."""
    args, every = job.args, job.args.every
    first = end - args.anneal_steps
    window = [kept[first - i * every] for i in reversed(range(args.count))]
    job.put(kept[first])
    finish(train(job, loader, first, end, decay=args.anneal_steps))
    annealed = job.score(job.weights())
    job.line("annealed", annealed, seed=seed, step=end, raw=raw, anneal_tokens=_tokens(job, args.anneal_steps))
    job.put(mean(window, SMAConfig(), moments=True))
    finish(train(job, loader, first, end, decay=args.anneal_steps))
    score = job.score(job.weights())
    given = {"count": args.count, "interval_tokens": _tokens(job, every)}
    job.line("start-last", annealed, seed=seed, step=end)
    job.line("start-average", score, seed=seed, step=end, raw=annealed, **given)


def _tune(job: Job, seed: int, window: Sequence[Snapshot]) -> None:
    """Fine-tuning on text that training has not seen, from the last checkpoint and from an average."""
    args = job.args
    loader = job.loader(seed, args.apart)
    held_out = TokenShards(args.apart, "validation")
    steps = args.tune_steps
    for rate in args.tune_rates:
        scores = {}
        for name, start in (("last", window[-1]), ("average", mean(window, SMAConfig()))):
            start = Snapshot(start.step, start.weights, {})
            job.put(start)
            before = job.score(start.weights, held_out)
            finish(train(job, loader, 0, steps, rate=rate, warmup=steps // 10, decay=steps - steps // 10))
            weights = job.weights()
            scores[name] = before, job.score(weights, held_out), job.score(weights)
        given = {"rate": rate, "tune_tokens": _tokens(job, steps)}
        for i, when in enumerate(("tune-start", "tune", "tune-elsewhere")):
            last, average = scores["last"][i], scores["average"][i]
            job.line(f"{when}-last", last, seed=seed, step=args.steps, **given)
            job.line(f"{when}-average", average, seed=seed, step=args.steps, raw=last, count=args.count, **given)


def collapse(job: Job, seed: int) -> None:
    """The first of the rates at which a run collapses: never going back, and by each way of going back."""
    for rate in job.args.rates:
        if job.has_time(f"seed {seed}, rate {rate:g}") and _collapses(job, seed, rate):
            return


def _collapses(job: Job, seed: int, rate: float) -> bool:
    args, every = job.args, job.args.every
    loader = job.loader(seed)
    job.start(seed)
    detector = SpikeDetector(_spikes(args))
    kept: list[Snapshot] = []
    fork: tuple[int, int, dict[str, Any]] | None = None
    curve: list[float] = []
    began, bad = time.perf_counter(), 0
    for step in range(args.steps):
        loss, norm = _watched(job, loader, step, rate)
        curve.append(loss)
        if fork is None:
            state = detector.state_dict()
            verdict = detector.check(step + 1, loss, norm)
            if verdict.action == "restart":
                fork = step + 1, verdict.onset, state
        bad = bad + 1 if not math.isfinite(loss) else 0
        if bad:
            print(f"seed {seed}: loss is not finite after step {step + 1}", flush=True)
            break
        if fork is None and (step + 1) % every == 0:
            kept.append(job.take(step + 1, moments=True))
    _speak(job, f"seed {seed}: rate {rate:g}, never going back", len(curve), began)
    _record_run(job, "collapse-none", seed, curve, rate, restarts=0)
    if fork is None:
        shown = " ".join(f"{np.mean(curve[i : i + 25]):.2f}" for i in range(0, len(curve), 25))
        print(f"seed {seed}: no collapse at rate {rate:g}: {shown}", flush=True)
        return False
    print(f"seed {seed}: left its range at step {fork[1]}, would go back at step {fork[0]}", flush=True)
    for way in WAYS:
        if job.has_time(f"seed {seed}, {way}"):
            _go_on(job, loader, seed, way, kept, fork, curve, rate)
    return True


def _spikes(args: argparse.Namespace) -> SpikesConfig:
    return SpikesConfig(
        action="restart", max_skips=0, window=args.window, patience=args.patience, margin_steps=args.margin
    )


def _watched(job: Job, loader: Loader, step: int, rate: float) -> tuple[float, float]:
    """One step with the warm-up of the run; loss and norm on the host."""
    factor = learning_rate_factor(step, ScheduleConfig(warmup_steps=job.args.warmup), steps=job.args.steps)
    values = torch.stack(job.update(loader, step, rate * factor)).tolist()
    return values[0], values[1]


def _go_on(
    job: Job,
    loader: Loader,
    seed: int,
    way: str,
    kept: Sequence[Snapshot],
    fork: tuple[int, int, dict[str, Any]],
    before: Sequence[float],
    full_rate: float,
) -> None:
    """The rest of the run, from the first collapse on, by one way of going back; up to three times."""
    args = job.args
    config = _spikes(args)
    detector = SpikeDetector(config)
    detector.load_state_dict(fork[2])
    kept, curve = list(kept), list(before[: fork[0]])
    onset, restarts, began = fork[1], 0, time.perf_counter()
    step = fork[0]
    while step < args.steps:
        if onset >= 0:
            early = [s for s in kept if s.step <= onset - 1 - config.margin_steps][-config.checkpoints :]
            if not early or restarts == config.max_restarts:
                print(f"seed {seed} {way}: gives up at step {step}, {restarts} restarts", flush=True)
                break
            restarts += 1
            start = mean(early, SMAConfig(), moments=WAYS[way] == "average")
            moments = {"average": start.moments, "newest": early[-1].moments, "reset": {}}[WAYS[way]]
            job.put(Snapshot(start.step, start.weights, moments))
            step, since = start.step, start.step
            kept = [s for s in kept if s.step <= step]
            print(f"seed {seed} {way}: from {[s.step for s in early]} on, left its range at {onset}", flush=True)
            detector.begin_anew()
            onset = -1
            curve = curve[:step]
        rate = full_rate * (0.5**restarts if way == "half-rate" else 1.0)
        rate *= min(1.0, (step - since + 1) / REWARM_STEPS) if way == "reset" else 1.0
        loss, norm = _watched(job, loader, step, rate)
        step += 1
        curve.append(loss)
        verdict = detector.check(step, loss, norm)
        if verdict.action == "restart":
            onset = verdict.onset
        elif step % args.every == 0 and detector.state_dict()["episode"][0] < 0:
            kept.append(job.take(step, moments=True))
    _speak(job, f"seed {seed}: {way}, {restarts} restarts", step - fork[0], began)
    _record_run(job, f"collapse-{way}", seed, curve, full_rate, restarts=restarts)


def _record_run(job: Job, method: str, seed: int, curve: list[float], rate: float, **params: Any) -> None:
    """The training loss along the run, and at its end the loss on held-out text."""
    args = job.args
    given = {"recipe": job.config.name, "method": method, "seed": seed, "rate": rate}
    for first in range(0, len(curve) - args.stretch + 1, args.stretch):
        value = float(np.mean(curve[first : first + args.stretch]))
        if math.isfinite(value):
            tokens = _tokens(job, first + args.stretch)
            line = given | {"tokens": tokens, "stretch_tokens": _tokens(job, args.stretch)}
            write_line(line, value, None, device=job.device.type, out=args.out, metric="training_loss", quiet=True)
    if len(curve) == args.steps:
        score = job.score(job.weights())
        if math.isfinite(score.loss):
            job.line(method, score, seed=seed, step=args.steps, rate=rate, **params)


def _speak(job: Job, what: str, steps: int, began: float) -> None:
    spent = time.perf_counter() - began
    rate = _tokens(job, steps) / max(spent, 1e-9) / 1e3
    print(f"[{job.seconds():.0f} s] {what} ({steps} steps, {spent:.1f} s, {rate:.0f} k tokens/s)", flush=True)


@contextmanager
def _fast() -> Iterator[None]:
    """fp32 products, which only scoring without autocast has, may use TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("anneal", "collapse"))
    parser.add_argument("recipe", help="recipe or TOML file with AdamW and a folder of token shards")
    parser.add_argument("--corpus", type=Path, help="another folder of token shards")
    parser.add_argument("--apart", type=Path, help="anneal: shards of other text with the same ids, for fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=math.inf, help="no work is begun after so long")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rates", type=float, nargs="+", default=[6e-3, 1.2e-2, 2.4e-2], help="of collapse")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--beta2", type=float, help="of AdamW; default: the recipe's")
    parser.add_argument("--clip", type=float, default=1.0, help="norm that gradients are clipped to; 0: not at all")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--count", type=int, default=6, help="checkpoints in the average that a branch starts from")
    parser.add_argument("--anneal-steps", type=int, default=160)
    parser.add_argument("--forks", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.7, 1.0], help="shares of the run")
    parser.add_argument("--tune-steps", type=int, default=60)
    parser.add_argument("--tune-rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--window", type=int, default=50, help="spikes.window")
    parser.add_argument("--patience", type=int, default=20, help="spikes.patience")
    parser.add_argument("--margin", type=int, default=10, help="spikes.margin_steps")
    parser.add_argument("--stretch", type=int, default=20, help="steps that a point of a training curve is a mean of")
    parser.add_argument("--validation-tokens", type=int, default=131_072)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    if args.anneal_steps % args.every or args.steps % args.every:
        parser.error(f"--steps and --anneal-steps must be multiples of --every = {args.every}")
    with _fast():
        job = Job(args)
        for seed in args.seeds:
            if job.has_time(f"seed {seed}"):
                {"anneal": anneal, "collapse": collapse}[args.study](job, seed)


if __name__ == "__main__":
    main()
