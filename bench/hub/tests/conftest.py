"""The package of `torch-ext/`, imported by its path, as the loader of the Hub does it."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: kernel-builder runs this test")


def load(name):
    """The package under the name `name`."""
    (file,) = (ROOT / "torch-ext").glob("*/__init__.py")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def package():
    return load("_operations_5f3a9c1")


@pytest.fixture(scope="session")
def another():
    """The same package a second time, as if it were another version."""
    return load("_operations_0d42e77")


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
