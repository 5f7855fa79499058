"""Faults planted into a rehearsal, to check that each costs its own number and no other."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import jobs
from bench.accuracy import WrongResult
from bench.jobs import Job


def _wrong() -> Any:
    raise WrongResult("planted: a kernel gave a wrong result")


def _memory() -> Any:
    raise torch.OutOfMemoryError("planted: out of memory")


def _hangs() -> Any:
    while True:
        time.sleep(60)


def _killed() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _broken() -> Any:
    jobs.works = lambda: False
    raise RuntimeError("planted: an illegal memory access broke the GPU context")


FAULTS: tuple[Callable[[], Any], ...] = (_wrong, _memory, _hangs, _killed, _broken)


def plant(chosen: Sequence[Job]) -> list[Job]:
    """Replace each of the second to the sixth job by a fault."""
    faulty = [dataclasses.replace(job, run=fault, limit=3) for job, fault in zip(chosen[1:], FAULTS, strict=False)]
    return [*chosen[:1], *faulty, *chosen[1 + len(faulty) :]]


# The same among tests. Each fault lies between two tests that pass.
TESTS = """
import os, signal, time
import pytest
import torch
from bench import jobs

@pytest.mark.parametrize("number", range(3))
def test_planted_gpu_right_before(number): pass
def test_planted_gpu_wrong(): assert 1 + 1 == 3, "planted"
def test_planted_gpu_right_1(): pass
def test_planted_gpu_memory(): raise torch.OutOfMemoryError("planted")
def test_planted_gpu_right_2(): pass
def test_planted_gpu_hangs(): time.sleep(3600)
def test_planted_gpu_right_3(): pass
def test_planted_gpu_killed(): os.kill(os.getpid(), signal.SIGKILL)
def test_planted_gpu_right_4(): pass
def test_planted_gpu_broken():
    jobs.works = lambda: False
    raise RuntimeError("planted")
def test_planted_gpu_right_5(): pass
"""
