"""Averages against annealing, as a start, and after a collapse: small replicas of arXiv 2505.12082, figures 3 to 7.

    python benchmarks/merge_quality.py anneal benchmarks/recipes/pma-60m.toml --seeds 0 1 2 --apart data/other-shards
    python benchmarks/merge_quality.py collapse benchmarks/recipes/pma-60m.toml --burst-factor 100
    python benchmarks/merge_quality.py collapse benchmarks/recipes/pma-60m.toml --rates 6e-3 1.2e-2

The recipe, or TOML file, has AdamW and a folder of token shards; the run is at a constant rate after a warm-up.
Checkpoints stay in memory, blocks are compiled, and the host waits for the device only where it must, so that a model
of 60 M parameters takes minutes on a GPU. Averages are made by whimbrel.merge.OnlineAverage, a collapse is seen by
whimbrel.merge.SpikeDetector. Work that would begin after --seconds is left out and named. A process for each seed,
side by side, keeps a large card busy; each needs about 20 GB, in `collapse` 30.

Lines go to benchmarks/results/merge_quality.jsonl: metric loss, on the first --validation-tokens of the held-out text,
with differences paired over blocks of one training sequence; metric training_loss, the mean of --stretch steps.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from whimbrel.bench.results import RESULTS, record
from whimbrel.config import MergeConfig, ScheduleConfig, SpikesConfig, load_config
from whimbrel.data import Loader, TokenShards
from whimbrel.evals.intervals import Interval, paired_difference
from whimbrel.merge import OnlineAverage
from whimbrel.merge.config import DecayConfig, EMAConfig, SMAConfig, WMAConfig
from whimbrel.merge.spikes import SpikeDetector
from whimbrel.model import build_model
from whimbrel.optim.schedule import learning_rate_factor
from whimbrel.training.processes import pick_device

METHODS = {"sma": SMAConfig(), "wma": WMAConfig(), "ema": EMAConfig(), "minus-sqrt": DecayConfig()}
COUNTS = (3, 6, 10, 15)
STRIDES = (1, 2, 4, 8)
"""Intervals between averaged checkpoints, in distances of checkpoints."""
METHOD_STRIDE = 2
"""The interval at which methods other than the plain mean are compared."""
MOMENTS = {"average": "average", "newest": "newest", "reset": "reset", "half-rate": "average"}
"""Ways to go back from a collapse: what becomes of the moments. `half-rate` also halves the rate each time."""
WAYS = ("undisturbed", "skip", "none", *MOMENTS)
"""What is compared after a collapse; the first two, without the burst and leaving updates out, only for a burst."""
KEPT = 12
"""Checkpoints that a run which may collapse keeps: it goes back to the three before the collapse."""
REWARM_STEPS = 50


def write_line(
    given: dict[str, Any],
    loss: float,
    difference: Interval | None,
    *,
    device: str,
    out: Path,
    metric: str = "loss",
    quiet: bool = False,
) -> None:
    """Record and print one loss in nats a token, and its difference to the one that it is compared with."""
    text = " ".join(f"{name} {value}" for name, value in given.items()) + f": {loss:.4f}"
    if difference is not None:
        ends = zip(("difference", "difference_low", "difference_high"), difference, strict=True)
        given = given | {name: round(value, 6) for name, value in ends}
        text += f" ({difference.value:+.4f}, {difference.low:+.4f} to {difference.high:+.4f})"
    if not quiet:
        print(text, flush=True)
    record("merge_quality", "whimbrel", given, metric, loss, "nats per token", device=device, out=out)


class Snapshot(NamedTuple):
    """A checkpoint in memory."""

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
        self.args, self.device = args, pick_device(args.device)
        self.began = time.perf_counter()
        given = {"data.corpus": args.corpus and str(args.corpus), "batch_tokens": args.batch_tokens}
        settings: Mapping[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.config = config = load_config(args.recipe, settings)
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
                    "exp_avg": snapshot.moments[f"first.{name}"].to(self.device, copy=True),
                    "exp_avg_sq": snapshot.moments[f"second.{name}"].to(self.device, copy=True),
                }

    def gradient(self, loader: Loader, step: int) -> tuple[Tensor, Tensor]:
        """Gradients of a step's batch; returns loss and norm before clipping, on the device."""
        tokens, targets = (self._moved(part) for part in loader.batch(step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model.loss(tokens, targets)
        loss.backward()
        return loss.detach(), nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])

    def apply(self, rate: float, norm: Tensor) -> None:
        """The optimizer's step with these gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.args.clip:
            nn.utils.clip_grads_with_norm_(self.params.values(), self.args.clip, norm)
        self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

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
        current.update(snapshot.weights)
        if moments:
            place = next(iter(snapshot.weights.values())).device
            current.update({name: value.to(place) for name, value in snapshot.moments.items()})

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
        job.apply((rate or job.rate) * factor, job.gradient(loader, step)[1])
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
    # Moments are large; they are kept where a branch begins and where they are averaged for one, in main memory.
    starts = {end - args.anneal_steps - i * every for end in branches for i in range(args.count)}
    job.start(seed)
    kept: dict[int, Snapshot] = {}
    began = time.perf_counter()
    for step in train(job, loader, 0, args.steps, warmup=args.warmup):
        if step % every == 0:
            taken = job.take(step, moments=step in starts)
            kept[step] = taken._replace(moments={name: value.cpu() for name, value in taken.moments.items()})
    _speak(job, f"seed {seed}: constant rate, {loader.epochs(args.steps):.1f} epochs", args.steps, began)
    if args.apart:
        _tune(job, seed, [kept[args.steps - i * every] for i in reversed(range(args.count))])
    # Should time run out: the end of the run says most, places without branches cost little, and starts come last.
    annealed: dict[int, Score] = {}
    for end in sorted(forks, key=lambda end: (end != args.steps, end in branches, -end)):
        if not job.has_time(f"seed {seed}, fork {end}"):
            return
        raw = job.score(kept[end].weights)
        job.line("last", raw, seed=seed, step=end)
        if end in branches:
            annealed[end] = score = _annealed(job, loader, kept[end - args.anneal_steps], end)
            given = {"anneal_tokens": _tokens(job, args.anneal_steps)}
            job.line("annealed", score, seed=seed, step=end, raw=raw, **given)
        for stride, method, count in _windows():
            oldest = end - (count - 1) * stride * every
            if oldest < every:
                continue
            chosen = [kept[step] for step in range(oldest, end + 1, stride * every)]
            score = job.score(mean(chosen, METHODS[method]).weights)
            job.line(
                method, score, seed=seed, step=end, raw=raw, count=count, interval_tokens=_tokens(job, stride * every)
            )
    for end, last in annealed.items():
        if not job.has_time(f"seed {seed}, annealing to {end} from an average"):
            return
        window = [kept[end - args.anneal_steps - i * every] for i in reversed(range(args.count))]
        score = _annealed(job, loader, mean(window, SMAConfig(), moments=True), end)
        given = {"count": args.count, "interval_tokens": _tokens(job, every)}
        job.line("start-last", last, seed=seed, step=end)
        job.line("start-average", score, seed=seed, step=end, raw=last, **given)


def _windows() -> Iterator[tuple[int, str, int]]:
    """(stride, method, count): the plain mean at every interval, other methods at one."""
    for stride in STRIDES:
        for method in METHODS if stride == METHOD_STRIDE else ("sma",):
            for count in COUNTS:
                yield stride, method, count


def _tokens(job: Job, steps: int) -> int:
    return steps * job.config.batch_tokens


def _annealed(job: Job, loader: Loader, start: Snapshot, end: int) -> Score:
    """The loss after annealing from `start` up to `end`."""
    job.put(start)
    finish(train(job, loader, start.step, end, decay=end - start.step))
    return job.score(job.weights())


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


@dataclass
class Course:
    """A run up to some step."""

    now: Snapshot
    rate: float
    curve: list[float] = field(default_factory=list)
    """Training loss of each step."""
    kept: list[Snapshot] = field(default_factory=list)
    """Checkpoints before any collapse, oldest first."""
    detector: dict[str, Any] = field(default_factory=dict)
    onset: int = -1
    """Where the loss left its range, if the detector's verdict on the last step is to go back."""
    restarts: int = 0
    ended: bool = False
    """Whether the run cannot go on: its loss is not finite, or it has gone back too often."""


def collapse(job: Job, seed: int) -> None:
    """Runs that collapse, by a burst of the rate or by the rate itself: never going back, and by each way of doing so.

    Of several rates, the first at which a run collapses.
    """
    for rate in job.args.rates or [job.rate]:
        if job.has_time(f"seed {seed}, rate {rate:g}") and _collapses(job, seed, rate):
            return


def _collapses(job: Job, seed: int, rate: float) -> bool:
    args = job.args
    loader = job.loader(seed)
    burst = None if args.rates else round(args.burst_at * args.steps / args.every) * args.every
    job.start(seed)
    course = Course(job.take(0, moments=False), rate)
    if burst is not None:
        course = _advance(job, loader, course, end=burst)
        if "undisturbed" in args.ways:
            _finish_run(job, loader, course, "undisturbed", seed)
        if "skip" in args.ways and job.has_time(f"seed {seed}, skip"):
            _finish_run(job, loader, course, "collapse-skip", seed, way="skip", burst=burst)
    fork = _advance(job, loader, course, end=args.steps, until_restart=True, burst=burst)
    if fork.onset < 0:
        _record_run(job, "collapse-none", seed, fork)
        shown = " ".join(f"{np.mean(fork.curve[i : i + 25]):.2f}" for i in range(0, len(fork.curve), 25))
        print(f"seed {seed}: no collapse at rate {rate:g}: {shown}", flush=True)
        return False
    print(f"seed {seed}: left its range at step {fork.onset}, would go back at step {fork.now.step}", flush=True)
    for way in ("none", *MOMENTS):
        if way in args.ways and job.has_time(f"seed {seed}, {way}"):
            _finish_run(job, loader, fork, f"collapse-{way}", seed, way=way)
    return True


def _finish_run(
    job: Job, loader: Loader, course: Course, method: str, seed: int, *, way: str = "none", burst: int | None = None
) -> None:
    """Go on to the end and record it; the run's checkpoints do not stay in memory."""
    _record_run(job, method, seed, _advance(job, loader, course, end=job.args.steps, way=way, burst=burst))


def _advance(
    job: Job,
    loader: Loader,
    course: Course,
    *,
    end: int,
    way: str = "none",
    until_restart: bool = False,
    burst: int | None = None,
) -> Course:
    """The run up to step `end`, with what `way` does about abnormal steps: nothing, leaving updates out, going back.

    The rate is --burst-factor times as high over --burst-steps steps from `burst` on, the first time they are taken.
    """
    args, began = job.args, time.perf_counter()
    config = replace(_spikes(args), action="skip", max_skips=2) if way == "skip" else _spikes(args)
    detector = SpikeDetector(config)
    if course.detector:
        detector.load_state_dict(course.detector)
    course = replace(course, curve=list(course.curve), kept=list(course.kept))
    raised = set() if burst is None else set(range(burst, burst + args.burst_steps))
    job.put(course.now)
    step = since = course.now.step
    while step < end and not course.ended:
        if course.onset >= 0 and way in MOMENTS:
            start = _before_collapse(course, way, config)
            if start is None:
                print(f"{way}: gives up at step {step}, {course.restarts} restarts", flush=True)
                course.ended = True
                break
            job.put(start)
            step = since = start.step
            course.restarts += 1
            course.onset = -1
            course.kept = [s for s in course.kept if s.step <= step]
            course.curve = course.curve[:step]
            detector.begin_anew()
        factor = learning_rate_factor(step, ScheduleConfig(warmup_steps=args.warmup), steps=args.steps)
        if step in raised:
            raised.remove(step)
            factor *= args.burst_factor
        if way == "half-rate":
            factor *= 0.5**course.restarts
        if way == "reset" and course.restarts:
            factor *= min(1.0, (step - since + 1) / REWARM_STEPS)
        values = job.gradient(loader, step)
        loss, norm = torch.stack(values).tolist()
        verdict = detector.check(step + 1, loss, norm)
        if verdict.action == "skip":
            job.drop()
        else:
            job.apply(course.rate * factor, values[1])
        step += 1
        course.curve.append(loss)
        course.ended = not math.isfinite(loss) and way == "none"
        course.onset = verdict.onset if verdict.action == "restart" else -1
        if course.onset >= 0 and until_restart:
            break
        if step % args.every == 0 and detector.state_dict()["episode"][0] < 0:
            course.kept = [*course.kept, job.take(step, moments=True)][-KEPT:]
    _speak(job, f"rate {course.rate:g}, {way}, {course.restarts} restarts, to step {step}", step - since, began)
    course.now, course.detector = job.take(step, moments=step > 0), detector.state_dict()
    return course


def _before_collapse(course: Course, way: str, config: SpikesConfig) -> Snapshot | None:
    """The average of the checkpoints before a collapse, and the moments to go on with; None where it gives up."""
    early = [s for s in course.kept if s.step <= course.onset - 1 - config.margin_steps][-config.checkpoints :]
    if not early or course.restarts == config.max_restarts:
        return None
    start = mean(early, SMAConfig(), moments=MOMENTS[way] == "average")
    moments = {"average": start.moments, "newest": early[-1].moments, "reset": {}}[MOMENTS[way]]
    print(f"{way}: from {[s.step for s in early]} on, left its range at {course.onset}", flush=True)
    return Snapshot(start.step, start.weights, moments)


def _spikes(args: argparse.Namespace) -> SpikesConfig:
    return SpikesConfig(
        action="restart", max_skips=0, window=args.window, patience=args.patience, margin_steps=args.margin
    )


def _record_run(job: Job, method: str, seed: int, course: Course) -> None:
    """The training loss along the run, and at its end the loss on held-out text; no loss of a run that ended early."""
    args, curve = job.args, course.curve
    given = {"recipe": job.config.name, "method": method, "seed": seed, "rate": course.rate}
    given |= {} if args.rates else {"burst_factor": args.burst_factor, "burst_steps": args.burst_steps}
    for first in range(0, len(curve) - args.stretch + 1, args.stretch):
        value = float(np.mean(curve[first : first + args.stretch]))
        if math.isfinite(value):
            tokens = _tokens(job, first + args.stretch)
            line = given | {"tokens": tokens, "stretch_tokens": _tokens(job, args.stretch)}
            write_line(line, value, None, device=job.device.type, out=args.out, metric="training_loss", quiet=True)
    if not course.ended:
        score = job.score(course.now.weights)
        if math.isfinite(score.loss):
            given |= {"tokens": _tokens(job, args.steps), "restarts": course.restarts}
            write_line(given, score.loss, None, device=job.device.type, out=args.out)


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
    parser.add_argument("--rates", type=float, nargs="+", help="collapse: rates of the whole run, in place of a burst")
    parser.add_argument(
        "--burst-at", type=float, default=0.5, help="collapse: where the burst begins, a share of the run"
    )
    parser.add_argument("--burst-steps", type=int, default=3)
    parser.add_argument("--burst-factor", type=float, default=100.0, help="collapse: the rate's factor in the burst")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="collapse: what is done about it, one run for each"
    )
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
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step; default: the recipe's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
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
