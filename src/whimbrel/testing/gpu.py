"""Room on a GPU whose memory other test workers use too."""

from __future__ import annotations

import time

import pytest
import torch


def need_memory(size: int, *, seconds: float = 120.0) -> None:
    """Wait until `size` bytes of the current GPU are free, for a test that needs much of it.

    What torch holds here without using it is given back first. A test is skipped only on a GPU that has less in all;
    one whose memory stays taken for `seconds` fails.
    """
    torch.cuda.empty_cache()
    until = time.monotonic() + seconds
    while True:
        free, total = torch.cuda.mem_get_info()
        if free >= size:
            return
        if total < size:
            pytest.skip(f"needs {size / 2**30:.0f} GiB on a GPU, this one has {total / 2**30:.0f} in all")
        if time.monotonic() >= until:
            pytest.fail(f"needs {size / 2**30:.0f} GiB on a GPU, {free / 2**30:.0f} are free: run it alone, with -n 0")
        time.sleep(0.5)
