"""Every causal block: the selector to compare the others with."""
