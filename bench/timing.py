"""How long, how much memory, and how fast this device copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

QUANTILES = (0.2, 0.5, 0.8)


def time_ms(function: Callable[[], Any], device: torch.device, rep_ms: float = 100.0) -> tuple[float, float, float]:
    """The 20, 50 and 80 % quantiles of a call's milliseconds over about `rep_ms`, after a warm-up.

    On a GPU: CUDA events around each call, the L2 cache flushed before each (`triton.testing.do_bench`). Work that the
    host issues more slowly than the GPU does it is timed at the host's pace, as a user would see it.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        low, middle, high = do_bench(function, warmup=25, rep=int(rep_ms), quantiles=list(QUANTILES))
        return low, middle, high
    times: list[float] = []
    for _ in range(2):
        function()
    while len(times) < 5 or (sum(times) < rep_ms and len(times) < 200):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    low, middle, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    )
    return low, middle, high


def copy_gb_per_s(device: torch.device) -> float:
    """Bandwidth of a plain copy, read and written bytes together: what memory-bound work is measured against."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    middle = time_ms(lambda: target.copy_(source), device)[1]
    return 2 * source.nbytes / middle / 1e6


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory a call holds beyond what is allocated before it; None on a CPU, where nothing counts it."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
