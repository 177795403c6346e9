"""What an average kept during training costs: time of a step, and memory of the GPU.

    python benchmarks/online_overhead.py --recipe benchmarks/recipes/llama-360m.toml --every 50 --rounds 4

An optimizer that refreshes bases now and then (fira, galore) would disturb the stretches in which it does.
Stretches of --every steps with one sample in them alternate with stretches without, on random tokens, in bf16 autocast
with fp32 weights as the trainer runs it. Lines go to benchmarks/results/online_average.jsonl: `overhead` is the time
of a stretch with the sample over that of the one before it, less 1; `gpu_bytes` the peak of allocated memory with the
average, less that of a stretch before it was made, so that sums kept on the GPU count; `sample_bytes` all that is
allocated there while a sample is taken, training standing still, which a peak elsewhere cannot hide; `step` the seconds
of a step without a sample; `sample` the time until a sample has been added, training standing still.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from whimbrel.bench.results import RESULTS, record
from whimbrel.config import load_config
from whimbrel.merge import OnlineAverage
from whimbrel.model import build_model
from whimbrel.training.processes import pick_device


class Job:
    """A model in training."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = pick_device(args.device)
        config = load_config(args.recipe, {"optim.kind": args.optim} if args.optim else None)
        torch.manual_seed(0)
        self.model = build_model(config.model).to(self.device)
        self.optimizer = config.optim.build(config.optim.groups(self.model))
        shape = (args.batch, args.seq_len)
        self.tokens = torch.randint(config.model.vocab_size, shape, device=self.device)

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model.loss(self.tokens, self.tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes given out by the GPU's allocator since the process began, freed ones too."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.memory_stats()["allocated_bytes.all.allocated"]

    def stretch(self, steps: int, average: OnlineAverage | None) -> tuple[float, int]:
        """Seconds of `steps` steps, with a sample after the first of them, and the peak of allocated memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.wait()
        start = time.perf_counter()
        for number in range(steps):
            self.step()
            if average is not None and number == 0:
                average.update((average.steps[-1] if average.steps else 0) + 1)
        self.wait()
        seconds = time.perf_counter() - start
        if average is not None:
            average.wait()
        return seconds, torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="rdn-360m")
    parser.add_argument("--optim", help="kind of the optimizer; default: the recipe's")
    parser.add_argument("--places", nargs="+", choices=("cpu", "same"), default=("cpu", "same"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--accumulate", choices=("float64", "float32"), default="float64")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    job = Job(args)
    params = {"recipe": Path(args.recipe).stem, "B": args.batch, "T": args.seq_len, "every": args.every}
    params |= {"optim": args.optim} if args.optim else {}
    for place in args.places:
        job.stretch(3, None)
        _, before = job.stretch(3, None)
        average = OnlineAverage(job.model, job.optimizer, count=0, device=place, accumulate=args.accumulate)
        job.stretch(3, average)
        ratios, grown, step = [], [], []
        for _ in range(args.rounds):
            (without, _), (with_sample, after) = (job.stretch(args.every, a) for a in (None, average))
            ratios.append(with_sample / without - 1)
            step.append(without / args.every)
            grown.append(after - before)
            print(f"{place}: step {step[-1]:.4f} s, {ratios[-1]:+.3%}, {grown[-1]:,} bytes", flush=True)
        start, held = time.perf_counter(), job.allocated()
        average.update(average.steps[-1] + 1)
        average.wait()
        job.wait()
        seconds, held = time.perf_counter() - start, job.allocated() - held
        for metric, values, unit in (
            ("overhead", ratios, "share"),
            ("step", step, "s"),
            ("gpu_bytes", grown, "bytes"),
            ("sample", [seconds], "s"),
            ("sample_bytes", [held], "bytes"),
        ):
            given = params | {"accumulate": args.accumulate}
            record("online_average", place, given, metric, values, unit, device=job.device.type, out=args.out)
        print(
            f"sums on {place}: a step takes {sorted(ratios)[len(ratios) // 2]:+.2%} of its time longer, "
            f"{max(grown):,} bytes of the GPU more, a sample {seconds:.3f} s and {held:,} bytes"
        )


if __name__ == "__main__":
    main()
