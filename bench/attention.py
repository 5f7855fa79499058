"""Which block sizes suit `cls_attention` here: each against the shipped ones, SDPA, and SDPA with `row_scores`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import micro, table
from bench.jobs import Job
from bench.workloads import WORKLOADS, base
from vtc import ops

# BLOCK_M, BLOCK_N, warps, stages
BLOCKS = (
    (64, 32, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (128, 32, 4, 2),
    (128, 64, 4, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (64, 128, 4, 2),
    (128, 128, 8, 2),
)


def jobs(device: torch.device, played: bool = False, rep_ms: float = 40.0) -> list[Job]:
    """LLaVA-1.5 in bf16, at each batch size the baselines and then every choice of blocks."""
    on_gpu = device.type == "cuda"
    model = base.MODELS[0] if on_gpu else base.SMALL_MODELS[1]
    dtype = "bf16" if on_gpu else "fp32"
    work = WORKLOADS["cls_attention"]
    shipped = work.providers()
    providers: dict[str, Callable[..., Any]] = {
        "sdpa+row_scores": shipped["sdpa+row_scores"],
        "triton": shipped["triton"],
        "sdpa": lambda q, k, v: (scaled_dot_product_attention(q, k, v).transpose(1, 2), None),
    }
    providers |= {
        f"triton {m}x{n} w{warps} s{stages}": with_blocks(m, n, warps, stages)
        for m, n, warps, stages in (BLOCKS if on_gpu else BLOCKS[:4])
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
        block_d = shipped(query.shape[3], query.element_size())[2]
        tuning.attention_blocks = lambda *_: (block_m, block_n, block_d, warps, stages)
        try:
            return ops.cls_attention(query, key, value, backend="triton")
        finally:
            tuning.attention_blocks = shipped

    return call
