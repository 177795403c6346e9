"""The contract of block selectors: what every kind in `whimbrel.sparse.KINDS`, and any of yours, must keep.

Each function takes a config whose block size is small against `TOKENS` and raises AssertionError where the
selector that it builds breaks the contract. `COVERAGE` checks apply to configs with a field `coverage`,
`ROW_LOCAL` checks to those that set `ROW_LOCAL = True`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from whimbrel.attend.op import attend
from whimbrel.attend.plan import Plan
from whimbrel.attend.reference import token_mask
from whimbrel.errors import ConfigError
from whimbrel.sparse.coverage import coverage
from whimbrel.testing.budget import assert_close
from whimbrel.testing.heads import Heads, gaussian, structured

TOKENS = 391
"""Length of the inputs: odd, and no multiple of a usual block size."""


def shapes(block_size: int, *, chunks: bool = True) -> Iterator[dict[str, Any]]:
    """Sizes to try: lengths that do not divide, shorter than a block, one token, grouped heads, queries at
    the end."""
    yield {"tokens": TOKENS, "batch": 2, "heads": 4, "kv_heads": 2}
    yield {"tokens": 8 * block_size, "heads": 3, "kv_heads": 3}
    yield {"tokens": block_size - 1, "heads": 4, "kv_heads": 1}
    yield {"tokens": 1}
    if chunks:
        yield {"tokens": TOKENS, "q_len": 1, "heads": 2}
        yield {"tokens": TOKENS, "q_len": 5 * block_size + 3, "heads": 4, "kv_heads": 2}


def check_plans(config: Any, *, chunks: bool = True) -> None:
    """Plans fit their inputs, keep the first and the diagonal block, are exact about density, and run.

    `chunks=False` leaves out inputs with fewer queries than keys.
    """
    for shape in shapes(config.block_size, chunks=chunks):
        q, k, v = gaussian(1, **shape)
        plan = config.build()(q, k).check()
        assert (plan.batch, plan.q_len, plan.num_heads) == tuple(q.shape[:3]), f"{shape}: plan of {plan}"
        assert plan.k_len == k.shape[1], f"{shape}: k_len {plan.k_len}"
        mask = plan.to_mask()
        assert mask[..., 0].all(), f"{shape}: a row leaves out the first block"
        seen = token_mask(plan)
        causal = torch.ones(seen.shape[2:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        brute = seen.sum((2, 3)).double() / causal.sum()
        assert torch.equal(plan.density(), brute), f"{shape}: density {plan.density()}, counted {brute}"
        got, want = attend(q, k, v, plan), attend(q, k, v, plan, impl="reference")
        assert_close(f"{shape}: y", want.y, got.y, 1e-5)


def check_one_sequence_at_a_time(config: Any) -> None:
    """A sequence gets the same plan alone as in a batch."""
    q, k, _ = gaussian(2, tokens=TOKENS, batch=3, heads=4, kv_heads=2)
    select = config.build()
    together = select(q, k).to_mask()
    for i in range(len(q)):
        alone = select(q[i : i + 1], k[i : i + 1]).to_mask()
        assert torch.equal(together[i], alone[0]), f"sequence {i} is selected differently in a batch"


def check_refuses(config: Any) -> None:
    """Wrong shapes raise ConfigError."""
    select = config.build()
    q, k, _ = gaussian(3, tokens=TOKENS, heads=4, kv_heads=2)
    for name, bad in (
        ("three dimensions", (q[0], k)),
        ("more queries than keys", (q, k[:, 1:])),
        ("heads that do not divide", (q[:, :, :3], k)),
        ("no tokens", (q[:, :0], k[:, :0])),
        ("two dtypes", (q, k.double())),
    ):
        try:
            select(*bad)
        except ConfigError:
            continue
        raise AssertionError(f"{name}: no ConfigError")


def check_scale(config: Any) -> None:
    """`scale` means what it means to attention: a factor on q."""
    q, k, _ = structured(4, tokens=TOKENS)
    select = config.build()
    want = select(q * 0.5, k).to_mask()
    got = select(q, k, scale=0.5 * q.shape[-1] ** -0.5).to_mask()
    assert torch.equal(want, got), "scale=s does not select as s times q does"


def check_full_coverage(config: Any) -> None:
    """COVERAGE: at coverage 1 every causal block is selected, so the result is dense attention."""
    for shape in shapes(config.block_size):
        q, k, v = gaussian(5, **shape)
        q *= 30  # Sharp rows: most masses are zero in fp32, and the rest sum to 1 without them.
        plan = dataclasses.replace(config, coverage=1.0).build()(q, k)
        dims = {"batch": plan.batch, "num_heads": plan.num_heads, "q_len": plan.q_len, "k_len": plan.k_len}
        dense = Plan.dense(**dims, block_size=config.block_size)
        assert torch.equal(plan.to_mask(), dense.to_mask()), f"{shape}: something is left out at coverage 1"
        assert_close(f"{shape}: y", causal_attention(q, k, v), attend(q, k, v, plan).y, 1e-5)


def check_monotone(config: Any) -> None:
    """COVERAGE: asking for more keeps all that was kept, and covers no less."""
    for inputs in (structured(6, tokens=TOKENS), gaussian(7, tokens=TOKENS, heads=4, kv_heads=2)):
        q, k, _ = inputs
        previous = None
        for asked in (0.2, 0.5, 0.8, 0.95, 0.99):
            plan = dataclasses.replace(config, coverage=asked).build()(q, k)
            mask, achieved = plan.to_mask(), coverage(q, k, plan)
            if previous is not None:
                assert (mask | ~previous[0]).all(), f"coverage {asked} drops a block that less coverage keeps"
                assert (achieved >= previous[1] - 1e-6).all(), f"coverage {asked} covers less than a lower one"
            previous = mask, achieved


def check_row_local(config: Any) -> None:
    """ROW_LOCAL: rows are chosen alike whatever follows them and wherever, on a block border, the prompt is
    cut."""
    size = config.block_size
    for inputs in (structured(8, tokens=TOKENS), gaussian(9, tokens=TOKENS, batch=2, heads=4, kv_heads=2)):
        q, k, v = inputs
        select = config.build()
        whole_plan = select(q, k)
        whole, y = whole_plan.to_mask(), attend(q, k, v, whole_plan).y
        for stop in (size, 5 * size, 5 * size + 3, TOKENS - 1):
            complete = stop // size
            part = select(q[:, :stop], k[:, :stop]).to_mask()[:, :, :complete, :complete]
            assert torch.equal(part, whole[:, :, :complete, :complete]), f"a suffix changes rows before {stop}"
        for chunk in (size, 3 * size, 7 * size):
            for start in range(0, TOKENS, chunk):
                stop = min(start + chunk, TOKENS)
                piece = Heads(q[:, start:stop], k[:, :stop], v[:, :stop])
                plan = select(piece.q, piece.k)
                rows = slice(start // size, -(-stop // size))
                want = whole[:, :, rows, : -(-stop // size)]
                assert torch.equal(plan.to_mask(), want), f"chunks of {chunk} change rows {start} to {stop}"
                assert_close(f"chunks of {chunk}: y", y[:, start:stop], attend(*piece, plan).y, 1e-6)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention in fp64, the queries being the last positions: [B, Tq, H, D]."""
    q_len, k_len, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
