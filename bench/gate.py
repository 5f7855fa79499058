"""Is every operation right on this device? Each Triton provider against float64, at LLaVA's shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import micro, record, table
from bench.accuracy import WrongResult
from bench.jobs import Job
from bench.micro import DTYPES
from bench.workloads import WORKLOADS, base
from bench.workloads.base import Shape, Workload

RUNS = 3  # the bits must be the same each time: a difference means a race


@dataclasses.dataclass
class Checked:
    """A result that passed. If it did not pass, its line has "job" and "failed", as for any job."""

    op: str
    model: str
    dtype: str
    shape: dict[str, int]
    backend: str
    errors: dict[str, tuple[float, float]]  # for each result, its largest error against float64 and the bound
    gpu: str | None
    revision: str | None


def jobs(device: torch.device, played: bool = False) -> list[Job]:
    """LLaVA-1.5 in bf16 first. There are two images, because wrong offsets rarely show in the first one."""
    models = base.MODELS if device.type == "cuda" else base.SMALL_MODELS[1:]
    batch, keep = (2, 64) if device.type == "cuda" else (2, 8)
    made = []
    for model in models:
        for dtype in ("bf16", "fp16", "fp32"):
            for op, work in WORKLOADS.items():
                if not work.floats and dtype != "fp32":
                    continue
                shape = {n: s for n, s in model.shape(batch, keep).items() if n in work.sizes + "K" * work.needs_keep}
                for name, provider in work.providers().items():
                    if name in base.NEED_GPU and micro.available(name, device, played):
                        where = f"{op} {model.name} {dtype} {table.shape_text(shape)} {name}"
                        names = {"op": op, "model": model.name, "dtype": dtype, "backend": name}
                        run = functools.partial(check, work, shape, device, provider, **names)
                        made.append(Job(where, run))
    return made


@torch.no_grad()
def check(
    work: Workload, shape: Shape, device: torch.device, provider: Callable[..., Any], *, dtype: str, **names: str
) -> list[Checked]:
    """Run a provider RUNS times; raise `WrongResult` unless its result is right, with the same bits each time."""
    inputs = work.make(shape, DTYPES[dtype], device)
    results = [provider(*inputs) for _ in range(RUNS)]
    errors = {measured.what: (measured.error, measured.bound) for measured in work.check(inputs, results[0])}
    for again in results[1:]:
        for one, other in zip(tensors(results[0]), tensors(again), strict=True):
            if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
                raise WrongResult("not the same bits in every run")
    about = record.provenance(device)
    return [Checked(dtype=dtype, shape=shape, errors=errors, gpu=about["gpu"], revision=about["revision"], **names)]


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a nested result, contiguous."""
    if isinstance(result, Tensor):
        return [result.contiguous()]
    return [tensor for part in result for tensor in tensors(part)]
