"""The step of a low-rank optimizer in two passes over the gradient, in Triton; `launch` imports it when first run."""
