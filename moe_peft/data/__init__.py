"""Readers, pipelines and feature converters. TensorFlow lives here and in the tasks, nowhere else."""
