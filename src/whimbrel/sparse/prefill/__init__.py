"""Selection and attention together, measured: time beside what was kept."""
