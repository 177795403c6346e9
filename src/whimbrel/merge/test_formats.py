"""Inputs and outputs beside safetensors: distributed checkpoints in any sharding, torch.save, training state."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as m
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from whimbrel.checkpoint import load_checkpoint, save_checkpoint
from whimbrel.checkpoint.dcp import read_checkpoint
from whimbrel.checkpoint.torchzip import read_archive
from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError
from whimbrel.files import sha256_file
from whimbrel.merge import merge_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def weights(seed: int) -> dict[str, Tensor]:
    """A model with matrices, a stack of experts, a vector, a scalar, and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (37, 12), "experts": (3, 10, 8), "norm": (13,), "scale": (), "empty": (0, 4)}
    made = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return {**made, "master": torch.randn(7, 5, generator=generator), "count": torch.tensor([3, 4])}


def cut_into(folder: Path, tensors: dict[str, Tensor], parts: int, axis: int) -> Path:
    """A distributed checkpoint whose tensors are cut along an axis, as uneven as they come, a file for each process."""
    folder.mkdir(parents=True)
    files = [io.BytesIO() for _ in range(parts)]
    described, storage = {}, {}
    for name, tensor in tensors.items():
        along = min(axis, tensor.dim() - 1)
        whole = tensor.numel() == 0 or tensor.dim() == 0
        boxes, start = [], 0
        for rank, piece in enumerate([tensor] if whole else tensor.tensor_split(parts, along)):
            offsets = [0] * tensor.dim()
            if not whole:
                offsets[along], start = start, start + piece.shape[along]
            if piece.numel() == 0 and not whole:
                continue
            boxes.append(m.ChunkStorageMetadata(torch.Size(offsets), piece.shape))
            begin = files[rank].tell()
            torch.save(piece.clone(memory_format=torch.contiguous_format), files[rank])
            files[rank].seek(0, os.SEEK_END)
            place = _StorageInfo(f"__{rank}_0.distcp", begin, files[rank].tell() - begin)
            storage[m.MetadataIndex(name, torch.Size(offsets), len(boxes) - 1)] = place
        properties = m.TensorProperties(dtype=tensor.dtype)
        described[name] = m.TensorStorageMetadata(properties, tensor.shape, boxes)
    for rank, file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    planner = {name: (name,) for name in tensors}
    (folder / ".metadata").write_bytes(pickle.dumps(m.Metadata(described, planner_data=planner, storage_data=storage)))
    return folder


def loaded(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a distributed checkpoint, read by torch."""
    state = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    dcp.load(state, checkpoint_id=str(folder))
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.fixture
def mean(tmp_path: Path) -> dict[str, Tensor]:
    """The merge of three models as plain safetensors."""
    for seed in range(3):
        (tmp_path / f"plain-{seed}").mkdir()
        save_file(weights(seed), tmp_path / f"plain-{seed}" / "model.safetensors")
    merge_checkpoints([tmp_path / f"plain-{seed}" for seed in range(3)], tmp_path / "plain", method="wma")
    return load_file(tmp_path / "plain" / "model.safetensors")


@pytest.mark.parametrize("piece", [64, 200, 1 << 20])
def test_shardings_that_differ_give_the_bytes_of_plain_files(
    piece: int, mean: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whimbrel.merge.job._LARGEST_PIECE", piece)
    sources = [
        cut_into(tmp_path / "a", weights(0), 3, axis=0),
        cut_into(tmp_path / "b", weights(1), 4, axis=1),
        cut_into(tmp_path / "c", weights(2), 1, axis=0),
    ]
    assert same(loaded(sources[1], mean), weights(1))
    merge_checkpoints(sources, tmp_path / "out", method="wma")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), mean)
    mixed = [tmp_path / "plain-0", sources[1], tmp_path / "plain-2"]
    merge_checkpoints(mixed, tmp_path / "mixed", method="wma", format="dcp")
    assert same(loaded(tmp_path / "mixed", mean), mean)
    again = read_checkpoint(tmp_path / "mixed")
    assert {name: tensor.shape for name, tensor in again.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in mean.items()
    }


def test_chunks_and_files_of_a_distributed_result(
    mean: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whimbrel.merge.outputs._CHUNK_BYTES", 300)
    monkeypatch.setattr("whimbrel.merge.outputs._SHARD_BYTES", 3000)
    sources = [cut_into(tmp_path / str(seed), weights(seed), seed + 1, axis=1) for seed in range(3)]
    merge_checkpoints(sources, tmp_path / "out", method="wma", format="dcp")
    assert len(list((tmp_path / "out").glob("*.distcp"))) > 1
    assert len(read_checkpoint(tmp_path / "out").tensors["embed.weight"].chunks) > 2
    assert same(loaded(tmp_path / "out", mean), mean)
    merge_checkpoints([tmp_path / "out"], tmp_path / "again")
    assert same(load_file(tmp_path / "again" / "model.safetensors"), mean)


def test_objects_of_a_distributed_checkpoint_are_copied(tmp_path: Path) -> None:
    state = [{"model": {"w": torch.full((3,), float(i))}, "note": {"text": f"step {i}"}} for i in range(2)]
    for i in range(2):
        dcp.save(state[i], checkpoint_id=str(tmp_path / str(i)))
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out", format="dcp")
    found = {"model": {"w": torch.zeros(3)}, "note": {"text": ""}}
    dcp.load(found, checkpoint_id=str(tmp_path / "out"))
    assert found["note"] == {"text": "step 1"}
    assert found["model"]["w"].tolist() == [0.5] * 3


def test_result_in_shards_with_an_index(
    mean: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whimbrel.merge.outputs._SHARD_BYTES", 900)
    sources = [cut_into(tmp_path / str(seed), weights(seed), 2, axis=0) for seed in range(3)]
    (sources[-1] / "config.json").write_text("{}")
    merge_checkpoints(sources, tmp_path / "out", method="wma")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 1
    parts = {file: load_file(tmp_path / "out" / file) for file in files}
    assert same({name: parts[file][name] for name, file in index["weight_map"].items()}, mean)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in mean.values())
    assert (tmp_path / "out" / "config.json").is_file()


def test_files_of_torch_save(mean: dict[str, Tensor], tmp_path: Path) -> None:
    for seed in range(3):
        (tmp_path / f"bin-{seed}").mkdir()
        torch.save(weights(seed), tmp_path / f"bin-{seed}" / "pytorch_model.bin")
    sources = [tmp_path / "bin-0", tmp_path / "bin-1", tmp_path / "bin-2" / "pytorch_model.bin"]
    merge_checkpoints(sources, tmp_path / "out", method="wma")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), mean)


def test_shards_of_torch_save(mean: dict[str, Tensor], tmp_path: Path) -> None:
    for seed in range(3):
        folder, tensors = tmp_path / f"bin-{seed}", weights(seed)
        folder.mkdir()
        names = list(tensors)
        for part, own in (("a", names[:3]), ("b", names[3:])):
            torch.save({name: nn.Parameter(tensors[name], requires_grad=False) for name in own}, folder / f"{part}.bin")
        index = {name: "a.bin" if name in names[:3] else "b.bin" for name in names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    merge_checkpoints([tmp_path / f"bin-{seed}" for seed in range(3)], tmp_path / "out", method="wma")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), mean)


def test_a_weight_with_two_names_is_merged_once(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        tied = torch.full((4, 2), float(i))
        torch.save({"embed": tied, "head": tied, "w": torch.ones(1)}, tmp_path / str(i) / "pytorch_model.bin")
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert set(result) == {"embed", "w"}
    assert result["embed"].unique().tolist() == [0.5]
    (tmp_path / "both").mkdir()
    save_file(
        {"embed": torch.ones(4, 2), "head": torch.zeros(4, 2), "w": torch.ones(1)},
        tmp_path / "both" / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"tensors 'embed' and 'head' are tied, but differ in .*both"):
        merge_checkpoints([tmp_path / "0", tmp_path / "both"], tmp_path / "no")


def test_embeddings_that_the_configuration_ties(tmp_path: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    for i, other in enumerate((0.0, 5.0)):
        (tmp_path / str(i)).mkdir()
        tensors = {names[0]: torch.full((2, 2), float(i)), names[1]: torch.full((2, 2), float(i) + other)}
        save_file(tensors, tmp_path / str(i) / "model.safetensors")
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "untied")
    (tmp_path / "1" / "config.json").write_text('{"tie_word_embeddings": true}')
    with pytest.raises(
        CheckpointError, match=r"'model.embed_tokens.weight' and 'lm_head.weight' are tied, but differ in"
    ):
        merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")


class _Evil:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> object:
        return (open, (str(self.made), "w"))


def test_no_pickled_code_runs(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "bin").mkdir()
    torch.save({"w": torch.ones(2), "x": _Evil(made)}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin holds a Python object of type \S+open, which is not loaded"
    ):
        merge_checkpoints([tmp_path / "bin"], tmp_path / "out")
    folder = cut_into(tmp_path / "dcp", weights(0), 2, axis=0)
    (folder / ".metadata").write_bytes(pickle.dumps(_Evil(made)))
    with pytest.raises(CheckpointError, match=r"\.metadata holds a Python object of type \S+open"):
        merge_checkpoints([folder], tmp_path / "out")
    assert not made.exists()


def test_flipped_byte_is_found_by_its_crc(tmp_path: Path) -> None:
    sources = [cut_into(tmp_path / str(seed), weights(seed), 2, axis=0) for seed in range(2)]
    chunk = read_checkpoint(sources[0]).tensors["experts"].chunks[0]
    data = bytearray(chunk.path.read_bytes())
    data[chunk.start + 5] ^= 1
    chunk.path.write_bytes(data)
    message = (
        rf"tensor 'experts' of {sources[0]} is damaged: the CRC-32 of its \d+ bytes at {chunk.start:,} in {chunk.path}"
    )
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoints(sources, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_truncated_and_missing_shards(tmp_path: Path) -> None:
    sources = [cut_into(tmp_path / str(seed), weights(seed), 2, axis=0) for seed in range(2)]
    file = sources[1] / "__1_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"{file} is truncated: [\d,]+ bytes expected, [\d,]+ found"):
        merge_checkpoints(sources, tmp_path / "out")
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file} does not exist, but \.metadata beside it names it"):
        merge_checkpoints(sources, tmp_path / "out")
    file.write_bytes(b"\0" * len(whole))
    with pytest.raises(CheckpointError, match=rf"{file} is damaged at byte \d+: no archive of torch.save"):
        merge_checkpoints(sources, tmp_path / "out")
    (sources[1] / ".metadata").write_bytes(b"\x80\x02K\x01")
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged: its pickle cannot be read"):
        merge_checkpoints(sources, tmp_path / "out")


def test_eight_bit_floats_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "a.bin")
    with pytest.raises(UnsupportedError, match=r"tensor 'w' in .* is F8_E4M3, whose codes cannot be averaged"):
        merge_checkpoints([tmp_path / "a.bin"], tmp_path / "out")
    torch.save({"w": torch.ones(3, 2).t()}, tmp_path / "b.bin")
    with pytest.raises(
        CheckpointError, match=r"tensor 'w' in .* is stored with strides \[1, 2\]; save it with contiguous"
    ):
        merge_checkpoints([tmp_path / "b.bin"], tmp_path / "out")


def test_names_are_changed_by_rules(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2), "b.w": torch.zeros(3)}
    dcp.save(
        {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}, checkpoint_id=str(tmp_path / "a")
    )
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    rules = [(r"^module\.", ""), (r"_orig_mod\.", "")]
    merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out", rename=rules)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    with pytest.raises(ConfigError, match=r"merge.rename gives two tensors of .* the name 'w'; change the rules"):
        merge_checkpoints([tmp_path / "b"], tmp_path / "no", rename=[(r"b\.", "")])
    with pytest.raises(ConfigError, match=r"merge.rename = '\(=' is no regular expression"):
        merge_checkpoints([tmp_path / "b"], tmp_path / "no", rename=[("(", "")])


def test_policies_for_what_is_not_averaged(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        tensors = {
            "w": torch.full((2,), float(i)),
            "count": torch.tensor([7 - i, i]),
            "mlp.gate.e_score_correction_bias": torch.full((3,), float(i)),
            "stats.mean": torch.full((1,), float(i)),
        }
        save_file(tensors, tmp_path / str(i) / "model.safetensors")
    sources = [tmp_path / str(i) for i in range(3)]
    with pytest.raises(CheckpointError, match=r"tensor 'count' \(I64\) differs between .*--integers newest or max"):
        merge_checkpoints(sources, tmp_path / "no")
    merge_checkpoints(sources, tmp_path / "a", integers="newest", newest=[r"^stats\."])
    result = load_file(tmp_path / "a" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in result.items()} == {
        "w": [1.0, 1.0], "count": [5, 2], "mlp.gate.e_score_correction_bias": [1.0] * 3, "stats.mean": [2.0],
    }  # fmt: skip
    merge_checkpoints(sources, tmp_path / "b", integers="max", router_bias="newest")
    result = load_file(tmp_path / "b" / "model.safetensors")
    assert result["count"].tolist() == [7, 2]
    assert result["mlp.gate.e_score_correction_bias"].tolist() == [2.0] * 3
    with pytest.raises(ConfigError, match=r"merge.newest = '\^stat\$' matches no tensor"):
        merge_checkpoints(sources, tmp_path / "no", newest=["^stat$"])
    with pytest.raises(ConfigError, match=r"merge.integers = 'newst' is not known; did you mean 'newest'\?; use equal"):
        merge_checkpoints(sources, tmp_path / "no", integers="newst")  # pyrefly: ignore


def train(run: Path, steps: int, optimizer_of=lambda p: torch.optim.AdamW(p, lr=0.1)):
    """Steps of a small model, each saved; the model, its optimizer, and the folders."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = optimizer_of(model.parameters())
    folders = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        extra = {"position": torch.tensor([step]), "note": f"at {step}"}
        folders.append(
            save_checkpoint(
                run,
                step=step,
                tokens=step * 10,
                model=model,
                optimizer=optimizer,
                extra=extra,
                config_toml="steps = 1\n",
            )
        )
    return model, optimizer, folders


@pytest.mark.parametrize("policy", ["average", "newest", "reset"])
def test_a_merge_that_a_run_goes_on_from(policy: str, tmp_path: Path) -> None:
    *_, folders = train(tmp_path / "run", 3)
    states = []
    for folder in folders:
        model, optimizer, _ = train(tmp_path / "fresh", 0)
        load_checkpoint(folder, model=model, optimizer=optimizer)
        states.append(optimizer.state_dict()["state"])
    merge_checkpoints(folders, tmp_path / "out", optimizer=policy)  # pyrefly: ignore
    model, optimizer, _ = train(tmp_path / "fresh", 0)
    extra = load_checkpoint(tmp_path / "out", model=model, optimizer=optimizer)
    assert extra["position"].tolist() == [3]
    assert extra["note"] == "at 3"
    files = [load_file(folder / "model.safetensors")["weight"].double() for folder in folders]
    assert torch.equal(model.weight.detach(), torch.stack(files).mean(0).float())
    state = optimizer.state_dict()["state"]
    if policy == "reset":
        assert state == {}
        return
    for key in ("exp_avg", "exp_avg_sq"):
        own = [step[0][key].double() for step in states]
        wanted = torch.stack(own).mean(0).float() if policy == "average" else own[-1].float()
        assert torch.equal(state[0][key], wanted), key
    assert float(state[0]["step"]) == 3


def test_training_state_that_cannot_be_merged(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["basis"] = torch.ones(2, 2)

    *_, folders = train(tmp_path / "run", 2, lambda p: Odd(p, lr=0.1))
    with pytest.raises(
        UnsupportedError, match=r"optimizer state 'optim/weight/basis' of .* cannot be averaged .*use merge"
    ):
        merge_checkpoints(folders, tmp_path / "out", optimizer="average")
    merge_checkpoints(folders, tmp_path / "out", optimizer="newest")
    (tmp_path / "bare").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "bare" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"bare holds no state of an optimizer \(a folder train/, optimizer.pt, or"
    ):
        merge_checkpoints([tmp_path / "bare"], tmp_path / "no", optimizer="newest")


def run_of_a_trainer(home: Path, optimizer_of=lambda p: torch.optim.AdamW(p, lr=0.1)) -> list[Path]:
    """Three checkpoints as the Trainer of transformers leaves them: weights, optimizer.pt, and what else it needs."""
    torch.manual_seed(0)
    model = nn.Linear(300, 70)
    optimizer = optimizer_of(model.parameters())
    folders = []
    for step in (1, 2, 3):
        optimizer.zero_grad()
        model(torch.randn(4, 300)).square().mean().backward()
        optimizer.step()
        folder = home / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        for name in ("scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / name).write_text(f"{name} of {step}")
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "num_input_tokens_seen": step * 64})
        )
        folders.append(folder)
    return folders


@pytest.mark.parametrize("policy", ["average", "newest", "reset"])
def test_optimizer_beside_a_model(policy: str, tmp_path: Path) -> None:
    folders = run_of_a_trainer(tmp_path / "run")
    states = [torch.load(folder / "optimizer.pt") for folder in folders]
    merge_checkpoints(folders, tmp_path / "out", optimizer=policy)  # pyrefly: ignore
    found = torch.load(tmp_path / "out" / "optimizer.pt")
    assert found["param_groups"] == states[-1]["param_groups"]
    for name in ("scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folders[-1] / name).read_bytes()
    optimizer = torch.optim.AdamW(nn.Linear(300, 70).parameters())
    optimizer.load_state_dict(found)
    if policy == "reset":
        assert found["state"] == {}
    else:
        read_archive(tmp_path / "out" / "optimizer.pt")
        for number in (0, 1):
            assert float(found["state"][number]["step"]) == 3
            for key in ("exp_avg", "exp_avg_sq"):
                own = [state["state"][number][key].double() for state in states]
                wanted = torch.stack(own).mean(0).float() if policy == "average" else own[-1].float()
                assert torch.equal(found["state"][number][key], wanted), key
        with zipfile.ZipFile(tmp_path / "out" / "optimizer.pt") as archive:
            assert archive.testzip() is None
    # what was made is a source like any other
    merge_checkpoints([folders[0], tmp_path / "out"], tmp_path / "again", optimizer="newest")
    merge_checkpoints(folders, tmp_path / "weights")
    assert not (tmp_path / "weights" / "optimizer.pt").exists()


def test_optimizers_beside_a_model_that_do_not_fit(tmp_path: Path) -> None:
    folders = run_of_a_trainer(tmp_path / "run")
    state = torch.load(folders[0] / "optimizer.pt")
    turned = {**state, "param_groups": [{**state["param_groups"][0], "params": [1, 0]}]}
    torch.save(turned, folders[0] / "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"checkpoint-1/optimizer.pt has other groups of parameters than .*point-3"
    ):
        merge_checkpoints(folders, tmp_path / "no", optimizer="average")
    merge_checkpoints(folders, tmp_path / "newest", optimizer="newest")
    (folders[0] / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer state 'state.0.step' is in .*|.*but not in .*checkpoint-1"):
        merge_checkpoints(folders, tmp_path / "no", optimizer="average")
    with pytest.raises(ConfigError, match=r"keeps its optimizer beside the weights, .*leave merge.format = dcp"):
        merge_checkpoints(folders, tmp_path / "no", optimizer="newest", format="dcp")
    torch.save([1], folders[-1] / "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"optimizer.pt is not the state of an optimizer: it holds no 'param_groups"
    ):
        merge_checkpoints(folders, tmp_path / "no", optimizer="newest")
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"state": {0: torch.ones(2)}}}, tmp_path / "all.pt")
    with pytest.raises(
        UnsupportedError, match=r"all.pt holds the state of an optimizer beside the weights, .*save it ap"
    ):
        merge_checkpoints([tmp_path / "all.pt"], tmp_path / "no", optimizer="newest")
    merge_checkpoints([tmp_path / "all.pt"], tmp_path / "yes")
    shared = torch.ones(4)
    torch.save({"state": {0: {"a": shared[:2], "b": shared[2:]}}, "param_groups": []}, folders[-1] / "optimizer.pt")
    with pytest.raises(
        UnsupportedError, match=r"optimizer state 'state.0.a' in .* shares its memory with another tensor"
    ):
        merge_checkpoints(folders, tmp_path / "no", optimizer="newest")


def test_flipped_byte_in_an_optimizer(tmp_path: Path) -> None:
    folders = run_of_a_trainer(tmp_path / "run")
    archive = read_archive(folders[1] / "optimizer.pt")
    place = archive.payloads[archive.value["state"][0]["exp_avg"].key].start + 7
    data = bytearray((folders[1] / "optimizer.pt").read_bytes())
    data[place] ^= 4
    (folders[1] / "optimizer.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tensor 'state.0.exp_avg' of .*checkpoint-2 is damaged: the CRC-32"):
        merge_checkpoints(folders, tmp_path / "out", optimizer="average")
    assert not (tmp_path / "out").exists()


def test_reset_of_a_run_on_torch_distributed_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for step in range(3):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=str(tmp_path / str(step)))
    sources = [tmp_path / str(step) for step in range(3)]
    with pytest.raises(
        ConfigError, match=r"in one distributed checkpoint, so .* give merge.format = dcp \(--format dcp\)"
    ):
        merge_checkpoints(sources, tmp_path / "no", optimizer="average")
    for policy in ("average", "reset"):
        merge_checkpoints(sources, tmp_path / policy, optimizer=policy, format="dcp")  # pyrefly: ignore
        fresh = nn.Linear(5, 3)
        again = torch.optim.AdamW(fresh.parameters(), lr=9.0)
        state = {"model": get_model_state_dict(fresh), "optim": get_optimizer_state_dict(fresh, again)}
        planner = DefaultLoadPlanner(allow_partial_load=policy == "reset")
        dcp.load(state, checkpoint_id=str(tmp_path / policy), planner=planner)
        set_optimizer_state_dict(fresh, again, state["optim"])
        assert again.param_groups[0]["lr"] == 0.25
        names = {*read_checkpoint(tmp_path / policy).tensors, *read_checkpoint(tmp_path / policy).blobs}
        assert any("exp_avg" in name for name in names) == (policy == "average")
        assert any("param_groups" in name for name in names)


def distributed_state(i: float) -> dict[str, dict]:
    """Weights, moments and options, under the names that trainers on torch.distributed give them."""
    optimizer = {
        "state.w.exp_avg": torch.full((3,), i),
        "state.w.step": torch.tensor(i),
        "param_groups.w.lr": torch.tensor(i),
    }
    return {"model": {"w": torch.full((3,), i)}, "optimizer": optimizer}


@pytest.mark.parametrize("prefix", ["optimizer", ""])
def test_training_state_of_a_plain_distributed_checkpoint(prefix: str, tmp_path: Path) -> None:
    def arranged(i: float) -> dict:
        state = distributed_state(i)
        return state if prefix else {"model": state["model"], **state["optimizer"]}

    for i in range(2):
        dcp.save(arranged(float(i)), checkpoint_id=str(tmp_path / str(i)))
    sources = [tmp_path / "0", tmp_path / "1"]
    merge_checkpoints(sources, tmp_path / "bare", format="dcp")
    assert set(read_checkpoint(tmp_path / "bare").tensors) == {"model.w"}
    merge_checkpoints(sources, tmp_path / "out", format="dcp", optimizer="average")
    found = arranged(9.0)
    dcp.load(found, checkpoint_id=str(tmp_path / "out"))
    state = found["optimizer"] if prefix else found
    assert found["model"]["w"].tolist() == state["state.w.exp_avg"].tolist() == [0.5] * 3
    assert float(state["state.w.step"]) == float(state["param_groups.w.lr"]) == 1.0
    merge_checkpoints(sources, tmp_path / "reset", format="dcp", optimizer="reset")
    dot = f"{prefix}." if prefix else ""
    assert set(read_checkpoint(tmp_path / "reset").tensors) == {"model.w", f"{dot}param_groups.w.lr"}


def test_manifest_of_a_distributed_result(tmp_path: Path) -> None:
    sources = [cut_into(tmp_path / str(seed), weights(seed), 2, axis=0) for seed in range(2)]
    merge_checkpoints(sources, tmp_path / "out", format="dcp")
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert set(manifest["files"]) == {".metadata", "__0_0.distcp"}
    assert all(entry["sha256"] == sha256_file(tmp_path / "out" / name) for name, entry in manifest["files"].items())
    assert set(manifest["sources"][0]["files"]) == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_archive_views_look_into_their_storages(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"tail": whole[1:], "n": 3}, tmp_path / "a.bin")
    archive = read_archive(tmp_path / "a.bin")
    assert archive.value["n"] == 3
    merge_checkpoints([tmp_path / "a.bin"], tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["tail"], whole[1:])
    assert math.prod(archive.value["tail"].shape) == 8
