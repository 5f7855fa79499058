"""`python -m bench micro`: every operation, every provider, side by side. Gate first, then the clock."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench import record, table, timing, workloads
from bench.record import Record
from bench.workloads import Shape, Workload

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass
class Options:
    ops: tuple[str, ...] = ()  # all
    providers: tuple[str, ...] = ()  # all
    dtypes: tuple[str, ...] = ()  # fp16 and bf16 on a GPU, fp32 on a CPU
    models: tuple[str, ...] = ()  # all
    batches: tuple[int, ...] = ()
    keeps: tuple[int, ...] = ()
    full: bool = False  # every K with every B, rather than every K at one B and every B at one K
    rep_ms: float = 100.0
    budget: float | None = None  # seconds, after which no new shape is begun


def chosen(what: str, asked: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """`asked`, or all that is `known`; ValueError for what is not."""
    if unknown := sorted(set(asked) - set(known)):
        raise ValueError(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(name for name in known if name in asked) if asked else known


def sizes(work: Workload, options: Options, on_gpu: bool) -> list[tuple[int, int | None]]:
    """The pairs of B and K."""
    batches = options.batches or (workloads.BATCHES if on_gpu else workloads.SMALL_BATCHES)
    if not work.needs_keep:
        return [(batch, None) for batch in batches]
    keeps = options.keeps or (workloads.KEEPS if on_gpu else workloads.SMALL_KEEPS)
    keep, batch = (64 if 64 in keeps else keeps[0]), (16 if 16 in batches else batches[-1])
    pairs = [(b, k) for b in batches for k in keeps]
    return pairs if options.full else [(b, k) for b, k in pairs if k == keep or b == batch]


def run(options: Options, device: torch.device, out: Path | None, say: Callable[[str], None] = print) -> int:
    """Time what `options` ask for; returns the exit status, 1 if a gate failed or a provider could not run."""
    on_gpu = device.type == "cuda"
    start, failures, records = time.monotonic(), [], []
    copy = timing.copy_gb_per_s(device)
    say(f"copy: {copy:.1f} GB/s")
    if not on_gpu:
        say("no GPU: torch providers on small shapes; Triton timings need a GPU")
    for work_name, model, dtype, pairs in _groups(options, on_gpu):
        torch.compiler.reset()  # each group compiles anew; within a group shapes become dynamic, as for any user
        work = workloads.WORKLOADS[work_name]
        for batch, keep in pairs:
            shape = {n: s for n, s in model.shape(batch, keep).items() if n in work.sizes + "K"}
            where = f"{work_name} {model.name} {dtype} {table.shape_text(shape)}"
            if options.budget is not None and time.monotonic() - start > options.budget:
                say(f"left out, the time is up: {where}")
                continue
            needed = work.needs_bytes(shape, DTYPES[dtype].itemsize)
            if on_gpu and needed > 0.4 * torch.cuda.get_device_properties(device).total_memory:
                say(f"left out, its inputs take {needed / 2**30:.0f} GiB: {where}")
                continue
            timed, wrong = _shape(work, shape, dtype, device, options, copy, {"op": work_name, "model": model.name})
            failures += [f"{where} {failure}" for failure in wrong]
            for failure in wrong:
                say(f"NO NUMBER: {where} {failure}")
            if timed:
                records += timed
                if out:
                    record.append(out, timed)
    if records:
        say("\n" + table.tables(records) + "\n\n" + table.provenance_line(records[-1]))
    if failures:
        say(f"{len(failures)} without a number:\n" + "\n".join(failures))
    return 1 if failures or not records else 0


def _groups(options: Options, on_gpu: bool) -> Iterator[tuple[str, workloads.Model, str, list]]:
    """Workload, model, dtype and the sizes to time; the first model's come first, in case the time runs out."""
    models = workloads.MODELS if on_gpu else workloads.SMALL_MODELS
    names = chosen("model", options.models, tuple(model.name for model in models))
    ops = chosen("op", options.ops, tuple(workloads.WORKLOADS))
    dtypes = (
        chosen("dtype", options.dtypes, tuple(DTYPES)) if options.dtypes else ("fp16", "bf16") if on_gpu else ("fp32",)
    )
    for model in models:
        for op in ops if model.name in names else ():
            work = workloads.WORKLOADS[op]
            for dtype in dtypes if work.floats else ("fp32",):
                yield op, model, dtype, sizes(work, options, on_gpu)


def _shape(
    work: Workload, shape: Shape, dtype: str, device: torch.device, options: Options, copy: float, names: dict[str, str]
) -> tuple[list[Record], list[str]]:
    """Records of one shape, and a line for each provider that gets none."""
    timed: list[Record] = []
    wrong: list[str] = []
    inputs = work.make(shape, DTYPES[dtype], device)
    for name, provider in work.providers().items():
        if (options.providers and name not in options.providers) or not available(name, device):
            continue

        def call(provider: Callable[..., object] = provider) -> object:
            return provider(*inputs)

        try:
            with torch.no_grad():
                work.check(inputs, call())
                peak = timing.peak_bytes(call, device)
                times = timing.time_ms(call, device, options.rep_ms)
        except Exception as error:  # whatever it is: this provider gets no number, the others are not lost
            wrong.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
            continue
        moved = work.bytes_moved(shape, DTYPES[dtype].itemsize)
        timed.append(
            record.make(
                suite="micro", shape=shape, dtype=dtype, backend=name, times=times, moved=moved, copy=copy,
                peak_bytes=peak, device=device, **names,
            )
        )  # fmt: skip
    record.compare_within(timed)
    return timed, wrong


def available(provider: str, device: torch.device) -> bool:
    """Whether a provider can run here at all: Triton's need a GPU, torch.compile on a CPU needs a C++ compiler."""
    if provider in workloads.NEED_GPU:
        return device.type == "cuda"
    return provider != "compiled" or device.type == "cuda" or bool(shutil.which(os.environ.get("CXX", "g++")))
