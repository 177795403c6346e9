"""What every evaluation asks of a model: logits of token ids, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

BATCH_TOKENS = 8192
"""Most tokens of one forward pass, unless one sequence is longer."""

CPU_BATCH_TOKENS = 2048
"""The same on a CPU. Tensors of larger passes are mapped anew each time, and the kernel zeroes every page of them."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; gives the model's device, and the former mode back at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        model.train(training)


def row_chunks(rows: int, seq_len: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that keep one forward pass within the tokens that `device` takes at a time."""
    size = max(1, (CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS) // seq_len)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def to_tokens(ids: np.ndarray, device: torch.device) -> Tensor:
    """Ids as an int64 tensor on `device`."""
    return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(device)
