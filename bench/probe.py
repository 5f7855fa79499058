"""What machine this is: versions, the GPU, how fast it copies and multiplies, and which SDPA runs where."""

from __future__ import annotations

import dataclasses
import functools
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench import ncu, record, timing
from bench.jobs import Job
from vtc import ops

MATMUL = "bf16 matmul TFLOP/s"


@dataclasses.dataclass
class Probed:
    probe: str
    value: Any


def jobs(device: torch.device) -> list[Job]:
    probes: dict[str, Callable[[torch.device], Any]] = {
        "versions": versions,
        "gpu": gpu,
        "copy GB/s": timing.copy_gb_per_s,
        MATMUL: timing.matmul_tflop_per_s,
        "SDPA, vision tower": functools.partial(which_sdpa, queries=577, keys=577, heads=16, features=64, causal=False),
        "SDPA, prefill": functools.partial(which_sdpa, queries=104, keys=104, heads=32, features=128, causal=True),
        "SDPA, decode": functools.partial(which_sdpa, queries=1, keys=105, heads=32, features=128, causal=False),
        "SDPA, decode, ms for each new length": new_lengths,
        "host us to launch: PyTorch": launch_torch,
        "host us to launch: Triton": launch_triton,
        "ncu": lambda device: ncu.path(),
    }
    return [Job(name, lambda name=name, probe=probe: [Probed(name, probe(device))]) for name, probe in probes.items()]


def versions(device: torch.device) -> dict[str, Any]:
    names = ("triton", "numpy", "tokenizers", "pytest", "pytest-xdist", "flash-attn", "vtc-cls")
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    found |= {name: record.version(name) for name in names}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    revision, dirty = record.git_state(record.PACKAGES)
    return found | {
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "revision": revision,
        "dirty": dirty,
    }


def gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine()}
    about = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": about.name, "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "L2 MB": about.L2_cache_size / 1e6, "GB": total / 1e9, "free GB": free / 1e9,
        "driver": record.provenance(device)["driver"],
    }  # fmt: skip


def which_sdpa(device: torch.device, *, queries: int, keys: int, heads: int, features: int, causal: bool) -> str | None:
    dtype = torch.bfloat16
    query = torch.randn(1, queries, heads, features, device=device).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, 1, keys, heads, features, device=device).to(dtype).transpose(2, 3)
    return timing.sdpa_backend(lambda: sdpa(query, key, value, is_causal=causal))


def new_lengths(device: torch.device) -> list[float]:
    """Milliseconds of SDPA for one new token, at ten lengths of the cache that were not used before."""
    times = []
    for length in range(601, 611):
        query = torch.randn(1, 32, 1, 128, device=device, dtype=torch.float32).to(torch.bfloat16)
        key, value = torch.randn(2, 1, 32, length, 128, device=device).to(torch.bfloat16)
        timing.synchronize(device)
        start = time.perf_counter()
        sdpa(query, key, value)
        timing.synchronize(device)
        times.append(round((time.perf_counter() - start) * 1e3, 3))
    return times


def launch_torch(device: torch.device) -> float:
    x = torch.zeros(16, device=device)
    return _host_us(lambda: x.add_(1), device)


def launch_triton(device: torch.device) -> float:
    scores = torch.rand(1, 576, device=device)
    return _host_us(lambda: ops.topk(scores, 64, backend="triton"), device)


def _host_us(call: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of the host for one call: the mean of 200 calls without synchronising in between."""
    count = 200 if device.type == "cuda" else 3
    call()
    timing.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    spent = time.perf_counter() - start
    timing.synchronize(device)
    return round(spent / count * 1e6, 1)
