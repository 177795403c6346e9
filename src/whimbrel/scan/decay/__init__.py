"""Scan with a scalar decay: S_t = alpha_t S_(t-1) + beta_t v_t k_t^T."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"decay_scan": "whimbrel.scan.decay.op:decay_scan"})
