"""Benchmarks of the service; docs/performance.md explains them."""
