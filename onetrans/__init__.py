"""Daily ranking pipeline: feature schema, lake, batches, models, training, gate and registry."""

__version__ = "0.1.0"
