"""The state of an optimizer as named tensors and plain data, to be saved sharded and put back bit for bit.

A state tensor is called `optim/PARAMETER/KEY`. One that has the parameter's shape and is sharded exactly if
the parameter is, follows the parameter's sharding when it is read back; any other is the same on every
process, unless the optimizer says by `empty_state(parameter, key)` how it lies.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from whimbrel.checkpoint.weights import plain_name
from whimbrel.errors import CheckpointError

_SCALARS = (bool, int, float, str, type(None))
_NOT_OPTIONS = ("params", "param_names")


def pack(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the optimizer's state by name, and all else that it holds as data for JSON."""
    names = _parameter_names(model, optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for number, values in packed["state"].items():
        name, parameter = names[number], parameters[number]
        state[name] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optim/{name}/{key}"] = value
                state[name][key] = _describe(value, parameter, own=hasattr(optimizer, "empty_state"))
            else:
                state[name][key] = {"value": _plain(value, f"state '{key}' of parameter '{name}'")}
    groups = []
    for i, group in enumerate(packed["param_groups"]):
        options: dict[str, Any] = {}
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group/{i}/{key}"] = value
                options[key] = _describe(value, None)
            elif key not in _NOT_OPTIONS:
                options[key] = {"value": _plain(value, f"option '{key}' of group {i}")}
        groups.append({"params": [names[number] for number in group["params"]], "options": options})
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "state": state}


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The model's names of the optimizer's parameters, in the order in which `state_dict` numbers them."""
    known = {id(parameter): plain_name(model, name) for name, parameter in model.named_parameters()}
    names = []
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                raise CheckpointError(
                    f"parameter {j} of the optimizer's group {i} (shape {list(parameter.shape)}) is not in"
                    " the model; build the optimizer over the parameters of that model"
                )
            names.append(known[id(parameter)])
    return names


def _describe(value: Tensor, parameter: Tensor | None, *, own: bool = False) -> dict[str, Any]:
    follows = (
        parameter is not None
        and value.shape == parameter.shape
        and isinstance(value, DTensor) == isinstance(parameter, DTensor)
    )
    if isinstance(value, DTensor) and not follows and not own:
        raise CheckpointError(
            f"an optimizer state tensor of shape {list(value.shape)} is sharded, but not as its parameter is;"
            " only states like their parameter and unsharded states can be saved"
        )
    return {
        "shape": list(value.shape),
        "dtype": _name(value),
        "follows": follows,
        "on_cpu": value.device.type == "cpu",
    }


def _plain(value: Any, what: str) -> Any:
    try:
        if isinstance(value, _SCALARS) or json.loads(json.dumps(value)) == _as_list(value):
            return value
    except (TypeError, ValueError):
        pass
    raise CheckpointError(
        f"optimizer {what} is a {type(value).__name__}; only tensors, numbers, texts and lists of them can be saved"
    )


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, (list, tuple)) else value


def allocate(model: nn.Module, optimizer: Optimizer, layout: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of the saved state's names, shapes and shardings to be read into.

    Raises CheckpointError where the saved state belongs to another optimizer or other groups of parameters.
    """
    _check_fit(model, optimizer, layout)
    names = _parameter_names(model, optimizer)
    parameters = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    tensors: dict[str, Tensor] = {}
    for name, values in layout["state"].items():
        for key, value in values.items():
            if "shape" in value:
                tensors[f"optim/{name}/{key}"] = _empty_state(optimizer, value, parameters[name], key)
    for i, group in enumerate(layout["groups"]):
        for key, value in group["options"].items():
            if "shape" in value:
                tensors[f"group/{i}/{key}"] = _empty(value, parameters[group["params"][0]])
    return tensors


def _empty_state(optimizer: Optimizer, value: dict[str, Any], parameter: Tensor, key: str) -> Tensor:
    if isinstance(parameter, DTensor) and not value["follows"] and hasattr(optimizer, "empty_state"):
        found = optimizer.empty_state(parameter, key)
        # what does not fit is read as it was saved, and refused by the optimizer, which names it
        if isinstance(found, DTensor) and list(found.shape) == value["shape"] and _name(found) == value["dtype"]:
            return found
    return _empty(value, parameter)


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _empty(value: dict[str, Any], parameter: Tensor) -> Tensor:
    dtype = getattr(torch, value["dtype"])
    if value["follows"]:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(value["shape"], dtype=dtype, device="cpu" if value["on_cpu"] else parameter.device)


def _check_fit(model: nn.Module, optimizer: Optimizer, layout: dict[str, Any]) -> None:
    if layout["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint holds the state of {layout['class']}, but the optimizer is"
            f" {type(optimizer).__name__}; use the optimizer that the run was started with"
        )
    names = iter(_parameter_names(model, optimizer))
    groups = [[next(names) for _ in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in layout["groups"]]
    if len(groups) != len(saved):
        raise CheckpointError(
            f"the checkpoint has {len(saved)} parameter groups, the optimizer {len(groups)};"
            " make the groups that the run had"
        )
    for i, (have, want) in enumerate(zip(groups, saved, strict=True)):
        if have != want:
            odd = sorted(set(have) ^ set(want)) or [a for a, b in zip(have, want) if a != b]
            raise CheckpointError(
                f"group {i} of the optimizer does not hold the parameters that it held in the checkpoint;"
                f" they differ first in '{odd[0]}'"
            )


def unpack(optimizer: Optimizer, layout: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put a saved state into the optimizer: tensors bit for bit, numbers and options as they were."""
    packed = optimizer.state_dict()
    numbers: dict[str, int] = {}
    for i, (group, saved) in enumerate(zip(packed["param_groups"], layout["groups"], strict=True)):
        numbers.update(zip(saved["params"], group["params"], strict=True))
        for key, value in saved["options"].items():
            if "shape" in value:
                group[key] = tensors[f"group/{i}/{key}"]
            else:
                group[key] = _like(value["value"], group.get(key))
    packed["state"] = {
        numbers[name]: {
            key: tensors[f"optim/{name}/{key}"] if "shape" in value else value["value"] for key, value in values.items()
        }
        for name, values in layout["state"].items()
    }
    optimizer.load_state_dict(packed)
    # load_state_dict has cast floating-point state to the parameter's dtype; an exact resume needs the bits.
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in packed["state"].get(number, {}).items():
            if isinstance(value, Tensor) and optimizer.state[parameter][key].dtype != value.dtype:
                optimizer.state[parameter][key] = value


def _like(value: Any, present: Any) -> Any:
    """JSON knows no tuples: give a list back as one where the option is a tuple."""
    return tuple(value) if isinstance(value, list) and isinstance(present, tuple) else value
