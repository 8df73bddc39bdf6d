"""Measurements, never assertions. `make bench` runs all of them; one: `python -m tests.benchmarks latency`."""
