"""The input makers have the structure their names promise."""

from __future__ import annotations

import pytest
import torch

from whimbrel.testing.heads import STRUCTURED, blocky, gaussian, mixed, scattered, slashes, structured


def logits(q, k):
    group = q.shape[2] // k.shape[2]
    return torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * q.shape[-1] ** -0.5


def test_scattered_columns_stand_out():
    found = logits(*scattered(1, tokens=1000, columns=20)[:2])[0, 0].mean(0).sort(descending=True).values
    assert (found[:20] - found[20:].mean()).mean().item() == pytest.approx(9, abs=0.3)
    assert found[19] - found[20] > 7


def test_slashes_stand_at_multiples_of_the_period():
    found = logits(*slashes(2, tokens=1000, period=97)[:2])[0, 0]
    by_distance = torch.stack([found.diagonal(-distance).mean() for distance in range(500)])
    peaks = by_distance[::97]
    assert (peaks - by_distance.median()).tolist() == pytest.approx([8.5] * len(peaks), abs=0.5)


@pytest.mark.parametrize(("distance", "want"), [(400, 1.0), (900, 2.25)])
def test_local_falls_with_distance(distance, want):
    found = logits(*STRUCTURED["local"](3, tokens=1000)[:2])[0, 0]
    fall = (found.diagonal()[distance:] - found.diagonal(-distance)).mean()
    assert fall.item() == pytest.approx(want, abs=0.1)


def test_diffuse_is_nearly_flat():
    assert logits(*STRUCTURED["diffuse"](4, tokens=500)[:2]).std() < 0.15


def test_blocks_of_blocky_are_alike():
    q, k, _ = blocky(5, tokens=512, block_size=64)
    tiles = logits(q, k)[0, 0].view(8, 64, 8, 64).transpose(1, 2)
    assert tiles.std((2, 3)).mean() < 0.25 * tiles.mean((2, 3)).std()


def test_mixed_has_a_sink_and_hot_columns():
    q, k, v = mixed(6, tokens=600, heads=4, kv_heads=2, dim=64)
    assert (q.dtype, q.shape, k.shape, v.shape) == (torch.bfloat16, (1, 600, 4, 64), (1, 600, 2, 64), (1, 600, 2, 64))
    found = logits(q.float(), k.float())[0].mean((0, 1))
    assert found[:4].min() > found[4:].mean() + 4
    assert (found[4:] > found[4:].median() + 2).sum() == 8


def test_seeds_and_shapes():
    one, same, other = (structured(seed, tokens=50) for seed in (1, 1, 2))
    assert torch.equal(one.k, same.k)
    assert not torch.equal(one.k, other.k)
    assert one.q.shape == (1, 50, 4, 64)
    q, k, v = gaussian(1, tokens=9, q_len=4, batch=2, heads=4, kv_heads=2, dim=8, dtype=torch.float64)
    assert (q.shape, k.shape, v.dtype) == ((2, 4, 4, 8), (2, 9, 2, 8), torch.float64)
