"""The cache of a hybrid: recurrent states with their own count of tokens, keys and values where a block is softmax.

The layers for linear attention that transformers has are not used: they take a state up again only where a short
convolution came before, their shape differs between its releases, and a cache of them alone does not know its length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from whimbrel.errors import UnsupportedError
from whimbrel.integrations.hf.config import WhimbrelConfig


class RecurrentLayer(CacheLayerMixin):
    """State of one linear block: any tree of tensors whose first dim is the batch."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.tokens = 0

    def store(self, state: Any, tokens: int) -> None:
        """Keep `state`, which is `tokens` tokens further than what was here."""
        self.state, self.tokens, self.is_initialized = state, self.tokens + tokens, True

    def get_seq_length(self) -> int:
        """Tokens that the state has seen."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens once `query_length` more have come."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in 5.6

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, as beam search wants."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing: a block moves its state to its inputs itself."""

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a recurrent state cannot go back."""
        raise UnsupportedError(
            "a recurrent state cannot be cropped to fewer tokens; run the shorter prompt again, or keep a copy of the "
            "cache (copy.deepcopy) from before"
        )

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the block's first state comes from the block."""

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: there are no keys and values."""
        raise UnsupportedError("this block is recurrent and keeps no keys and values; its cache has store()")

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = tree_map_only(torch.Tensor, change, self.state)


class WhimbrelCache(Cache):
    """One layer for each block of a model: a RecurrentLayer, or a DynamicLayer where the block is softmax."""

    def __init__(self, config: WhimbrelConfig) -> None:
        types: list[str] = config.layer_types
        super().__init__(layers=[RecurrentLayer() if kind == "linear_attention" else DynamicLayer() for kind in types])
        self.unusable: str | None = None
        """Why the states cannot be gone on from, if so."""
