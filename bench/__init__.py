"""Benchmarks: ``python -m bench --help`` in a checkout. Not installed with the package."""

import time

STARTED = time.monotonic()
"""When this process began, before the slowest imports: `bench gpu --minutes` counts from here."""
