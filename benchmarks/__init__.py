"""Measurements on the machine at hand; docs/benchmarks.md holds the results."""
