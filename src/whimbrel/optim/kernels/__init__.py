"""The step of a low-rank optimizer in two passes over the gradient, in Triton; `launch` imports it when first run."""

PROVEN_ON: frozenset[tuple[int, int]] = frozenset({(9, 0)})
"""CUDA capabilities on which the tests marked `gpu` of this folder passed and a step took less time than the eager one.
On others `impl="auto"` stays with PyTorch."""
