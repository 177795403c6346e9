"""Benchmark case of merging: our engine and mergekit's linear merge beside a plain read of the same files.

Every run is a process of its own, with the files dropped from the page cache before it. mergekit wants other versions
of its libraries, so it lives in a virtual environment of its own: MERGEKIT_PYTHON names that environment's python.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from whimbrel.bench.case import Case, Figures
from whimbrel.errors import UnsupportedError
from whimbrel.merge.stream import merge_checkpoints

_SOURCES = 10
# Elements of each tensor that are held against the exact mean.
_CHECKED = 1 << 17

# Each prints its seconds; imports are not counted.
_READ = """
buffer = bytearray(8 << 20)
begin = clocks()
for source in sources:
    with open(source + "/model.safetensors", "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""
_WHIMBREL = """
from whimbrel.merge import merge_checkpoints, stream
begin = clocks()
merge_checkpoints(sources, out)
"""
_MERGEKIT = """
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
models = [{"model": source, "parameters": {"weight": 1.0}} for source in sources]
config = MergeConfiguration.model_validate({"merge_method": "linear", "dtype": "bfloat16", "models": models})
begin = clocks()
run_merge(config, out, MergeOptions(copy_tokenizer=False, quiet=True))
"""
_FRAME = """
import json, sys, time
out, *sources = sys.argv[1:]
def clocks():
    return time.perf_counter(), time.process_time()
{body}
seconds, processor = (end - start for start, end in zip(begin, clocks()))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, processor, peak * 1024]))
"""


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """Means of ten bfloat16 checkpoints shaped like a Llama, of 1 GiB each (4 MiB with `quick`), from cold files."""
    del device  # merging runs on the processor, whatever the device
    megabytes = 4 if quick else 1024
    runs = {"whimbrel": _WHIMBREL, "mergekit": _MERGEKIT, "read": _READ}
    return [
        Case(
            name="merge",
            params={"sources": _SOURCES, "MiB": megabytes, "dtype": "bfloat16", **_storage()},
            check=_check,
            figures={impl: partial(_run, impl, body, megabytes) for impl, body in runs.items()},
            rounds=1 if quick else 3,
            metric="throughput",
        )
    ]


def _storage() -> dict[str, str]:
    """Where the temporary files lie, if that is no disk: from there no merge is bound by reading."""
    home = Path(tempfile.gettempdir()).resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    holding = [(len(place), kind) for place, kind in mounts if home.is_relative_to(place)]
    return {"storage": "memory"} if max(holding)[1] in ("tmpfs", "ramfs") else {}


class _Checkpoints:
    """Folders with one weights file each, deleted when no longer held."""

    def __init__(self, megabytes: int, sources: int = _SOURCES) -> None:
        self._home = tempfile.TemporaryDirectory()
        self.home = Path(self._home.name)
        self.folders = [self.home / f"step-{i:06d}" for i in range(sources)]
        hidden, inner, vocabulary = (2048, 5632, 32000) if megabytes > 100 else (64, 176, 1000)
        layers = max(round((megabytes * 2**19 - 2 * vocabulary * hidden) / (4 * hidden**2 + 3 * hidden * inner)), 1)
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16,
            "vocab_size": vocabulary, "tie_word_embeddings": False,
        }  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(max(inner, vocabulary) * hidden, generator=generator)
        for folder in self.folders:
            # A walk by 2 parts in a thousand, as checkpoints of one run lie.
            base = base * (1 + 2e-3 * torch.randn(base.shape, generator=generator))
            folder.mkdir()
            save_file(_llama(base.bfloat16(), hidden, inner, vocabulary, layers), folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(config))
        os.sync()

    @property
    def files(self) -> list[Path]:
        """The weights files, oldest first."""
        return [folder / "model.safetensors" for folder in self.folders]

    def drop(self) -> None:
        """Make the next read come from the disk."""
        for path in self.files:
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _llama(values: Tensor, hidden: int, inner: int, vocabulary: int, layers: int) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}

    def from_behind(i: int, size: int) -> Tensor:
        """`size` values from the i-th last on, so that no two tensors are alike."""
        return torch.cat((values[len(values) - i :][:size], values[: max(size - i, 0)]))

    return {name: from_behind(i, math.prod(shape)).reshape(shape) for i, (name, shape) in enumerate(shapes.items())}


@functools.cache
def _checkpoints(megabytes: int) -> _Checkpoints:
    return _Checkpoints(megabytes)


def _run(impl: str, body: str, megabytes: int) -> Figures:
    """One run from cold files: bytes a second of input, peak memory, and outputs that are not the rounded mean."""
    python = os.environ.get("MERGEKIT_PYTHON") if impl == "mergekit" else sys.executable
    if not python:
        raise UnsupportedError("set MERGEKIT_PYTHON to the python of an environment with mergekit")
    sources = _checkpoints(megabytes)
    with tempfile.TemporaryDirectory() as home:
        out = Path(home) / "out"
        sources.drop()
        command = [python, "-c", _FRAME.format(body=body), str(out), *map(str, sources.folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnsupportedError(f"it fails: {' '.join(done.stderr.splitlines()[-1:])}")
        seconds, processor, peak = json.loads(done.stdout.splitlines()[-1])
        total = sum(path.stat().st_size for path in sources.files)
        figures: dict[str, tuple[float, str]] = {"rate": (total / seconds / 1e9, "GB/s"), "peak_rss": (peak, "bytes")}
        figures["processor"] = (processor, "s")
        if impl != "read":
            figures["wrong_outputs"] = (_wrong_outputs(sources.files, out), "share")
    return figures


def _wrong_outputs(sources: list[Path], out: Path) -> float:
    """Share of the outputs that are not the bfloat16 number nearest to the exact mean, of a part of each tensor."""
    wrong = checked = 0
    with safe_open(sources[0], "pt") as first:
        names = list(first.keys())
    for name in names:
        total = sum((_start(path, name).double() for path in sources), torch.zeros(()))
        result = next(_start(path, name) for path in sorted(out.glob("*.safetensors")) if _holds(path, name))
        # N·y and the sum are exact in float64, so these distances tell which of three neighbours is the nearest.
        bits = result.view(torch.int16)
        own, *others = (
            (total - len(sources) * (bits + step).view(torch.bfloat16).double()).abs() for step in (0, -1, 1)
        )
        tie = (own == others[0]) | (own == others[1])
        bad = (own > others[0]) | (own > others[1]) | (tie & (bits % 2 != 0))
        wrong += int(bad.sum())
        checked += len(bits)
    return wrong / checked


def _start(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_slice(name)[:_CHECKED].reshape(-1)[:_CHECKED]


def _holds(path: Path, name: str) -> bool:
    with safe_open(path, "pt") as file:
        return name in file.keys()  # noqa: SIM118 (a safe_open is no dictionary)


def _check() -> None:
    """A small merge equals the mean of all checkpoints held in memory."""
    sources = _Checkpoints(4, sources=4)
    merge_checkpoints(sources.folders, sources.home / "out")
    got = load_file(sources.home / "out" / "model.safetensors")
    loaded = [load_file(path) for path in sources.files]
    for name, value in loaded[-1].items():
        mean = sum((each[name].double() for each in loaded), torch.zeros(())) / len(loaded)
        assert torch.equal(got[name], mean.to(value.dtype)), f"merge: {name} differs"
    assert _wrong_outputs(sources.files, sources.home / "out") == 0, "merge: an output is not the rounded mean"
