"""Scan with the gated delta rule: S_t = alpha_t S_(t-1) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T."""

from __future__ import annotations

from whimbrel._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"delta_scan": "whimbrel.scan.delta.op:delta_scan"})
