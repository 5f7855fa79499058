"""Tests inside vLLM need an environment of their own; .github/CONTRIBUTING.md says how to run them."""

import importlib.util
import os

if importlib.util.find_spec("vllm"):
    # For this process, and for those that vLLM starts.
    for name, value in {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(name, value)
else:
    collect_ignore_glob = ["test_vllm_*.py"]


def pytest_collection_modifyitems(items):
    """Ray's tests first: they take longest, and wait most of the time."""
    items.sort(key=lambda item: item.path.name != "test_vllm_ray.py")
