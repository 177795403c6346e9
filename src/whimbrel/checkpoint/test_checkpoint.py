"""Saving and resuming in one process: exact, complete, and clear about what does not fit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whimbrel import checkpoint
from whimbrel.errors import CheckpointError


class Net(nn.Module):
    """A tied pair, a buffer, dropout, a parameter without gradient."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.3), nn.Linear(width, width, bias=False))
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("scale", torch.ones(2, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


class LowRank(torch.optim.Optimizer):
    """State of other shapes and dtypes than the parameter's, numbers in the state, a counter in the group."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "step": 0, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["basis"] = torch.randn(param.shape[-1], 2)
                    state["low"] = torch.zeros(*param.shape[:-1], 2)
                    state["seen"] = 0
                state["seen"] += 1
                state["low"].lerp_(param.grad.float() @ state["basis"], 0.3)
                param -= (group["lr"] * (state["low"] @ state["basis"].mT)).to(param.dtype)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True),
    "adamw by name": lambda model: torch.optim.AdamW(list(model.named_parameters()), lr=torch.tensor(1e-2)),
    "adamw in groups": lambda model: torch.optim.AdamW(
        [{"params": list(model.body.parameters()), "weight_decay": 0.5}, {"params": [model.embed.weight], "lr": 0.1}]
    ),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "low rank": lambda model: LowRank(model.parameters()),
}


def train(model: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(0, 20, (4, 5))).float().square().mean().backward()
        optimizer.step()


def save(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int = 3, **extra: Any) -> Path:
    return checkpoint.save_checkpoint(
        run,
        step=step,
        tokens=step * 100,
        model=model,
        optimizer=optimizer,
        extra={**checkpoint.rng_state(), **extra},
        config_toml=f"steps = {step}\n",
    )


def made(tmp_path: Path, *, steps: int = 1) -> tuple[Path, Net, torch.optim.Optimizer]:
    """A run with checkpoints at steps 1, 2, ..."""
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS["adamw"](model)
    for step in range(1, steps + 1):
        train(model, optimizer, 1)
        save(tmp_path / "run", model, optimizer, step)
    return tmp_path / "run", model, optimizer


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same(a.reshape(-1), b.reshape(-1)) and a.shape == b.shape
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_state, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_exact(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Net().to(dtype)
    optimizer = OPTIMIZERS[kind](model)
    train(model, optimizer, 3)
    path = save(tmp_path, model, optimizer)
    saved = set(optimizer.state_dict()["state"])
    train(model, optimizer, 2)

    torch.manual_seed(99)
    again = Net().to(dtype)
    resumed = OPTIMIZERS[kind](again)
    for group in resumed.param_groups:
        group["lr"] = 123.0
    extra = checkpoint.load_checkpoint(path, model=again, optimizer=resumed)
    checkpoint.restore_rng(extra)
    assert set(resumed.state_dict()["state"]) == saved
    train(again, resumed, 2)
    for name, value in model.state_dict().items():
        assert same(value.reshape(-1), again.state_dict()[name].reshape(-1)), name
    assert same_state(optimizer.state_dict(), resumed.state_dict())


@pytest.mark.gpu
def test_resume_is_exact_on_cuda(tmp_path: Path) -> None:
    """State on the device, step counters in main memory, the device's random state for dropout."""
    torch.manual_seed(1)
    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model: Net, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.randint(0, 20, (4, 5), device="cuda")).square().mean().backward()
        optimizer.step()

    step(model, optimizer)
    path = save(tmp_path, model, optimizer)
    step(model, optimizer)
    again = Net().cuda()
    resumed = torch.optim.AdamW(again.parameters(), lr=1.0)
    extra = checkpoint.load_checkpoint(path, model=again, optimizer=resumed)
    assert {"rng.cpu", "rng.cuda"} <= extra.keys()
    checkpoint.restore_rng(extra)
    step(again, resumed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert same_state(optimizer.state_dict(), resumed.state_dict())


def test_state_keeps_its_dtype_and_bits(tmp_path: Path) -> None:
    """torch's own load_state_dict would round float32 state to a bfloat16 parameter's type."""
    model = Net().bfloat16()
    optimizer = LowRank([model.embed.weight])
    train(model, optimizer, 2)
    state = optimizer.state[model.embed.weight]
    path = save(tmp_path, model, optimizer)
    again = Net().bfloat16()
    resumed = LowRank([again.embed.weight])
    checkpoint.load_checkpoint(path, model=again, optimizer=resumed)
    loaded = resumed.state[again.embed.weight]
    assert loaded["basis"].dtype == torch.float32
    assert same(loaded["basis"], state["basis"])
    assert same(loaded["low"], state["low"])
    assert loaded["seen"] == 2
    assert resumed.param_groups[0]["step"] == 2
    assert resumed.param_groups[0]["betas"] == (0.9, 0.99)


def test_before_the_first_step(tmp_path: Path) -> None:
    model = Net()
    path = save(tmp_path, model, OPTIMIZERS["adamw"](model), 0)
    optimizer = OPTIMIZERS["adamw"](model)
    checkpoint.load_checkpoint(path, model=model, optimizer=optimizer)
    assert optimizer.state_dict()["state"] == {}


def test_extra_comes_back(tmp_path: Path) -> None:
    model = Net()
    optimizer = OPTIMIZERS["sgd"](model)
    table = torch.arange(6, dtype=torch.int16).view(2, 3)
    path = save(tmp_path, model, optimizer, table=table, note="näh", epoch=2, share=0.1, done=True)
    extra = checkpoint.load_checkpoint(path, model=model, optimizer=optimizer)
    assert torch.equal(extra.pop("table"), table)
    assert extra.pop("rng.cpu").dtype == torch.uint8
    assert extra == {"note": "näh", "epoch": 2, "share": 0.1, "done": True}
    with pytest.raises(
        CheckpointError, match=r"extra\['bad'\] is a list; only tensors, numbers and texts can be saved"
    ):
        save(tmp_path, model, optimizer, bad=[1])


def test_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS["sgd"](model)
    train(model, optimizer, 1)
    (tmp_path / "tok.json").write_text("{}")
    path = checkpoint.save_checkpoint(
        tmp_path / "run",
        step=200,
        tokens=1000,
        model=model,
        optimizer=optimizer,
        extra={},
        config_toml="a = 1\n",
        tokenizer_path=tmp_path / "tok.json",
    )
    assert path == tmp_path / "run" / "step-000200" == checkpoint.step_dir(tmp_path / "run", 200)
    assert [entry.name for entry in path.parent.iterdir()] == ["step-000200"]
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert files == [
        "config.toml",
        "meta.json",
        "model.safetensors",
        "tokenizer.json",
        "train/.metadata",
        "train/__0_0.distcp",
        "train/state.json",
    ]
    meta = checkpoint.read_meta(path)
    assert (meta.step, meta.tokens, meta.world_size, meta.torch) == (200, 1000, 1, torch.__version__)
    assert sorted([*meta.files, "meta.json"]) == files
    weights = load_file(path / "model.safetensors")
    # head.weight is embed.weight and stored once
    assert set(weights) == {"embed.weight", "body.0.weight", "body.0.bias", "body.2.weight", "unused", "scale"}
    assert torch.equal(weights["embed.weight"], model.embed.weight)


def test_names_without_the_marks_of_compile(tmp_path: Path) -> None:
    model = Net()
    model.body[0] = torch.compile(model.body[0])  # pyrefly: ignore
    checkpoint.save_weights(tmp_path / "a.safetensors", torch.compile(model))
    names = set(load_file(tmp_path / "a.safetensors"))
    assert "body.0.weight" in names
    assert not any("_orig_mod" in name for name in names)
    plain = Net()
    checkpoint.load_weights(tmp_path / "a.safetensors", plain)
    assert torch.equal(plain.body[0].weight, model.body[0].weight)


def test_weights_of_another_dtype_are_converted_but_not_resumed(tmp_path: Path) -> None:
    run, model, _ = made(tmp_path)
    half = Net().bfloat16()
    checkpoint.load_weights(run / "step-000001", half)
    assert torch.equal(half.embed.weight, model.embed.weight.bfloat16())
    with pytest.raises(
        CheckpointError, match=r"is torch.float32 in .*, but torch.bfloat16 in the model; going on exactly"
    ):
        checkpoint.load_checkpoint(run / "step-000001", model=half, optimizer=OPTIMIZERS["adamw"](half))


def test_tied_weight_under_its_other_name(tmp_path: Path) -> None:
    model = Net()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    save_file({name: value for name, value in weights.items() if name != "embed.weight"}, tmp_path / "a.safetensors")
    other = Net()
    checkpoint.load_weights(tmp_path / "a.safetensors", other)
    assert torch.equal(other.embed.weight, model.embed.weight)
    save_file({**weights, "head.weight": weights["head.weight"] + 1}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors 'embed.weight' and 'head.weight' are one weight in the model"):
        checkpoint.load_weights(tmp_path / "b.safetensors", other)


def write(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": None}, "tensor 'w' of the model is missing from {0}"),
        ({"more": torch.ones(1)}, "tensor 'more' of {0}/model.safetensors is not in the model"),
        ({"w": torch.ones(3, 2)}, "tensor 'w' has shape [3, 2] in {0}/model.safetensors, but [2, 3] in the model"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    model = nn.ParameterDict({"a": torch.zeros(4), "w": torch.zeros(2, 3), "z": torch.zeros(4)})
    tensors = {"a": torch.ones(4), "w": torch.ones(2, 3), "z": torch.ones(4), **change}
    path = write(tmp_path, {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(path, model)
    assert str(caught.value) == message.format(path) + "; build the model from the configuration beside the file"
    assert all(bool((value == 0).all()) for value in model.values()), "the model was changed"


def test_model_without_memory(tmp_path: Path) -> None:
    path = write(tmp_path, {"weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="tensor 'weight' of the model is on the meta device; give the model"):
        checkpoint.load_weights(path, nn.Linear(2, 2, bias=False, device="meta"))


def test_unknown_tensor_type(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False).to(torch.complex128)
    with pytest.raises(CheckpointError, match=r"tensor 'weight' is torch.complex128, which safetensors cannot hold"):
        checkpoint.save_weights(tmp_path / "a.safetensors", model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda model: torch.optim.SGD(model.parameters()),
            "the checkpoint holds the state of AdamW, but the optimizer is SGD; use the optimizer that the run was",
        ),
        (
            lambda model: torch.optim.AdamW([{"params": [p]} for p in model.parameters()]),
            "the checkpoint has 1 parameter groups, the optimizer 5",
        ),
        (
            lambda model: torch.optim.AdamW(list(model.parameters())[1:]),
            r"group 0 of the optimizer does not hold the parameters .* they differ first in 'unused'",
        ),
    ],
)
def test_optimizer_that_does_not_fit(
    build: Callable[[nn.Module], torch.optim.Optimizer], message: str, tmp_path: Path
) -> None:
    run, model, _ = made(tmp_path)
    before = model.embed.weight.detach().clone()
    with torch.no_grad():
        model.embed.weight.add_(1)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_checkpoint(run / "step-000001", model=model, optimizer=build(model))
    assert torch.equal(model.embed.weight, before + 1), "weights were read before the check"


def test_state_that_cannot_be_saved(tmp_path: Path) -> None:
    model = Net()
    optimizer = OPTIMIZERS["sgd"](model)
    optimizer.state[model.embed.weight]["projector"] = object()
    with pytest.raises(
        CheckpointError, match=r"state 'projector' of parameter 'embed.weight' is a object; only tensors"
    ):
        save(tmp_path, model, optimizer)
    other = OPTIMIZERS["sgd"](Net())
    with pytest.raises(
        CheckpointError, match=r"parameter 0 of the optimizer's group 0 \(shape \[3\]\) is not in the mod"
    ):
        save(tmp_path, model, other)
    assert list(tmp_path.iterdir()) == []


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 7)


def test_truncated_checkpoint_is_skipped_and_named(tmp_path: Path) -> None:
    run, model, optimizer = made(tmp_path, steps=3)
    bad = run / "step-000003" / "train" / "__0_0.distcp"
    size = bad.stat().st_size
    truncate(bad)
    message = f"{bad} is damaged: {size:,} bytes expected, {size - 7:,} found"
    with pytest.warns(UserWarning, match=f"skipped a damaged checkpoint: {message}"):
        assert checkpoint.latest_checkpoint(run) == run / "step-000002"
    with pytest.warns(UserWarning, match="skipped"):
        assert checkpoint.list_checkpoints(run) == [run / "step-000001", run / "step-000002"]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_checkpoint(run / "step-000003", model=model, optimizer=optimizer)
    assert str(caught.value) == f"{message}; use {run / 'step-000002'}, the newest complete checkpoint beside it"


def test_files_that_are_gone(tmp_path: Path) -> None:
    run, model, optimizer = made(tmp_path, steps=2)
    (run / "step-000002" / "config.toml").unlink()
    with pytest.raises(CheckpointError, match=r"step-000002/config.toml is missing; use .*step-000001, the newest"):
        checkpoint.load_checkpoint(run / "step-000002", model=model, optimizer=optimizer)
    (run / "step-000002" / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"meta.json cannot be read \(No such file or directory\)"):
        checkpoint.load_checkpoint(run / "step-000002", model=model, optimizer=optimizer)
    (run / "step-000002" / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"meta.json is damaged; .*step-000002 is no complete checkpoint"):
        checkpoint.read_meta(run / "step-000002")
    shutil.rmtree(run / "step-000001")
    with pytest.raises(CheckpointError, match="there is no other complete checkpoint beside it"):
        checkpoint.load_checkpoint(run / "step-000001", model=model, optimizer=optimizer)
    with pytest.warns(UserWarning, match="skipped"):
        assert checkpoint.latest_checkpoint(run) is None
    assert checkpoint.latest_checkpoint(tmp_path / "nowhere") is None


def test_format_of_the_future(tmp_path: Path) -> None:
    run, _, _ = made(tmp_path)
    meta = run / "step-000001" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2; this version of Whimbrel reads format 1"):
        checkpoint.read_meta(meta.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "train/__0_0.distcp", "train/state.json", "config.toml"])
def test_flipped_bit(name: str, tmp_path: Path) -> None:
    run, model, optimizer = made(tmp_path, steps=2)
    file = run / "step-000002" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    message = f"{file} is damaged: its SHA-256 begins .*, but was .* when it was written; use {run / 'step-000001'}"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_checkpoint(run / "step-000002", model=model, optimizer=optimizer)
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_weights(run / "step-000002", model)
    checkpoint.load_weights(run / "step-000002", model, verify=False)


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    run, model, optimizer = made(tmp_path)
    with torch.no_grad():
        model.embed.weight.fill_(7)
    save(run, model, optimizer, 1)
    assert bool((load_file(run / "step-000001" / "model.safetensors")["embed.weight"] == 7).all())
    assert [path.name for path in run.iterdir()] == ["step-000001"]


def test_leftovers_are_ignored_and_cleaned(tmp_path: Path) -> None:
    run, model, optimizer = made(tmp_path)
    shutil.copytree(run / "step-000001", run / ".step-000009.tmp-1")
    (run / "step-000abc").mkdir()
    assert checkpoint.latest_checkpoint(run) == run / "step-000001"
    save(run, model, optimizer, 2)
    assert sorted(path.name for path in run.iterdir()) == ["step-000001", "step-000002", "step-000abc"]


def test_prune(tmp_path: Path) -> None:
    run, _, _ = made(tmp_path, steps=4)
    assert checkpoint.prune(run, 2) == [run / "step-000001", run / "step-000002"]
    assert sorted(path.name for path in run.iterdir()) == ["step-000003", "step-000004"]
    assert checkpoint.prune(run, 5) == []
    with pytest.raises(CheckpointError, match=r"cannot keep 0 checkpoints of .*; keep at least one"):
        checkpoint.prune(run, 0)


def test_newest_by_number_not_by_name(tmp_path: Path) -> None:
    run, model, optimizer = made(tmp_path)
    for step in (999_999, 1_000_000):
        save(run, model, optimizer, step)
    assert checkpoint.latest_checkpoint(run) == run / "step-1000000"


@pytest.mark.parametrize("target", ["train", "meta", "weights"])
def test_full_disk(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the disk fills up: one line, the older checkpoint as it was, nothing half-written."""
    run, model, optimizer = made(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {
        "train": "torch.distributed.checkpoint.filesystem._write_item",
        "meta": "whimbrel.checkpoint.full.write_meta",
        "weights": "whimbrel.checkpoint.weights._bytes_of",
    }[target]
    monkeypatch.setattr(place, full)
    with pytest.raises(CheckpointError) as caught:
        save(run, model, optimizer, 2)
    message = str(caught.value)
    assert message.startswith(f"cannot write checkpoint {run / 'step-000002'}: the disk is full at {run} (")
    assert "free some space or choose another folder" in message
    assert "\n" not in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_too_little_space_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, model, optimizer = made(tmp_path)
    monkeypatch.setattr("whimbrel.files.free_bytes", lambda path: 100)
    with pytest.raises(CheckpointError, match=r"step-000002: too little free space at .* bytes needed, 100 free\)"):
        save(run, model, optimizer, 2)
    assert [path.name for path in run.iterdir()] == ["step-000001"]
