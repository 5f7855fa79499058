"""How long a call takes, host time included and on the device only; how much memory; which attention it runs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import graphs

QUANTILES = (0.2, 0.5, 0.8)
SAMPLES = 7  # at least: with fewer, three quantiles say nothing
MOST_SAMPLES = 200
BUSY_CYCLES = 400_000  # a fifth of a millisecond or so

spoiled = False  # a capture has failed: PyTorch's allocator may still be in it, so another process should continue

Quantiles = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one call, the 20, 50 and 80 % quantiles of at least `SAMPLES` samples."""

    host: Quantiles  # from the call to the end of its work, host time included, as a user sees it
    device: Quantiles | None  # device time only: replays of a captured graph
    why: str | None = None  # the reason if there is no device time
    speedup: Quantiles | None = None  # the time of `other` divided by this one, host time included


def measure(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    rep_ms: float = 100.0,
    *,
    not_captured: str | None = None,
    played: bool = False,
    other: Callable[[], float] | None = None,
) -> Times:
    """Time one call, given as several `calls` of it over inputs in different memory, which take turns.

    Each of the two times is measured for about `rep_ms` milliseconds after a warm-up. The device's time is that of a
    captured graph, without the host. Without a GPU there is no device time. With `played`, a loop replaces the graph
    and refuses the operations that a capture refuses. A call that cannot be captured has no device time, and `why` has
    the reason. If that is known beforehand, pass the reason as `not_captured`, and no capture is tried.

    `other` times the call to compare with, once. The two take turns, because a host may be much slower a second later.
    """
    calls = list(calls)
    for call in calls:  # compiles, fills caches; a capture allows neither
        call()
    host, speedup = _host_ms(calls, device, rep_ms, other)
    if not_captured:
        return Times(host, None, f"not captured: {not_captured}", speedup)
    if device.type != "cuda" and not played:
        return Times(host, None, "no GPU", speedup)
    captured = calls * max(1, min(100, int(2 / host[1])) // len(calls))  # two milliseconds or so
    try:
        replay = graphs.play(captured) if played else graphs.capture(captured)
    except Exception as error:
        global spoiled
        spoiled = device.type == "cuda"
        return Times(host, None, f"not captured: {reason(error)}", speedup)
    return Times(host, _device_ms(replay, len(captured), device, rep_ms), speedup=speedup)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def quantiles(samples: list[float]) -> Quantiles:
    low, middle, high = (
        torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    )
    return low, middle, high


def _samples(sample: Callable[[], float], rep_ms: float) -> list[float]:
    """At least SAMPLES samples, more until they add up to `rep_ms`."""
    taken: list[float] = []
    while len(taken) < SAMPLES or (sum(taken) < rep_ms and len(taken) < MOST_SAMPLES):
        taken.append(sample())
    return taken


def host_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds from one call to the end of its work, with a cold L2 cache."""
    _flush(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _host_ms(
    calls: list[Callable[[], Any]], device: torch.device, rep_ms: float, other: Callable[[], float] | None
) -> tuple[Quantiles, Quantiles | None]:
    """Milliseconds of one call; and the time of `other` divided by it, from pairs of samples."""
    turns = itertools.cycle(calls)
    if other is None:
        return quantiles(_samples(lambda: host_ms(next(turns), device), rep_ms)), None
    other()  # compiles, fills caches
    ratios = []

    def sample() -> float:
        theirs = other()
        ours = host_ms(next(turns), device)
        ratios.append(theirs / ours)
        return ours

    return quantiles(_samples(sample, rep_ms)), quantiles(ratios)


def _device_ms(replay: Callable[[], Any], count: int, device: torch.device, rep_ms: float) -> Quantiles:
    """Milliseconds of one of the `count` calls in a replay."""
    replay()

    def sample() -> float:
        if device.type != "cuda":
            start = time.perf_counter()
            replay()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)  # the graph is launched before the GPU reaches `begin`
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    low, middle, high = quantiles(_samples(sample, rep_ms))
    return low / count, middle / count, high / count


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flush(device: torch.device) -> None:
    """Overwrite the GPU's L2 cache, and synchronise."""
    if device.type == "cuda":
        _flushed(device).zero_()
        torch.cuda.synchronize(device)


@functools.cache
def _flushed(device: torch.device) -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device=device)


def copy_gb_per_s(device: torch.device) -> float:
    """Bandwidth of a plain copy, read and written bytes together: the yardstick for memory-bound work."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    times = measure([lambda: target.copy_(source)], device)
    return 2 * source.nbytes / (times.device or times.host)[1] / 1e6


def matmul_tflop_per_s(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Speed of a large matrix product of random numbers: the yardstick for arithmetic."""
    size = 8192 if device.type == "cuda" else 256 if dtype == torch.bfloat16 else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=torch.float32).to(dtype)
    times = measure([lambda: a @ b], device)
    return 2 * size**3 / (times.device or times.host)[1] / 1e9


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that a call allocates beyond what was allocated before; None on a CPU, which has no counter."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


SDPA = {
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash (CPU)",
    "aten::_scaled_dot_product_fused_attention_overrideable": "overrideable",
    "aten::_scaled_dot_product_attention_math": "math",
}


def sdpa_backend(function: Callable[[], Any]) -> str | None:
    """Which of SDPA's implementations a call ran, several joined by " + "; None if it did not call SDPA.

    This is the implementation that PyTorch chose, which depends on version, device, shape and strides.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function()
    ran = {SDPA[event.name] for event in profiled.events() if event.name in SDPA}
    return " + ".join(sorted(ran)) or None
