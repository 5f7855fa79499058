"""Which block sizes suit `cls_attention` here: each against the shipped ones, SDPA, and SDPA with `cls_probs`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import micro, table
from bench.jobs import Job
from bench.record import Record
from bench.workloads import WORKLOADS, base
from vtc import ops


def jobs(device: torch.device, played: bool = False, rep_ms: float = 40.0) -> list[Job]:
    """LLaVA-1.5 in bf16, at each batch size the baselines and then every choice of blocks."""
    from vtc_kernels import tuning

    on_gpu = device.type == "cuda"
    model = base.MODELS[0] if on_gpu else base.SMALL_MODELS[1]
    dtype = "bf16" if on_gpu else "fp32"
    work = WORKLOADS["cls_attention"]
    shipped = work.providers()
    providers: dict[str, Callable[..., Any]] = {
        "sdpa+cls_probs": shipped["sdpa+cls_probs"],
        "triton": shipped["triton"],
        "sdpa": lambda q, k, v: (scaled_dot_product_attention(q, k, v).transpose(1, 2), None),
    }
    providers |= {
        f"triton {m}x{n} w{warps} s{stages}": with_blocks(m, n, warps, stages)
        for m, n, warps, stages in tuning.ATTENTION_CHOICES[: None if on_gpu else 3]
    }
    made = []
    for batch in (16, 1, 64, 4) if on_gpu else (1,):
        shape = {name: size for name, size in model.shape(batch, None).items() if name in work.sizes}
        for name, provider in providers.items():
            run = functools.partial(
                micro.time_provider, work, shape, dtype, device, provider,
                rep_ms=rep_ms, played=played, suite="attention", op="cls_attention", model=model.name, backend=name,
            )  # fmt: skip
            made.append(Job(f"blocks {model.name} {dtype} {table.shape_text(shape)} {name}", run))
    return made


def with_blocks(block_m: int, block_n: int, warps: int, stages: int) -> Callable[..., Any]:
    """The kernel of `cls_attention` with these block sizes."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        from vtc_kernels import tuning

        shipped = tuning.attention_blocks

        def blocks(*args: Any, **options: Any) -> tuple[int, int, int, int, int, bool]:
            _, _, block_d, _, _, peel = shipped(*args, **options)
            return block_m, block_n, block_d, warps, stages, peel

        tuning.attention_blocks = blocks
        try:
            return ops.cls_attention(query, key, value, backend="triton")
        finally:
            tuning.attention_blocks = shipped

    return call


def to_paste(records: list[Record], capability: str | None) -> list[str]:
    """Lines for `MEASURED` in kernels/tuning.py and `FUSED` in vtc/ops/cls_attention.py, from one GPU's records.

    Block sizes must not depend on the batch: the choice is the one whose times, each divided by the best at its batch
    size, have the least sum. It is for `FUSED` if it is slower than SDPA and `cls_probs` at no batch size.
    """
    if capability is None:
        return []
    major_minor = tuple(int(number) for number in capability.split("."))
    lines = []
    sweeps = [r for r in records if r.suite == "attention"]
    for dtype, num_features in dict.fromkeys((r.dtype, r.shape["D"]) for r in sweeps):
        times: dict[str, dict[int, float]] = {}
        for r in sweeps:
            if (r.dtype, r.shape["D"]) == (dtype, num_features):
                times.setdefault(r.backend, {})[r.shape["B"]] = r.ms
        batches = sorted(set().union(*times.values()))
        choices = {name: at for name, at in times.items() if name.startswith("triton ") and len(at) == len(batches)}
        if not choices:
            continue
        best = {batch: min(at[batch] for at in choices.values()) for batch in batches}
        name, chosen = min(choices.items(), key=lambda one: sum(one[1][batch] / best[batch] for batch in batches))
        blocks = tuple(int(number) for number in re.findall(r"\d+", name))
        lines.append(f"MEASURED: ({major_minor}, {num_features}, {micro.DTYPES[dtype].itemsize}): {blocks},")
        others = times.get("sdpa+cls_probs", {})
        slower = [f"B={batch}" for batch in batches if chosen[batch] > others.get(batch, 0.0)]
        lines.append(
            f"FUSED: not {dtype}, {num_features}: slower than SDPA and cls_probs at {', '.join(slower)}"
            if slower
            else f"FUSED: ({major_minor}, {micro.DTYPES[dtype]}, {num_features}),"
        )
    return lines
