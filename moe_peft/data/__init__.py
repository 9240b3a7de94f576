"""Readers, pipelines, feature converters. TensorFlow lives here and in the tasks only."""
