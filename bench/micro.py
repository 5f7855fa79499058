"""`python -m bench micro`: every operation, every provider, side by side. Each is checked, then timed."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import record, table, timing
from bench.jobs import Job
from bench.jobs import run as run_jobs
from bench.record import Record
from bench.workloads import WORKLOADS, base
from bench.workloads.base import Model, Shape, Workload

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SETS = 4, 64  # inputs in different memory that a provider is timed on in turn: at least, and at most


@dataclasses.dataclass
class Options:
    ops: tuple[str, ...] = ()  # all
    providers: tuple[str, ...] = ()  # all but "compiled", which takes longer to compile than all others to run
    dtypes: tuple[str, ...] = ()  # bf16 and fp16 on a GPU, fp32 on a CPU
    models: tuple[str, ...] = ()  # all
    batches: tuple[int, ...] = ()
    keeps: tuple[int, ...] = ()
    full: bool = False  # every K with every B, rather than every K at one B and every B at one K
    rep_ms: float = 100.0
    budget: float | None = None  # seconds, after which no new number is begun
    played: bool = False  # rehearsal on a CPU: Triton in its interpreter, a loop in place of a CUDA graph; no timing


def chosen(what: str, names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The `names`, by default all that are `known`; ValueError for an unknown one."""
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(name for name in known if name in names) if names else known


def sizes(work: Workload, options: Options, on_gpu: bool) -> list[tuple[int, int | None]]:
    """The pairs of B and K."""
    batches = options.batches or (base.BATCHES if on_gpu else base.SMALL_BATCHES)
    if not work.needs_keep:
        return [(batch, None) for batch in batches]
    keeps = options.keeps or (base.KEEPS if on_gpu else base.SMALL_KEEPS)
    keep, batch = (64 if 64 in keeps else keeps[0]), (16 if 16 in batches else batches[-1])
    pairs = [(b, k) for b in batches for k in keeps]
    return pairs if options.full else [(b, k) for b, k in pairs if k == keep or b == batch]


def run(options: Options, device: torch.device, out: Path | None, say: Callable[[str], None] = print) -> int:
    """Time what `options` select; returns the exit status, 1 if a check failed or a provider could not run."""
    if device.type != "cuda":
        say("no GPU: torch providers on small shapes; Triton timings need a GPU")
    start, late = time.monotonic(), 0

    def in_time() -> Iterator[Job]:
        nonlocal late
        for job in jobs(options, device, say):
            if options.budget is not None and time.monotonic() - start > options.budget:
                late += 1
            else:
                yield job

    records, failed = run_jobs(in_time(), out)
    if records:
        say("\n" + table.tables(records) + "\n\n" + table.provenance_line(records[-1]))
    if late:
        say(f"left out, the time is up: {late} numbers")
    if failed:
        say(f"{len(failed)} without a number:\n" + "\n".join(f"{name}: {why}" for name, why in failed.items()))
    return 1 if failed or not records else 0


def jobs(options: Options, device: torch.device, say: Callable[[str], None] = print) -> list[Job]:
    """One job for each number, the most important first: the first model, bf16, `scored_layers`.

    Shapes with too few patches for K are left out, and `say` gets a line for each. ValueError if no other is left.
    """
    on_gpu = device.type == "cuda"
    models = base.MODELS if on_gpu else base.SMALL_MODELS
    names = chosen("model", options.models, tuple(model.name for model in models))
    ops = chosen("op", options.ops, tuple(WORKLOADS))
    dtypes = options.dtypes or (("bf16", "fp16") if on_gpu else ("fp32",))
    chosen("dtype", dtypes, tuple(DTYPES))
    made: list[Job] = []
    left_out: dict[str, None] = {}  # a set in the order of the shapes
    for model in models:
        for dtype in dtypes if model.name in names else ():
            for op in ops:
                work = WORKLOADS[op]
                if not work.floats and dtype != dtypes[0]:
                    continue
                for batch, keep in sizes(work, options, on_gpu):
                    if keep is not None and keep >= model.tokens:
                        left_out[f"{model.name} has {model.tokens - 1} patches, too few for K = {keep}"] = None
                        continue
                    made += _of_shape(op, model, dtype if work.floats else "fp32", batch, keep, options, device)
    if left_out and not made:
        raise ValueError(f"{'; '.join(left_out)}; give a smaller --keep")
    for line in left_out:
        say(f"left out: {line}")
    return made


def _of_shape(
    op: str, model: Model, dtype: str, batch: int, keep: int | None, options: Options, device: torch.device
) -> list[Job]:
    """The providers of one shape."""
    work = WORKLOADS[op]
    shape = {n: s for n, s in model.shape(batch, keep).items() if n in work.sizes + "K"}
    made = []
    for name, provider in work.providers().items():
        wanted = name in options.providers if options.providers else name != "compiled"
        if wanted and available(name, device, options.played):
            number = functools.partial(
                    time_provider, work, shape, dtype, device, provider,
                    rep_ms=options.rep_ms, played=options.played, suite="micro", op=op, model=model.name, backend=name,
                )  # fmt: skip
            made.append(Job(f"{op} {model.name} {dtype} {table.shape_text(shape)} {name}", number))
    return made


def time_provider(
    work: Workload,
    shape: Shape,
    dtype: str,
    device: torch.device,
    provider: Callable[..., Any],
    *,
    rep_ms: float,
    played: bool,
    **names: str,
) -> list[Record]:
    """Check, then time: the record of one provider on one shape.

    Raises
    ------
    WrongResult
        If its result does not pass the check.
    """
    size = DTYPES[dtype].itemsize
    size_of_inputs = work.needs_bytes(shape, size)
    if not (count := 1 if played else number_of_sets(size_of_inputs, device)):
        raise ValueError(f"its inputs take {size_of_inputs / 2**30:.0f} GiB, too much for this device")
    inputs = [work.make(shape, DTYPES[dtype], device) for _ in range(count)]
    calls = [functools.partial(provider, *one) for one in inputs]
    with torch.no_grad():
        work.check(inputs[0], calls[0]())
        peak = timing.peak_bytes(calls[0], device)
        times = timing.measure(calls, device, rep_ms, played=played)
        sdpa = timing.sdpa_backend(calls[0]) if "sdpa" in names["backend"] else None
    moved = work.bytes_moved(shape, size)
    made = record.make(
        shape=shape, dtype=dtype, times=times, moved=moved, copy=_copy(device), peak_bytes=peak, sdpa=sdpa,
        device=device, **names,
    )  # fmt: skip
    return [made]


def number_of_sets(size: int, device: torch.device) -> int:
    """How many inputs of `size` bytes take turns: they fill twice the L2 cache, and at most 0.4 of the memory."""
    if device.type != "cuda":
        return min(SETS[0], 2**32 // size)
    about = torch.cuda.get_device_properties(device)
    return min(max(SETS[0], -(-2 * about.L2_cache_size // size)), SETS[1], int(0.4 * about.total_memory) // size)


@functools.cache
def _copy(device: torch.device) -> float:
    return timing.copy_gb_per_s(device)


def available(provider: str, device: torch.device, played: bool = False) -> bool:
    """Whether a provider can run here: Triton's need a GPU, torch.compile on a CPU needs a C++ compiler."""
    if provider in base.NEED_GPU:
        return device.type == "cuda" or played
    return provider != "compiled" or device.type == "cuda" or bool(shutil.which(os.environ.get("CXX", "g++")))
