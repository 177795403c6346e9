"""What Fira and GaLore share: groups, batches of equal matrices, refreshes, state that resumes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError, nearest
from whimbrel.optim import counter, lowrank, storage
from whimbrel.optim.adamw.optimizer import adamw_step, decay
from whimbrel.optim.device import HostCopy, to_device
from whimbrel.optim.groups import resolve_side
from whimbrel.optim.kernels import PROVEN_ON
from whimbrel.optim.layout import Entry, matrix_layout, other_layout, sides
from whimbrel.optim.options import check_options, check_rank
from whimbrel.optim.sharding import full, local, local_grad, local_part

BATCH_ELEMENTS = 1 << 18
"""Largest stack of gradients, in elements, about what a core's cache holds; larger matrices go one by one."""

if TYPE_CHECKING:
    from whimbrel.optim.kernels.launch import Addresses

LARGEST_GAP = 8
"""Most candidates from one lazy refresh of a matrix to the next."""
ALIASES = {"update_proj_gap": "refresh_steps", "proj_type": "side", "scale": "alpha"}
"""Group keys of the packages `fira` and `galore-torch`, and of others' APOLLO, by our names."""

ACCEPTED = ("params", "name", "param_names", "low_rank", "initial_lr", "foreach", "fused")
"""Group keys without a meaning here, set by `param_groups`, by torch's schedulers and by training engines."""


class Projected(NamedTuple):
    """B gradients of one shape on their way through a step.

    grad [B, m, n], float32, zero where not active (where only a refresh follows: as it is); slice_norm [B, n] or
    [B, m], the norm of each slice; active [B], false where the gradient is zero or not finite; basis [B, d, r].
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

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then leaves grad_scale and found_inf to `step`

    rule: ClassVar[Callable[..., Any]]
    """(Projected, *state, **options) -> (update [B, m, n], *state after); the weights become W - update."""
    coefficients: ClassVar[Callable[..., Any]]
    """The part of `rule` that follows from norms: (lowrank.Slices, correction [B], active [B], *scalars, **options)
    -> (lowrank.Coefficients, *scalars after)."""
    random: ClassVar[bool] = False
    """Whether bases may be drawn, refresh="random"."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """Names of the method's own scalars in the state, after step, exp_avg and exp_avg_sq."""
    options: ClassVar[tuple[str, ...]] = ()
    """Group keys that `rule` takes besides lr, betas and eps."""

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
        self._started: set[Tensor] = set()
        self._gaps: dict[Tensor, HostCopy] = {}
        self._addresses: Addresses | None = None
        self._drawn: dict[tuple[int, int], tuple[tuple[int, ...], Tensor]] = {}
        self._num_matrices = 0
        self._bases: dict[tuple[int, tuple[int, ...], torch.device], Tensor] = {}

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
            self._num_matrices = sum(len(group["params"]) for group in self.param_groups if group["low_rank"])
            index, after = itertools.count(), itertools.count(self._num_matrices)
            for group in self.param_groups:
                offsets = {param: next(index if group["low_rank"] else after) for param in group["params"]}
                if group["low_rank"]:
                    self._step_matrices(group, offsets, fresh)
                else:
                    self._step_others(group, offsets)
        return loss

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
                    self.state[param][key] = loaded[key].to(device=param.device, copy=True)

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

    def _allocate(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or self.state[param]:
                    continue
                if param.grad.is_sparse:
                    raise UnsupportedError(f"{type(self).__name__} takes no sparse gradients; use dense ones")
                layout = self._layout(group, param)
                if isinstance(param, DTensor) and not group["low_rank"] and "exp_avg_scale" in layout:
                    raise UnsupportedError(
                        "other_dtype = 'int8' takes no DTensor parameters; use float32 or bfloat16 under FSDP2"
                    )
                for key, entry in layout.items():
                    dtype = storage.DTYPES[entry.dtype]
                    self.state[param][key] = (
                        torch.zeros(entry.shape, dtype=dtype, device=param.device)
                        if group["low_rank"] or key == "step" or entry.dtype == "uint8" or "_scale" in key
                        # a DTensor where the parameter is one
                        else torch.zeros_like(param, dtype=dtype)
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

    def _step_others(self, group: dict[str, Any], offsets: dict[Tensor, int]) -> None:
        params = [param for param in group["params"] if param.grad is not None and param in self._started]
        if not params:
            return
        group["step"] += 1
        plain = [p for p in params if p.dtype == self.state[p]["exp_avg"].dtype == torch.float32]
        # one by one, as each needs float32 copies of its weights and moments
        for chosen in ([plain] if plain else []) + [[p] for p in params if p not in set(plain)]:
            states = [self.state[param] for param in chosen]
            weights = [local(param) for param in chosen]
            local_states = [{key: local(value) for key, value in state.items()} for state in states]
            moments = [[storage.read_moment([s], key)[0] for s in local_states] for key in ("exp_avg", "exp_avg_sq")]
            values = [weight.float() for weight in weights]
            adamw_step(
                values,
                [self._unscaled(local_grad(param)) for param in chosen],
                [state["step"] for state in states],
                *moments,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                active=self._usable(),
            )
            if chosen is plain:
                continue
            (weight,), (value,), (state,) = weights, values, local_states
            keys = self._keys(group, chosen, offsets)
            for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                storage.write_moment([state], key, moment[0][None], keys, self._usable())
            _write_weight(weight, value, keys[0], group["stochastic_rounding"])

    def _step_matrices(self, group: dict[str, Any], offsets: dict[Tensor, int], fresh: set[Tensor]) -> None:
        params = [param for param in group["params"] if param.grad is not None and param in self._started]
        if not params:
            return
        group["step"] += 1
        every = group["refresh_steps"]
        due: set[Tensor] = set()
        if group["refresh"] == "random":
            fresh = set()
        else:
            phases = {param: self._phase(group, offsets[param]) for param in params if param not in fresh}
            due = {
                param
                for param, phase in phases.items()
                if phase % every == 0 and phase // every % self._gap(group, param) == 0
            }
        fused = [param for param in params if self._fuses(group, param)]
        refreshed = [param for param in fused if param in due or param in fresh]
        for batch in _batches(refreshed):
            self._refresh_some(group, batch, self._for_refresh(group, batch, offsets), offsets, due, fresh)
        if fused:
            self._step_fused(group, fused, offsets)
        taken = set(fused)
        for batch in _batches([param for param in params if param not in taken]):
            projected = self._project(group, batch, offsets)
            self._refresh_some(group, batch, projected, offsets, due, fresh)
            self._apply(group, batch, projected, offsets)

    def _fuses(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether the kernels step this matrix."""
        small = param.numel() < 1 << 31  # the kernels count elements in 32 bits
        if group["impl"] == "auto":
            return param.is_cuda and small and not isinstance(param, DTensor) and _proven(param.device)
        if group["impl"] == "triton" and not small:
            raise UnsupportedError(
                f"impl = 'triton' takes no matrix of 2^31 elements or more, as {list(param.shape)}; use impl = 'auto'"
            )
        if group["impl"] == "triton" and isinstance(param, DTensor):
            raise UnsupportedError("impl = 'triton' takes no DTensor parameters; use impl = 'auto'")
        return group["impl"] == "triton"

    def _step_fused(self, group: dict[str, Any], params: list[Tensor], offsets: dict[Tensor, int]) -> None:
        from whimbrel.optim.kernels import launch

        if self._addresses is None:
            self._addresses = launch.Addresses()
        for batch in launch.batches(params, group["rank"]):
            states = [self.state[param] for param in batch]

            def coefficients(
                slices: lowrank.Slices, correction: Tensor, active: Tensor, states: list[dict[str, Tensor]] = states
            ) -> tuple[lowrank.Coefficients, list[Tensor]]:
                scalars = (storage.stack([state[name] for state in states]) for name in self.scalars)
                options = {name: group[name] for name in self.options}
                found, *after = self.coefficients(slices, correction, active, *scalars, lr=group["lr"], **options)
                return found, after

            launch.fused_step(
                batch,
                states,
                side=resolve_side(group["side"], batch[0].shape),
                bases=self._base_words(group, batch, offsets),
                drawn=self._basis_keys(group, batch, offsets) if group["refresh"] == "random" else None,
                coefficients=coefficients,
                scalars=self.scalars,
                betas=group["betas"],
                eps=group["eps"],
                decay=group["lr"] * group["weight_decay"],
                stochastic=group["stochastic_rounding"],
                found_inf=getattr(self, "found_inf", None),
                grad_scale=getattr(self, "grad_scale", None),
                addresses=self._addresses,
                batch=offsets[batch[0]],
            )

    def _refresh_some(
        self,
        group: dict[str, Any],
        batch: list[Tensor],
        projected: Projected,
        offsets: dict[Tensor, int],
        due: set[Tensor],
        fresh: set[Tensor],
    ) -> None:
        first = [i for i, param in enumerate(batch) if param in fresh]
        later = [i for i, param in enumerate(batch) if param in due]
        if first:
            noise = self._noise(group, [offsets[batch[i]] for i in first], projected)
            self._refresh(group, batch, projected, first, noise, offsets)
        if later:
            self._refresh(group, batch, projected, later, None, offsets)

    def _gap(self, group: dict[str, Any], param: Tensor) -> int:
        """Candidates from one refresh of the matrix to the next: 1, or more where refreshes are lazy."""
        if not group["lazy_overlap"]:
            return 1
        if param not in self._gaps:
            # after loading; later refreshes write to host memory without making anything wait
            self._gaps[param] = HostCopy(self.state[param]["refresh_gap"])
        return max(1, int(self._gaps[param].read()))

    def _usable(self) -> Tensor | None:
        """Whether this step counts, as a scalar on the device, where a gradient scaler has left its verdict."""
        found = getattr(self, "found_inf", None)
        return None if found is None else found.reshape(()) == 0

    def _unscaled(self, grad: Tensor) -> Tensor:
        scale = getattr(self, "grad_scale", None)
        return grad.float() if scale is None else grad.float() / scale.reshape(())

    def _keys(self, group: dict[str, Any], params: list[Tensor], offsets: dict[Tensor, int]) -> Tensor:
        """Words [B] for stochastic rounding in the step that has just been counted."""
        steps = storage.stack([self.state[param]["step"] for param in params])
        return counter.key(self._base_words(group, params, offsets), steps)

    def _base_words(self, group: dict[str, Any], params: list[Tensor], offsets: dict[Tensor, int]) -> Tensor:
        known, device = tuple(offsets[param] for param in params), params[0].device
        bases = self._bases.get((group["seed"], known, device))
        if bases is None:
            words = torch.tensor([counter.base(group["seed"], index) for index in known])
            bases = self._bases[group["seed"], known, device] = to_device(words, device)
        return bases

    def _basis(self, group: dict[str, Any], batch: list[Tensor], offsets: dict[Tensor, int]) -> Tensor:
        _, d = sides(batch[0].shape, group["side"])
        if group["refresh"] != "random":
            return storage.read_basis([self.state[param] for param in batch], d)
        return lowrank.drawn(self._basis_keys(group, batch, offsets), d, group["rank"])

    def _basis_keys(self, group: dict[str, Any], batch: list[Tensor], offsets: dict[Tensor, int]) -> Tensor:
        """Words [B] from which the bases of this step are drawn."""
        every = group["refresh_steps"]
        found = tuple(
            counter.drawn_basis_key(
                counter.base(group["seed"], offsets[param]), self._phase(group, offsets[param]) // every
            )
            for param in batch
        )
        role = group["seed"], offsets[batch[0]]
        if role not in self._drawn or self._drawn[role][0] != found:
            self._drawn[role] = found, to_device(torch.tensor(found), batch[0].device)
        return self._drawn[role][1]

    def _phase(self, group: dict[str, Any], offset: int) -> int:
        """Steps before this one, shifted so that refreshes fall on multiples of `refresh_steps`."""
        shift = offset * group["refresh_steps"] // self._num_matrices if group["stagger"] else 0
        return group["step"] - 1 + shift

    def _project(self, group: dict[str, Any], batch: list[Tensor], offsets: dict[Tensor, int]) -> Projected:
        side = resolve_side(group["side"], batch[0].shape)
        # stack copies, so that the mask below does not reach the gradients
        grad = self._unscaled(torch.stack([full(param.grad) for param in batch if param.grad is not None]))
        slice_norm = torch.linalg.vector_norm(grad, dim=lowrank.slice_dim(side))
        norm = torch.linalg.vector_norm(slice_norm, dim=-1)
        active = norm.isfinite() & (norm > 0)
        usable = self._usable()
        if usable is not None:
            active = active & usable
        return Projected(
            grad.masked_fill_(~active[:, None, None], 0.0),
            torch.where(active[:, None], slice_norm, 0.0),
            active,
            self._basis(group, batch, offsets),
            side,
        )

    def _for_refresh(self, group: dict[str, Any], batch: list[Tensor], offsets: dict[Tensor, int]) -> Projected:
        """What a refresh reads, where the kernels do the step: gradients in their own dtype and at their own scale."""
        grad = storage.stack([full(param.grad) for param in batch if param.grad is not None])
        norm = torch.linalg.vector_norm(grad, dim=(-2, -1), dtype=torch.float32)
        active = norm.isfinite() & (norm > 0)
        usable = self._usable()
        if usable is not None:
            active = active & usable
        return Projected(
            grad, norm[:, None], active, self._basis(group, batch, offsets), resolve_side(group["side"], grad.shape)
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
        offsets: dict[Tensor, int],
    ) -> None:
        """Fit the bases of the chosen matrices anew, in the state and in `projected`."""
        whole = len(chosen) == len(batch)
        grad, active, old = (
            t if whole else torch.stack([t[i] for i in chosen])
            for t in (projected.grad, projected.active, projected.basis)
        )
        side, rank = projected.side, group["rank"]
        if group["refresh"] == "exact":
            new = lowrank.fit_exact(grad.float(), side, rank)
        elif noise is not None:
            new = lowrank.fit_first(grad.float(), noise, side, rank)
        else:
            half = batch[0].grad is not None and batch[0].grad.dtype == torch.bfloat16
            new = lowrank.fit_warm(grad, old, side, products=torch.bfloat16 if half else torch.float32)
        # a fit that fails leaves NaN, and the old basis then stays
        active = active & new.isfinite().flatten(1).all(1)
        new = torch.where(active[:, None, None], new, old)
        params = [batch[i] for i in chosen]
        states = [self.state[param] for param in params]
        if group["on_refresh"] != "keep":
            moments = self._moments(states, side)
            carried = lowrank.carry(moments, old, new, side, group["on_refresh"])
            kept = lowrank.Moments(
                *(
                    torch.where(active.view(-1, *[1] * (before.ndim - 1)), after, before)
                    for before, after in zip(moments, carried, strict=True)
                )
            )
            # other bits than those of the step that follows
            self._store_moments(states, kept, side, counter.mix(self._keys(group, params, offsets)), active)
        if group["lazy_overlap"]:
            gaps = storage.stack([state["refresh_gap"] for state in states])
            stays = lowrank.overlap(old, new) >= group["lazy_overlap"]
            gaps = torch.where(stays & (gaps > 0), (2 * gaps).clamp_max(LARGEST_GAP), 1.0)
            storage.store(states, "refresh_gap", gaps)
            self._gaps |= {param: HostCopy(gap) for param, gap in zip(params, gaps.unbind(), strict=True)}
        storage.write_basis(states, new)
        stored = storage.read_basis(states, new.shape[-2])
        for i, basis in zip(chosen, stored.unbind(), strict=True):
            projected.basis[i].copy_(basis)

    def _moments(self, states: list[dict[str, Tensor]], side: str) -> lowrank.Moments:
        """Step [B], and both moments in float32 and the shape of the projected gradient."""
        both = (storage.read_moment(states, key) for key in ("exp_avg", "exp_avg_sq"))
        return lowrank.Moments(
            storage.stack([state["step"] for state in states]), *(x.mT if side == "left" else x for x in both)
        )

    def _store_moments(
        self, states: list[dict[str, Tensor]], moments: lowrank.Moments, side: str, keys: Tensor, active: Tensor
    ) -> None:
        for key in ("exp_avg", "exp_avg_sq"):
            value = getattr(moments, key)
            storage.write_moment(states, key, value.mT if side == "left" else value, keys, active)
        storage.store(states, "step", moments.step)

    def _apply(
        self, group: dict[str, Any], batch: list[Tensor], projected: Projected, offsets: dict[Tensor, int]
    ) -> None:
        states = [self.state[param] for param in batch]
        update, step, mean, square, *after = self.rule(
            projected,
            *self._moments(states, projected.side),
            *(storage.stack([state[key] for state in states]) for key in self.scalars),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            **{name: group[name] for name in self.options},
        )
        moments = lowrank.Moments(step, mean, square)
        storage.store(states, "step", step)
        keys = self._keys(group, batch, offsets)
        self._store_moments(states, moments, projected.side, keys, projected.active)
        for key, value in zip(self.scalars, after, strict=True):
            storage.store(states, key, value)
        weights = [local(param) for param in batch]
        updates = [local_part(part, param) for part, param in zip(update.unbind(), batch, strict=True)]
        # after the update, on the updated weights, as in the authors' code
        shares = group["lr"] * group["weight_decay"] * projected.active.float()
        if batch[0].dtype == torch.bfloat16 and group["stochastic_rounding"]:
            for i, (weight, part) in enumerate(zip(weights, updates, strict=True)):
                value = weight.float() - part
                value = value - shares[i] * value
                # counted over the whole matrix, so that its sharding does not matter
                bits = counter.lattice(keys[i], *batch[i].shape, first=counter.WEIGHTS)
                weight.copy_(counter.round_to_bfloat16(value, local_part(bits, batch[i])))
            return
        torch._foreach_sub_(weights, updates)
        if group["weight_decay"]:
            decay(weights, list(shares.unbind()))


@functools.cache
def _proven(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) in PROVEN_ON


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


def _write_weight(weight: Tensor, value: Tensor, key: Tensor, stochastic: bool) -> None:
    if weight.dtype == torch.bfloat16 and stochastic:
        columns = value.shape[-1] if value.ndim else 1
        bits = counter.lattice(key, value.numel() // columns, columns, first=counter.WEIGHTS).view(value.shape)
        value = counter.round_to_bfloat16(value, bits)
    weight.copy_(value)
