"""What `whimbrel merge` and `whimbrel merge sweep` have in common: rules, limits, and the progress that both report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from whimbrel.errors import ConfigError

if TYPE_CHECKING:
    from whimbrel.merge.plan import Rules
    from whimbrel.merge.stream import MergePlan, MergeReport, Progress


@dataclass(frozen=True, kw_only=True)
class Options:
    """Treatment of tensors, limits, and what to print."""

    dtype: str | None = None
    """Type of the averaged floats, e.g. float32 or bfloat16; default: the sources'."""
    format: Literal["safetensors", "dcp"] = "safetensors"
    """Write safetensors as Hugging Face lays it out, or a distributed checkpoint of torch."""
    accumulate: Literal["float64", "float32"] = "float64"
    """Type of the sums."""
    tied: tuple[str, ...] = ()
    """Two names of one weight, as A=B."""
    rename: tuple[str, ...] = ()
    """Rules for names, PATTERN=REPLACEMENT: a regular expression and what to put in its place."""
    newest: tuple[str, ...] = ()
    """Regular expressions of names to copy from the newest checkpoint."""
    integers: Literal["equal", "newest", "max"] = "equal"
    """Integers and booleans must be equal, or come from the newest, or are the largest."""
    router_bias: Literal["average", "newest"] = "average"
    """Balancing biases of mixture-of-experts routers."""
    tokens_per_step: str | None = None
    """Tokens of one optimizer step, where the run does not record them: 4M."""
    tolerance: float = 0.1
    """How far a checkpoint may lie from its point, as a share of the interval."""
    memory_limit: int = 256
    """Most memory for buffers, MiB."""
    workers: int | None = None
    """Threads; the result does not depend on it."""
    overwrite: bool = False
    """Replace OUT if it is a merge."""
    dry_run: bool = False
    """Check everything, say what would be read and written, and stop."""
    json: bool = False
    """Print JSON lines: progress each second, then the report."""

    def rules(self, optimizer: Literal["average", "newest", "reset"] | None = None) -> Rules:
        """The rules that these flags make."""
        from whimbrel.merge.plan import Rules

        return Rules(
            dtype=self.dtype, format=self.format, accumulate=self.accumulate, tied=_pairs(self.tied, "tied"),
            rename=_pairs(self.rename, "rename"), newest=self.newest, integers=self.integers,
            router_bias=self.router_bias, optimizer=optimizer,
        )  # fmt: skip

    def step_tokens(self) -> int | None:
        """Tokens of one optimizer step, if given."""
        from whimbrel.merge.select import parse_tokens

        return None if self.tokens_per_step is None else parse_tokens(self.tokens_per_step, "--tokens-per-step")


def _pairs(texts: Sequence[str], flag: str) -> tuple[tuple[str, str], ...]:
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"--{flag} = '{text}' needs the form A=B")
    return tuple((text.rpartition("=")[0], text.rpartition("=")[2]) for text in texts)


@contextmanager
def reporting(as_json: bool, disk_rate: float) -> Iterator[Progress]:
    """A progress callback: a bar with the rate beside the disk's own, or a JSON line each second."""
    from rich.filesize import decimal

    from whimbrel.progress import track

    start = last = time.monotonic()
    with track("merge", 1, "B", quiet=as_json) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            rate = done / max(now - start, 1e-9)
            if not as_json:
                bar.total = total
                bar.advance(done - bar.done, f"{rate / disk_rate:.0%} of the disk's {decimal(int(disk_rate))}/s")
            elif now - last >= 1.0:
                last = now
                left = (total - done) / max(rate, 1.0)
                line = {"event": "progress", "read_bytes": done, "total_bytes": total, "bytes_per_second": rate}
                print(json.dumps({**line, "disk_bytes_per_second": disk_rate, "seconds_left": left}), flush=True)

        yield progress


def print_plan(plan: MergePlan, out: Path | None, *, as_json: bool, extra: dict[str, Any]) -> None:
    """What a merge would do."""
    from rich.filesize import decimal

    if as_json:
        data = {**plan._asdict(), "weights": plan.weights.texts(), "out": out, "event": "plan", **extra}
        print(json.dumps(data, default=str))
        return
    for path, weight in zip(plan.sources, plan.weights.texts()):
        print(f"{weight:>12}  {path}" if "merges" not in extra else f"  {path}")
    print(
        f"would read {decimal(plan.read_bytes)} and write {decimal(plan.write_bytes)}"
        f" ({_tensors(plan.tensors)}) in about {plan.seconds:.0f} s at the {decimal(int(plan.disk_rate))}/s of a"
        f" moment's reading, with {plan.buffer_bytes / 2**20:.0f} MiB of buffers; nothing was written"
    )


def print_done(report: MergeReport, text: str, *, as_json: bool, extra: dict[str, Any]) -> None:
    """What a merge did."""
    from rich.filesize import decimal

    rate = report.read_bytes / max(report.seconds, 1e-9)
    if as_json:
        data = {**report._asdict(), "weights": report.weights.floats(), "event": "done", "bytes_per_second": rate}
        print(json.dumps({**data, **extra}, default=str))
        return
    resumed = f", {report.resumed_bytes:,} taken over from an interrupted merge" if report.resumed_bytes else ""
    print(f"{text}: {_tensors(report.tensors)}, {report.read_bytes:,} bytes read at {decimal(int(rate))}/s{resumed}")


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def warn(warnings: Sequence[str]) -> None:
    """Say what may be wrong with a choice of checkpoints."""
    for text in warnings:
        print(f"whimbrel: warning: {text}", file=sys.stderr)
