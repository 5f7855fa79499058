"""Tests that reserve gigabytes ask for them, and give them back."""

import ast
from pathlib import Path

import pytest
import torch
from support import kernels as kernel_helpers


def test_memory_that_a_test_reserves_on_a_gpu_is_asked_for_and_given_back(monkeypatch):
    done = []
    free = 9 * 2**30
    monkeypatch.setattr(kernel_helpers, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("freed"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 * 2**30))
    kernel_helpers.reserves(5)(lambda what: done.append(what))("ran")
    assert done == ["freed", "ran", "freed"]
    with pytest.raises(pytest.skip.Exception, match=r"needs 9 GiB of GPU memory and some more, 9.0 GiB are free"):
        kernel_helpers.reserves(9)(done.append)("never")

    def too_late():
        raise torch.OutOfMemoryError

    with pytest.raises(pytest.skip.Exception, match="which another process has taken"):
        kernel_helpers.reserves(5)(too_late)()
    assert done == ["freed", "ran", "freed", "freed", "freed", "freed"]


def test_whoever_goes_beyond_int32_says_how_much_memory_that_takes():
    found = 0
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("beyond_int32"):
                assert any(ast.unparse(decorator).startswith("reserves(") for decorator in node.decorator_list), (
                    node.name
                )
                found += 1
    assert found >= 7
