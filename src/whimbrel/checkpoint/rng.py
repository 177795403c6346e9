"""The random state of a process as tensors, for `extra` of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_CPU, _CUDA = "rng.cpu", "rng.cuda"


def rng_state() -> dict[str, Tensor]:
    """States of this process's torch generators: the CPU's, and the current CUDA device's if it is in use."""
    state = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state[_CUDA] = torch.cuda.get_rng_state()
    return state


def restore_rng(extra: Mapping[str, object]) -> None:
    """Put back what `rng_state` returned; other entries of `extra` are passed over."""
    cpu, cuda = extra.get(_CPU), extra.get(_CUDA)
    if isinstance(cpu, Tensor):
        torch.set_rng_state(cpu)
    if isinstance(cuda, Tensor) and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
