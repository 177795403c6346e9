"""What Fira and GaLore share: groups, batches of equal matrices, refreshes, state that resumes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError, nearest
from whimbrel.optim import lowrank
from whimbrel.optim.adamw.optimizer import adamw_step, decay
from whimbrel.optim.groups import resolve_side
from whimbrel.optim.options import check_options, check_rank
from whimbrel.optim.sharding import full, local, local_grad, local_part

BATCH_ELEMENTS = 1 << 18
"""Largest stack of gradients, in elements, about what a core's cache holds; larger matrices go one by one."""

ALIASES = {"update_proj_gap": "refresh_steps", "proj_type": "side"}
"""Group keys of the packages `fira` and `galore-torch`, by our names."""

ACCEPTED = ("params", "name", "param_names", "low_rank", "initial_lr", "foreach", "fused")
"""Group keys without a meaning here, set by `param_groups`, by torch's schedulers and by training engines."""


class Projected(NamedTuple):
    """B gradients of one shape on their way through a step.

    grad [B, m, n], float32, zero where not active; slice_norm [B, n] or [B, m], the norm of each slice;
    active [B], false where the gradient is zero or not finite; basis [B, d, r].
    """

    grad: Tensor
    slice_norm: Tensor
    active: Tensor
    basis: Tensor
    side: str


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

    rule: ClassVar[Callable[..., Any]]
    """(Projected, *state, **options) -> (update [B, m, n], *state after); the weights become W - update."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """Names of the method's own scalars in the state, after step, exp_avg and exp_avg_sq."""
    options: ClassVar[tuple[str, ...]] = ()
    """Group keys that `rule` takes besides lr, betas and eps."""

    def __init__(self, groups: Iterable[Any], defaults: dict[str, Any]) -> None:
        check_options(defaults)
        self._started: set[Tensor] = set()
        groups = list(groups)
        if not any(isinstance(group, dict) and {"rank", "low_rank"} & group.keys() for group in groups):
            raise ConfigError(
                f"no group given to {type(self).__name__} is marked low-rank; "
                'pass param_groups(model, low_rank=...), or set "rank" on a group'
            )
        super().__init__(groups, {**defaults, "step": 0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._started = set()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

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
        check_options(group)
        super().add_param_group(group)
        added = self.param_groups[-1]
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
        self._allocate()
        fresh = self._start()
        if self._started:
            index = itertools.count()
            num_matrices = sum(len(group["params"]) for group in self.param_groups if group["low_rank"])
            for group in self.param_groups:
                if group["low_rank"]:
                    offsets = {param: next(index) for param in group["params"]}
                    self._step_matrices(group, offsets, num_matrices, fresh)
                else:
                    self._step_others(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; it keeps its float32 whatever the parameters' dtype.

        Raises CheckpointError where an entry is missing or does not have the shape that its parameter needs.
        """
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for g, group in enumerate(self.param_groups):
            for name, param in zip(_names(group, g), group["params"], strict=True):
                loaded = state_dict["state"].get(next(saved))
                if not loaded:
                    continue
                shapes = self._state_shapes(group, param)
                for key in shapes:
                    if key not in loaded:
                        raise CheckpointError(
                            f"optimizer state of {name} lacks '{key}'; "
                            f"load a state that {type(self).__name__} has written"
                        )
                for key, shape in shapes.items():
                    if tuple(loaded[key].shape) != shape:
                        raise CheckpointError(
                            f"optimizer state '{key}' of {name} has shape {list(loaded[key].shape)}, "
                            f"but needs {list(shape)}; load it into the model that it was saved with"
                        )
                    # torch has cast it to the parameter's dtype, so go back to what was saved
                    self.state[param][key] = loaded[key].to(device=param.device, copy=True)

    def _state_shapes(self, group: dict[str, Any], param: Tensor) -> dict[str, tuple[int, ...]]:
        if not group["low_rank"]:
            return {"step": (), "exp_avg": tuple(param.shape), "exp_avg_sq": tuple(param.shape)}
        side, rank = resolve_side(group["side"], param.shape), group["rank"]
        low = lowrank.low_shape(param.shape, rank, side)
        return {
            "step": (),
            "exp_avg": low,
            "exp_avg_sq": low,
            **dict.fromkeys(self.scalars, ()),
            "basis": lowrank.basis_shape(param.shape, rank, side),
        }

    def _allocate(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or self.state[param]:
                    continue
                if param.grad.is_sparse:
                    raise UnsupportedError(f"{type(self).__name__} takes no sparse gradients; use dense ones")
                for key, shape in self._state_shapes(group, param).items():
                    self.state[param][key] = (
                        torch.zeros(shape, dtype=torch.float32, device=param.device)
                        if group["low_rank"] or key == "step"
                        # a DTensor where the parameter is one
                        else torch.zeros_like(param, dtype=torch.float32)
                    )

    def _start(self) -> set[Tensor]:
        """Note the parameters that are stepped from now on; returns the matrices that need their first basis.

        A loaded state may already count steps. Matrices wait for a gradient of their own, the other
        parameters for any gradient at all, as an engine's zero-gradient step before loading must not count.
        """
        low_rank = [group["low_rank"] for group in self.param_groups]
        waiting = [
            (param, is_low_rank)
            for group, is_low_rank in zip(self.param_groups, low_rank, strict=True)
            for param in group["params"]
            if param.grad is not None and param not in self._started
        ]
        if not waiting:
            return set()
        counted = {param: bool(self.state[param]["step"] > 0) for param, _ in waiting}
        norms = {param: float(full(torch.linalg.vector_norm(param.grad.float()))) for param, _ in waiting}
        awake = bool(self._started) or any(counted.values()) or any(norm != 0 for norm in norms.values())
        fresh = set()
        for param, is_low_rank in waiting:
            if counted[param] or (0 < norms[param] < float("inf") if is_low_rank else awake):
                self._started.add(param)
                if is_low_rank and not counted[param]:
                    fresh.add(param)
        return fresh

    def _step_others(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None and param in self._started]
        if not params:
            return
        states = [self.state[param] for param in params]
        group["step"] += 1
        adamw_step(
            [local(param) for param in params],
            [local_grad(param).float() for param in params],
            [state["step"] for state in states],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _step_matrices(
        self, group: dict[str, Any], offsets: dict[Tensor, int], num_matrices: int, fresh: set[Tensor]
    ) -> None:
        params = [param for param in group["params"] if param.grad is not None and param in self._started]
        if not params:
            return
        now, every = group["step"], group["refresh_steps"]
        group["step"] += 1
        for batch in _batches(params):
            first = [i for i, param in enumerate(batch) if param in fresh]
            due = [
                i
                for i, param in enumerate(batch)
                if param not in fresh
                and (now + (offsets[param] * every // num_matrices if group["stagger"] else 0)) % every == 0
            ]
            projected = self._project(group, batch)
            if first:
                noise = self._noise(group, [offsets[batch[i]] for i in first], projected)
                self._refresh(group, batch, projected, first, noise)
            if due:
                self._refresh(group, batch, projected, due, None)
            self._apply(group, batch, projected)

    def _project(self, group: dict[str, Any], batch: list[Tensor]) -> Projected:
        side = resolve_side(group["side"], batch[0].shape)
        # stack copies, so that the mask below does not reach the gradients
        grad = torch.stack([full(param.grad) for param in batch if param.grad is not None]).float()
        slice_norm = torch.linalg.vector_norm(grad, dim=lowrank.slice_dim(side))
        norm = torch.linalg.vector_norm(slice_norm, dim=-1)
        active = norm.isfinite() & (norm > 0)
        return Projected(
            grad.masked_fill_(~active[:, None, None], 0.0),
            torch.where(active[:, None], slice_norm, 0.0),
            active,
            _stack([self.state[param]["basis"] for param in batch]),
            side,
        )

    def _noise(self, group: dict[str, Any], indices: list[int], projected: Projected) -> Tensor | None:
        if group["refresh"] == "exact":
            return None
        grad, rank, side = projected.grad, group["rank"], projected.side
        rows, _ = lowrank.basis_shape(grad.shape, rank, side)
        columns = lowrank.noise_columns(grad.shape, rank, side)
        drawn = [lowrank.noise(rows, columns, seed=group["seed"], index=i) for i in indices]
        return torch.stack(drawn).to(grad.device, non_blocking=True)

    def _refresh(
        self,
        group: dict[str, Any],
        batch: list[Tensor],
        projected: Projected,
        chosen: list[int],
        noise: Tensor | None,
    ) -> None:
        """Fit the bases of the chosen matrices anew, in the state and in `projected`."""
        whole = len(chosen) == len(batch)
        grad, active, old = (
            t if whole else torch.stack([t[i] for i in chosen])
            for t in (projected.grad, projected.active, projected.basis)
        )
        side, rank = projected.side, group["rank"]
        if group["refresh"] == "exact":
            new = lowrank.fit_exact(grad, side, rank)
        elif noise is not None:
            new = lowrank.fit_first(grad, noise, side, rank)
        else:
            new = lowrank.fit_warm(grad, old, side)
        new = torch.where(active[:, None, None], new, old)
        states = [self.state[batch[i]] for i in chosen]
        if group["on_refresh"] != "keep":
            moments = lowrank.Moments(*(_stack([s[key] for s in states]) for key in lowrank.Moments._fields))
            carried = lowrank.carry(moments, old, new, side, group["on_refresh"])
            for key, before, after in zip(moments._fields, moments, carried, strict=True):
                kept = active.view(-1, *[1] * (before.ndim - 1))
                _store(states, key, torch.where(kept, after, before))
        _store(states, "basis", new)
        for i, basis in zip(chosen, new.unbind(), strict=True):
            projected.basis[i].copy_(basis)

    def _apply(self, group: dict[str, Any], batch: list[Tensor], projected: Projected) -> None:
        states = [self.state[param] for param in batch]
        keys = (*lowrank.Moments._fields, *self.scalars)
        update, *after = self.rule(
            projected,
            *(_stack([state[key] for state in states]) for key in keys),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            **{name: group[name] for name in self.options},
        )
        for key, value in zip(keys, after, strict=True):
            _store(states, key, value)
        weights = [local(param) for param in batch]
        updates = [local_part(part, param) for part, param in zip(update.unbind(), batch, strict=True)]
        torch._foreach_sub_(weights, updates)
        if group["weight_decay"]:
            # after the update, on the updated weights, as in the authors' code
            shares = group["lr"] * group["weight_decay"] * projected.active.float()
            decay(weights, list(shares.unbind()))


def _names(group: dict[str, Any], index: int) -> Sequence[str]:
    return group.get("param_names") or [f"group {index}, parameter {i}" for i in range(len(group["params"]))]


def _batches(params: list[Tensor]) -> list[list[Tensor]]:
    """Lists of parameters of one shape and device, none above BATCH_ELEMENTS unless it is a single matrix."""
    equal: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
    for param in params:
        equal.setdefault((param.shape, param.device), []).append(param)
    batches = []
    for (shape, _), members in equal.items():
        size = max(1, BATCH_ELEMENTS // shape.numel())
        batches += [members[i : i + size] for i in range(0, len(members), size)]
    return batches


def _stack(tensors: list[Tensor]) -> Tensor:
    """[B, ...]; a single tensor is viewed, not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _store(states: list[dict[str, Tensor]], key: str, values: Tensor) -> None:
    torch._foreach_copy_([state[key] for state in states], list(values.unbind()))
