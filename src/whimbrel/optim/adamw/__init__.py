"""AdamW: Adam with decoupled weight decay (arXiv 1711.05101)."""
