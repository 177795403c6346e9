"""Checkpoints of several processes (gloo, FSDP2, low-rank optimizer): exact resume, and other numbers of processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from whimbrel import checkpoint

# Commands, one after the other, in each process of a group of WORLD:
#   train N: N steps.  save STEP, load STEP: the checkpoint.  digest NAME: write the whole state's hash.
PROCESS = """
import faulthandler, hashlib, json, os, sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from whimbrel import checkpoint
from whimbrel.errors import CheckpointError
from whimbrel.optim import Fira, param_groups

torch.set_num_threads(1)
# Every group is one line. Its processes are forked from this one, which alone imports torch and waits for its parent.
for line in sys.stdin:
    folder, world, commands, name = json.loads(line)
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            break
    if 0 in children:
        break
    statuses = []
    while children:
        child, status = os.wait()
        children.remove(child)
        statuses.append(status)
        if status:  # the others would wait for it
            for other in children:
                os.kill(other, 9)
    print(json.dumps({"statuses": statuses}), flush=True)
else:
    sys.exit()
faulthandler.dump_traceback_later(100, exit=True)  # says where a process is stuck
os.dup2(os.open(f"{folder}/{name}-{rank}.out", os.O_WRONLY | os.O_CREAT), 1)
os.dup2(os.open(f"{folder}/{name}-{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/join-{name}", rank=rank, world_size=world)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        # 13 rows do not divide by the processes
        self.embed = nn.Embedding(13, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.tanh(nn.functional.dropout(block(x), 0.1))
        return x @ self.embed.weight.T

torch.manual_seed(0)
model = Net()
if world > 1:
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = Fira(param_groups(model, low_rank="blocks.*.weight"), lr=1e-2, rank=4, refresh_steps=2)
torch.manual_seed(10 + rank)
step = 0

def train(count):
    global step
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randint(0, 13, (3, 5))).square().mean().backward()
        optimizer.step()
        model.seen += 1
        step += 1

def save(number):
    extra = {**checkpoint.rng_state(), "step": step, "rank": rank}
    checkpoint.save_checkpoint(folder + "/run", step=number, tokens=number, model=model, optimizer=optimizer,
                               extra=extra, config_toml="")

def load(number):
    global step
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extra = checkpoint.load_checkpoint(f"{folder}/run/step-{number:06d}", model=model, optimizer=optimizer)
    print(json.dumps({"rank": rank, "extra": extra["rank"], "warnings": [str(w.message) for w in caught]}), flush=True)
    checkpoint.restore_rng(extra)
    step = extra["step"]

def fail(number):
    import whimbrel.checkpoint.weights as weights
    def full(tensor):
        raise OSError(28, "No space left on device")
    weights._bytes_of = full
    try:
        save(number)
    except CheckpointError as error:
        print(json.dumps({"rank": rank, "error": str(error)}), flush=True)

def whole(value):
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

def digest(name):
    parts = {key: whole(value) for key, value in model.state_dict().items()}
    names = {id(p): n for n, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        parts |= {f"{names[id(p)]} {key}": whole(value) for key, value in state.items()}
    hashes = {key: hashlib.sha256(value).hexdigest() for key, value in parts.items()}
    # torch adds "differentiable" to groups that it loads
    skipped = ("params", "differentiable")
    hashes["groups"] = str([{k: v for k, v in g.items() if k not in skipped} for g in optimizer.param_groups])
    if rank == 0:
        with open(f"{folder}/{name}.json", "w") as file:
            json.dump(hashes, file)

for command, argument in commands:
    globals()[command](argument)
"""


def run(
    server: subprocess.Popen[str], folder: Path, world: int, *commands: tuple[str, object], name: str
) -> list[dict]:
    """Run the commands in `world` processes; returns what they print, by rank."""
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps([str(folder), world, commands, name]), file=server.stdin, flush=True)
    done = json.loads(server.stdout.readline())
    said = [[(folder / f"{name}-{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(world)]
    assert done["statuses"] == [0] * world, "\n".join(err for _, err in said)
    return [json.loads(line) for out, _ in said for line in out.splitlines() if line.startswith("{")]


def digest(folder: Path, name: str) -> dict[str, str]:
    return json.loads((folder / f"{name}.json").read_text())


class Saved(NamedTuple):
    """A run and what its processes have said."""

    folder: Path
    one: list[dict]
    two: list[dict]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Two processes save step 3 and train to 5; one takes over at 3 and saves 4; two go on from 4, then from 3."""
    folder = tmp_path_factory.mktemp("saved")
    command = [sys.executable, "-c", PROCESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        first = [("train", 3), ("save", 3), ("digest", "three"), ("train", 2), ("digest", "five")]
        run(server, folder, 2, *first, name="first")
        one = run(server, folder, 1, ("load", 3), ("digest", "alone"), ("save", 4), name="second")
        commands = [("load", 4), ("digest", "back"), ("load", 3), ("digest", "again"), ("train", 2), ("digest", "on")]
        two = run(server, folder, 2, *commands, ("fail", 7), name="third")
    return Saved(folder, one, two)


def test_two_processes_go_on_exactly(saved: Saved) -> None:
    loads = [line for line in saved.two if "extra" in line]
    assert [(line["rank"], line["extra"]) for line in loads[1::2]] == [(0, 0), (1, 1)], "another's random state"
    assert not any(line["warnings"] for line in loads[1::2])
    assert digest(saved.folder, "again") == digest(saved.folder, "three")
    assert digest(saved.folder, "on") == digest(saved.folder, "five")
    assert digest(saved.folder, "five") != digest(saved.folder, "three")


def test_one_process_takes_over_and_gives_back(saved: Saved) -> None:
    (line,) = saved.one
    assert digest(saved.folder, "alone") == digest(saved.folder, "three")
    assert line["warnings"] == [
        f"{saved.folder}/run/step-000003 was saved by 2 processes; process 0 of 1 takes the random state and other"
        " tensors of process 0"
    ]
    assert digest(saved.folder, "back") == digest(saved.folder, "three")
    assert [line["extra"] for line in saved.two if "extra" in line][::2] == [0, 0]


def test_a_full_disk_stops_all_processes_alike(saved: Saved) -> None:
    """The first process alone writes the weights, but none of them may wait for it for ever."""
    errors = [line["error"] for line in saved.two if "error" in line]
    assert len(errors) == 2
    for error in errors:
        assert error.startswith(f"cannot write checkpoint {saved.folder}/run/step-000007: the disk is full at")
    assert sorted(path.name for path in (saved.folder / "run").iterdir()) == ["step-000003", "step-000004"]


def test_what_two_processes_leave_on_the_disk(saved: Saved) -> None:
    meta = checkpoint.check_complete(saved.folder / "run" / "step-000003")
    assert meta.world_size == 2
    assert {"train/__0_0.distcp", "train/__1_0.distcp", "train/.metadata"} <= set(meta.files)
    state = json.loads((saved.folder / "run" / "step-000003" / "train" / "state.json").read_text())["optimizer"][
        "state"
    ]
    basis = state["blocks.0.weight"]["basis"]
    assert (basis["shape"], basis["follows"]) == ([32, 4], False)
    assert state["embed.weight"]["exp_avg"]["follows"] is True


def test_weights_are_whole_tensors(saved: Saved) -> None:
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(13, 32), "blocks": torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))}
    )
    model.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
    checkpoint.load_weights(saved.folder / "run" / "step-000003", model)
    assert int(model.seen) == 3
