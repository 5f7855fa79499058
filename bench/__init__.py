"""Benchmarks: ``python -m bench --help`` in a checkout. Not installed with the package."""
