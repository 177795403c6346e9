"""The step that low-rank optimizers share: groups, plans, updates in backward, state that resumes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from whimbrel.errors import ConfigError, UnsupportedError, nearest
from whimbrel.optim import backward, eager
from whimbrel.optim.amp import GradScale
from whimbrel.optim.bases import Bases, Fitted
from whimbrel.optim.fused import Fused, fuses
from whimbrel.optim.grad_norm import GradNorm
from whimbrel.optim.groups import ALIASES
from whimbrel.optim.layout import Entry
from whimbrel.optim.matrix import Key, Matrix, batches
from whimbrel.optim.method import Method, Projected
from whimbrel.optim.options import check_options, check_rank
from whimbrel.optim.others import step_others
from whimbrel.optim.places import Places
from whimbrel.optim.plan import PLANNED, Plan, hold
from whimbrel.optim.sharding import full, local_grad
from whimbrel.optim.state import check_loaded, empty_entry, loaded_entry, state_layout
from whimbrel.optim.words import Words

__all__ = ["LowRankOptimizer", "Projected"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a parameter may be in."""

ACCEPTED = ("params", "name", "param_names", "low_rank", "initial_lr", "foreach", "fused")
"""Group keys without a meaning here, set by `param_groups`, by torch's schedulers and by training engines."""


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a constructor's arguments (`locals()`, before anything else) that groups may set for themselves."""
    return {name: value for name, value in arguments.items() if name not in ("self", "groups", "__class__")}


class LowRankOptimizer(Method, torch.optim.Optimizer):
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
        self._updated: set[Tensor] = set()
        self._counted: set[int] = set()
        self._plans: dict[tuple[int, ...], list[Plan]] = {}
        self._known_places: Places | None = None
        self._words = Words()
        self._sharers: ProcessGroup | None = getattr(self, "_sharers", None)
        self._bases = Bases(self._words, self._sharers)
        self._in_backward: bool = getattr(self, "_in_backward", False)
        self._norm = GradNorm() if self.reports_grad_norm else None

    @property
    def _places(self) -> Places:
        if self._known_places is None:
            self._plans = {}
            self._known_places = Places(self.param_groups)
            self._bases.num_matrices = self._known_places.num_matrices
        return self._known_places

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
                hint = nearest(name, known) or f"; use {', '.join(known)}"
                raise ConfigError(f"unknown key '{name}' in a group of {type(self).__name__}{hint}")
        # always written, as torch fills in "rank" from the arguments in every group
        group.setdefault("low_rank", "rank" in group)
        check_options({**self.defaults, **group}, random=self.random)
        super().add_param_group(group)
        added = self.param_groups[-1]
        self._known_places = None
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
            raise backward.refusal("a gradient scaler")
        self._advance([param for group in self.param_groups for param in group["params"] if param.grad is not None])
        self._counted.clear()
        self._updated.clear()
        if self._norm is not None:
            params = [param for group in self.param_groups for param in group["params"]]
            self.grad_norm = self._norm.total(map(self._places.summands, params), params[0].device)
        return loss

    def report_grad_norm(self) -> None:
        """From the next step on, leave the global norm of its gradients in `grad_norm`, without a look at them more.

        The norm is that of `torch.nn.utils.clip_grad_norm_`, over all processes, of unscaled gradients, from the norms
        that a step takes of its matrices; only parameters outside of low-rank groups are read for it. It is there
        under `fuse_into_backward` too, where no other way leads to it. Parameters count from the step on in which
        their state begins. Nothing is clipped.
        """
        self.reports_grad_norm = True
        self._norm = GradNorm()
        self._plans = {}

    def _square(self, param: Tensor) -> Tensor | None:
        """Where the squared norm of this parameter's gradient is added up, if it is asked for."""
        return None if self._norm is None else self._norm.square(self._places.summands(param), param.device)

    def _advance(self, params: Sequence[Tensor]) -> None:
        """Update these parameters, which have gradients; a group's first in a step counts the step."""
        places = self._places
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
            chosen.setdefault(places.home[param], []).append(param)
        low_rank = {number for number in chosen if self.param_groups[number]["low_rank"]}
        found = {number: places.matrices(chosen[number], self.state) for number in low_rank}
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
        amp = GradScale.of(self)
        if plan.found:
            self._step_matrices(group, plan, fresh, amp)
        if plan.rest:
            self._step_others(group, plan.rest, amp)
        plan.release()

    def _plan(self, group: dict[str, Any], number: int, found: list[Matrix], rest: list[Tensor]) -> Plan:
        kernels = [matrix for matrix in found if fuses(group["impl"], matrix)]
        taken = {matrix.key for matrix in kernels}
        return Plan(
            number,
            [group[name] for name in PLANNED],
            found,
            hold(found, self.state),
            self._bases.residues(group, found),
            Fused(group, kernels, self._words, together=not self._in_backward) if kernels else None,
            taken,
            batches([matrix for matrix in found if matrix.key not in taken]),
            rest,
        )

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
        backward.check_loop(accumulation_steps, clip_grad_norm, grad_scaler)
        if self._in_backward:
            raise ConfigError("fuse_into_backward has been called already; call it once for each optimizer")
        backward.check_model(model, self._places.home, type(self).__name__)
        self._in_backward = True
        self._plans = {}
        backward.hook(self._update_in_backward, self._places.home)

    @torch.no_grad()
    def _update_in_backward(self, param: Tensor) -> None:
        if param in self._updated:
            raise backward.refusal("a second backward before optimizer.step()")
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
        self._bases.sharers = self._sharers

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
                layout = state_layout(group, param.shape, self.scalars)
                check_loaded(loaded, layout, param=name, optimizer=type(self).__name__)
                for key in layout:
                    # torch has cast it to the parameter's dtype, so go back to what was saved
                    self.state[param][key] = loaded_entry(group, param, key, layout, loaded[key].to(param.device))

    def _allocate(self, params: Sequence[Tensor]) -> None:
        for param in params:
            if self.state[param]:
                continue
            if param.grad is not None and param.grad.is_sparse:
                raise UnsupportedError(f"{type(self).__name__} takes no sparse gradients; use dense ones")
            for key in self.layout(param):
                self.state[param][key] = self.empty_state(param, key)

    def layout(self, param: Tensor) -> dict[str, Entry]:
        """Names, shapes and dtypes of a parameter's state."""
        return state_layout(self._places.group(param), param.shape, self.scalars)

    def empty_state(self, param: Tensor, key: str) -> Tensor:
        """Zeros for one entry of a parameter's state; a DTensor where processes hold parts of it.

        Moments lie with the slices, or rows, of their parameter; bases and numbers are the same on every process.
        """
        return empty_entry(self._places.group(param), param, key, self.layout(param))

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

    def _step_others(self, group: dict[str, Any], params: Sequence[Tensor], amp: GradScale) -> None:
        for param in params:
            square = self._square(param)
            if square is not None:
                norm = torch.linalg.vector_norm(local_grad(param), dtype=torch.float32)
                square += amp.unscaled(norm).square()
        step_others(group, params, self.state, amp, self._words, self._places.offsets)

    def _step_matrices(self, group: dict[str, Any], plan: Plan, fresh: set[Key], amp: GradScale) -> None:
        bases, drawn = self._bases, group["refresh"] == "random"
        if drawn:
            fresh = set()
        due = bases.due(group, plan.due, fresh)
        refreshed = []
        if fresh or due:
            refreshed = [matrix for matrix in plan.found if matrix.key in due or matrix.key in fresh]
        apart = bases.fit_apart(group, refreshed, fresh)
        after = due if bases.follow(group) else set()

        def refit(keys: set[Key]) -> list[Fitted]:
            chosen = batches([x for x in refreshed if x.key in plan.taken and x.key in keys])
            return [bases.refit(group, batch, amp, fresh, apart) for batch in chosen]

        for keys in (fresh, due - after):
            for fitted in refit(keys):
                bases.put(group, fitted)
        later: list[Fitted] = []
        if plan.fused is not None:
            members = [batch.matrices for batch in plan.fused.batches]
            known = {
                "drawn": [bases.drawn_keys(group, each) if drawn else None for each in members],
                "squares": [self._square(each[0].key[0]) for each in members],
            }
            step = functools.partial(plan.fused.step, self, group, amp, **known)
            if plan.taken & after:
                later = plan.fused.beside(step, lambda: refit(after))
            else:
                step()
        for fitted in later:
            bases.put(group, fitted)
        for batch in plan.others:
            square = self._square(batch[0].key[0])
            projected = eager.project(group, batch, bases.read(group, batch), amp, square)
            for keys in (fresh, due - after):
                bases.refresh_projected(group, batch, projected, keys, fresh, apart)
            eager.apply(self, group, batch, projected, self._words)
            bases.refresh_projected(group, batch, projected, after, fresh, apart)


def _names(group: dict[str, Any], index: int) -> Sequence[str]:
    return group.get("param_names") or [f"group {index}, parameter {i}" for i in range(len(group["params"]))]
