"""What Fira and GaLore share: groups, batches of equal matrices, refreshes, state that resumes."""

from __future__ import annotations

import functools
import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError, nearest
from whimbrel.optim import counter, lowrank, storage
from whimbrel.optim.adamw.optimizer import adamw_step, decay
from whimbrel.optim.device import HostCopy, to_device
from whimbrel.optim.groups import ALIASES, resolve_side
from whimbrel.optim.kernels import PROVEN_ON
from whimbrel.optim.layout import Entry, matrix_layout, other_layout, sides
from whimbrel.optim.matrix import Key, Matrix, batches, count_matrices, layout_of, matrices, place_of, stack_grads
from whimbrel.optim.options import check_options, check_rank
from whimbrel.optim.sharding import (
    WHOLE,
    Spread,
    full,
    local,
    local_grad,
    matrix_placements,
    part_of,
    place,
    split_over,
    zeros,
)

if TYPE_CHECKING:
    from whimbrel.optim.kernels.launch import Batch

LARGEST_GAP = 8
"""Most candidates from one lazy refresh of a matrix to the next."""
PIECE_ELEMENTS = 1 << 24
"""Most elements of a parameter in few bits, outside of low-rank groups, that are stepped at once: beside its state a
step takes some 40 bytes for each, which for all of an embedding would be more than the state of all matrices."""
_IN_BACKWARD = (
    "{} does not go with updates in backward, where no two gradients exist at once; "
    "leave it out, or leave out fuse_into_backward"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a parameter may be in."""

_PLANNED = ("impl", "rank", "refresh_steps", "seed", "side", "stagger")
"""Group keys from which a plan follows."""

ACCEPTED = ("params", "name", "param_names", "low_rank", "initial_lr", "foreach", "fused")
"""Group keys without a meaning here, set by `param_groups`, by torch's schedulers and by training engines."""


class Projected(NamedTuple):
    """B gradients of one shape on their way through a step.

    grad [B, m, n], float32, zero where not active; slice_norm [B, n] or
    [B, m], the norm of each slice; active [B], false where the gradient is zero or not finite; basis [B, d, r]. Under a
    spread they are the parts that this process holds, slice_norm that of the slices which it owns.
    """

    grad: Tensor
    slice_norm: Tensor
    active: Tensor
    basis: Tensor
    side: str
    spread: Spread = WHOLE

    def down(self) -> Tensor:
        """The gradients in the coordinates of the bases, for the slices that this process owns."""
        low = lowrank.down(self.grad, self.basis, self.side)
        return self.spread.own(low, -1 if self.side == "left" else -2)


class Held(NamedTuple):
    """A low-rank parameter as a plan was made for it: what it would have to be made anew for."""

    param: Tensor
    state: dict[str, Tensor]
    entries: list[Tensor]
    """Of the state."""
    address: int
    """Of the part that this process holds."""
    layout: Any
    members: list[Matrix]

    def renew(self, states: Any) -> bool:
        """Take the gradient of this step; whether the rest is as it was."""
        param = self.param
        if states.get(param) is not self.state or param.grad is None:
            return False
        if any(now is not then for now, then in zip(self.state.values(), self.entries, strict=False)):
            return False
        weight, grad = local(param), local_grad(param)
        if weight.data_ptr() != self.address or layout_of(weight, grad) != self.layout:
            return False
        for matrix in self.members:
            expert = matrix.key[1]
            matrix.grad = grad if expert is None else grad[expert]
        return True


class Plan(NamedTuple):
    """What a group's step does to parameters that have all been stepped before, as long as nothing of it changes."""

    number: int
    """Of the group."""
    options: list[Any]
    """Values of _PLANNED."""
    found: list[Matrix]
    held: list[Held]
    """Their parameters, of which only the gradients are new in each step."""
    due: dict[int, list[Matrix]]
    """Matrices by the number of steps after which their bases are fitted, modulo refresh_steps."""
    fused: list[tuple[Batch, Tensor]]
    """Batches for the kernels, and the words of their matrices."""
    taken: set[Key]
    others: list[list[Matrix]]
    """Batches for PyTorch."""
    rest: list[Tensor]
    """Parameters that are not projected."""
    replay: Any
    """Of the batches for the kernels: a `launch.Replay`, or None."""

    def renew(self, group: dict[str, Any], states: Any) -> bool:
        """Take the gradients of this step; whether the plan still stands."""
        return (
            [group[name] for name in _PLANNED] == self.options
            and all(states.get(param) for param in self.rest)
            and all(held.renew(states) for held in self.held)
        )

    def release(self) -> None:
        """Hold no gradient until the next step."""
        for matrix in self.found:
            del matrix.grad


class LowRankOptimizer(torch.optim.Optimizer):
    """Groups marked low-rank go through `rule` with state of a low rank, the others through AdamW.

    A group is low-rank if it has "rank", or "low_rank": True; its keys win over the arguments. At least one
    group must carry one of the two keys, so that a plain list of parameters is not taken for a choice.

    State of a low-rank matrix, all float32: `step` (scalar), `basis` [d, r], `exp_avg` and `exp_avg_sq` of
    the projected shape, and the scalars of the method. State of any other parameter: `step`, and `exp_avg`
    and `exp_avg_sq` in float32 of its shape. Each group counts its steps in group["step"], from which the
    refresh phase follows. All of it is in `state_dict`, which holds tensors and numbers only.

    A matrix is left alone, weight decay included, in a step where its gradient is zero or not finite. Until
    the first gradient that is not zero a step allocates state and does nothing else. The host reads from the
    device only for matrices that have not been stepped since construction or loading.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then leaves grad_scale and found_inf to `step`

    rule: ClassVar[Callable[..., Any]]
    """(Projected, *state, **options) -> (update [B, m, n], *state after); the weights become W - update."""
    coefficients: ClassVar[Callable[..., Any]]
    """The part of `rule` that follows from norms: (lowrank.Slices, correction [B], active [B], *scalars, **options)
    -> (lowrank.Coefficients, *scalars after)."""
    factors: ClassVar[Callable[..., lowrank.Factors]]
    """The numbers in `coefficients`, from the options."""
    random: ClassVar[bool] = False
    """Whether bases may be drawn, refresh="random"."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """Names of the method's own scalars in the state, after step, exp_avg and exp_avg_sq."""
    options: ClassVar[tuple[str, ...]] = ()
    """Group keys that `rule` takes besides lr, betas and eps."""

    reports_grad_norm = False
    """Whether `report_grad_norm` was called."""
    grad_norm: Tensor | None = None
    """Norm of all gradients of the last step, a scalar in float32 on the device; None before `report_grad_norm`."""

    def __init__(self, groups: Iterable[Any], defaults: dict[str, Any]) -> None:
        check_options(defaults, random=self.random)
        self._forget()
        groups = list(groups)
        if not any(isinstance(group, dict) and {"rank", "low_rank"} & group.keys() for group in groups):
            raise ConfigError(
                f"no group given to {type(self).__name__} is marked low-rank; "
                'pass param_groups(model, low_rank=...), or set "rank" on a group'
            )
        super().__init__(groups, {**defaults, "step": 0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _forget(self) -> None:
        """Drop what follows from the state and the parameters."""
        self._started: set[Key] = set()
        self._gaps: dict[Key, HostCopy] = {}
        self._places: dict[Tensor, tuple[Spread, tuple[int, int]]] = {}
        self._offsets: dict[Tensor, int] = {}
        self._home: dict[Tensor, int] = {}
        self._updated: set[Tensor] = set()
        self._counted: set[int] = set()
        self._sharers: ProcessGroup | None = getattr(self, "_sharers", None)
        self._in_backward: bool = getattr(self, "_in_backward", False)
        self._plans: dict[tuple[int, ...], list[Plan]] = {}
        self._rates: dict[int, Tensor] = {}
        self._drawn: dict[tuple[int, int, int], tuple[tuple[int, ...], Tensor]] = {}
        self._num_matrices = 0
        self._bases: dict[tuple[int, tuple[int, ...], torch.device], Tensor] = {}
        self._squares: dict[tuple[ProcessGroup, ...], Tensor] | None = {} if self.reports_grad_norm else None
        self._parted: dict[Tensor, tuple[ProcessGroup, ...]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raises ConfigError for an unknown key, a value or a rank that is not allowed."""
        group = dict(param_group)
        for alias, name in ALIASES.items():
            if alias in group and name in group:
                raise ConfigError(f"a group has both '{alias}' and '{name}', which mean the same; keep one of them")
            if alias in group:
                group[name] = group.pop(alias)
        known = [*self.defaults, *ACCEPTED]
        for name in group:
            if name not in known:
                raise ConfigError(f"unknown key '{name}' in a group of {type(self).__name__}{nearest(name, known)}")
        # always written, as torch fills in "rank" from the arguments in every group
        group.setdefault("low_rank", "rank" in group)
        check_options({**self.defaults, **group}, random=self.random)
        super().add_param_group(group)
        added = self.param_groups[-1]
        self._offsets = {}
        for name, param in zip(_names(added, len(self.param_groups) - 1), added["params"], strict=True):
            if getattr(param, "_fsdp_flattened", False) or type(param).__name__ == "FlatParameter":
                raise UnsupportedError(
                    f"{name} is a flat parameter of FSDP1 (FullyShardedDataParallel), in which matrices are lost; "
                    "use torch.distributed.fsdp.fully_shard"
                )
            if param.dtype not in DTYPES:
                dtype = str(param.dtype).removeprefix("torch.")
                raise UnsupportedError(
                    f"{name} is {dtype}, but {type(self).__name__} computes in float32; "
                    "use float32, bfloat16 or float16"
                )
        if added["low_rank"]:
            for name, param in zip(_names(added, len(self.param_groups) - 1), added["params"], strict=True):
                check_rank(added["rank"], tuple(param.shape), name)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyrefly: ignore [bad-override]
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward and (hasattr(self, "grad_scale") or hasattr(self, "found_inf")):
            raise UnsupportedError(_IN_BACKWARD.format("a gradient scaler"))
        self._advance([param for group in self.param_groups for param in group["params"] if param.grad is not None])
        self._counted.clear()
        self._updated.clear()
        if self._squares is not None:
            self.grad_norm = self._total_norm(self._squares)
        return loss

    def report_grad_norm(self) -> None:
        """From the next step on, leave the global norm of its gradients in `grad_norm`, without a look at them more.

        The norm is that of `torch.nn.utils.clip_grad_norm_`, over all processes, of unscaled gradients, from the norms
        that a step takes of its matrices; only parameters outside of low-rank groups are read for it. It is there
        under `fuse_into_backward` too, where no other way leads to it. Parameters count from the step on in which
        their state begins. Nothing is clipped.
        """
        self.reports_grad_norm = True
        self._squares = {}
        self._plans = {}

    def _note(self, param: Tensor, square: Tensor) -> None:
        """Add the squared norm of the gradient that is here, or of slices of it that are this process's to count."""
        held = self._square(param)
        if held is not None:
            held += square

    def _square(self, param: Tensor) -> Tensor | None:
        """Where squared norms are added up that are summed over the same processes as this parameter's."""
        if self._squares is None:
            return None
        groups = self._parts(param)
        if groups not in self._squares:
            self._squares[groups] = torch.zeros((), device=param.device)
        return self._squares[groups]

    def _parts(self, param: Tensor) -> tuple[ProcessGroup, ...]:
        """Groups of processes over which the squared norm of a parameter's gradient is a sum of what each notes."""
        if param not in self._parted:
            low_rank = self.param_groups[self._home[param]]["low_rank"]
            parts = self._place(param)[0].summands if low_rank else split_over(param, range(param.ndim))
            self._parted[param] = parts
        return self._parted[param]

    def _total_norm(self, squares: dict[tuple[ProcessGroup, ...], Tensor]) -> Tensor:
        """The norm of all that was noted, on every process; what was noted is zero again."""
        params = [param for group in self.param_groups for param in group["params"]]
        total = torch.zeros((), device=params[0].device)
        for groups in dict.fromkeys(map(self._parts, params)):
            part = squares.get(groups, total.new_zeros(())).clone()
            for processes in groups:
                dist.all_reduce(part, group=processes)
            total += part.to(total.device)
        for held in squares.values():
            held.zero_()
        return total.sqrt()

    def _advance(self, params: Sequence[Tensor]) -> None:
        """Update these parameters, which have gradients; a group's first in a step counts the step."""
        if not self._offsets:
            self._number()
        ids = tuple(map(id, params))
        plans = self._plans.pop(ids, None)
        if plans is not None and all(plan.renew(self.param_groups[plan.number], self.state) for plan in plans):
            for plan in plans:
                self._run(plan, set())
            self._plans[ids] = plans
            return
        self._allocate(params)
        chosen: dict[int, list[Tensor]] = {}
        for param in params:
            chosen.setdefault(self._home[param], []).append(param)
        low_rank = {number for number in chosen if self.param_groups[number]["low_rank"]}
        found = {number: self._matrices(self.param_groups[number], chosen[number]) for number in low_rank}
        others = [param for number in chosen.keys() - low_rank for param in chosen[number]]
        fresh = self._start([matrix for number in sorted(low_rank) for matrix in found[number]], others)
        plans, whole = [], True
        for number in sorted(chosen):
            group = self.param_groups[number]
            started = [matrix for matrix in found.get(number, []) if matrix.key in self._started]
            rest = [] if number in low_rank else [param for param in chosen[number] if (param, None) in self._started]
            whole &= len(started) + len(rest) == len(found[number] if number in low_rank else chosen[number])
            if started or rest:
                plans.append(self._plan(group, number, started, rest))
                self._run(plans[-1], fresh)
        if whole:
            self._plans[ids] = plans

    def _run(self, plan: Plan, fresh: set[Key]) -> None:
        """Step a group's matrices and other parameters; the first of its calls in a step counts it."""
        group = self.param_groups[plan.number]
        if plan.number not in self._counted:
            self._counted.add(plan.number)
            group["step"] += 1
        if plan.found:
            self._step_matrices(group, plan, fresh)
        if plan.rest:
            self._step_others(group, plan.rest)
        plan.release()

    def _plan(self, group: dict[str, Any], number: int, found: list[Matrix], rest: list[Tensor]) -> Plan:
        due: dict[int, list[Matrix]] = {}
        for matrix in found if group["refresh"] != "random" else ():
            due.setdefault(-self._shift(group, matrix.offset) % group["refresh_steps"], []).append(matrix)
        members: dict[Tensor, list[Matrix]] = {}
        for matrix in found:
            members.setdefault(matrix.key[0], []).append(matrix)
        kernels = [matrix for matrix in found if self._fuses(group, matrix)]
        taken = {matrix.key for matrix in kernels}
        fused: list[Batch] = []
        replay = None
        if kernels:
            from whimbrel.optim.kernels import launch

            fused = launch.batches(kernels, group["rank"], group["side"])
            replay = launch.Replay() if self._replays(kernels) else None
        return Plan(
            number,
            [group[name] for name in _PLANNED],
            found,
            [self._hold(param, its) for param, its in members.items()],
            due,
            [(batch, self._base_words(group, batch.matrices)) for batch in fused],
            taken,
            batches([matrix for matrix in found if matrix.key not in taken]),
            rest,
            replay,
        )

    def _hold(self, param: Tensor, members: list[Matrix]) -> Held:
        weight, state = local(param), self.state[param]
        layout = layout_of(weight, local_grad(param))
        return Held(param, state, list(state.values()), weight.data_ptr(), layout, members)

    def _replays(self, matrices: Sequence[Matrix]) -> bool:
        """Whether steps may be replayed: all at once, on one GPU, without words between processes."""
        devices = {matrix.weight.device for matrix in matrices}
        together = len(devices) == 1 and not self._in_backward and not any(x.spread.split for x in matrices)
        return together and next(iter(devices)).type == "cuda"

    def _number(self) -> None:
        """Number the matrices of all groups, and after them the other parameters; note each one's group."""
        self._plans = {}
        low_rank = [param for group in self.param_groups if group["low_rank"] for param in group["params"]]
        others = [param for group in self.param_groups if not group["low_rank"] for param in group["params"]]
        counts = [count_matrices(param) for param in low_rank]
        self._num_matrices = sum(counts)
        starts = itertools.accumulate([0, *counts, *[1] * len(others)])
        self._offsets = dict(zip([*low_rank, *others], starts, strict=False))
        self._home = {param: number for number, group in enumerate(self.param_groups) for param in group["params"]}

    def _matrices(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[Matrix]:
        found: list[Matrix] = []
        for param in params:
            found += matrices(param, self.state[param], self._offsets[param], *self._place(param))
        return found

    def _place(self, param: Tensor) -> tuple[Spread, tuple[int, int]]:
        if param not in self._places:
            side = self.param_groups[self._home[param]]["side"]
            self._places[param] = place_of(param, resolve_side(side, param.shape) == "left")
        return self._places[param]

    def fuse_into_backward(
        self,
        model: nn.Module,
        *,
        accumulation_steps: int = 1,
        clip_grad_norm: float = 0.0,
        grad_scaler: Any = None,
    ) -> None:
        """Update each parameter as soon as backward has its gradient, and free the gradient: the least memory.

        `step` then only ends the step; it must still be called after every backward. Under FSDP2 the update follows
        the reduction of each unit. The other arguments say what the training loop does, and refuse what needs all
        gradients at once: accumulation over several backward passes, clipping by the global norm, a gradient scaler.
        The limiter of Fira bounds each matrix's update in their place.

        Raises UnsupportedError for these, and in the second backward before a `step`; ConfigError where a trainable
        parameter of `model` is in no group, since its gradient would stay.
        """
        for asked, what in (
            (accumulation_steps != 1, f"accumulation_steps = {accumulation_steps}"),
            (bool(clip_grad_norm), f"clip_grad_norm = {clip_grad_norm}"),
            (grad_scaler is not None and grad_scaler.is_enabled(), "a gradient scaler"),
        ):
            if asked:
                raise UnsupportedError(_IN_BACKWARD.format(what))
        if self._in_backward:
            raise ConfigError("fuse_into_backward has been called already; call it once for each optimizer")
        self._number()
        for name, param in model.named_parameters():
            if param.requires_grad and param not in self._home:
                raise ConfigError(f"{name} is in no group of {type(self).__name__}; add it, or switch its gradient off")
        self._in_backward = True
        # a hook that held the optimizer would be a cycle that no collector sees, and keep all weights for ever
        this = weakref.ref(self)

        def update(param: Tensor) -> None:
            optimizer = this()
            if optimizer is not None:
                optimizer._update_in_backward(param)

        for param in self._home:
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(update)

    @torch.no_grad()
    def _update_in_backward(self, param: Tensor) -> None:
        if param in self._updated:
            raise UnsupportedError(_IN_BACKWARD.format("a second backward before optimizer.step()"))
        self._updated.add(param)
        self._advance([param])
        param.grad = None

    def share_refreshes(self, processes: ProcessGroup | None = None) -> None:
        """Fit each new basis on one of `processes` (all by default) and send it to the rest, as data parallelism wants.

        For parameters and gradients that are equal on these processes, as under DistributedDataParallel; all must
        call this, before the first step. The bases are then equal bit for bit, and a step with several new ones takes
        1 / world of their time. DTensors need no call: processes that hold parts of a matrix fit its basis together.
        """
        self._sharers = processes if processes is not None else dist.distributed_c10d._get_default_group()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; it keeps its float32 whatever the parameters' dtype.

        Raises CheckpointError where an entry is missing or does not have the shape that its parameter needs.
        """
        super().load_state_dict(state_dict)
        self._forget()
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for g, group in enumerate(self.param_groups):
            for name, param in zip(_names(group, g), group["params"], strict=True):
                loaded = state_dict["state"].get(next(saved))
                if not loaded:
                    continue
                layout = self._layout(group, param)
                for key in layout:
                    if key not in loaded:
                        raise CheckpointError(
                            f"optimizer state of {name} lacks '{key}'; "
                            f"load a state that {type(self).__name__} has written"
                        )
                for key, (shape, dtype) in layout.items():
                    if tuple(loaded[key].shape) != shape:
                        raise CheckpointError(
                            f"optimizer state '{key}' of {name} has shape {list(loaded[key].shape)}, "
                            f"but needs {list(shape)}; load it into the model that it was saved with"
                        )
                    if loaded[key].dtype != storage.DTYPES[dtype]:
                        found = str(loaded[key].dtype).removeprefix("torch.")
                        raise CheckpointError(
                            f"optimizer state '{key}' of {name} is {found}, but needs {dtype}; "
                            "load it with the state_dtype, basis_dtype and other_dtype of its run"
                        )
                    # torch has cast it to the parameter's dtype, so go back to what was saved
                    self.state[param][key] = self._placed(group, param, key, loaded[key].to(param.device))

    def _layout(self, group: dict[str, Any], param: Tensor) -> dict[str, Entry]:
        if not group["low_rank"]:
            return other_layout(param.shape, other_dtype=group["other_dtype"])
        return matrix_layout(
            param.shape,
            rank=group["rank"],
            side=group["side"],
            scalars=(*self.scalars, *(("refresh_gap",) if group["lazy_overlap"] else ())),
            state_dtype=group["state_dtype"],
            basis_dtype=None if group["refresh"] == "random" else group["basis_dtype"],
        )

    def _allocate(self, params: Sequence[Tensor]) -> None:
        for param in params:
            if self.state[param]:
                continue
            if param.grad is not None and param.grad.is_sparse:
                raise UnsupportedError(f"{type(self).__name__} takes no sparse gradients; use dense ones")
            for key in self._layout(self.param_groups[self._home[param]], param):
                self.state[param][key] = self.empty_state(param, key)

    def layout(self, param: Tensor) -> dict[str, Entry]:
        """Names, shapes and dtypes of a parameter's state."""
        if not self._offsets:
            self._number()
        return self._layout(self.param_groups[self._home[param]], param)

    def empty_state(self, param: Tensor, key: str) -> Tensor:
        """Zeros for one entry of a parameter's state; a DTensor where processes hold parts of it.

        Moments lie with the slices, or rows, of their parameter; bases and numbers are the same on every process.
        """
        entry = self.layout(param)[key]
        group = self.param_groups[self._home[param]]
        dtype = storage.DTYPES[entry.dtype]
        if not isinstance(param, DTensor):
            return torch.zeros(entry.shape, dtype=dtype, device=param.device)
        return zeros(entry.shape, dtype, param, self._placements(group, param, key))

    def _placements(self, group: dict[str, Any], param: DTensor, key: str) -> Sequence[Placement]:
        if group["low_rank"]:
            return matrix_placements(param, key, resolve_side(group["side"], param.shape) == "left")
        if key == "step":
            return [Replicate()] * param.device_mesh.ndim
        by_last = any(getattr(p, "dim", None) in (-1, param.ndim - 1) for p in param.placements)
        if by_last and "exp_avg_scale" in self._layout(group, param):
            raise UnsupportedError(
                "other_dtype = 'int8' takes no parameters that are split along their last dimension, as vectors are "
                "under FSDP2; use float32 or bfloat16"
            )
        return param.placements

    def _placed(self, group: dict[str, Any], param: Tensor, key: str, loaded: Tensor) -> Tensor:
        """A copy of a loaded entry that lies over processes as it does here, however it was saved."""
        placements = self._placements(group, param, key) if isinstance(param, DTensor) else ()
        if isinstance(loaded, DTensor) and isinstance(param, DTensor) and list(loaded.placements) == list(placements):
            return loaded.detach().clone()
        whole = full(loaded)
        if not isinstance(param, DTensor) or all(isinstance(p, Replicate) for p in placements):
            return whole.detach().clone()
        return place(whole, param, placements)

    def _start(self, found: Sequence[Matrix], others: Sequence[Tensor]) -> set[Key]:
        """Note what is stepped from now on; returns the matrices that need their first basis.

        A loaded state may already count steps. Matrices wait for a gradient of their own, the other
        parameters for any gradient at all, as an engine's zero-gradient step before loading must not count.
        """
        waiting = [matrix for matrix in found if matrix.key not in self._started]
        rest = [param for param in others if (param, None) not in self._started]
        if not waiting and not rest:
            return set()
        norms = [torch.linalg.vector_norm(matrix.grad, dtype=torch.float32).double() for matrix in waiting]
        norms = [float(matrix.spread.everywhere(x.square())) for matrix, x in zip(waiting, norms, strict=True)]
        norms += [float(full(torch.linalg.vector_norm(param.grad.float()))) for param in rest if param.grad is not None]
        steps = [matrix.state["step"] for matrix in waiting] + [self.state[param]["step"] for param in rest]
        counted = [bool(step > 0) for step in steps]
        awake = bool(self._started) or any(counted) or any(norm != 0 for norm in norms)
        fresh = set()
        for matrix, count, norm in zip(waiting, counted, norms, strict=False):
            if count or 0 < norm < float("inf"):
                self._started.add(matrix.key)
                if not count:
                    fresh.add(matrix.key)
        self._started |= {
            (param, None) for param, count in zip(rest, counted[len(waiting) :], strict=True) if count or awake
        }
        return fresh

    def _step_others(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        for param in params if self._squares is not None else ():
            norm = torch.linalg.vector_norm(local_grad(param), dtype=torch.float32)
            self._note(param, self._unscaled(norm).square())
        plain = [p for p in params if p.dtype == self.state[p]["exp_avg"].dtype == torch.float32]
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} | {"active": self._usable()}
        if plain:
            states = [{key: local(value) for key, value in self.state[param].items()} for param in plain]
            gradients = [self._unscaled(local_grad(param)) for param in plain]
            held = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
            adamw_step([local(param) for param in plain], gradients, *held, **options)
        for param in params:
            if param.dtype != torch.float32 or self.state[param]["exp_avg"].dtype != torch.float32:
                self._step_other(group, param, options)

    def _step_other(self, group: dict[str, Any], param: Tensor, options: dict[str, Any]) -> None:
        """Step one parameter, whose weights or moments are not in float32; by rows, each needs copies that are."""
        weight, grad = local(param), local_grad(param)
        state = {key: local(value) for key, value in self.state[param].items()}
        row, column = _first(param)
        counted = state["step"]
        for start, stop in _pieces(weight):
            rows = slice(start, stop) if weight.ndim else ...
            part = {key: value[rows] for key, value in state.items() if key != "step"}
            moments = [storage.read_moment([part], key)[0] for key in ("exp_avg", "exp_avg_sq")]
            value, counted = weight[rows].float(), state["step"].clone()
            adamw_step([value], [self._unscaled(grad[rows])], [counted], *([x] for x in moments), **options)
            keys = counter.key(self._words_of(group, [self._offsets[param]], param.device), counted[None])
            first = row + start * math.prod(weight.shape[1:-1]), column
            for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                storage.write_moment([part], key, moment[None], keys, self._usable(), first=first)
            _write_weight(weight[rows], value, keys[0], group["stochastic_rounding"], first)
        state["step"].copy_(counted)

    def _step_matrices(self, group: dict[str, Any], plan: Plan, fresh: set[Key]) -> None:
        every = group["refresh_steps"]
        if group["refresh"] == "random":
            fresh = set()
        due = {
            matrix.key
            for matrix in plan.due.get((group["step"] - 1) % every, ())
            if matrix.key not in fresh and self._phase(group, matrix.offset) // every % self._gap(group, matrix) == 0
        }
        refreshed = []
        if fresh or due:
            refreshed = [matrix for matrix in plan.found if matrix.key in due or matrix.key in fresh]
        apart = self._fit_apart(group, refreshed, fresh)
        for keys in (fresh, due):
            for batch in batches([x for x in refreshed if x.key in plan.taken and x.key in keys]):
                self._refresh_alone(group, batch, fresh, apart)
        if plan.fused:
            self._step_fused(group, plan)
        for batch in plan.others:
            projected = self._project(group, batch)
            self._refresh_some(group, batch, projected, due, fresh, apart)
            self._apply(group, batch, projected)

    def _fuses(self, group: dict[str, Any], matrix: Matrix) -> bool:
        """Whether the kernels step this matrix."""
        small = matrix.weight.numel() < 1 << 31  # the kernels count elements in 32 bits
        if group["impl"] == "auto":
            # matrices in parts have been stepped by the kernels on processors alone
            known = matrix.weight.is_cuda and small and not matrix.spread.split
            return known and _proven(matrix.weight.device)
        if group["impl"] == "triton" and not (matrix.weight.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
            raise UnsupportedError(
                f"impl = 'triton' needs parameters on a CUDA device, these are on {matrix.weight.device.type}; "
                "use impl = 'auto' or 'eager'"
            )
        if group["impl"] == "triton" and not small:
            raise UnsupportedError(
                f"impl = 'triton' takes no matrix of 2^31 elements or more, as {list(matrix.shape)}; use impl = 'auto'"
            )
        if group["impl"] == "triton" and matrix.spread.depth.groups:
            raise UnsupportedError(
                "impl = 'triton' takes no matrices whose slices are split over processes; use impl = 'auto', or "
                "side = 'right' under FSDP2"
            )
        return group["impl"] == "triton"

    def _step_fused(self, group: dict[str, Any], plan: Plan) -> None:
        from whimbrel.optim.kernels import launch

        options = {name: group[name] for name in self.options}
        scaling = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        shared = {
            "factors": self.factors(**options),
            "scalars": self.scalars,
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "stochastic": group["stochastic_rounding"],
        }
        drawn = [
            self._basis_keys(group, batch.matrices) if group["refresh"] == "random" else None for batch, _ in plan.fused
        ]

        def step(lr: float | Tensor) -> None:
            for (batch, words), keys in zip(plan.fused, drawn, strict=True):

                def coefficients(
                    slices: lowrank.Slices, correction: Tensor, active: Tensor, batch: Batch = batch
                ) -> tuple[lowrank.Coefficients, list[Tensor]]:
                    held = (storage.stack([matrix.state[name] for matrix in batch.matrices]) for name in self.scalars)
                    found, *after = self.coefficients(slices, correction, active, *held, lr=lr, **options)
                    return found, after

                launch.fused_step(
                    batch,
                    bases=words,
                    drawn=keys,
                    coefficients=coefficients,
                    lr=lr,
                    found_inf=scaling[0],
                    grad_scale=scaling[1],
                    square=self._square(batch.matrices[0].key[0]),
                    **shared,
                )

        lr, device = group["lr"], plan.fused[0][0].matrices[0].weight.device
        if plan.replay is None or torch.cuda.is_current_stream_capturing():
            step(lr)
            return
        if not isinstance(lr, Tensor) or not lr.is_cuda:
            # where a graph reads it
            if plan.number not in self._rates:
                self._rates[plan.number] = torch.zeros((), device=device)
            lr = self._rates[plan.number].fill_(float(lr))
        held = [lr, *scaling, *drawn, *(self._square(batch.matrices[0].key[0]) for batch, _ in plan.fused)]
        known = (
            [batch.moves() for batch, _ in plan.fused],
            [None if x is None else (x.data_ptr(), x.dtype) for x in held],
            shared,
        )
        plan.replay.run(known, device, lambda: step(lr))

    def _fit_apart(self, group: dict[str, Any], refreshed: Sequence[Matrix], fresh: set[Key]) -> dict[Key, Tensor]:
        """Bases [d, r] that processes fit for each other: each whole fit is done by one of them, and sent to the rest.

        Exact fits of matrices that lie on one dimension of a mesh; and all fits, after `share_refreshes`.
        """
        sharers: dict[ProcessGroup, list[Matrix]] = {}
        for matrix in refreshed:
            groups = matrix.spread.slices.groups + matrix.spread.depth.groups
            if self._sharers is not None and not groups:
                sharers.setdefault(self._sharers, []).append(matrix)
            elif len(groups) == 1 and group["refresh"] == "exact":
                sharers.setdefault(groups[0], []).append(matrix)
        found = {}
        for processes, members in sharers.items():
            world, rank = dist.get_world_size(processes), dist.get_rank(processes)
            # equal work side by side: whoever waits, waits for the heaviest of a round
            members.sort(key=lambda matrix: (-math.prod(matrix.shape) * min(matrix.shape), matrix.offset))
            for round in (members[i : i + world] for i in range(0, len(members), world)):
                left = [resolve_side(group["side"], matrix.shape) == "left" for matrix in round]
                grads = [matrix.full_grad(is_left) for matrix, is_left in zip(round, left, strict=True)]
                for i, (matrix, grad, is_left) in enumerate(zip(round, grads, left, strict=True)):
                    side = "left" if is_left else "right"
                    if i == rank:
                        found[matrix.key] = self._fit(group, [matrix], grad[None].float(), side, fresh)[0].contiguous()
                    else:
                        shape = lowrank.basis_shape(matrix.shape, group["rank"], side)
                        found[matrix.key] = torch.empty(shape, device=grad.device)
                for i, matrix in enumerate(round):
                    dist.broadcast(found[matrix.key], group=processes, group_src=i)
        return found

    def _fit(
        self,
        group: dict[str, Any],
        chosen: Sequence[Matrix],
        grad: Tensor | list[Tensor],
        side: str,
        fresh: set[Key],
        old: Tensor | None = None,
        spread: Spread = WHOLE,
    ) -> Tensor:
        """Bases [B, d, r] of B gradients, or their parts under a spread; all first ones, or all later ones."""
        rank = group["rank"]
        if group["refresh"] == "exact" or chosen[0].key in fresh:
            stack = grad if isinstance(grad, Tensor) else storage.stack(grad)
            if group["refresh"] == "exact":
                return lowrank.fit_exact(self._whole(chosen, stack, side, spread).float(), side, rank)
            noise = spread.depth.cut(self._noise(group, chosen, stack.device, side), -2)
            return spread.depth.join(lowrank.fit_first(stack.float(), noise, side, rank, spread=spread), -2)
        old = self._basis(group, chosen) if old is None else old
        half = chosen[0].grad.dtype == torch.bfloat16
        start = spread.depth.cut(old, -2)
        new = lowrank.fit_warm(grad, start, side, products=torch.bfloat16 if half else torch.float32, spread=spread)
        return spread.depth.join(new, -2)

    def _whole(self, chosen: Sequence[Matrix], grad: Tensor, side: str, spread: Spread) -> Tensor:
        if not spread.split:
            return grad
        of_slices, of_depth = (-1, -2) if side == "left" else (-2, -1)
        return spread.slices.join(spread.depth.join(grad, of_depth), of_slices)

    def _refresh_some(
        self,
        group: dict[str, Any],
        batch: list[Matrix],
        projected: Projected,
        due: set[Key],
        fresh: set[Key],
        apart: dict[Key, Tensor],
    ) -> None:
        """Fit bases anew, in the states and in `projected`."""
        for keys in (fresh, due):
            indices = [i for i, matrix in enumerate(batch) if matrix.key in keys]
            if not indices:
                continue
            grad, active = projected.grad, projected.active
            if len(indices) < len(batch):
                grad, active = (torch.stack([t[i] for i in indices]) for t in (grad, active))
            chosen = [batch[i] for i in indices]
            self._refresh(group, chosen, grad, active, fresh, apart)
            stored = projected.spread.depth.cut(self._basis(group, chosen), -2)
            for i, basis in zip(indices, stored.unbind(), strict=True):
                projected.basis[i].copy_(basis)

    def _refresh_alone(
        self, group: dict[str, Any], batch: list[Matrix], fresh: set[Key], apart: dict[Key, Tensor]
    ) -> None:
        """Fit bases anew where the kernels do the step: from gradients in their own dtype and at their own scale."""
        grads = [matrix.grad for matrix in batch]
        norms = torch.stack(torch._foreach_norm(grads, dtype=torch.float32))
        active = self._active(batch[0].spread.everywhere(norms.square()))
        self._refresh(group, batch, grads, active, fresh, apart)

    def _gap(self, group: dict[str, Any], matrix: Matrix) -> int:
        """Candidates from one refresh of the matrix to the next: 1, or more where refreshes are lazy."""
        if not group["lazy_overlap"]:
            return 1
        if matrix.key not in self._gaps:
            # after loading; later refreshes write to host memory without making anything wait
            self._gaps[matrix.key] = HostCopy(matrix.state["refresh_gap"])
        return max(1, int(self._gaps[matrix.key].read()))

    def _usable(self) -> Tensor | None:
        """Whether this step counts, as a scalar on the device, where a gradient scaler has left its verdict."""
        found = getattr(self, "found_inf", None)
        return None if found is None else found.reshape(()) == 0

    def _unscaled(self, grad: Tensor) -> Tensor:
        scale = getattr(self, "grad_scale", None)
        return grad.float() if scale is None else grad.float() / scale.reshape(())

    def _keys(self, group: dict[str, Any], batch: Sequence[Matrix]) -> Tensor:
        """Words [B] for stochastic rounding in the step that has just been counted."""
        steps = storage.stack([matrix.state["step"] for matrix in batch])
        words = self._base_words(group, batch)
        return counter.key(words, steps)

    def _base_words(self, group: dict[str, Any], batch: Sequence[Matrix]) -> Tensor:
        return self._words_of(group, [matrix.offset for matrix in batch], batch[0].weight.device)

    def _words_of(self, group: dict[str, Any], offsets: Sequence[int], device: torch.device) -> Tensor:
        known = tuple(offsets)
        bases = self._bases.get((group["seed"], known, device))
        if bases is None:
            words = torch.tensor([counter.base(group["seed"], index) for index in known])
            bases = self._bases[group["seed"], known, device] = to_device(words, device)
        return bases

    def _basis(self, group: dict[str, Any], batch: Sequence[Matrix]) -> Tensor:
        """The bases [B, d, r], whole on every process."""
        _, d = sides(batch[0].shape, group["side"])
        if group["refresh"] != "random":
            return storage.read_basis([matrix.state for matrix in batch], d)
        return lowrank.drawn(self._basis_keys(group, batch), d, group["rank"])

    def _basis_keys(self, group: dict[str, Any], batch: Sequence[Matrix]) -> Tensor:
        """Words [B] from which the bases of this step are drawn."""
        every = group["refresh_steps"]
        found = tuple(
            counter.drawn_basis_key(
                counter.base(group["seed"], matrix.offset), self._phase(group, matrix.offset) // every
            )
            for matrix in batch
        )
        role = group["seed"], batch[0].offset, len(batch)
        held = self._drawn.get(role)
        if held is None or held[0] != found:
            words = to_device(torch.tensor(found), batch[0].weight.device)
            # in their place, where replayed launches read them
            self._drawn[role] = held = found, words if held is None else held[1].copy_(words)
        return held[1]

    def _phase(self, group: dict[str, Any], offset: int) -> int:
        """Steps before this one, shifted so that refreshes fall on multiples of `refresh_steps`."""
        return group["step"] - 1 + self._shift(group, offset)

    def _shift(self, group: dict[str, Any], offset: int) -> int:
        return offset * group["refresh_steps"] // self._num_matrices if group["stagger"] else 0

    def _project(self, group: dict[str, Any], batch: list[Matrix]) -> Projected:
        side, spread = resolve_side(group["side"], batch[0].shape), batch[0].spread
        # stack copies, so that the mask below does not reach the gradients
        grad = self._unscaled(stack_grads(batch))
        slice_norm = torch.linalg.vector_norm(grad, dim=lowrank.slice_dim(side))
        if spread.depth.groups:
            slice_norm = spread.own(slice_norm.square(), 1).sqrt()
        active = self._active(spread.total(slice_norm.square()))
        if self._squares is not None:
            self._note(batch[0].key[0], slice_norm.square().sum())
        return Projected(
            grad.masked_fill_(~active[:, None, None], 0.0),
            torch.where(active[:, None], slice_norm, 0.0),
            active,
            spread.depth.cut(self._basis(group, batch), -2),
            side,
            spread,
        )

    def _active(self, total: Tensor) -> Tensor:
        """Which matrices [B] are stepped, by the squares of their norms."""
        active, usable = total.isfinite() & (total > 0), self._usable()
        return active if usable is None else active & usable

    def _noise(self, group: dict[str, Any], chosen: Sequence[Matrix], device: torch.device, side: str) -> Tensor:
        rank, shape = group["rank"], chosen[0].shape
        rows, _ = lowrank.basis_shape(shape, rank, side)
        columns = lowrank.noise_columns(shape, rank, side)
        drawn = [lowrank.noise(rows, columns, seed=group["seed"], index=matrix.offset) for matrix in chosen]
        return torch.stack(drawn).to(device, non_blocking=True)

    def _refresh(
        self,
        group: dict[str, Any],
        chosen: Sequence[Matrix],
        grad: Tensor | list[Tensor],
        active: Tensor,
        fresh: set[Key],
        apart: dict[Key, Tensor],
    ) -> None:
        """Fit the bases of B matrices anew where they are active [B]."""
        spread, side = chosen[0].spread, resolve_side(group["side"], chosen[0].shape)
        old = self._basis(group, chosen)
        if all(matrix.key in apart for matrix in chosen):
            new = torch.stack([apart[matrix.key] for matrix in chosen])
        else:
            new = self._fit(group, chosen, grad, side, fresh, old, spread)
        # a fit that fails leaves NaN, and the old basis then stays
        active = active & new.isfinite().flatten(1).all(1)
        new = torch.where(active[:, None, None], new, old)
        states = [matrix.state for matrix in chosen]
        if group["on_refresh"] != "keep":
            moments = self._moments(chosen, side)
            carried = lowrank.carry(moments, old, new, side, group["on_refresh"])
            kept = lowrank.Moments(
                *(
                    torch.where(active.view(-1, *[1] * (before.ndim - 1)), after, before)
                    for before, after in zip(moments, carried, strict=True)
                )
            )
            # other bits than those of the step that follows
            self._store_moments(chosen, kept, side, counter.mix(self._keys(group, chosen)), active)
        if group["lazy_overlap"]:
            gaps = storage.stack([state["refresh_gap"] for state in states])
            stays = lowrank.overlap(old, new) >= group["lazy_overlap"]
            gaps = torch.where(stays & (gaps > 0), (2 * gaps).clamp_max(LARGEST_GAP), 1.0)
            storage.store(states, "refresh_gap", gaps)
            self._gaps |= {matrix.key: HostCopy(gap) for matrix, gap in zip(chosen, gaps.unbind(), strict=True)}
        storage.write_basis(states, new)

    def _moments(self, batch: Sequence[Matrix], side: str) -> lowrank.Moments:
        """Step [B], and both moments in float32 and the shape of the projected gradient."""
        states = [matrix.state for matrix in batch]
        both = (storage.read_moment(states, key) for key in ("exp_avg", "exp_avg_sq"))
        return lowrank.Moments(
            storage.stack([state["step"] for state in states]), *(x.mT if side == "left" else x for x in both)
        )

    def _store_moments(
        self, batch: Sequence[Matrix], moments: lowrank.Moments, side: str, keys: Tensor, active: Tensor
    ) -> None:
        states, owned = [matrix.state for matrix in batch], batch[0].spread.owned
        for key in ("exp_avg", "exp_avg_sq"):
            value = getattr(moments, key)
            first = 0 if owned is None else owned.start, 0
            storage.write_moment(states, key, value.mT if side == "left" else value, keys, active, first=first)
        storage.store(states, "step", moments.step)

    def _apply(self, group: dict[str, Any], batch: list[Matrix], projected: Projected) -> None:
        states = [matrix.state for matrix in batch]
        update, step, mean, square, *after = self.rule(
            projected,
            *self._moments(batch, projected.side),
            *(storage.stack([state[key] for state in states]) for key in self.scalars),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            **{name: group[name] for name in self.options},
        )
        moments = lowrank.Moments(step, mean, square)
        storage.store(states, "step", step)
        keys = self._keys(group, batch)
        self._store_moments(batch, moments, projected.side, keys, projected.active)
        for key, value in zip(self.scalars, after, strict=True):
            storage.store(states, key, value)
        weights, updates = [matrix.weight for matrix in batch], update.unbind()
        # after the update, on the updated weights, as in the authors' code
        shares = group["lr"] * group["weight_decay"] * projected.active.float()
        if weights[0].dtype == torch.bfloat16 and group["stochastic_rounding"]:
            for i, (matrix, part) in enumerate(zip(batch, updates, strict=True)):
                value = matrix.weight.float() - part
                value = value - shares[i] * value
                _write_weight(matrix.weight, value, keys[i], True, matrix.first)
            return
        torch._foreach_sub_(weights, list(updates))
        if group["weight_decay"]:
            decay(weights, list(shares.unbind()))


@functools.cache
def _proven(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) in PROVEN_ON


def _names(group: dict[str, Any], index: int) -> Sequence[str]:
    return group.get("param_names") or [f"group {index}, parameter {i}" for i in range(len(group["params"]))]


def _first(param: Tensor) -> tuple[int, int]:
    """Row and column at which the part held here begins, of a parameter as a matrix of its last dimension."""
    if param.ndim == 0:
        return 0, 0
    rows = part_of(param, 0).start * math.prod(param.shape[1:-1]) if param.ndim > 1 else 0
    return rows, part_of(param, -1).start


def _pieces(weight: Tensor) -> Iterable[tuple[int, int]]:
    """First and last row of each part of a parameter that is stepped at once; a vector is one part."""
    if weight.ndim < 2 or not weight.numel():
        return [(0, len(weight) if weight.ndim else 0)]
    rows = max(1, PIECE_ELEMENTS // math.prod(weight.shape[1:]))
    return [(start, min(start + rows, len(weight))) for start in range(0, len(weight), rows)]


def _write_weight(weight: Tensor, value: Tensor, key: Tensor, stochastic: bool, first: tuple[int, int]) -> None:
    """Write a parameter, or the part of one that begins at this row and column, by which its rounding is counted."""
    if weight.dtype == torch.bfloat16 and stochastic and value.numel():
        columns = value.shape[-1] if value.ndim else 1
        rows = counter.WEIGHTS + first[0]
        bits = counter.lattice(key, value.numel() // columns, columns, first=rows, first_column=first[1])
        value = counter.round_to_bfloat16(value, bits.view(value.shape))
    weight.copy_(value)
