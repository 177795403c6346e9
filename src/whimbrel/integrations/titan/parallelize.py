"""How the model is spread: projections over `tp`, stretches of the sequences over `cp`, everything over the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division

from whimbrel.errors import UnsupportedError
from whimbrel.integrations.titan.model import TitanDecoder
from whimbrel.mixers import parallel as mixers
from whimbrel.mixers.base import KVCache, Out
from whimbrel.mixers.linear import LinearMixer
from whimbrel.mixers.rdn.op import rdn
from whimbrel.mixers.rla.op import rla
from whimbrel.mixers.softmax.layer import SoftmaxAttention, _attend
from whimbrel.scan import parallel as scans
from whimbrel.scan.decay.op import decay_scan
from whimbrel.scan.delta.op import delta_scan

_SHARED: dict[Callable, Callable] = {
    rdn: mixers.rdn,
    rla: mixers.rla,
    delta_scan: scans.delta_scan,
    decay_scan: scans.decay_scan,
}
"""A recurrence -> the same over sequences that several processes share."""


def parallelize(
    model: TitanDecoder,
    *,
    parallel_dims: ParallelDims,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    **kwargs: Any,
) -> TitanDecoder:
    """Spread `model` over the processes, as `parallelism` asks; torchtitan calls this before there are weights.

    Raises UnsupportedError for what Whimbrel's layers cannot do: other SPMD backends, torch.compile of them, selective
    recomputation, and context parallelism of mixers that have no shared form.
    """
    if parallelism.spmd_backend != "partial_dtensor":
        raise UnsupportedError(
            f"parallelism.spmd_backend = '{parallelism.spmd_backend}' is not supported; use 'partial_dtensor'"
        )
    if compile_config.enable and "model" in compile_config.components:
        raise UnsupportedError("compile.enable is not supported for the model, whose kernels are its own; leave it out")
    if parallel_dims.cp_enabled:
        share_sequences(model, parallel_dims.get_mesh("cp"))
    if parallel_dims.tp_enabled:
        split_projections(model, parallel_dims.get_mesh("tp"))
    if ac_config is not None:
        recompute(model, ac_config)
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    shard(model, parallel_dims.get_mesh(names))
    return model


def shard(model: TitanDecoder, mesh: DeviceMesh) -> None:
    """FSDP2 over `mesh`: one unit for each block and one for the rest; gradients are summed, not averaged.

    torchtitan divides the loss by the tokens of all processes, so a mean over the processes would be a second one.
    """
    # A block returns its state beside its output; nobody changes either in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    disable_fsdp_gradient_division(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no sum with a factor, even if it is 1
            module.set_force_sum_reduction_for_comms(True)


def recompute(model: TitanDecoder, config: Any) -> None:
    """Keep the input of each block alone for the backward."""
    if not isinstance(config, FullAC.Config):
        raise UnsupportedError(
            f"activation_checkpoint = {type(config).__qualname__} is not supported; use FullAC.Config() or None"
        )
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def share_sequences(model: TitanDecoder, mesh: DeviceMesh) -> None:
    """Let every process of `mesh` hold a stretch of each sequence, in the order of their ranks.

    Linear mixers pass states on (`whimbrel.mixers.parallel`); softmax layers gather the keys before their stretch.
    """
    for index, block in enumerate(model.blocks):
        mixer = block.mixer
        if isinstance(mixer, SoftmaxAttention):
            mixer.forward = partial(_attend_shared, mixer, mesh)
        elif isinstance(mixer, LinearMixer) and isinstance(mixer.recurrence, partial):
            mixer.recurrence = _shared(mixer.recurrence, mesh, index)
            mixer.conv.forward = partial(_conv_shared, mixer.conv.forward, mixer.conv.weight.shape[2] - 1, mesh)
        else:
            raise UnsupportedError(_no_shared_form(index, mixer))


def _shared(recurrence: partial, mesh: DeviceMesh, index: int) -> partial:
    options = {**recurrence.keywords, "group": mesh.get_group()}
    if recurrence.func in _SHARED:
        return partial(_SHARED[recurrence.func], *recurrence.args, **options)
    if recurrence.args and recurrence.args[0] in _SHARED:
        scan = partial(_SHARED[recurrence.args[0]], group=mesh.get_group())
        return partial(recurrence.func, scan, *recurrence.args[1:], **recurrence.keywords)
    raise UnsupportedError(_no_shared_form(index, recurrence))


def _no_shared_form(index: int, what: object) -> str:
    return (
        f"block {index} ({type(what).__name__}) cannot share a sequence with other processes; "
        "use rla, rdn, gdn, sgla or softmax, or parallelism.context_parallel_degree = 1"
    )


def _conv_shared(
    conv: Callable[..., Any], past: int, mesh: DeviceMesh, streams: Any, state: Any, **kwargs: Any
) -> tuple[Any, Tensor]:
    return conv(streams, mixers.conv_start(streams, past, state, group=mesh.get_group()), **kwargs)


def _attend_shared(
    layer: SoftmaxAttention, mesh: DeviceMesh, x: Tensor, state: Any = None, *, cu_seqlens: Any = None
) -> Out:
    """Softmax attention of this process's stretch x [B, T, hidden_size] to it and all stretches before it.

    Stretches have one length. Later processes have more keys to read, so the last one takes longest.
    """
    time, rank = x.shape[1], mesh.get_local_rank()
    start = rank * time
    q, k, v = layer.heads(x, torch.arange(start, start + time, device=x.device))
    k, v = (_Gathered.apply(tensor, mesh)[:, : start + time] for tensor in (k, v))
    y = _attend(q, k, v, layer.window)
    return Out(layer.o_proj(y.flatten(2)), KVCache(k, v))


class _Gathered(torch.autograd.Function):
    """x [B, T, ...] of every process, [B, processes T, ...], in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh, ctx.time = mesh, x.shape[1]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
        dist.all_gather(parts, x.contiguous(), group=mesh.get_group())
        return torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore [bad-override]
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.mesh.get_group())
        start = ctx.mesh.get_local_rank() * ctx.time
        return grad[:, start : start + ctx.time], None


def split_projections(model: TitanDecoder, mesh: DeviceMesh) -> None:
    """Split every projection of the blocks over `mesh`: those into a layer by columns, those out of it by rows.

    Recurrences, attention and norms are computed by every process of `mesh`; weights, gradients, optimizer state and
    the products of the projections are what is split.
    """
    for block in model.blocks:
        plan: dict[str, ParallelStyle] = {
            "mlp.gate": ColwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(),
        }
        for name, child in block.get_submodule("mixer").named_children():
            if isinstance(child, nn.Linear):
                into = name != "o_proj"
                style = (
                    ColwiseParallel(output_layouts=Replicate()) if into else RowwiseParallel(input_layouts=Replicate())
                )
                plan[f"mixer.{name}"] = style
        parallelize_module(block, mesh, plan)
    for module in model.modules():
        names = [name for name, p in module.named_parameters(recurse=False) if not isinstance(p, DTensor)]
        for name in names:
            own = module.get_parameter(name)
            shared = nn.Parameter(distribute_tensor(own.data, mesh, [Replicate()], src_data_rank=None))
            for key, value in own.__dict__.items():
                setattr(shared, key, value)
            module.register_parameter(name, shared)
        if names:
            _read_locally(module, mesh, names)


def _read_locally(module: nn.Module, mesh: DeviceMesh, names: list[str]) -> None:
    """Let the layer see plain tensors where every process of `tp` has the same parameter.

    They stay DTensors for FSDP, clipping and the optimizer, which want all parameters on one mesh. While FSDP has a
    parameter whole for a forward or backward, it is on the mesh of `tp` alone.
    """

    def reader(name: str) -> Any:
        def read(self: nn.Module) -> Any:
            value = self._parameters[name]
            return value.to_local() if isinstance(value, DTensor) and value.device_mesh == mesh else value

        return property(read)

    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {name: reader(name) for name in names})
