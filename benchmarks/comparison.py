"""Mixers at equal parameters and tokens: loss, recall by pairs and by length, bytes of a sequence, speed.

    python benchmarks/comparison.py train --corpus data/shards --jobs 3 --device cuda
    python benchmarks/comparison.py speed --device cuda

`train` runs `whimbrel train` and `whimbrel eval` for each mixer and seed in processes of their own, kept in --runs, so
that a second call does no work twice; --jobs of them share a card. A run that is done is judged and recorded at once.
With --seconds, what still trains then is ended, and all are judged by the newest checkpoint that every one has as well:
equal tokens, but a rate that had not come down. `speed` measures training and decoding, one model at a time.

Lines are of the case `comparison`: params mixer's width, tokens and seed; metrics loss (nats a token of held-out text),
mqar and needle (accuracy), curve (loss of the batches trained on, the same for all), state_bytes, train_rate and
decode_rate (tokens a second), train_peak (bytes of the device). Evaluation is in the precision of training.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._pytree import tree_map

from whimbrel import checkpoint as checkpoints
from whimbrel.bench.models import widened
from whimbrel.bench.results import RESULTS, record
from whimbrel.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ScheduleConfig,
    to_toml,
)
from whimbrel.data import TokenShards
from whimbrel.mixers.gdn.config import GDNConfig
from whimbrel.mixers.gdn_sum.config import GDNSumConfig
from whimbrel.mixers.rdn.config import RDNConfig
from whimbrel.mixers.rla.config import RLAConfig
from whimbrel.mixers.softmax.config import SoftmaxConfig
from whimbrel.model import build_model
from whimbrel.model.memory import parameter_counts, state_bytes
from whimbrel.optim.adamw.config import AdamWConfig

CONTEXTS = (1024, 8192, 32_768, 131_072)
"""Tokens before the decoded ones."""
LENGTHS = (1024, 16_384)
"""Tokens of a sequence of which the speed of training is measured."""
DECODE_BATCH, DECODE_TOKENS = 16, 32
CHECKPOINTS = 4
"""Checkpoints of a run, at equal distances."""
PIECE = 4096
"""Tokens of a prompt at a time."""

MIXERS = ("RDN", "softmax", "RDN hybrid", "GDN", "RLA", "GDN sum")


def models(vocab_size: int, *, hidden_size: int, layers: int, head_dim: int) -> dict[str, ModelConfig]:
    """Name -> model; the MLP is as wide as makes all of them as large as the one of RDN."""
    heads = hidden_size // head_dim
    softmax = SoftmaxConfig(num_heads=heads, head_dim=head_dim)
    size = {"num_heads": heads, "head_dim": head_dim}
    rdn = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=layers,
        mlp_size=hidden_size * 8 // 3 // 32 * 32,
        mixer=RDNConfig(**size),
        softmax_every=0,
        softmax=softmax,
    )
    others = {
        "RDN": rdn,
        "softmax": replace(rdn, mixer=softmax),
        "RDN hybrid": replace(rdn, softmax_every=4),
        "GDN": replace(rdn, mixer=GDNConfig(**size)),
        "RLA": replace(rdn, mixer=RLAConfig(**size)),
        "GDN sum": replace(rdn, mixer=GDNSumConfig(**size)),
    }
    return {name: widened(others[name], rdn) for name in MIXERS}


def chosen(args: argparse.Namespace, vocab_size: int) -> dict[str, ModelConfig]:
    """The models of --mixers."""
    found = models(vocab_size, hidden_size=args.hidden_size, layers=args.layers, head_dim=args.head_dim)
    return {name: found[name] for name in args.mixers}


def config_for(model: ModelConfig, args: argparse.Namespace, seed: int) -> Config:
    """AdamW at one rate for all mixers, cosine to a tenth, one recall sequence in sixteen."""
    return Config(
        name="comparison",
        seed=seed,
        device=args.device,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        micro_batch_tokens=args.micro_batch_tokens or args.batch_tokens,
        log_every=max(1, args.steps // 40),
        dtype="bfloat16" if args.device == "cuda" else "float32",
        model=model,
        optim=AdamWConfig(lr=args.lr, weight_decay=0.1),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=max(1, args.steps // 10), min_ratio=0.1),
        data=DataConfig(
            corpus=args.corpus, seq_len=args.seq_len, recall_fraction=1 / 16, recall_warmup_steps=args.steps // 4
        ),
        checkpoint=CheckpointConfig(every_steps=max(1, args.steps // CHECKPOINTS)),
        eval=EvalConfig(
            validation_tokens=args.validation_tokens,
            checkpoint_tokens=0,
            num_sequences=args.num_sequences,
            needle_lengths=tuple(args.seq_len * factor for factor in (1, 2, 4, 8)),
        ),
    )


class Run:
    """One mixer and seed, in a folder of its own."""

    def __init__(self, name: str, model: ModelConfig, seed: int, args: argparse.Namespace) -> None:
        self.name, self.model, self.seed, self.args = name, model, seed, args
        self.folder = args.runs / f"{name.replace(' ', '-')}-seed{seed}-steps{args.steps}"

    def work(self) -> None:
        """Train, and judge and record what came to its last step."""
        self.train()
        if self.args.steps in self.steps():
            write_curve(self)
            write(self, self.args.steps, self.judge(self.args.steps))

    def train(self) -> None:
        """Train in a process, which is ended at the time that is set; a second call goes on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self.folder / "start.toml"
        start.write_text(to_toml(config_for(self.model, self.args, self.seed)))
        with (self.folder / "log.txt").open("a") as log:
            call = [sys.executable, "-m", "whimbrel", "train", str(start), "--run-dir", str(self.folder)]
            try:
                left = max(0.0, self.args.end - time.monotonic())
                subprocess.run(call, check=True, stdout=log, stderr=log, timeout=left)
            except subprocess.TimeoutExpired:
                print(f"{self.name} seed {self.seed}: ended before its last step", flush=True)
            except subprocess.CalledProcessError as error:
                print(f"{self.name} seed {self.seed}: failed ({error.returncode}); see {log.name}", flush=True)

    def steps(self) -> set[int]:
        """Steps of which there are complete checkpoints."""
        return {checkpoints.read_meta(folder).step for folder in checkpoints.list_checkpoints(self.folder)}

    def judge(self, step: int) -> dict[str, Any]:
        """The evaluation of a checkpoint, made in a process, as plain data."""
        done = self.folder / f"eval-{step}.json"
        if not done.exists():
            dtype = "bfloat16" if self.args.device == "cuda" else "float32"
            call = [sys.executable, "-m", "whimbrel", "eval", str(checkpoints.step_dir(self.folder, step)), "--json"]
            call += ["--tasks", "bpb", "mqar", "needle", "--device", self.args.device, "--dtype", dtype]
            with (self.folder / "log.txt").open("a") as log:
                done.write_text(subprocess.run(call, check=True, stdout=subprocess.PIPE, stderr=log, text=True).stdout)
        return json.loads(done.read_text())

    def curve(self) -> list[tuple[int, float]]:
        """(tokens, nats a token of the batches since the tokens before)."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [(line["tokens"], line["loss"]) for line in lines if "loss" in line]


def train(args: argparse.Namespace) -> None:
    """All mixers and seeds."""
    args.end = time.monotonic() + args.seconds
    found = chosen(args, TokenShards(args.corpus, "train").tokenizer().vocab_size)
    runs = [Run(name, found[name], seed, args) for seed in args.seeds for name in found]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        done = [pool.submit(run.work) for run in runs]
        concurrent.futures.wait(done)
        runs = [run for run in runs if run.steps()]  # what failed has said so
        if not runs:
            sys.exit("no run came to a checkpoint; give more --seconds or fewer --steps")
        if not all(args.steps in run.steps() for run in runs):
            judge_together(runs, args, pool)
    for future in done:
        future.result()  # raises what an evaluation ended with


def judge_together(runs: Sequence[Run], args: argparse.Namespace, pool: concurrent.futures.Executor) -> None:
    """Judge and record all runs at the newest step of which every one has a checkpoint."""
    step = max(set.intersection(*(run.steps() for run in runs)), default=0)
    if not step:
        sys.exit("no checkpoint is common to all runs; give more --seconds or fewer --steps")
    for run in runs:
        write_curve(run)  # first, since judging takes a while and time is short
    print(f"judged after {step} of {args.steps} steps, the last that all runs reached", flush=True)
    judged = {pool.submit(run.judge, step): run for run in runs}
    for done in concurrent.futures.as_completed(judged):
        write(judged[done], step, done.result())


def line(run: Run, tokens: int, metric: str, value: float, unit: str, **more: Any) -> None:
    """Append a line on one run after so many tokens."""
    model, args = run.model, run.args
    params = {
        "hidden_size": model.hidden_size,
        "layers": model.num_layers,
        "parameters": parameter_counts(model)["total"],
        "tokens": tokens,
        "of_tokens": args.steps * args.batch_tokens,
        "T": args.seq_len,
        "lr": args.lr,
        "seed": run.seed,
        **more,
    }
    record("comparison", run.name, params, metric, value, unit, device=args.device, out=args.out)


def write_curve(run: Run) -> None:
    """Append the losses along a run."""
    for tokens, loss in run.curve():
        line(run, tokens, "curve", loss, "nats per token")


def write(run: Run, step: int, result: dict[str, Any]) -> None:
    """Append what the judgement of a run's step says."""
    tokens = step * run.args.batch_tokens
    line(run, tokens, "loss", result["bpb"]["nats_per_token"], "nats per token")
    for cell in result["mqar"]:
        line(run, tokens, "mqar", cell["accuracy"], "share", pairs=cell["num_pairs"], chance=cell["chance"])
    for cell in result["needle"]:
        given = {name: cell[name] for name in ("length", "depth", "chance")}
        line(run, tokens, "needle", cell["accuracy"], "share", **given)
    mqar = sum(cell["accuracy"] for cell in result["mqar"]) / len(result["mqar"])
    needle = sum(cell["accuracy"] for cell in result["needle"]) / len(result["needle"])
    print(
        f"{run.name:12} seed {run.seed}: {result['bpb']['nats_per_token']:.4f} nats, MQAR {mqar:.1%}, "
        f"needle {needle:.1%}",
        flush=True,
    )


def speed(args: argparse.Namespace) -> None:
    """Training steps and decoded tokens, one model at a time; bytes of a sequence are exact."""
    for name, model in chosen(args, args.vocab_size).items():
        params = {
            "hidden_size": model.hidden_size,
            "layers": model.num_layers,
            "parameters": parameter_counts(model)["total"],
        }
        text = f"{name:12} training"
        for length in args.lengths:
            rates, peak = train_rates(model, length, args)
            given = {**params, "T": length, "tokens": args.batch_tokens}
            record("comparison", name, given, "train_rate", rates, "tokens/s", device=args.device, out=args.out)
            if peak:
                record("comparison", name, given, "train_peak", peak, "bytes", device=args.device, out=args.out)
            text += f" {length}: {median(rates):,.0f} tokens/s, {peak / 2**30:.1f} GiB;"
        text += " decoding"
        for context, rates in decode_rates(model, args.contexts, args.device):
            held = state_bytes(model, context, bytes_per_element=2)
            total = held.recurrent + held.kv_cache
            given = {**params, "context": context, "B": DECODE_BATCH}
            record("comparison", name, given, "decode_rate", rates, "tokens/s", device=args.device, out=args.out)
            record("comparison", name, given, "state_bytes", total, "bytes", device=args.device, out=args.out)
            text += f" {context}: {median(rates):,.0f} tokens/s, {total / 2**20:.2f} MiB;"
        print(text, flush=True)


def train_rates(model: ModelConfig, length: int, args: argparse.Namespace) -> tuple[list[float], int]:
    """Tokens a second of forward, backward and update over sequences of `length`, and the largest memory, in bytes."""
    decoder = build_model(model, seed=0).to(args.device)
    config = config_for(model, args, 0)
    optimizer = config.optim.build(config.optim.groups(decoder))
    rows = max(1, args.batch_tokens // length)
    tokens = torch.randint(model.vocab_size, (rows, length + 1), device=args.device)

    def call() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = decoder.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = seconds(call, args.device, warmup=3, rounds=10 if cuda else 2)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return [tokens[:, 1:].numel() / taken for taken in times], peak


@torch.no_grad()
def decode_rates(model: ModelConfig, contexts: Sequence[int], device: str) -> Iterator[tuple[int, list[float]]]:
    """For each of the contexts, from the shortest: tokens a second of DECODE_BATCH sequences behind so many tokens."""
    decoder = build_model(model, seed=0).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    prompt = torch.randint(model.vocab_size, (1, max(contexts)), device=device)
    token = prompt[:, :1].expand(DECODE_BATCH, 1)
    first, cache = 0, None
    for context in sorted(contexts):
        for piece in prompt[:, first:context].split(PIECE, dim=1):
            _, cache = decoder(piece, cache, logits_to_keep=1)
        first = context
        # What the rows hold makes no difference to the time, so one prompt stands for all.
        rows = tree_map(lambda state: state if state is None else state.repeat_interleave(DECODE_BATCH, 0), cache)

        def call() -> None:
            nonlocal rows
            _, rows = decoder(token, rows, logits_to_keep=1)

        yield context, [DECODE_BATCH / taken for taken in seconds(call, device, warmup=4, rounds=DECODE_TOKENS)]
        del rows


def seconds(call: Callable[[], None], device: str, *, warmup: int, rounds: int) -> list[float]:
    """What each of `rounds` calls took, the device's work included."""
    times = []
    for _ in range(warmup + rounds):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[warmup:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "speed"))
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS)
    parser.add_argument("--corpus", default="demo", help="folder of token shards (whimbrel data)")
    parser.add_argument("--vocab-size", type=int, default=16_384, help="speed: train takes the corpus's")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--micro-batch-tokens", type=int, default=0, help="train: of one forward pass; 0 for all")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--validation-tokens", type=int, default=1_048_576)
    parser.add_argument("--num-sequences", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="train: end what still trains then")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="speed: of training sequences")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="speed: tokens before decoded ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    (train if args.what == "train" else speed)(args)


if __name__ == "__main__":
    main()
