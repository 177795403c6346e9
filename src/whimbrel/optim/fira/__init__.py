"""Fira: full-rank training with optimizer state of a low rank (arXiv 2410.01623)."""
