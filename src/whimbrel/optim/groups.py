"""Which parameter goes into which group. Sees names and shapes only; imports no torch."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from whimbrel.errors import ConfigError, nearest
from whimbrel.optim.options import check_rank

if TYPE_CHECKING:
    from torch import nn

    Target = str | re.Pattern[str] | Sequence[str] | Callable[[str, nn.Module], bool]
    """Which modules' matrices get low-rank state."""


ALIASES = {
    "update_proj_gap": "refresh_steps",
    "proj_type": "side",
    "projection_type": "side",
    "scale": "alpha",
}
"""Group keys of the packages `fira`, `galore-torch` and `pytorch-optimizer`, and of others' APOLLO, by our names."""


def param_groups(
    model: nn.Module,
    *,
    low_rank: str | Sequence[str] = "blocks.*",
    exclude: str | Sequence[str] = (),
    target: Target | None = None,
    rank: int | None = None,
    weight_decay: float | None = None,
    min_dim: int = 32,
    **low_rank_options: Any,
) -> list[dict[str, Any]]:
    """Sort a model's parameters into the groups that Fira, GaLore and AdamW take.

    low_rank, exclude: shell patterns (`*`, `?`, `[...]`) over parameter names; each must match a parameter.
    target: modules in place of `low_rank` patterns, see `target_names`.
    rank: rank of the low-rank group; None leaves it to the optimizer's argument.
    weight_decay: decay of the groups that are decayed; None leaves it to the optimizer's argument.
    min_dim: matrices whose smaller side is below it are not projected. A parameter [E, m, n] counts as E matrices.
    low_rank_options: further keys of the low-rank group, by our names or those of the packages `fira`, `galore-torch`
    and `pytorch-optimizer` (update_proj_gap, scale, proj_type, projection_type).

    Groups, in this order, empty ones left out: `low_rank`, the matrices that match and are large enough;
    `decay`, the other parameters of two or more dimensions; `no_decay`, vectors, scalars and parameters with
    a true attribute `_no_weight_decay`. Each holds "params" as a list of (name, tensor), "name" and
    "low_rank". Tied parameters appear once, under their first name; parameters that need no gradient are left
    out. Raises ConfigError for a pattern without a match, for a selection without a matrix, and for a rank
    above the smaller side of a selected matrix.
    """
    named = dict(model.named_parameters())
    if target is not None:
        low_rank = [fnmatch_literal(name) for name in target_names(model, target)]
    kinds = assign_groups(
        {name: tuple(param.shape) for name, param in named.items()},
        low_rank=low_rank,
        exclude=exclude,
        min_dim=min_dim,
        no_decay={name for name, param in named.items() if getattr(param, "_no_weight_decay", False)},
    )
    groups = []
    for kind in ("low_rank", "decay", "no_decay"):
        params = [(name, param) for name, param in named.items() if kinds[name] == kind and param.requires_grad]
        group: dict[str, Any] = {"params": params, "name": kind, "low_rank": kind == "low_rank"}
        if kind == "no_decay":
            group["weight_decay"] = 0.0
        elif weight_decay is not None:
            group["weight_decay"] = weight_decay
        if kind == "low_rank" and rank is not None:
            for name, param in params:
                check_rank(rank, tuple(param.shape), name)
            group["rank"] = rank
        if kind == "low_rank":
            group |= low_rank_options
        if params:
            groups.append(group)
    return groups


def target_names(model: nn.Module, target: Target) -> list[str]:
    """Names of the parameters that the modules chosen by `target` hold: weights of nn.Linear, and experts [E, m, n].

    target: "all-linear", every nn.Linear but one that gives logits (the model's output embedding, or one of the shape
    of an embedding); any other text or a compiled pattern, a regular expression for whole module names; a list, names
    or parts of names of modules, as the authors of GaLore and Fira and `optim_target_modules` of Hugging Face read it;
    a function of (name, module), which says yes or no. Raises ConfigError where nothing is chosen.
    """
    from torch import nn

    modules = dict(model.named_modules())
    if target == "all-linear":
        tables = {tuple(m.weight.shape) for m in modules.values() if isinstance(m, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {
            name
            for name, m in modules.items()
            if isinstance(m, nn.Linear) and m is not head and tuple(m.weight.shape) not in tables
        }
    elif callable(target):
        chosen = {name for name, module in modules.items() if target(name, module)}
    elif isinstance(target, str | re.Pattern):
        chosen = {name for name in modules if re.fullmatch(target, name)}
    else:
        chosen = {name for name in modules if any(part in name for part in target)}
    found = [
        f"{name}.{key}" if name else key
        for name in modules
        if name in chosen
        for key, param in modules[name].named_parameters(recurse=False)
        if param.requires_grad and (param.ndim == 3 or (isinstance(modules[name], nn.Linear) and key == "weight"))
    ]
    if not found:
        part = isinstance(target, str) and any(target in name for name in modules)
        hint = f"; for parts of names use a list, [{target!r}]" if part else ""
        raise ConfigError(
            f"target = {target!r} chooses no nn.Linear and no experts; use 'all-linear', a list of names of modules, a "
            f"regular expression for whole names, or a function"
            f"{hint or nearest(str(target), ['all-linear', *_candidates(modules)])}"
        )
    known = {name for name, _ in model.named_parameters()}
    return [name for name in found if name in known]  # tied parameters have one name


def fnmatch_literal(name: str) -> str:
    """The pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def assign_groups(
    shapes: Mapping[str, Sequence[int]],
    *,
    low_rank: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    min_dim: int = 32,
    no_decay: Collection[str] = (),
) -> dict[str, str]:
    """Parameter name -> name of its group, by name and shape; `no_decay` names those that must not be decayed.

    Raises ConfigError for a pattern that matches no parameter.
    """
    selected = _matching("low_rank", low_rank, shapes) - _matching("exclude", exclude, shapes)

    def group(name: str, shape: Sequence[int]) -> str:
        if name in no_decay or len(shape) < 2:
            return "no_decay"
        fits = len(shape) in (2, 3) and min(shape[-2:]) >= min_dim
        return "low_rank" if name in selected and fits else "decay"

    groups = {name: group(name, shape) for name, shape in shapes.items()}
    if _patterns(low_rank) and "low_rank" not in groups.values():
        raise ConfigError(
            f"low_rank = {list(_patterns(low_rank))} selects no matrix whose smaller side is at least "
            f"min_dim = {min_dim}; choose other patterns or a smaller min_dim"
        )
    return groups


def resolve_side(side: str, shape: Sequence[int]) -> str:
    """ "left" or "right" for an m x n matrix. `std` projects the shorter side (a square one on the right)."""
    if side in ("left", "right"):
        return side
    wide = shape[-2] < shape[-1]
    return "left" if wide == (side == "std") else "right"


def _patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matching(argument: str, patterns: str | Sequence[str], names: Iterable[str]) -> set[str]:
    names = list(names)
    matches: set[str] = set()
    for pattern in _patterns(patterns):
        found = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not found:
            hint = nearest(pattern, _candidates(names)) or f"; patterns are for whole names, such as '{names[0]}'"
            raise ConfigError(f"{argument} pattern '{pattern}' matches no parameter{hint if names else ''}")
        matches |= found
    return matches


def _candidates(names: Iterable[str]) -> list[str]:
    """Patterns that would match: every name and its beginnings, with "*" for numbers and for what follows."""
    found = set()
    for name in names:
        parts = ["*" if part.isdigit() else part for part in name.split(".")]
        found |= {".".join([*parts[:k], "*"]) for k in range(1, len(parts))} | {".".join(parts)}
    return sorted(found)
