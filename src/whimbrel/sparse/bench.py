"""Benchmark cases of all selectors: choosing and attending, against dense attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from whimbrel._lazy import load_object
from whimbrel.attend.bench import DIM, HEADS, KEY_HEADS
from whimbrel.attend.dense import dense_attention
from whimbrel.attend.op import attend
from whimbrel.bench.case import Case
from whimbrel.sparse import KINDS
from whimbrel.sparse.apply import Selector, apply_selector
from whimbrel.testing.budget import assert_close


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """Each kind with its default options; the density it chose stands in the line, since speed follows it."""
    found = []
    for length in (512,) if quick else (4096, 8192):
        q, k, v = make_inputs(length, device)
        for kind, target in KINDS.items():
            selector = load_object(target)().build()
            plan = selector(q, k)
            density = float(plan.density().mean())
            found.append(
                Case(
                    name="sparse",
                    params={"selector": kind, "T": length, "H": HEADS, "Hkv": KEY_HEADS, "D": DIM}
                    | {"block": plan.block_size, "density": round(density, 3), "dtype": "float32"},
                    impls={
                        "sdpa": partial(_thunk, partial(dense_attention, q, k, v)),
                        "attend": partial(_thunk, partial(attend, q, k, v, plan)),
                        "select + attend": partial(_thunk, partial(apply_selector, q, k, v, selector)),
                    },
                    check=partial(_check, kind, selector, q, k, v),
                )
            )
    return found


def make_inputs(length: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with structure to find: neighbours resemble one another, and the first key draws every query.

    q [1, T, H, D] and k follow one slow random walk over the positions; v is white.
    """
    generator = torch.Generator().manual_seed(length)

    def noise(heads: int) -> Tensor:
        return torch.randn(1, length, heads, DIM, generator=generator)

    walk = noise(KEY_HEADS).cumsum(1)
    walk = 2.0 * walk / walk.square().mean((1, 3), keepdim=True).sqrt()
    k = walk + 0.5 * noise(KEY_HEADS)
    q = walk.repeat_interleave(HEADS // KEY_HEADS, 2) + 0.5 * noise(HEADS)
    k[:, 0] += 2.0 * q.mean(1).unflatten(1, (KEY_HEADS, -1)).mean(2)
    return q.to(device), k.to(device), noise(KEY_HEADS).to(device)


def _thunk(call: partial[object]) -> partial[object]:
    return call


def _check(kind: str, selector: Selector, q: Tensor, k: Tensor, v: Tensor) -> None:
    """On the last queries, since the masked softmax of the reference needs memory for every pair."""
    out = apply_selector(q[:, -256:], k, v, selector)
    reference = attend(q[:, -256:], k, v, out.plan, impl="reference").y
    assert_close(f"sparse {kind}", reference, out.y, 1e-5)
