"""One step of training LLaMA-7B's shapes on one card, and the memory that it takes.

    python benchmarks/one_card.py

Weights and gradients are bfloat16; blocks are run again in the backward pass. Under `fira` each parameter is updated
in the backward pass, as soon as it has a gradient, and the gradient is freed. Each --run is OPTIMIZER:GIB, the latter
the most that the allocator may take (0: all of the card), by which a large card stands for a smaller one; the memory
of the CUDA context comes on top. Tokens are drawn at random, which changes nothing about time and memory.

Lines go to benchmarks/results/one_card.jsonl: `peak_bytes` and `reserved_bytes`, the most that tensors took and that
the allocator held over all steps, the first with its fits of all bases included; `time`, ms of each step after the
first; `weight_bytes`, `state_bytes`; or `out_of_memory` = 1 where a step did not fit.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from whimbrel.bench.results import RESULTS, record
from whimbrel.config import ModelConfig
from whimbrel.mixers.softmax.config import SoftmaxConfig
from whimbrel.model import Decoder
from whimbrel.optim import Fira, FiraConfig

SHAPES = {
    "7b": ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        num_layers=32,
        mlp_size=11_008,
        mixer=SoftmaxConfig(num_heads=32, head_dim=128),
        softmax_every=0,
        tie_embeddings=False,
    ),
    "tiny": ModelConfig(
        vocab_size=256,
        hidden_size=64,
        num_layers=2,
        mlp_size=176,
        mixer=SoftmaxConfig(num_heads=2, head_dim=32),
        softmax_every=0,
        tie_embeddings=False,
    ),
}
FORMATS = {"state_dtype": "int8", "basis_dtype": "int4", "other_dtype": "int8"}
WEIGHTS = {"fira": torch.bfloat16, "adamw-bfloat16": torch.bfloat16, "adamw-float32": torch.float32}
"""Optimizers, and the dtype of weights, gradients and state of AdamW."""


def build(model: str, dtype: torch.dtype, device: str) -> Decoder:
    """The model, made on the device, whose blocks are run again in the backward pass."""
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            made = Decoder(SHAPES[model])
        finally:
            torch.set_default_dtype(torch.float32)
    for block in made.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return made


def optimizer_for(name: str, model: nn.Module, rank: int, impl: str) -> torch.optim.Optimizer:
    if name == "fira":
        config = FiraConfig(lr=1e-4, rank=rank, min_dim=rank, impl=impl, **FORMATS)
        made = config.build(config.groups(model))
        assert isinstance(made, Fira)
        made.fuse_into_backward(model)
        return made
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def step_times(args: argparse.Namespace, model: Decoder, optimizer: torch.optim.Optimizer) -> list[float]:
    """Milliseconds of each whole step: forward, backward and update."""
    times = []
    cuda = args.device == "cuda"
    wait: Callable[[], object] = torch.cuda.synchronize if cuda else time.perf_counter
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=model.embed.weight.dtype == torch.float32)
    for _ in range(args.steps):
        tokens = torch.randint(SHAPES[args.model].vocab_size, (args.batch, args.seq_len + 1), device=args.device)
        wait()
        began = time.perf_counter()
        with autocast:
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        times.append(1e3 * (time.perf_counter() - began))
    assert torch.isfinite(loss), f"the loss is {loss.item()}"
    return times


def held_bytes(tensors: list[Tensor]) -> float:
    return float(sum(x.nbytes for x in tensors))


def run(args: argparse.Namespace, name: str, limit: float) -> None:
    params = {
        "model": args.model,
        "rank": args.rank if name == "fira" else 0,
        "state": "int8+int4" if name == "fira" else name.removeprefix("adamw-"),
        "seq_len": args.seq_len,
        "batch": args.batch,
        "limit_gib": limit,
    }

    def line(metric: str, values: float | list[float], unit: str) -> None:
        found = record("one_card", name, params, metric, values, unit, device=args.device, out=args.out)
        shown = f"{found['value'] / 2**30:.2f} GiB" if unit == "bytes" else f"{found['value']:.4g} {unit}"
        print(f"{name:16} limit {limit:g} GiB  {metric:16} {shown}", flush=True)

    cuda = args.device == "cuda"
    if cuda:
        whole = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / whole) if limit else 1.0)
        torch.cuda.reset_peak_memory_stats()
    model, optimizer = None, None
    try:
        model = build(args.model, WEIGHTS[name], args.device)
        optimizer = optimizer_for(name, model, args.rank, args.impl)
        times = step_times(args, model, optimizer)
        line("time", times[1:], "ms")
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        line("weight_bytes", held_bytes(list(model.parameters())), "bytes")
        line("state_bytes", held_bytes(state), "bytes")
        if cuda:
            line("peak_bytes", float(torch.cuda.max_memory_allocated()), "bytes")
            line("reserved_bytes", float(torch.cuda.max_memory_reserved()), "bytes")
    except torch.OutOfMemoryError as error:
        print(f"{name}: {str(error).splitlines()[0]}", flush=True)
        line("out_of_memory", 1.0, "1")
    del model, optimizer
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SHAPES), default="7b")
    runs = ["fira:79", "adamw-bfloat16:79", "adamw-float32:79", "fira:23"]
    parser.add_argument("--run", nargs="+", default=runs, metavar="OPTIMIZER:GIB")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--impl", choices=("auto", "eager", "triton"), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for text in args.run:
        name, _, limit = text.partition(":")
        if name not in WEIGHTS or not limit.replace(".", "", 1).isdigit():
            parser.error(f"--run {text} is not OPTIMIZER:GIB with an optimizer of {', '.join(WEIGHTS)}")
        run(args, name, float(limit))


if __name__ == "__main__":
    main()
