"""Seconds of an implementation's first call: in a process of its own, with every compilation cache empty."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from whimbrel.bench.results import ResultLine, record
from whimbrel.bench.runner import choose, load_cases, say

CACHES = ("TRITON_CACHE_DIR", "TILELANG_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
"""Environment variables that name the folders in which compilers keep their work."""


def first_calls(
    name: str,
    *,
    device: str = "cpu",
    quick: bool = False,
    only: Sequence[str] | None = None,
    out: Path | None = None,
    table: bool = True,
) -> list[ResultLine]:
    """Measure the first shape of one case and append the result lines; arguments as for `run_case`.

    What counts is one call, with the imports, compilation and tuning that it brings; making the inputs does not.
    An implementation that fails is named on standard error and left out.
    """
    case = choose(name, load_cases(name, device=device, quick=quick)[:1], only)[0]
    lines = []
    for impl in (*case.impls, *case.rivals):
        with tempfile.TemporaryDirectory() as folder:
            fresh = {key: str(Path(folder) / key) for key in CACHES}
            call = [sys.executable, "-m", "whimbrel.bench.first_call", name, impl, device, *["quick"] * quick]
            done = subprocess.run(call, env=os.environ | fresh, capture_output=True, text=True, check=False)
        if done.returncode:
            say(case, impl, f"left out, it fails: {' '.join(done.stderr.splitlines()[-1:])}")
            continue
        seconds = float(done.stdout.split()[-1])
        lines.append(record(case.name, impl, case.params, "first_call", seconds, "s", device=device, out=out))
        if table:
            print(f"{name} {impl}: first call {seconds:.1f} s", flush=True)
    return lines


def main(name: str, impl: str, device: str, *rest: str) -> None:
    """Print the seconds of one implementation's first call in this process."""
    case = load_cases(name, device=device, quick="quick" in rest)[0]
    set_up = case.impls[impl] if impl in case.impls else case.rivals[impl].set_up
    call = set_up()
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    print(time.perf_counter() - started)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
