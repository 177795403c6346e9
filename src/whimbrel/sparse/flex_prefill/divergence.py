"""How far the pooled estimate of a head lies from its true attention."""

from __future__ import annotations

import torch
from torch import Tensor


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """sqrt of the Jensen-Shannon divergence (natural logarithm) of distributions, [..., n] -> [...].

    A zero probability counts as the limit 0 log 0 = 0. The result lies in [0, sqrt(log 2)].
    """
    middle = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny)
    terms = torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)
    return (terms.sum(-1) / 2).clamp_min(0).sqrt()


def js_distance_official(p: Tensor, q: Tensor) -> Tensor:
    """The same as the authors compute it: NaN as soon as a probability is zero, which no threshold is above."""
    middle = (p + q) / 2
    terms = p * (p.log() - middle.log()) + q * (q.log() - middle.log())
    return (terms.sum(-1) / 2).sqrt()
