"""FSDP2 on two gloo processes against one process: the same weights after the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from whimbrel.optim import Fira, GaLore, param_groups
from whimbrel.testing.budget import rms_ratio

STEPS = 7
WORLD = 2


def make_model():
    torch.manual_seed(0)
    # 17 and 3 rows do not divide by 2, and one row leaves a process without any
    return nn.Sequential(nn.Linear(10, 17), nn.Tanh(), nn.Linear(17, 3), nn.Linear(3, 1))


def make_optimizer(cls, model):
    groups = param_groups(model, low_rank="*.weight", min_dim=3)
    return cls(groups, lr=1e-2, rank=3, refresh_steps=3, weight_decay=0.1)


def run(rank, folder):
    """Step a sharded model with the gradients of a whole one, which steps beside it; write how far they part."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    worst = {}
    for cls in (Fira, GaLore):
        whole, model = make_model(), fully_shard(make_model(), mesh=mesh)
        rival, optimizer = make_optimizer(cls, whole), make_optimizer(cls, model)
        for step in range(STEPS):
            if step == 4:
                # saved and loaded in between, through the zero-gradient step of torch's helpers
                saved = get_optimizer_state_dict(model, optimizer)
                optimizer = make_optimizer(cls, model)
                model.zero_grad()
                set_optimizer_state_dict(model, optimizer, saved)
            x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
            whole.zero_grad()
            (whole(x) - x[:, :1]).square().mean().backward()
            for mine, param in zip(model.parameters(), whole.parameters(), strict=True):
                assert isinstance(mine, DTensor)
                mine.grad = distribute_tensor(param.grad, mesh, mine.placements)
            rival.step()
            optimizer.step()
        for (name, param), mine in zip(whole.named_parameters(), model.parameters(), strict=True):
            worst[f"{cls.__name__} {name}"] = rms_ratio(param, mine.full_tensor())
        sharded = [state["exp_avg"] for state in optimizer.state.values() if isinstance(state["exp_avg"], DTensor)]
        assert len(sharded) == len(optimizer.state) - 2, "all but the two low-rank matrices keep sharded moments"
    torch.save(worst, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(run, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("cls", [Fira, GaLore])
def test_two_processes_equal_one(cls, parted):
    for ratios in parted:
        found = {name: ratio for name, ratio in ratios.items() if name.startswith(cls.__name__)}
        assert len(found) == 6
        assert max(found.values()) <= 1e-6, found
