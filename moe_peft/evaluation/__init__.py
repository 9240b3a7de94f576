"""How good a model is: metrics, averages over templates, predictions on disk, evaluation runs."""
