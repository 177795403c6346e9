"""Damaged checkpoints and full disks, through the command: each its own line and status, and nothing half-published."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from whimbrel.checkpoint.dcp import read_checkpoint
from whimbrel.cli import main


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(64, 8, generator=generator) for name in ("embed.weight", "head.weight", "layer.weight")}


def flip_a_byte(folder: Path) -> None:
    chunk = read_checkpoint(folder).tensors["layer.weight"].chunks[0]
    data = bytearray(chunk.path.read_bytes())
    data[chunk.start + 100] ^= 1
    chunk.path.write_bytes(data)


def rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return apply


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def poison(held: dict[str, Tensor]) -> None:
    held["layer.weight"][3, 3] = float("nan")


def widen(held: dict[str, Tensor]) -> None:
    held["layer.weight"] = held["layer.weight"].double()


FAULTS = {
    "truncated shard": (cut_off, "checkpoint-2/model.safetensors is truncated: "),
    "flipped byte": (flip_a_byte, "tensor 'layer.weight' of {run}/checkpoint-2 is damaged: the CRC-32 of its"),
    "missing tensor": (rewrite(lambda held: held.pop("layer.weight")), "tensor 'layer.weight' is in"),
    "NaN": (rewrite(poison), "tensor 'layer.weight' holds nan in {run}/checkpoint-2;"),
    "tied mismatch": (lambda _: None, "tensors 'embed.weight' and 'head.weight' are tied, but differ in"),
    "wrong dtype": (
        rewrite(widen),
        "tensor 'layer.weight' is F32 in {run}/checkpoint-1, but F64 in {run}/checkpoint-2;",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_line_and_leaves_nothing(fault: str, tmp_path: Path, capsys) -> None:
    damage, message = FAULTS[fault]
    run, out = tmp_path / "run", tmp_path / "out"
    for step in (1, 2):
        folder = run / f"checkpoint-{step}"
        if fault == "flipped byte":
            dcp.save(tensors(step), checkpoint_id=folder, no_dist=True)
        else:
            folder.mkdir(parents=True)
            save_file(tensors(step), folder / "model.safetensors")
    damage(run / "checkpoint-2")
    tied = ("--tied", "embed.weight=head.weight") if fault == "tied mismatch" else ()
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main(["merge", *(str(run / f"checkpoint-{step}") for step in (1, 2)), "--out", str(out), *tied]) == 4
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.format(run=run) in error
    others = [text for name, (_, text) in FAULTS.items() if name != fault]
    assert not any(text.format(run=run) in error for text in others)
    assert sorted(path for path in tmp_path.rglob("*")) == before


ON_A_SMALL_DISK = """
import os, subprocess, sys
from whimbrel import files
from whimbrel.cli import main
disk, *sources = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
def merge(name):
    print(main(["merge", *sources, "--out", f"{disk}/{name}"]), *sorted(os.listdir(disk)))
merge("first")
open(f"{disk}/other", "wb").write(bytes(2 << 20))
merge("second")
files.free_bytes = lambda path: 1 << 40
merge("third")
"""


def may_mount() -> bool:
    """Whether this process can have a file system of its own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="no user namespaces here")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """1.5 MiB fit on a disk of 4 MiB once, and not beside 2 MiB more: seen beforehand, or when the disk says so."""
    sources = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    for step, folder in enumerate(sources):
        folder.mkdir()
        save_file({"w": torch.full((3 * 2**17,), float(step))}, folder / "model.safetensors")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", ON_A_SMALL_DISK, disk, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [line for line in done.stdout.splitlines() if line[0].isdigit()]
    assert found == ["0 first", "4 first other", "4 first other"]
    before, late = [line for line in done.stderr.splitlines() if "cannot write merge" in line]
    assert f"{disk}/second: too little free space at" in before
    assert f"{disk}/third: the disk is full at" in late
