"""What every evaluation asks of a model: logits of token ids, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

BATCH_TOKENS = 8192
"""Most tokens of one forward pass, unless one sequence is longer."""


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


def row_chunks(rows: int, seq_len: int) -> Iterator[slice]:
    """Slices of rows that keep one forward pass within BATCH_TOKENS."""
    size = max(1, BATCH_TOKENS // seq_len)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def to_tokens(ids: np.ndarray, device: torch.device) -> Tensor:
    """Ids as an int64 tensor on `device`."""
    return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(device)
