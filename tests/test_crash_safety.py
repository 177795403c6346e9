"""A run that is killed, or runs out of disk, at any moment: the newest complete checkpoint is whole and usable."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from whimbrel import checkpoint

KILLS = 12

# Forks a child for every line, which is the step to go on from, and tells its number. At step n every weight and every
# state tensor is n, so that a mixture of two steps would show.
SERVER = """
import os, sys, torch
from torch import nn
from whimbrel import checkpoint
import whimbrel.checkpoint.full

def save_forever(run, log, step):
    model = nn.Linear(256, 1024)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    while True:
        step += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
                optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, step)
        extra = {"step": step, "rng": torch.full((5000,), step)}
        checkpoint.save_checkpoint(run, step=step, tokens=step * 10, model=model, optimizer=optimizer, extra=extra,
                                   config_toml=f"steps = {step}")
        checkpoint.prune(run, 3)
        with open(log, "a") as file:
            file.write(f"{step}\\n")

torch.set_num_threads(1)
# What torch imports at the first save is imported here, once for all children.
first = nn.Linear(1, 1)
checkpoint.save_checkpoint(sys.argv[2] + "-first", step=0, tokens=0, model=first, extra={}, config_toml="",
                           optimizer=torch.optim.SGD(first.parameters()))
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        save_forever(sys.argv[1], sys.argv[2], int(line))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def assert_whole(path: Path) -> int:
    """Load a checkpoint with all its hashes verified; returns its step, which every value in it must equal."""
    model = nn.Linear(256, 1024)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    extra = checkpoint.load_checkpoint(path, model=model, optimizer=optimizer)
    step = checkpoint.read_meta(path).step
    assert path.name == f"step-{step:06d}"
    assert extra["step"] == step
    assert bool((torch.as_tensor(extra["rng"]) == step).all())
    for parameter in model.parameters():
        assert bool((parameter == step).all())
        assert bool((optimizer.state[parameter]["momentum_buffer"] == step).all())
    assert (path / "config.toml").read_text() == f"steps = {step}"
    return step


def last_saved(log: Path) -> int:
    """The last step whose save has returned in a child."""
    return int(log.read_text().split()[-1]) if log.exists() else 0


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Each new process goes on from what the killed one left, as a restarted run would."""
    run, log = tmp_path / "run", tmp_path / "log"
    draw = random.Random(5)
    newest = unfinished = 0
    command = [sys.executable, "-c", SERVER, str(run), str(log)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for _ in range(KILLS):
            print(newest, file=server.stdin, flush=True)
            child = int(server.stdout.readline())
            while last_saved(log) <= newest:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            assert server.stdout.readline() == "ended\n"
            unfinished += any(path.name.startswith(".step-") for path in run.iterdir())
            found = checkpoint.latest_checkpoint(run)
            assert found is not None
            newest = assert_whole(found)
            assert newest >= last_saved(log), "a checkpoint whose save had returned is gone"
        server.stdin.close()
    assert unfinished, "no process was killed in the middle of a save, so nothing was shown"
    for path in checkpoint.list_checkpoints(run):
        assert_whole(path)


# A limit on the size of files stands for a full disk: a write fails half-way through.
LIMITED = """
import resource, signal, sys, torch
from torch import nn
from whimbrel import checkpoint
from whimbrel.errors import CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = nn.Linear(256, 1024)
optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
def save(step, state_size):
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros(state_size)
    checkpoint.save_checkpoint(sys.argv[1], step=step, tokens=0, model=model, optimizer=optimizer, extra={},
                               config_toml="")
save(1, 10)
for step, limit, state_size in ((2, 2**19, 10), (3, 3 * 2**20, 2**21)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(step, state_size)
    except CheckpointError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save(4, 10)
"""


def test_disk_that_fills_up_while_saving(tmp_path: Path) -> None:
    """First within the weights, then within the optimizer state; the run goes on once there is room again."""
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", LIMITED, str(run)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    for step, line in zip((2, 3), lines, strict=True):
        start = f"cannot write checkpoint {run}/step-{step:06d}: the file size limit is reached at {run} ("
        assert line.startswith(start), line
        assert line.endswith("; nothing that was there is changed; free some space or choose another folder")
    assert sorted(path.name for path in run.iterdir()) == ["step-000001", "step-000004"]
    assert checkpoint.latest_checkpoint(run) == run / "step-000004"


REPLACED = """
import os, signal, sys, torch
from torch import nn
from whimbrel import checkpoint, files

def save(run, value):
    with torch.no_grad():
        model.weight.fill_(value)
    checkpoint.save_checkpoint(run, step=5, tokens=0, model=model, optimizer=optimizer, extra={}, config_toml="")

def dying(a, b):
    if moment == "after":
        swap(a, b)
    os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters())
swap = files._exchange
for moment in ("before", "after"):
    run = f"{sys.argv[1]}/{moment}"
    save(run, 1)
    child = os.fork()
    if child == 0:
        files._exchange = dying
        save(run, 2)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_killed_while_a_step_is_replaced(tmp_path: Path) -> None:
    """A step saved again is swapped in at once: before and after, one whole version has the name."""
    subprocess.run([sys.executable, "-c", REPLACED, str(tmp_path)], check=True)
    for moment, value in (("before", 1), ("after", 2)):
        path = checkpoint.latest_checkpoint(tmp_path / moment)
        assert path == tmp_path / moment / "step-000005"
        model = nn.Linear(4, 4)
        checkpoint.load_checkpoint(path, model=model, optimizer=torch.optim.SGD(model.parameters()))
        assert bool((model.weight == value).all())
