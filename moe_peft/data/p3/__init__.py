"""P3, the prompted data sets of T0: names and caps of its tasks, and readers of its records."""
