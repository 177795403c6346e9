"""Mixers trained on multi-query associative recall alone, at equal parameters: what fits into a state of what size.

    python benchmarks/recall.py --jobs 6 --device cuda

Every batch has one of the numbers of pairs in --pairs, drawn by its step, in sequences of --seq-len tokens, and is the
same for all models; only answers count in the loss. For the first --warmup of the steps sequences have no filler, and
few pairs at first; without that no linear mixer learns the task in millions of tokens. Of the rates in --rates each
mixer trains with every one; which is best is told by the loss at the end of training, before anything is judged. Small
models of two blocks, as in the paper that names the task (arXiv 2312.04927), so that states are full within a sequence.

Lines are of the case `recall`: params width, blocks, head_dim, state_bytes of a sequence of --seq-len tokens,
tokens, lr and seed; metrics loss (nats an answer, mean over the last tenth of training) and accuracy (by pairs).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from comparison import MIXERS, models
from torch import nn

from whimbrel.bench.results import RESULTS, record
from whimbrel.config import ModelConfig, ScheduleConfig
from whimbrel.data.draws import Draws
from whimbrel.data.synthetic import mqar
from whimbrel.data.tokenizer import Symbols
from whimbrel.evals.recall import RecallResult, evaluate_mqar
from whimbrel.model import build_model
from whimbrel.model.memory import parameter_counts, state_bytes
from whimbrel.optim.adamw.config import AdamWConfig
from whimbrel.optim.schedule import learning_rate_factor
from whimbrel.training.prefetch import Prefetcher

PAIRS = (2, 4, 8, 16, 32, 64)
"""Numbers of pairs trained on; twice the last is judged as well, in sequences as long as it needs."""
SYMBOLS = Symbols(np.arange(128), np.arange(128, 256), np.arange(256, 512))
"""Keys, values and fillers: all ids there are."""
JUDGED_SEED = 1234

# Purposes of random streams.
_PAIRS, _BATCH = range(2)


class Job(NamedTuple):
    """One model, trained at one rate."""

    name: str
    model: ModelConfig
    head_dim: int
    lr: float
    seed: int
    args: argparse.Namespace


class Done(NamedTuple):
    """What came of it."""

    loss: float
    """Nats an answer, mean over the last tenth of training."""
    cells: list[RecallResult]
    tokens: int
    """Trained on."""
    seconds: float


def jobs(args: argparse.Namespace) -> list[Job]:
    """Those of all sizes, seeds, rates and mixers; mixers last, so that what has no time left lacks for all of them."""
    vocab = sum(map(len, SYMBOLS))
    found = []
    for head_dim, seed, lr in itertools.product(args.head_dims, args.seeds, args.rates):
        made = models(vocab, hidden_size=args.hidden_size, layers=args.layers, head_dim=head_dim)
        for name in args.mixers:
            # A hybrid of so few blocks ends with its softmax block.
            model = replace(made[name], softmax_every=args.layers) if made[name].softmax_every else made[name]
            found.append(Job(name, model, head_dim, lr, seed, args))
    return found


def batch(step: int, seed: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets [B, T] of a step; of short sequences at most four times as many as of whole ones."""
    warmup, rows = round(args.warmup * args.steps), args.batch_tokens // args.seq_len
    known = args.pairs if step >= warmup else args.pairs[: 1 + len(args.pairs) * step // warmup]
    pairs = known[int(Draws(seed, _PAIRS, step).below(len(known), 1)[0])]
    length = args.seq_len if step >= warmup else min(args.seq_len, -(-3 * pairs // 16) * 16)
    rows = min(args.batch_tokens // length, 4 * rows)
    made = mqar(seed, _BATCH, step, batch=rows, seq_len=length, num_pairs=pairs, symbols=SYMBOLS)
    return torch.from_numpy(made.tokens), torch.from_numpy(made.answers)


def work(job: Job) -> Done | None:
    """Train and judge; None if the time is up."""
    args, device = job.args, job.args.device
    torch.set_num_threads(args.threads)
    if time.time() > args.end:
        return None
    start = time.perf_counter()
    model = build_model(job.model, seed=job.seed).to(device)
    config = AdamWConfig(lr=job.lr, weight_decay=0.1)
    optimizer = config.build(config.groups(model))
    schedule = ScheduleConfig(kind="cosine", warmup_steps=max(1, args.steps // 10))
    batches = Prefetcher(lambda step: batch(step, job.seed, args))
    losses, seen = [], 0
    cast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    for step in range(args.steps):
        tokens, targets = (x.to(device, non_blocking=True) for x in batches(step))
        seen += tokens.numel()
        for group in optimizer.param_groups:
            group["lr"] = job.lr * learning_rate_factor(step, schedule, steps=args.steps)
        with cast:
            loss = model.loss(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if args.log_every and (step + 1) % args.log_every == 0:
            mean = torch.stack(losses[-args.log_every :]).mean().item()
            print(f"{job.name} d{job.head_dim} lr {job.lr:g}: {step + 1} {mean:.4f}", flush=True)
            if time.time() > args.end:
                return None
    with cast:
        cells = evaluate_mqar(
            model,
            SYMBOLS,
            pairs=(*args.pairs, 2 * args.pairs[-1]),
            num_sequences=args.num_sequences,
            seq_len=args.seq_len,
            seed=JUDGED_SEED,
        )
    last = torch.stack(losses[-max(1, args.steps // 10) :]).mean().item()
    return Done(last, cells, seen, time.perf_counter() - start)


def write(job: Job, done: Done) -> None:
    """Append the lines of a model, and say what it came to."""
    args, model = job.args, job.model
    held = state_bytes(model, args.seq_len, bytes_per_element=2)
    params = {
        "hidden_size": model.hidden_size,
        "layers": model.num_layers,
        "head_dim": job.head_dim,
        "parameters": parameter_counts(model)["total"],
        "state_bytes": held.recurrent + held.kv_cache,
        "tokens": done.tokens,
        "warmup": args.warmup,
        "T": args.seq_len,
        "lr": job.lr,
        "seed": job.seed,
    }
    record("recall", job.name, params, "loss", done.loss, "nats per answer", device=args.device, out=args.out)
    for cell in done.cells:
        given = {**params, "pairs": cell.num_pairs, "chance": cell.chance}
        record("recall", job.name, given, "accuracy", cell.accuracy, "share", device=args.device, out=args.out)
    shares = " ".join(f"{cell.num_pairs}: {cell.accuracy:.1%}" for cell in done.cells)
    print(
        f"{job.name:12} d {job.head_dim:3} lr {job.lr:<6g} seed {job.seed}: {done.loss:.4f} nats, {shares} "
        f"(mean {fmean(cell.accuracy for cell in done.cells):.1%}, {done.seconds:.0f} s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[16])
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS, help="numbers of pairs, in rising order")
    parser.add_argument("--warmup", type=float, default=0.5, help="share of the steps without filler")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-sequences", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each job on a CPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="models that still train then are left out")
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.end = time.time() + args.seconds
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        running = {pool.submit(work, job): job for job in jobs(args)}
        for future in concurrent.futures.as_completed(running):
            done = future.result()
            if done is None:
                print(f"{running[future].name}: ended before its last step", flush=True)
            else:
                write(running[future], done)


if __name__ == "__main__":
    main()
