"""GaLore: Adam on gradients projected to a low rank (arXiv 2403.03507)."""
