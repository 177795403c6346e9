"""Mixers at equal parameters and tokens: loss, recall by pairs and by length, bytes of a sequence, speed.

    python benchmarks/comparison.py train --corpus data/shards --steps 1600 --jobs 3 --device cuda
    python benchmarks/comparison.py speed --device cuda

`train` runs `whimbrel train` and `whimbrel eval` for each mixer and seed in processes of their own, kept in --runs, so
that a second call does no work twice; --jobs of them share a card. `speed` measures training and decoding, one model
at a time. Lines are of the case `comparison`: params mixer's width, tokens and seed; metrics loss (nats a token of
held-out text), mqar and needle (accuracy), state_bytes, train_rate and decode_rate (tokens a second).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

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

CONTEXTS = (1024, 8192, 32_768)
"""Tokens before the decoded ones."""
DECODE_BATCH, DECODE_TOKENS = 16, 32


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
        "softmax": replace(rdn, mixer=softmax),
        "GDN": replace(rdn, mixer=GDNConfig(**size)),
        "GDN sum": replace(rdn, mixer=GDNSumConfig(**size)),
        "RLA": replace(rdn, mixer=RLAConfig(**size)),
        "RDN": rdn,
        "RDN hybrid": replace(rdn, softmax_every=4),
    }
    return {name: widened(model, rdn) for name, model in others.items()}


def config_for(model: ModelConfig, args: argparse.Namespace, seed: int) -> Config:
    """AdamW at one rate for all mixers, cosine to a tenth, one recall sequence in eight."""
    return Config(
        name="comparison",
        seed=seed,
        device=args.device,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        micro_batch_tokens=args.batch_tokens,
        dtype="bfloat16" if args.device == "cuda" else "float32",
        model=model,
        optim=AdamWConfig(lr=args.lr, weight_decay=0.1),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=max(1, args.steps // 10), min_ratio=0.1),
        data=DataConfig(
            corpus=args.corpus, seq_len=args.seq_len, recall_fraction=0.125, recall_warmup_steps=args.steps // 3
        ),
        checkpoint=CheckpointConfig(every_steps=args.steps),
        eval=EvalConfig(
            validation_tokens=args.validation_tokens,
            checkpoint_tokens=0,
            num_sequences=args.num_sequences,
            needle_lengths=tuple(args.seq_len * factor for factor in (1, 2, 4)),
        ),
    )


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train and judge in processes of their own; gives the evaluation as plain data."""
    done = folder / "eval.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        start = folder / "start.toml"
        start.write_text(to_toml(config))
        call = [sys.executable, "-m", "whimbrel"]
        with (folder / "log.txt").open("w") as log:
            train = [*call, "train", str(start), "--run-dir", str(folder)]
            subprocess.run(train, check=True, stdout=log, stderr=log)
        judge = [*call, "eval", str(folder), "--tasks", "bpb", "mqar", "needle", "--device", config.device, "--json"]
        done.write_text(subprocess.run(judge, check=True, capture_output=True, text=True).stdout)
    return json.loads(done.read_text())


def train(args: argparse.Namespace) -> None:
    """All mixers and seeds."""
    found = models(TokenShards(args.corpus, "train").tokenizer().vocab_size, **size_of(args))
    jobs = [(name, seed) for seed in args.seeds for name in found]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        running = {
            pool.submit(
                run,
                config_for(found[name], args, seed),
                args.runs / f"{name.replace(' ', '-')}-seed{seed}-steps{args.steps}",
            ): (name, seed)
            for name, seed in jobs
        }
        for done in concurrent.futures.as_completed(running):
            name, seed = running[done]
            write(name, found[name], args, seed, done.result())


def write(name: str, model: ModelConfig, args: argparse.Namespace, seed: int, result: dict[str, Any]) -> None:
    """Append one run's lines."""
    params = {
        "hidden_size": model.hidden_size,
        "parameters": parameter_counts(model)["total"],
        "tokens": args.steps * args.batch_tokens,
        "lr": args.lr,
        "seed": seed,
    }

    def line(metric: str, value: float, unit: str, **more: Any) -> None:
        record("comparison", name, {**params, **more}, metric, value, unit, device=args.device, out=args.out)

    line("loss", result["bpb"]["nats_per_token"], "nats per token")
    for cell in result["mqar"]:
        line("mqar", cell["accuracy"], "share", pairs=cell["num_pairs"], chance=cell["chance"])
    for cell in result["needle"]:
        given = {name: cell[name] for name in ("length", "depth", "chance")}
        line("needle", cell["accuracy"], "share", **given)
    mqar = sum(cell["accuracy"] for cell in result["mqar"]) / len(result["mqar"])
    print(f"{name:12} seed {seed}: {result['bpb']['nats_per_token']:.4f} nats, MQAR {mqar:.1%}", flush=True)


def speed(args: argparse.Namespace) -> None:
    """Training steps and decoded tokens, one model at a time; bytes of a sequence are exact."""
    for name, model in models(args.vocab_size, **size_of(args)).items():
        params = {"hidden_size": model.hidden_size, "parameters": parameter_counts(model)["total"]}
        rates = train_rates(model, args)
        given = {**params, "T": args.seq_len, "tokens": args.batch_tokens}
        record("comparison", name, given, "train_rate", rates, "tokens/s", device=args.device, out=args.out)
        text = f"{name:12} training {median(rates):,.0f} tokens/s; decoding"
        for context in CONTEXTS if args.device == "cuda" else CONTEXTS[:1]:
            rates = decode_rates(model, context, args.device)
            held = state_bytes(model, context, bytes_per_element=2)
            total = held.recurrent + held.kv_cache
            given = {**params, "context": context, "B": DECODE_BATCH}
            record("comparison", name, given, "decode_rate", rates, "tokens/s", device=args.device, out=args.out)
            record("comparison", name, given, "state_bytes", total, "bytes", device=args.device, out=args.out)
            text += f" {context}: {median(rates):,.0f} tokens/s, {total / 2**20:.2f} MiB;"
        print(text, flush=True)


def train_rates(model: ModelConfig, args: argparse.Namespace) -> list[float]:
    """Tokens a second of forward, backward and update."""
    decoder = build_model(model, seed=0).to(args.device)
    config = config_for(model, args, 0)
    optimizer = config.optim.build(config.optim.groups(decoder))
    rows = args.batch_tokens // args.seq_len
    tokens = torch.randint(model.vocab_size, (rows, args.seq_len + 1), device=args.device)

    def call() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = decoder.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    count = tokens[:, 1:].numel()
    return [count / taken for taken in seconds(call, args.device, warmup=3, rounds=10 if args.device == "cuda" else 2)]


@torch.no_grad()
def decode_rates(model: ModelConfig, context: int, device: str) -> list[float]:
    """Tokens a second of DECODE_BATCH sequences, one token of each a call, behind `context` tokens."""
    decoder = build_model(model, seed=0).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    prompt = torch.randint(model.vocab_size, (DECODE_BATCH, context), device=device)
    cache = None
    for piece in prompt.split(4096, dim=1):
        _, cache = decoder(piece, cache, logits_to_keep=1)
    token = prompt[:, :1]

    def call() -> None:
        nonlocal cache
        _, cache = decoder(token, cache, logits_to_keep=1)

    return [DECODE_BATCH / taken for taken in seconds(call, device, warmup=4, rounds=DECODE_TOKENS)]


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


def size_of(args: argparse.Namespace) -> dict[str, int]:
    return {"hidden_size": args.hidden_size, "layers": args.layers, "head_dim": args.head_dim}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "speed"))
    parser.add_argument("--corpus", default="demo", help="folder of token shards (whimbrel data)")
    parser.add_argument("--vocab-size", type=int, default=16_384, help="speed: train takes the corpus's")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--validation-tokens", type=int, default=1_048_576)
    parser.add_argument("--num-sequences", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    (train if args.what == "train" else speed)(args)


if __name__ == "__main__":
    main()
