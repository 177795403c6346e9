"""Which process this is, on which device, and how the model is spread over the processes.

One machine, any number of processes: started by plain `python` there is one; started by `torchrun` there are
WORLD_SIZE, joined by NCCL on CUDA and gloo on the CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from whimbrel.config import Config
from whimbrel.errors import ConfigError
from whimbrel.model import Decoder


class Processes(NamedTuple):
    """This process among its peers."""

    rank: int
    world: int
    device: torch.device
    peers: tuple[int, ...] = ()
    """Process ids of the others, where all of them are on this machine."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def largest(self, values: Tensor) -> Tensor:
        """Each value's maximum over all processes, one that is not finite in any of them as infinity."""
        if self.world > 1:
            values = values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def norm(self, parts: Sequence[Tensor]) -> Tensor:
        """The norm of all elements of tensors of which each process holds other parts."""
        here = nn.utils.get_total_norm(parts)
        return here if self.world == 1 else self.sum(here.double().square()).sqrt().to(here.dtype)

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for `config.device`; raises ConfigError for another name, and where CUDA is asked for and absent."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device = {name!r} is not allowed; use 'auto', 'cpu' or 'cuda'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda' but no CUDA device is available; use 'cpu' or 'auto'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


@contextmanager
def joined(config: Config) -> Iterator[Processes]:
    """Join the processes that torchrun started, if any, and leave them at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(0, 1, device)
        return
    already = dist.is_initialized()
    if not already:
        _join(device)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device, _peers())
    finally:
        if not already:
            dist.destroy_process_group()


def _on_one_machine() -> bool:
    return os.environ.get("GROUP_WORLD_SIZE", "1") == "1"


def _peers() -> tuple[int, ...]:
    if not _on_one_machine():
        return ()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, os.getpid())
    return tuple(process for process in found if process != os.getpid())


def _join(device: torch.device) -> None:
    """Make the group of all processes, by the environment that torchrun has set.

    torchrun keeps one store for all attempts of a job, and in it the addresses of processes that are dead by the time
    it starts them again: on one machine each attempt reads and writes under its own name. Machines count attempts
    apart, so several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead (docs/howto/many-gpus.md).
    """
    options: dict[str, Any] = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    if not _on_one_machine():
        dist.init_process_group(**options)
        return
    store, rank, world = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    options["store"] = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(**options, rank=rank, world_size=world)


def shard(model: Decoder, processes: Processes) -> None:
    """Spread the parameters over the processes with FSDP2: one unit for each block and one for the rest."""
    if processes.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # A block returns its state beside its output; nobody changes either in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
