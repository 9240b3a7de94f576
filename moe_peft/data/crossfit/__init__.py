"""CrossFit: its few-shot files and the partition of its tasks."""
