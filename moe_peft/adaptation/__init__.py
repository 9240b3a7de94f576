"""Few-shot adaptation: one run a task and seed, all of them together."""
