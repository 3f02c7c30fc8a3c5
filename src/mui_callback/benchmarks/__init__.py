"""Benchmarks: what is measured of the performance of the live model, next to the probe."""
