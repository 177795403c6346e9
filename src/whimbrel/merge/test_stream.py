"""The streaming engine: what it reads, writes, refuses, and how much memory it takes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from whimbrel.checkpoint.steps import Meta, write_meta
from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError
from whimbrel.files import sha256_file
from whimbrel.merge import merge_checkpoints
from whimbrel.merge.blocks import Averager
from whimbrel.merge.config import DecayConfig, ExplicitConfig
from whimbrel.merge.pma import sma
from whimbrel.merge.reading import Handles

NAN, INF = float("nan"), float("inf")


def step(run: Path, number: int, tensors: dict[str, Tensor]) -> Path:
    """A step folder with what a merge looks at."""
    folder = run / f"step-{number:06d}"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.toml").write_text(f"steps = {number}\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "train").mkdir()
    write_meta(folder, Meta(number, number * 10, 1, "0", "0", {}))
    return folder


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """Four steps of a model with several types and odd sizes."""
    return [
        step(
            tmp_path / "run",
            100 * (i + 1),
            {
                "embed": normal(i, 1013, 7, dtype=torch.bfloat16),
                "norm": normal(10 + i, 13),
                "head": normal(20 + i, 501, 3, dtype=torch.bfloat16),
                "half": normal(30 + i, 5, dtype=torch.float16),
                "wide": normal(40 + i, 11).double(),
                "wave": torch.complex(normal(50 + i, 3), normal(60 + i, 3)),
                "empty": torch.zeros(0, 4),
                "scalar": normal(70 + i, 1)[0],
                "order": torch.arange(9),
                "mask": torch.tensor([True, False, True]),
            },
        )
        for i in range(4)
    ]


def test_mean_of_every_type(run: list[Path], tmp_path: Path) -> None:
    report = merge_checkpoints(run, tmp_path / "out")
    sources = [load_file(path / "model.safetensors") for path in run]
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert set(result) == set(sources[0])
    for name, tensor in result.items():
        first = sources[0][name]
        assert (tensor.dtype, tensor.shape) == (first.dtype, first.shape)
        if not (first.is_floating_point() or first.is_complex()):
            assert torch.equal(tensor, first)
            continue
        wide = torch.complex128 if first.is_complex() else torch.float64
        mean = torch.stack([source[name].to(wide) for source in sources]).mean(0)
        if first.dtype == torch.float64:
            torch.testing.assert_close(tensor, mean, rtol=1e-15, atol=1e-15)
        else:
            assert torch.equal(tensor, mean.to(first.dtype)), name
    assert report.tensors == len(result)
    assert report.read_bytes == 4 * sum(t.numel() * t.element_size() for t in result.values())
    assert report.written_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.sources == tuple(run)


def test_same_bytes_for_any_piece_and_any_number_of_threads(run: list[Path], tmp_path: Path) -> None:
    hashes = set()
    least = 8 * 64 * 2**10 + 64 * 32768
    for number, (workers, limit) in enumerate([(1, least), (1, 2**28), (2, 2**28), (5, 5 * least), (8, 2**30)]):
        out = tmp_path / f"out-{number}"
        merge_checkpoints(run, out, method="wma", workers=workers, memory_limit=limit)
        hashes.add(sha256_file(out / "model.safetensors"))
    assert len(hashes) == 1


@pytest.mark.parametrize("kind", ["safetensors", "bin", "dcp"])
def test_reads_of_any_place_and_size_give_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that begin at no page and no multiple of their type, up to the last byte of a file."""
    paths = [tmp_path / f"source-{i}" for i in range(3)]
    for i, path in enumerate(paths):
        path.mkdir()
        tensors = {"a": normal(i, 200_001), "b": normal(3 + i, 3, 50_021).bfloat16(), "c": normal(6 + i, 70_000)}
        if kind == "safetensors":
            save_file(tensors, path / "model.safetensors")
        elif kind == "bin":
            torch.save(tensors, path / "pytorch_model.bin")
        else:
            dcp.save(tensors, checkpoint_id=path, no_dist=True)
    merge_checkpoints(paths, tmp_path / "whole")
    monkeypatch.setattr("whimbrel.merge.job._LARGEST_PIECE", 30_008)
    merge_checkpoints(paths, tmp_path / "cut", workers=3)
    opened: list[Path] = []
    new = Handles._new
    monkeypatch.setattr(Handles, "_new", staticmethod(lambda path: opened.append(path) or new(path)))
    monkeypatch.setattr("resource.getrlimit", lambda _: (0, 0))
    merge_checkpoints(paths, tmp_path / "opened", workers=3)
    assert len(opened) > 3 * len(paths)
    assert len({sha256_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut", "opened")}) == 1
    found, loaded = load_file(tmp_path / "whole" / "model.safetensors"), normal(0, 200_001)
    mean = (loaded.double() + normal(1, 200_001).double() + normal(2, 200_001).double()) / 3
    assert torch.equal(found["a"], mean.float())


def test_pieces_and_blocks_that_do_not_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [step(tmp_path / "run", i, {"a": normal(i, 1001), "b": normal(9 + i, 77)}) for i in (1, 2, 3)]
    merge_checkpoints(paths, tmp_path / "whole")
    monkeypatch.setattr("whimbrel.merge.job._LARGEST_PIECE", 200)
    monkeypatch.setattr("whimbrel.merge.blocks.BLOCK", 13)
    done: list[tuple[int, int]] = []
    merge_checkpoints(paths, tmp_path / "cut", progress=lambda now, total: done.append((now, total)))
    whole, cut = (sha256_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole == cut
    total = 3 * 1078 * 4
    assert done[-1] == (total, total)
    assert len(done) > 20
    assert all(a < b for a, b in pairwise(now for now, _ in done))


def test_bfloat16_is_rounded_once() -> None:
    """Values just beside the middle of two bfloat16 numbers, which float32 cannot tell from the middle."""
    middle = 1 + 2.0**-8
    odd = 1 + 3 * 2.0**-8
    values = np.array([middle, middle + 2.0**-40, middle - 2.0**-40, odd, odd + 2.0**-40, odd - 2.0**-40])
    values = np.concatenate([values, -values, values * 2.0**-134, [0.0, -0.0, 2.0**-133, 2.0**-134, 3.38e38]])
    out = np.zeros(len(values), "<u2")
    Averager(sma(1)).average(values.view("u1")[None], [0], "F64", memoryview(out).cast("B"), "BF16")
    got = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).double().tolist()
    up, down, high = 1 + 2.0**-7, 1.0, 1 + 2.0**-6
    expected = [down, up, down, high, high, up]
    # 2^-133 is the smallest bfloat16: at that scale the six values are 1/2 of it, just over, just under, ...
    assert got[:12] == expected + [-value for value in expected]
    assert got[12:18] == [2.0**-133 if value > 2.0**-134 else 0.0 for value in values[12:18]]
    assert got[18:22] == [0.0, -0.0, 2.0**-133, 0.0]
    assert got[22] == pytest.approx(3.38e38, rel=2**-8)


def test_wide_spread_in_one_element(tmp_path: Path) -> None:
    """1 + 2^-8 lies between two bfloat16 numbers; what float32 sums lose decides the rounding."""
    values = [2.0, 2.0**-7, 2.0**-28, 2.0**-28]
    paths = [step(tmp_path / "run", i, {"w": torch.tensor([v], dtype=torch.bfloat16)}) for i, v in enumerate(values)]
    merge_checkpoints(paths, tmp_path / "out")
    exact = sum(values) / 4
    assert load_file(tmp_path / "out/model.safetensors")["w"].item() == 0.5 + 2.0**-8
    assert exact > 0.5 + 2.0**-9  # just over the middle between 0.5 and 0.5 + 2^-8


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_type_of_the_result(dtype: str, run: list[Path], tmp_path: Path) -> None:
    merge_checkpoints(run, tmp_path / "out", dtype=dtype)
    result = load_file(tmp_path / "out" / "model.safetensors")
    sources = [load_file(path / "model.safetensors") for path in run]
    for name in ("embed", "norm", "half", "wide"):
        mean = torch.stack([source[name].double() for source in sources]).mean(0)
        assert result[name].dtype == getattr(torch, dtype)
        torch.testing.assert_close(result[name].double(), mean, rtol=torch.finfo(result[name].dtype).eps, atol=1e-9)
    assert result["order"].dtype == torch.int64
    assert result["wave"].dtype == torch.complex64


def test_what_lies_beside_the_weights_comes_from_the_newest(run: list[Path], tmp_path: Path) -> None:
    merge_checkpoints(run, tmp_path / "out", method=DecayConfig(curve="cosine"))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.toml",
        "merge.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (out / "config.toml").read_text() == "steps = 400\n"


def test_manifest(run: list[Path], tmp_path: Path) -> None:
    merge_checkpoints(run, tmp_path / "out", method="wma", dtype="float32")
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [source["weight"] for source in manifest["sources"]] == ["1/10", "1/5", "3/10", "2/5"]
    assert [source["path"] for source in manifest["sources"]] == [str(path) for path in run]
    assert (manifest["sources"][0]["step"], manifest["sources"][0]["tokens"]) == (100, 1000)
    assert manifest["method"] == {"kind": "wma"}
    assert manifest["dtype"] == "float32"
    assert "integer weights, one division" in manifest["arithmetic"]
    weights = manifest["files"]["model.safetensors"]
    assert weights["sha256"] == sha256_file(tmp_path / "out" / "model.safetensors")
    read = manifest["sources"][0]["files"]["model.safetensors"]
    assert read["bytes"] == (run[0] / "model.safetensors").stat().st_size
    assert len(read["header_sha256"]) == 64


def test_shards_with_an_index(tmp_path: Path) -> None:
    """Sources may be cut into files differently; the result is cut as the newest."""
    tensors = [{name: normal(i + 10 * j, 50, 3) for j, name in enumerate("abcd")} for i in range(3)]
    cuts = [["abcd"], ["a", "bcd"], ["ab", "cd"]]
    paths = []
    for i, cut in enumerate(cuts):
        folder = tmp_path / f"source-{i}"
        folder.mkdir()
        places = {}
        for k, names in enumerate(cut):
            file = f"model-{k + 1:05d}-of-{len(cut):05d}.safetensors"
            save_file({name: tensors[i][name] for name in names}, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": 2400}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        paths.append(folder)
    merge_checkpoints(paths, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == places
    assert index["metadata"] == {"total_size": 2400}
    for name in "abcd":
        mean = torch.stack([source[name].double() for source in tensors]).mean(0).float()
        assert torch.equal(load_file(tmp_path / "out" / places[name])[name], mean)


def test_single_files_give_model_safetensors(tmp_path: Path) -> None:
    for i in range(2):
        save_file({"a": torch.full((2,), float(i))}, tmp_path / f"{i}.safetensors")
    merge_checkpoints([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].tolist() == [0.5, 0.5]


def test_one_source_is_copied(run: list[Path], tmp_path: Path) -> None:
    merge_checkpoints(run[:1], tmp_path / "out", method="ema", alpha=0.1)
    before, after = (load_file(path / "model.safetensors") for path in (run[0], tmp_path / "out"))
    assert all(torch.equal(before[name].view(-1), after[name].view(-1)) for name in before)


def test_merge_of_merges(run: list[Path], tmp_path: Path) -> None:
    merge_checkpoints(run[:2], tmp_path / "a")
    merge_checkpoints(run[2:], tmp_path / "b")
    merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    merge_checkpoints(run, tmp_path / "all")
    both, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("ab", "all"))
    torch.testing.assert_close(both["norm"], whole["norm"], rtol=2**-23, atol=1e-9)


def tied_sources(tmp_path: Path, *, differ: bool = False) -> list[Path]:
    values = [normal(i, 4, 3) for i in range(3)]
    contents = [
        {"embed": values[0], "head": values[0] + float(differ)},
        {"embed": values[1]},
        {"head": values[2].clone(), "embed": values[2]},
    ]
    return [step(tmp_path / "run", i, tensors) for i, tensors in enumerate(contents)]


def test_tied_weights_are_merged_as_one(tmp_path: Path) -> None:
    paths = tied_sources(tmp_path)
    mean = torch.stack([load_file(path / "model.safetensors")["embed"].double() for path in paths]).mean(0).float()
    merge_checkpoints(paths, tmp_path / "both", tied=[("embed", "head")])
    both = load_file(tmp_path / "both" / "model.safetensors")
    assert torch.equal(both["embed"], mean)
    assert torch.equal(both["head"], mean)
    merge_checkpoints([paths[0], paths[2], paths[1]], tmp_path / "one", tied=[("embed", "head")])
    assert list(load_file(tmp_path / "one" / "model.safetensors")) == ["embed"]


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    paths = tied_sources(tmp_path, differ=True)
    with pytest.raises(CheckpointError, match=f"tensors 'embed' and 'head' are tied, but differ in {paths[0]}"):
        merge_checkpoints(paths, tmp_path / "out", tied=[("embed", "head")])
    with pytest.raises(ConfigError, match=r"merge.tied names 'x' and 'y', but .* has neither"):
        merge_checkpoints(paths[:1], tmp_path / "out", tied=[("x", "y")])


def pair(tmp_path: Path, first: dict[str, Tensor], second: dict[str, Tensor]) -> list[Path]:
    return [step(tmp_path / "run", 1, first), step(tmp_path / "run", 2, second)]


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ({"w": torch.ones(3)}, {}, CheckpointError, "tensor 'w' is in {0} but not in {1}"),
        ({}, {"w": torch.ones(3)}, CheckpointError, "tensor 'w' is in {1} but not in {0}"),
        (
            {"w": torch.ones(3)},
            {"w": torch.ones(3, 1)},
            CheckpointError,
            "tensor 'w' has shape [3] in {0}, but [3, 1] in {1}",
        ),
        (
            {"w": torch.ones(3)},
            {"w": torch.ones(3).half()},
            CheckpointError,
            "tensor 'w' is F32 in {0}, but F16 in {1}; convert one of them first",
        ),
        (
            {"w": torch.tensor([1.0, NAN])},
            {"w": torch.ones(2)},
            CheckpointError,
            "tensor 'w' holds nan in {0}; leave that checkpoint out of the merge",
        ),
        ({"w": torch.ones(2)}, {"w": torch.tensor([1.0, -INF])}, CheckpointError, "tensor 'w' holds -inf in {1};"),
        (
            {"w": torch.tensor([INF]).bfloat16()},
            {"w": torch.tensor([-INF]).bfloat16()},
            CheckpointError,
            "tensor 'w' holds inf in {0};",
        ),
        (
            {"w": torch.tensor([NAN]).half()},
            {"w": torch.ones(1).half()},
            CheckpointError,
            "tensor 'w' holds nan in {0};",
        ),
        (
            {"w": torch.ones(2).double()},
            {"w": torch.tensor([1.0, NAN]).double()},
            CheckpointError,
            "tensor 'w' holds nan in {1};",
        ),
        (
            {"w": torch.arange(3)},
            {"w": torch.tensor([0, 1, 3])},
            CheckpointError,
            "tensor 'w' (I64) differs between {0} and {1};",
        ),
        (
            {"w": torch.ones(3).to(torch.float8_e4m3fn)},
            {"w": torch.ones(3).to(torch.float8_e4m3fn)},
            UnsupportedError,
            "tensor 'w' in {1} is F8_E4M3, whose codes cannot be averaged;",
        ),
    ],
)
def test_sources_that_do_not_fit(
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    others = {"a": torch.ones(5), "z": torch.ones(5)}
    paths = pair(tmp_path, {**others, **first}, {**others, **second})
    with pytest.raises(error) as caught:
        merge_checkpoints(paths, tmp_path / "out")
    assert message.format(*paths) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_first_bad_value_is_named_among_many_tensors(tmp_path: Path) -> None:
    names = [f"block.{i}" for i in range(40)]
    clean = {name: torch.ones(3000) for name in names}
    bad = {**clean, "block.23": torch.cat([torch.ones(2999), torch.tensor([NAN])])}
    with pytest.raises(CheckpointError, match=r"tensor 'block.23' holds nan"):
        merge_checkpoints(pair(tmp_path, clean, bad), tmp_path / "out")


def test_result_too_large_for_its_type(tmp_path: Path) -> None:
    paths = pair(tmp_path, {"w": torch.tensor([1.0, 3e5])}, {"w": torch.tensor([1.0, 3e5])})
    with pytest.raises(CheckpointError, match=r"tensor 'w': an average of 3e.05 is too large for F16; choose a wider"):
        merge_checkpoints(paths, tmp_path / "out", dtype="float16")
    big = torch.tensor([3.4e38])
    paths = pair(tmp_path / "big", {"w": -big}, {"w": big})
    with pytest.raises(CheckpointError, match=r"tensor 'w': an average of 1.02e.39 is too large for F32"):
        merge_checkpoints(paths, tmp_path / "out", method=ExplicitConfig(values=("-1", "2")))


def damage(path: Path, how: Callable[[bytes], bytes]) -> Path:
    file = path / "model.safetensors"
    file.write_bytes(how(file.read_bytes()))
    return file


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda data: data[:-10], "is truncated: {size} bytes expected, {cut} found"),
        (lambda data: data[:5], "is truncated: .* bytes expected, 5 found"),
        (lambda data: data + b"xx", "is damaged: .* bytes long, but its header describes {size}"),
        (lambda data: data[:8] + b"?" + data[9:], "is not a safetensors file: its header cannot be read"),
        (
            lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
            "is damaged: tensor 'a' begins at byte",
        ),
        (
            lambda data: data.replace(b'"shape":[30]', b'"shape":[31]', 1),
            r"is damaged: tensor 'a' of F32 \[31\] has 120",
        ),
    ],
)
def test_damaged_source(how: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    paths = pair(tmp_path, {"a": torch.ones(30)}, {"a": torch.ones(30)})
    size = (paths[0] / "model.safetensors").stat().st_size
    file = damage(paths[0], how)
    with pytest.raises(CheckpointError, match=f"{file} {message.format(size=size, cut=size - 10)}"):
        merge_checkpoints(paths, tmp_path / "out")


def test_sources_that_are_no_checkpoints(run: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; name a checkpoint: .*pytorch_model.bin, a dis"):
        merge_checkpoints([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"holds checkpoints and is none: name them, such as .*step-000400, or, fo"
    ):
        merge_checkpoints([run[0].parent], tmp_path / "out")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is damaged at byte 0: no archive of torch.save"):
        merge_checkpoints([tmp_path / "pickle"], tmp_path / "out")
    for single in (str(run[0]), run[0]):
        with pytest.raises(ConfigError, match=r"sources = '.*' is a single path; give a list of checkpoints, oldest f"):
            merge_checkpoints(single, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"holds no checkpoint: neither safetensors, nor pytorch_model.bin, nor a di"
    ):
        merge_checkpoints([tmp_path / "empty"], tmp_path / "out")
    for name in "ab":
        save_file({name: torch.ones(1)}, tmp_path / "empty" / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 \.safetensors files but no model.safetensors.index.json"):
        merge_checkpoints([tmp_path / "empty"], tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index: it must hold a table 'weight_map'"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "which is not a file of its own folder"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"b\.safetensors does not exist"),
        ('{"weight_map": {"a": "a.safetensors", "q": "a.safetensors"}}', "tensor 'q' is missing from"),
        ('{"weight_map": {"a": "a.safetensors"}}', "tensor 'b' of .* is not listed in"),
    ],
)
def test_damaged_index(index: str, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoints([tmp_path], tmp_path / "out")


def test_bad_arguments(run: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(run[0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("the only copy")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: merge_checkpoints([], out), "number of checkpoints to merge = 0 is not allowed; use at least one"),
        (lambda: merge_checkpoints([run[0], run[1], run[0]], out), "same as source .*; name each checkpoint once"),
        (lambda: merge_checkpoints([run[0], tmp_path / "link"], out), "is the same as source"),
        (lambda: merge_checkpoints(run[::-1], out, method="wma"), "step 300.* after .*step 400.* name the chec"),
        (lambda: merge_checkpoints(run, out, dtype="float23"), "merge.dtype = 'float23' is not known; did you mean"),
        (lambda: merge_checkpoints(run, out, workers=0), "merge.workers = 0 is not allowed; use at least one thread"),
        (
            lambda: merge_checkpoints(run, out, memory_limit=1000),
            "merge.memory_limit = 1000 is not allowed; use at least .* bytes .* MiB. for 4 sources and 2 threads",
        ),
        (lambda: merge_checkpoints(run, run[0].parent, overwrite=True), "would replace the source"),
        (lambda: merge_checkpoints(run, tmp_path / "x.safetensors"), "names a file; name the folder to write instead"),
        (lambda: merge_checkpoints(run, tmp_path / "full"), "exists; .* or replace it with --overwrite"),
        (lambda: merge_checkpoints(run, tmp_path / "full", overwrite=True), "is not a merge and is not overwritten"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
    assert not out.exists()
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_order_does_not_matter_for_equal_weights(run: list[Path], tmp_path: Path) -> None:
    merge_checkpoints(run[::-1], tmp_path / "out")


def test_overwriting_a_merge(run: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(run, out)
    before = sha256_file(out / "model.safetensors")
    merge_checkpoints(run[:2], out, overwrite=True)
    assert sha256_file(out / "model.safetensors") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_failed_overwrite_keeps_the_old_merge(run: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(run, out)
    before = sha256_file(out / "model.safetensors")
    tensors = load_file(run[0] / "model.safetensors")
    bad = step(tmp_path / "run", 500, {**tensors, "norm": torch.full((13,), NAN)})
    with pytest.raises(CheckpointError, match="tensor 'norm' holds nan"):
        merge_checkpoints([*run, bad], out, overwrite=True)
    assert sha256_file(out / "model.safetensors") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_full_disk(run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(run, tmp_path / "out")
    assert str(caught.value).startswith(
        f"cannot write merge {tmp_path / 'out'}: the disk is full at {tmp_path / 'out'}"
    )
    assert "free some space or choose another folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_too_little_space_is_known_beforehand(run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whimbrel.files.free_bytes", lambda path: 12_345)
    with pytest.raises(CheckpointError, match=r"too little free space at .*out \(.* bytes needed, 12,345 free\)"):
        merge_checkpoints(run, tmp_path / "out")


def test_source_that_changes_meanwhile(run: list[Path], tmp_path: Path) -> None:
    def touch(done: int, total: int) -> None:
        os.utime(run[1] / "model.safetensors", (1, 1))

    with pytest.raises(
        CheckpointError, match=r"step-000200/model.safetensors changed while it was merged; start again"
    ):
        merge_checkpoints(run, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


SLOW_MERGE = """
import sys, time
from whimbrel.merge import job, stream
job._LARGEST_PIECE, stream._SYNC_SECONDS = 300, 0.0
count = int(sys.argv[1])
def slow(done, total):
    global count
    count -= 1
    if count == 0:
        print("under way", flush=True)
        time.sleep(60)
stream.merge_checkpoints(sys.argv[3:], sys.argv[2], progress=slow)
"""


def killed_merge(out: Path, sources: list[Path], pieces: int) -> None:
    """A merge in a process of its own that is killed after some pieces."""
    command = [sys.executable, "-c", SLOW_MERGE, str(pieces), str(out), *map(str, sources)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"under way\n"
        child.send_signal(signal.SIGKILL)


def test_killed_merge_leaves_a_hidden_folder_and_is_taken_up_from_there(
    run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed four times, each time further on; then a merge that reads only the rest and gives the same bytes."""
    monkeypatch.setattr("whimbrel.merge.job._LARGEST_PIECE", 300)
    whole = merge_checkpoints(run, tmp_path / "whole")
    out = tmp_path / "out"
    for pieces in (5, 20, 21, 40):
        killed_merge(out, run, pieces)
        assert (tmp_path / ".out.merging" / "journal").is_file()
        assert not out.exists()
    report = merge_checkpoints(run, out)
    assert report.resumed_bytes > 0
    assert report.read_bytes + report.resumed_bytes == whole.read_bytes
    assert sha256_file(out / "model.safetensors") == sha256_file(tmp_path / "whole" / "model.safetensors")
    files = [json.loads((path / "merge.json").read_text())["files"] for path in (out, tmp_path / "whole")]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "whole"]


def test_interruption_at_any_point(run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after any piece, and after it other damage: a torn line, bytes that never reached the disk."""
    monkeypatch.setattr("whimbrel.merge.job._LARGEST_PIECE", 300)
    monkeypatch.setattr("whimbrel.merge.stream._SYNC_SECONDS", -1.0)
    merge_checkpoints(run, tmp_path / "whole", method="wma")
    wanted = sha256_file(tmp_path / "whole" / "model.safetensors")
    work = tmp_path / ".out.merging"
    rng = random.Random(0)
    for attempt in range(10):
        stop = rng.randrange(2, 50)

        def interrupt(done: int, total: int) -> None:
            nonlocal stop
            stop -= 1
            if stop == 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(run, tmp_path / "out", method="wma", progress=interrupt)
        if attempt % 3 == 1:
            with open(work / "journal", "ab") as journal:
                journal.write(b"[[12345],")
        if attempt % 3 == 2:
            file = work / "result" / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[rng.randrange(2000, 4000)] ^= 255
            file.write_bytes(data)
        merge_checkpoints(run, tmp_path / "out", method="wma", workers=1 + attempt % 3)
        assert sha256_file(tmp_path / "out" / "model.safetensors") == wanted
        shutil.rmtree(tmp_path / "out")


def test_another_plan_does_not_take_up_the_work(run: list[Path], tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(run, tmp_path / "out", progress=interrupt)
    assert merge_checkpoints(run, tmp_path / "out", method="wma").resumed_bytes == 0


def test_two_merges_into_one_folder(run: list[Path], tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        merge_checkpoints(run, tmp_path / "out")

    with pytest.raises(
        ConfigError, match=r"merge.out = .* is being written by another process; wait or choose another"
    ):
        merge_checkpoints(run, tmp_path / "out", progress=again)


MEASURE = """
import resource, sys
from whimbrel.merge import merge_checkpoints
merge_checkpoints(sys.argv[4:], sys.argv[1], method=sys.argv[2], memory_limit=int(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print("torch" in sys.modules)
"""


def peak_bytes(out: Path, limit: int, sources: list[Path]) -> int:
    """Peak memory of a process that merges `sources`."""
    command = [sys.executable, "-c", MEASURE, str(out), "sma", str(limit), *map(str, sources)]
    peak, has_torch = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert has_torch == "False"
    return int(peak)


def test_memory_is_bounded_by_the_limit_not_by_the_model(tmp_path: Path) -> None:
    """Eight sources, then two, of one 48 MiB tensor each, and a small model for comparison."""
    small = [step(tmp_path / "small", i, {"w": torch.full((1024,), float(i))}) for i in range(8)]
    large = [step(tmp_path / "large", i, {"w": torch.full((24 * 2**20,), float(i)).bfloat16()}) for i in range(8)]
    limit = 16 * 2**20
    base = peak_bytes(tmp_path / "out-0", limit, small)
    for number, count in enumerate((8, 2), start=1):
        peak = peak_bytes(tmp_path / f"out-{number}", limit, large[:count])
        assert peak - base < limit, f"{count} sources took {(peak - base) / 2**20:.0f} MiB over a small model"
