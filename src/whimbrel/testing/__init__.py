"""Error budgets, input makers and contract suites that third parties can run on their own methods."""
