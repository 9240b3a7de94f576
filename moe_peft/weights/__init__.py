"""Weights on disk, in every format: opened, named, described, written."""
