"""Benchmark cases of merging: the streaming engine against loading every checkpoint into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whimbrel.bench.case import Case
from whimbrel.merge.stream import merge_checkpoints


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """Means of four checkpoints; files lie in the temporary folder and are warm in the page cache."""
    del device  # merging runs on the processor, whatever the device
    sources = 4
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        megabytes = 1 if quick else 64
        elements = megabytes * 2**20 // dtype.itemsize
        found.append(
            Case(
                name="merge",
                params={"sources": sources, "MiB": megabytes, "dtype": str(dtype).removeprefix("torch.")},
                impls={
                    "in memory": partial(_set_up, _in_memory, sources, elements, dtype),
                    "stream": partial(_set_up, _stream, sources, elements, dtype),
                },
                check=partial(_check, sources, elements, dtype),
                bytes=float((sources + 1) * megabytes * 2**20),
            )
        )
    return found


class _Checkpoints:
    """Folders with one weights file each, deleted when no longer held."""

    def __init__(self, sources: int, elements: int, dtype: torch.dtype) -> None:
        self._home = tempfile.TemporaryDirectory()
        self.out = Path(self._home.name) / "merged"
        self.loose = Path(self._home.name) / "mean.safetensors"
        self.folders = [Path(self._home.name) / f"step-{i}" for i in range(sources)]
        generator = torch.Generator().manual_seed(0)
        for folder in self.folders:
            folder.mkdir()
            weights = {
                f"blocks.{i}.weight": torch.randn(256, elements // 1024, generator=generator).to(dtype)
                for i in range(4)
            }
            save_file(weights, folder / "model.safetensors")


def _set_up(
    merge: Callable[[_Checkpoints], object], sources: int, elements: int, dtype: torch.dtype
) -> Callable[[], object]:
    return partial(merge, _Checkpoints(sources, elements, dtype))


def _stream(checkpoints: _Checkpoints) -> object:
    return merge_checkpoints(checkpoints.folders, checkpoints.out, method="sma", overwrite=True)


def _in_memory(checkpoints: _Checkpoints) -> dict[str, Tensor]:
    loaded = [load_file(folder / "model.safetensors") for folder in checkpoints.folders]
    mean = {
        name: (sum((each[name].double() for each in loaded), torch.zeros(())) / len(loaded)).to(value.dtype)
        for name, value in loaded[-1].items()
    }
    save_file(mean, checkpoints.loose)
    return mean


def _check(sources: int, elements: int, dtype: torch.dtype) -> None:
    checkpoints = _Checkpoints(sources, elements, dtype)
    wanted = _in_memory(checkpoints)
    _stream(checkpoints)
    got = load_file(checkpoints.out / "model.safetensors")
    assert list(got) == list(wanted), "merge: names differ"
    for name, value in wanted.items():
        assert torch.equal(got[name], value), f"merge: {name} differs"
