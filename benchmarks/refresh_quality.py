"""How well bases are fitted without an SVD, on gradients of a language model in training.

    python benchmarks/refresh_quality.py --steps 200 --gap 20

A small decoder learns the bytes of this repository's own documents and sources with AdamW. At every refresh each of its
matrices is fitted in several ways, each going on from its own basis before. Lines go to
benchmarks/results/refresh_quality.jsonl: `energy`, the share that a basis keeps of what the exact SVD of the same
gradient keeps (median over matrices and refreshes, with quartiles), `energy_min`, and `fit`, the time of one fit. Then
the same model is trained by Fira with power and with exact refreshes from several seeds: `loss` over the last tenth.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from whimbrel.bench.results import RESULTS, record
from whimbrel.config import load_config
from whimbrel.model import build_model
from whimbrel.optim import AdamW, FiraConfig, lowrank
from whimbrel.optim.groups import resolve_side

RANK = 32
ROOT = Path(__file__).parents[1]


@functools.cache
def corpus() -> Tensor:
    """Bytes of the repository's text, read once, so that every run sees the same."""
    files = [
        path for kind in ("**/*.md", "src/**/*.py") for path in sorted(ROOT.glob(kind)) if ".venv" not in path.parts
    ]
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batches(seed: int, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless inputs and targets [batch, length] of bytes."""
    text = corpus()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length - 1, (batch,), generator=generator)
        rows = torch.stack([text[start : start + length + 1] for start in starts]).long()
        yield rows[:, :-1], rows[:, 1:]


def make_model(seed: int) -> nn.Module:
    config = load_config("tiny-softmax").model
    torch.manual_seed(seed)
    return build_model(dataclasses.replace(config, vocab_size=256, hidden_size=128, num_layers=2, mlp_size=344))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    seed: int,
    watch: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Losses of `steps` steps; `watch` sees the gradients of each."""
    losses = []
    for step, (inputs, targets) in zip(range(steps), batches(seed, 8, 64), strict=False):
        loss = model.loss(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        watch(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def draw(shape: torch.Size, side: str) -> Tensor:
    rows, _ = lowrank.basis_shape(shape, RANK, side)
    return lowrank.noise(rows, lowrank.noise_columns(shape, RANK, side), seed=0, index=0)[None]


def householder(grad: Tensor, basis: Tensor, side: str) -> Tensor:
    """The same iterations with torch's QR after every product."""
    g = grad if side == "left" else grad.mT
    for _ in range(lowrank.WARM_ITERATIONS):
        basis = torch.linalg.qr(g @ torch.linalg.qr(g.mT @ basis).Q).Q
    return basis


FITS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "exact": lambda grad, basis, side: lowrank.fit_exact(grad, side, RANK),
    "power": lowrank.fit_warm,
    "power, two iterations": lambda grad, basis, side: lowrank.iterate(grad, basis, side, 2),
    "power in bfloat16": lambda grad, basis, side: lowrank.fit_warm(grad, basis, side, products=torch.bfloat16),
    "power, Householder": householder,
    "first fit": lambda grad, basis, side: lowrank.fit_first(grad, draw(grad.shape, side), side, RANK),
    "stale": lambda grad, basis, side: basis,
}


def watch_fits(steps: int, gap: int) -> dict[str, dict[str, list[float]]]:
    """Energy and seconds of every fit of every matrix."""
    model = make_model(0)
    matrices = {name: p for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2}
    bases: dict[tuple[str, str], Tensor] = {}
    found: dict[str, dict[str, list[float]]] = {fit: {"energy": [], "fit": []} for fit in FITS}

    def energy(grad: Tensor, basis: Tensor, side: str) -> float:
        return float(lowrank.down(grad.double(), basis.double(), side).square().sum())

    def watch(step: int) -> None:
        if step % gap:
            return
        for name, param in matrices.items():
            assert param.grad is not None
            grad, side = param.grad[None], resolve_side("std", param.shape)
            best = energy(grad, lowrank.fit_exact(grad, side, RANK), side)
            for fit, call in FITS.items():
                if (fit, name) not in bases:
                    bases[fit, name] = lowrank.fit_first(grad, draw(grad.shape, side), side, RANK)
                    continue
                started = time.perf_counter()
                new = call(grad, bases[fit, name], side)
                found[fit]["fit"].append(time.perf_counter() - started)
                found[fit]["energy"].append(energy(grad, new, side) / best)
                # a stale basis is as old as the last exact fit
                bases[fit, name] = lowrank.fit_exact(grad, side, RANK) if fit == "stale" else new

    train(model, AdamW(model.parameters(), lr=2e-3), steps, seed=0, watch=watch)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gap", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    params = {"rank": RANK, "refresh_steps": args.gap, "steps": args.steps}
    for fit, values in watch_fits(args.steps, args.gap).items():
        record("refresh_quality", fit, params, "energy", values["energy"], "share", device="cpu", out=args.out)
        record("refresh_quality", fit, params, "energy_min", min(values["energy"]), "share", device="cpu", out=args.out)
        milliseconds = [1e3 * seconds for seconds in values["fit"]]
        record("refresh_quality", fit, params, "fit", milliseconds, "ms", device="cpu", out=args.out)
        print(
            f"{fit:22} energy {statistics.median(values['energy']):.4f}, at least {min(values['energy']):.4f}, "
            f"{statistics.median(milliseconds):.2f} ms"
        )
    small = {"state_dtype": "int8", "basis_dtype": "int4"}
    for name, options in (("power", {}), ("exact", {"refresh": "exact"}), ("power, int8+int4", small)):
        losses = []
        for seed in range(args.seeds):
            model = make_model(seed)
            config = FiraConfig(rank=RANK, refresh_steps=args.gap, lr=5e-3, **options)
            run = train(model, config.build(config.groups(model)), args.steps, seed=seed)
            losses.append(statistics.fmean(run[-len(run) // 10 :]))
        record("refresh_quality", name, params, "loss", losses, "nats", device="cpu", out=args.out)
        print(f"Fira, {name:20} loss {', '.join(f'{loss:.4f}' for loss in losses)}")


if __name__ == "__main__":
    main()
