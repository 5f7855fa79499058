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

SLOWEST_FIRST = ("ray", "llava", "bench", "server", "backend", "parallel", "next", "page", "refused")


def pytest_collection_modifyitems(items):
    """Workers take files in this order, so that all are busy until the end."""
    order = [f"test_vllm_{name}" for name in SLOWEST_FIRST]
    items.sort(key=lambda item: order.index(item.path.stem) if item.path.stem in order else len(order))
