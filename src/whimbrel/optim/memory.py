"""Bytes of optimizer state: planned from names and shapes before training, and measured where an optimizer holds it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn, optim

from whimbrel.errors import ConfigError
from whimbrel.optim.adamw.config import AdamWConfig
from whimbrel.optim.lowrank_config import LowRankConfig


class MemoryReport(NamedTuple):
    """Bytes of state by group of parameters (`low_rank`, `decay`, `no_decay`); str() is a table."""

    planned: dict[str, int]
    measured: dict[str, int] | None

    def __str__(self) -> str:
        rows = [("group", "planned", *(["measured"] if self.measured is not None else []))]
        columns = [self.planned] if self.measured is None else [self.planned, self.measured]
        rows += [(name, *(f"{column[name] / 2**20:,.2f} MiB" for column in columns)) for name in self.planned]
        rows += [("all", *(f"{sum(column.values()) / 2**20:,.2f} MiB" for column in columns))]
        return "\n".join(f"{row[0]:10}" + "".join(f"{cell:>16}" for cell in row[1:]) for row in rows)


def memory_report(
    model: nn.Module, config: LowRankConfig | AdamWConfig, optimizer: optim.Optimizer | None = None
) -> MemoryReport:
    """What the state of `config`'s optimizer over `model` takes; beside it what `optimizer` holds, where given.

    The model may lie on the meta device. Before an optimizer's first step it holds nothing. Raises ConfigError where
    `optimizer` is not over the groups that `config` makes.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    planned = config.bytes_by_group(shapes)
    if optimizer is None:
        return MemoryReport(planned, None)
    measured = dict.fromkeys(planned, 0)
    for group in optimizer.param_groups:
        if group.get("name") not in measured:
            raise ConfigError(
                f"optimizer has a group named {group.get('name')!r}, but this report is of {', '.join(planned)}; "
                "build it by config.build(config.groups(model))"
            )
        held = [value for param in group["params"] for value in optimizer.state.get(param, {}).values()]
        measured[group["name"]] += sum(value.nbytes for value in held if isinstance(value, Tensor))
    return MemoryReport(planned, measured)
