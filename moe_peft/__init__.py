"""Parameter-efficient mixtures of experts for T5 models in JAX."""

__version__ = "0.1.0"
