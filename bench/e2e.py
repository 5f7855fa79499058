"""`python -m bench e2e`: a whole LLaVA, stage by stage, stock SDPA with all visual tokens against VTC with few."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlavaForConditionalGeneration

import vtc
from bench import record, table, timing
from bench.jobs import Job
from bench.jobs import run as run_jobs
from bench.record import Record
from bench.stages import TEXT_TOKENS, Stages, build, make_inputs, shared_copy

NOT_CAPTURED = {
    "first token": "transformers reads values back",
    "first token, new length": "each call is longer than the last",
    "generate": "transformers reads values back",
}
STAGES = ("vision", "select", "projector", "prefill", "decode", "first token", "first token, new length", "generate")


class Variant(NamedTuple):
    """One side of a comparison: the number of kept visual tokens, None for the stock model, and which SDPA may run."""

    keep: int | None
    cudnn: bool = True

    @property
    def name(self) -> str:
        return ("sdpa" if self.keep is None else f"vtc {self.keep}") + ("" if self.cudnn else ", no cudnn")

    @property
    def stock(self) -> Variant:
        """The variant that it is compared with."""
        return self._replace(keep=None)


VARIANTS = (Variant(None), Variant(128), Variant(64))
# cuDNN's SDPA spends tens of milliseconds on planning for each new length, and every generated token is a new length.
LENGTHS = tuple(Variant(keep, cudnn) for keep in (None, 64) for cudnn in (True, False))


class Bench:
    """The models, and the stages of one variant on one batch; both are made, and checked, when first needed."""

    def __init__(self, device: torch.device, image_size: int) -> None:
        self.device, self.image_size = device, image_size
        self._ready: dict[tuple[int, Variant], Stages | Exception] = {}

    @functools.cached_property
    def stock(self) -> tuple[str, str, LlavaForConditionalGeneration]:
        """Name, dtype and model; VTC never touches this one."""
        return build(self.device, self.image_size)

    @functools.cached_property
    def compressed(self) -> LlavaForConditionalGeneration:
        """A model that compresses, with the stock model's weights."""
        return shared_copy(self.stock[2])

    @functools.cached_property
    def copy(self) -> float:
        return timing.copy_gb_per_s(self.device)

    @contextlib.contextmanager
    def running(self, variant: Variant) -> Iterator[LlavaForConditionalGeneration]:
        model = self.stock[2] if variant.keep is None else self.compressed
        if variant.keep is not None:
            vtc.enable(model, keep=variant.keep)
        before = torch.backends.cuda.cudnn_sdp_enabled()
        with torch.no_grad():
            torch.backends.cuda.enable_cudnn_sdp(before and variant.cudnn)
            try:
                yield model
            finally:
                torch.backends.cuda.enable_cudnn_sdp(before)

    def stages(self, model: LlavaForConditionalGeneration, batch: int, variant: Variant) -> Stages:
        """The stages, kept as long as the batch is the same. Stages that failed to build raise their error again."""
        self._ready = {key: ready for key, ready in self._ready.items() if key[0] == batch}
        if (batch, variant) not in self._ready:
            try:
                stages = Stages(model, make_inputs(model, batch), variant.keep)
                stages.check()
                self._ready[batch, variant] = stages
            except Exception as error:  # out of memory, say
                self._ready[batch, variant] = error
        ready = self._ready[batch, variant]
        if isinstance(ready, Exception):
            raise ready
        return ready

    def stock_timer(self, batch: int, variant: Variant, stage: str) -> Callable[[], float] | None:
        """A function that times the stock model's stage once; None if there is none to compare with, or it failed."""
        if variant == variant.stock or stage == "select":
            return None
        try:
            with self.running(variant.stock) as model:
                call, _ = self.stages(model, batch, variant.stock).call(stage)
        except Exception:  # the record of the stock model's stage says why
            return None

        def stock_ms() -> float:
            with self.running(variant.stock):
                return timing.host_ms(call, self.device)

        return stock_ms

    def number(self, batch: int, variant: Variant, stage: str, rep_ms: float, played: bool) -> list[Record]:
        stock = self.stock_timer(batch, variant, stage)
        with self.running(variant) as model:
            name, dtype, _ = self.stock
            stages = self.stages(model, batch, variant)
            call, moved = stages.call(stage)
            profiled = stages.decode if stage == "generate" else call  # profiling one token is enough
            times = timing.measure(
                [call], self.device, rep_ms, not_captured=NOT_CAPTURED.get(stage), played=played, other=stock
            )
            made = record.make(
                suite="e2e", op=stage, model=name, dtype=dtype, backend=variant.name, times=times, moved=moved,
                shape={"B": batch, "visual": stages.features.shape[1], "text": TEXT_TOKENS}, copy=self.copy,
                peak_bytes=timing.peak_bytes(call, self.device), sdpa=timing.sdpa_backend(profiled), device=self.device,
            )  # fmt: skip
        return [made]


def jobs(device: torch.device, batches: tuple[int, ...], rep_ms: float = 100.0, played: bool = False) -> list[Job]:
    """One job for each stage of each variant and batch size; new lengths are timed at the first size only."""
    bench = Bench(device, image_size=168 if played else 336)
    *stages, new_length, generate = STAGES

    def of(batch: int) -> list[tuple[int, Variant, str]]:
        return [(batch, v, s) for v in VARIANTS for s in stages if s != "select" or v.keep]

    first, *others = batches
    lengths = [(first, v, s) for v in LENGTHS for s in (new_length, generate)]
    numbers = of(first) + lengths + [one for batch in others for one in of(batch)]
    # The first job of a worker builds the model, also after a crash, so every job has the long limit.
    return [
        Job(f"B={b} {v.name} {s}", functools.partial(bench.number, b, v, s, rep_ms, played), limit=60)
        for b, v, s in numbers
    ]


def run(
    device: torch.device,
    batches: tuple[int, ...],
    out: Path | None,
    rep_ms: float = 100.0,
    say: Callable[[str], None] = print,
) -> int:
    """Time every stage for every batch size and K; returns the exit status, 1 if a gate failed."""
    records, failed = run_jobs(jobs(device, batches, rep_ms), out)
    for line in shares(records):
        say(line)
    if records:
        say("\n" + table.tables(records) + "\n\n" + table.provenance_line(records[-1]))
    for name, why in failed.items():
        say(f"NO NUMBER: {name}: {why}")
    return 1 if failed or not records else 0


def shares(records: list[Record]) -> list[str]:
    """The time that VTC adds to the vision tower, in percent of the stock tower's."""
    tower = {r.shape["B"]: r.ms for r in records if (r.op, r.backend) == ("vision", "sdpa")}
    return [
        f"B={r.shape['B']} {r.backend}: select takes {100 * r.ms / tower[r.shape['B']]:.2f} % of the stock tower"
        for r in records
        if r.op == "select" and r.shape["B"] in tower
    ]
