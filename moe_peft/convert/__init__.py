"""Weights of other projects, in and out: Hugging Face T5, T5X checkpoints."""
