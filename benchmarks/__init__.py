"""Benchmarks: how fast the product answers, and what everything around the engine costs. README.md says how to run."""
