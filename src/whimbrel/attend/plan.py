"""Which key blocks each query block attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whimbrel.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """The cut of positions into blocks.

    Block j holds the absolute positions j * block_size up to (j + 1) * block_size, for queries and keys
    alike, so a block stays the same block whatever part of a prompt is at hand. The queries are the last
    `q_len` of the `k_len` positions: the first and the last query block may be partial, of the key blocks
    only the last.
    """

    block_size: int
    """Positions of a block."""
    q_len: int
    """Query positions."""
    k_len: int
    """Key positions, counted from the start of the sequence."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"block_size = {self.block_size} is not allowed; use a positive number of tokens")
        if not 1 <= self.q_len <= self.k_len:
            raise ConfigError(f"q_len = {self.q_len} with k_len = {self.k_len} is not allowed; use 1 <= q_len <= k_len")

    @property
    def offset(self) -> int:
        """Absolute position of the first query."""
        return self.k_len - self.q_len

    @property
    def first_block(self) -> int:
        """Absolute index of the first query block."""
        return self.offset // self.block_size

    @property
    def key_blocks(self) -> int:
        """Number of key blocks; the last one is also the last query block."""
        return -(-self.k_len // self.block_size)

    @property
    def query_blocks(self) -> int:
        """Number of query blocks."""
        return self.key_blocks - self.first_block

    def query_span(self, row: int) -> tuple[int, int]:
        """First query of query block `row` and one past its last, as indices into q."""
        start = (self.first_block + row) * self.block_size
        return max(start, self.offset) - self.offset, min(start + self.block_size, self.k_len) - self.offset

    def diagonal(self, device: torch.device | None = None) -> Tensor:
        """int64 [query_blocks]: the key block in which each query block lies."""
        return torch.arange(self.first_block, self.key_blocks, device=device)

    def causal(self, device: torch.device | None = None) -> Tensor:
        """bool [query_blocks, key_blocks]: key blocks that hold at least one position a query block may
        see."""
        return torch.arange(self.key_blocks, device=device) <= self.diagonal(device)[:, None]


@dataclass(frozen=True, eq=False)
class Plan:
    """Key blocks of every (batch, head, query block), as compressed sparse rows.

    Rows are ordered batch, head, query block. Inside a block the attention is causal, token by token, so only
    the diagonal block is cut. The constructor checks shapes; `check` also reads the contents.
    """

    offsets: Tensor
    """int64 [batch * num_heads * query_blocks + 1]: row r owns indices[offsets[r] : offsets[r + 1]]."""
    indices: Tensor
    """int32 [at least offsets[-1]]: key blocks, ascending in each row; the last of a row is its diagonal block. What
    lies behind offsets[-1] is no part of the plan: room that a GPU did not turn out to need."""
    block_size: int
    """Positions of a block."""
    q_len: int
    """Query positions: the last of the key positions."""
    k_len: int
    """Key positions."""
    num_heads: int
    """Query heads."""
    batch: int
    """Sequences."""
    is_part: bool = False
    """Whether rows may lack their diagonal block, or every block: a part whose result is merged with others'."""
    is_checked: bool = False
    """Whether the contents are known to be right, so that nobody looks again: a look makes a GPU wait."""

    def __post_init__(self) -> None:
        rows = self.batch * self.num_heads * self.grid.query_blocks
        if self.batch < 1 or self.num_heads < 1:
            raise ConfigError(
                f"plan has batch = {self.batch} and num_heads = {self.num_heads}; both must be at least 1"
            )
        if self.offsets.dtype != torch.int64 or self.offsets.shape != (rows + 1,):
            raise ConfigError(
                f"plan.offsets is {self.offsets.dtype} of shape {tuple(self.offsets.shape)}; "
                f"it must be int64 of shape ({rows + 1},), one more than batch * heads * query blocks"
            )
        if self.indices.dtype != torch.int32 or self.indices.dim() != 1:
            raise ConfigError(
                f"plan.indices is {self.indices.dtype} of shape {tuple(self.indices.shape)}; "
                "it must be int32 of one dimension"
            )

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_size: int, q_len: int, k_len: int, is_part: bool = False) -> Plan:
        """The plan of a mask, bool [batch, heads, query blocks, key blocks], on the mask's device.

        Raises ConfigError for a mask that does not fit the grid, selects a block that lies wholly in the
        future, or leaves out a diagonal block, as a part may.
        """
        grid = Grid(block_size, q_len, k_len)
        want = (grid.query_blocks, grid.key_blocks)
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != want:
            raise ConfigError(
                f"plan mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool, [batch, heads, "
                f"{want[0]}, {want[1]}] for q_len = {q_len}, k_len = {k_len}, block_size = {block_size}"
            )
        counts = mask.sum(-1).flatten()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        indices = mask.nonzero()[:, -1].int()
        sizes = {"num_heads": mask.shape[1], "batch": mask.shape[0], "is_part": is_part}
        return cls(offsets, indices, block_size, q_len, k_len, **sizes).check()

    @classmethod
    def dense(
        cls,
        *,
        batch: int,
        num_heads: int,
        block_size: int,
        q_len: int,
        k_len: int,
        device: torch.device | None = None,
    ) -> Plan:
        """The plan that selects every causal block."""
        grid = Grid(block_size, q_len, k_len)
        copies = batch * num_heads
        counts = grid.diagonal(device) + 1
        entries = grid.query_blocks * (grid.first_block + 1 + grid.key_blocks) // 2
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=entries)
        indices = (torch.arange(entries, device=device) - starts).int().repeat(copies)
        counts = counts.repeat(copies)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(offsets, indices, block_size, q_len, k_len, num_heads=num_heads, batch=batch, is_checked=True)

    @property
    def grid(self) -> Grid:
        """The cut of positions into blocks."""
        return Grid(self.block_size, self.q_len, self.k_len)

    def counts(self) -> Tensor:
        """int64 [batch, heads, query blocks]: selected key blocks."""
        return self.offsets.diff().view(self.batch, self.num_heads, self.grid.query_blocks)

    def row_of_index(self) -> Tensor:
        """int64 [offsets[-1]]: the row that owns each entry of `indices`."""
        counts = self.offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def to_mask(self) -> Tensor:
        """bool [batch, heads, query blocks, key blocks]: for tests and figures; `from_mask` gives the plan
        back."""
        grid = self.grid
        mask = self.indices.new_zeros(len(self.offsets) - 1, grid.key_blocks, dtype=torch.bool)
        rows = self.row_of_index()
        mask[rows, self.indices[: len(rows)].long()] = True
        return mask.view(self.batch, self.num_heads, grid.query_blocks, grid.key_blocks)

    def density(self) -> Tensor:
        """fp64 [batch, heads]: token pairs attended to, as a share of all causal token pairs of these
        queries.

        Exact, partial blocks included; a dense plan has density 1.
        """
        grid = self.grid
        before = grid.diagonal(self.offsets.device) * grid.block_size
        first = before.clamp_min(grid.offset) - grid.offset
        stop = (before + grid.block_size).clamp_max(grid.k_len) - grid.offset
        queries = stop - first
        # Query p sees p - before + 1 keys of its own block; the sum over consecutive p is an arithmetic
        # series.
        own = queries * (first + stop + 1 + 2 * (grid.offset - before)) // 2
        diagonal = self.has_diagonal().view(self.batch, self.num_heads, -1).long() if self.is_part else 1
        attended = ((self.counts() - diagonal) * queries * grid.block_size + own * diagonal).sum(-1)
        causal = grid.q_len * (grid.offset + 1 + grid.k_len) // 2
        return attended.double() / causal

    def mean_density(self) -> float:
        """Density over all sequences and heads."""
        return float(self.density().mean())

    def check(self) -> Plan:
        """The same plan with `is_checked`; raises ConfigError unless every row is ascending, causal and ends with
        its diagonal block.

        A row without its diagonal block could hold queries that attend to nothing, which a part alone may.
        """
        grid, counts = self.grid, self.offsets.diff()
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) > len(self.indices) or bool((counts < 0).any()):
            raise ConfigError(
                f"plan.offsets must rise from 0 to at most the number of indices, {len(self.indices)}; they run from "
                f"{int(self.offsets[0])} to {int(self.offsets[-1])}, smallest step {int(counts.min())}"
            )
        if not self.is_part:
            self._refuse(counts == 0, "selects no key block")
        rows = self.row_of_index()
        indices = self.indices[: len(rows)]
        diagonal = grid.diagonal(counts.device).repeat(self.batch * self.num_heads)
        outside = (indices < 0) | (indices > diagonal[rows])
        self._refuse(outside, "selects a key block outside its causal range", rows)
        repeated = (indices.diff() <= 0) & (rows.diff() == 0)
        self._refuse(repeated, "has key blocks that are not ascending and unique", rows[1:])
        if not self.is_part:
            self._refuse(indices[self.offsets[1:] - 1] != diagonal, "leaves out its diagonal block")
        return replace(self, is_checked=True)

    def has_diagonal(self) -> Tensor:
        """bool [rows]: whether a row holds its diagonal block, as all do unless the plan is a part."""
        diagonal = self.grid.diagonal(self.offsets.device).repeat(self.batch * self.num_heads)
        last = self.offsets[1:] - 1
        found = diagonal.new_full(diagonal.shape, -1) if len(self.indices) == 0 else self.indices[last.clamp_min(0)]
        return (self.offsets.diff() > 0) & (found == diagonal)

    def _refuse(self, wrong: Tensor, what: str, rows: Tensor | None = None) -> None:
        if not bool(wrong.any()):
            return
        entry = int(wrong.nonzero()[0])
        row = entry if rows is None else int(rows[entry])
        sequence, rest = divmod(row, self.num_heads * self.grid.query_blocks)
        head, block = divmod(rest, self.grid.query_blocks)
        raise ConfigError(
            f"plan row (batch {sequence}, head {head}, query block {block}) {what}; "
            f"it may hold blocks 0 to {self.grid.first_block + block} and must hold the last of them"
        )
