"""Measurements: load tests, micro-benchmarks, quality, peers. Each module is a command."""
