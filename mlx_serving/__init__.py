"""A reusable Django app that serves MLX language models."""

__version__ = "0.1.0"
