"""Looking at models and runs: what a method adapts, what it costs, how runs compare."""
