"""Checks of benchmark files before a run: what is there, what is missing, what leaks."""
