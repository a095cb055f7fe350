"""Experiments for benchmarks/experiment.py: modules whose EXPERIMENT says what is compared."""
