"""`python -m bench e2e`: a whole LLaVA, stage by stage, stock SDPA with all visual tokens against VTC with few."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlavaForConditionalGeneration

import vtc
from bench import record, roofline, speedups, table, timing
from bench.accuracy import WrongResult
from bench.jobs import Job
from bench.jobs import run as run_jobs
from bench.micro import chosen
from bench.played import switch_on as play_graphs
from bench.record import Record
from bench.stages import MODELS, TEXT_TOKENS, Stages, build, make_inputs, require_close, shared_copy
from vtc.hf.graphs.model import of as graphs_of

NEW_LENGTH = "first token, new length"
LONG = "generate 32"
GENERATE = ("generate 1", LONG)
NOT_CAPTURED = {
    "first token": "transformers reads values back",
    NEW_LENGTH: "each call is longer than the last",
    **dict.fromkeys(GENERATE, "transformers reads values back"),
}
STAGES = (
    "vision", "selection", "projector", "prefill", "decode",
    "first token", "first token, one graph", NEW_LENGTH, *GENERATE,
)  # fmt: skip
WITH_GRAPHS = ("first token", *GENERATE)
KEEPS = (192, 128, 64, 32)


class Variant(NamedTuple):
    """One side of a comparison.

    Attributes
    ----------
    keep : int or None
        Kept visual tokens; None for the stock model.
    cudnn : bool
        Whether cuDNN's SDPA may run.
    graphs : bool
        Whether `vtc.graphs` is on; for the stock model with `method="none"`.
    """

    keep: int | None
    cudnn: bool = True
    graphs: bool = False

    @property
    def name(self) -> str:
        kind = "sdpa" if self.keep is None else f"vtc {self.keep}"
        return kind + ("" if self.cudnn else ", no cudnn") + (", graphs" if self.graphs else "")

    @property
    def stock(self) -> Variant:
        """The variant that it is compared with."""
        return self._replace(keep=None, graphs=False)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed: every stage of every model at every batch size, the stock model and VTC at each `keep`."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    keeps: tuple[int, ...] = KEEPS
    rep_ms: float = 100.0
    image_size: int = 336
    played: bool = False

    @classmethod
    def of(
        cls,
        device: torch.device,
        models: tuple[str, ...] = (),
        batches: tuple[int, ...] = (),
        keeps: tuple[int, ...] = (),
        rep_ms: float = 100.0,
    ) -> Options:
        """The given values, and defaults for those that are empty.

        Raises
        ------
        ValueError
            For a model that is not one of `MODELS`, and for as many tokens as an image has, or more.
        """
        on_gpu = device.type == "cuda"
        models = chosen("model", models, tuple(MODELS)) if models else tuple(MODELS)[:2] if on_gpu else ("small LLaVA",)
        if too_many := [keep for keep in keeps if keep >= 576]:
            raise ValueError(
                f"--keep must be below the 576 visual tokens of an image, got {too_many[0]}; the stock model, which "
                "keeps all, is always timed"
            )
        return cls(models, batches or ((1, 4, 16, 64) if on_gpu else (1, 4)), keeps or KEEPS, rep_ms)


class Bench:
    """One model, and the stages of one variant on one batch; both are made, and checked, when first needed."""

    def __init__(self, name: str, device: torch.device, image_size: int) -> None:
        self.name, self.device, self.image_size = name, device, image_size
        self._ready: dict[tuple[int, Variant], Stages | Exception] = {}
        self._graphed: tuple[int | None, LlavaForConditionalGeneration] | None = None

    @functools.cached_property
    def stock(self) -> tuple[str, LlavaForConditionalGeneration]:
        """Dtype and model; VTC never touches this one."""
        return build(self.name, self.device, self.image_size)

    @functools.cached_property
    def compressed(self) -> LlavaForConditionalGeneration:
        """A model that compresses, with the stock model's weights."""
        return shared_copy(self.stock[1])

    def graphed(self, keep: int | None) -> LlavaForConditionalGeneration:
        """A model with graphs and the stock model's weights. It takes the place of the one before."""
        if self._graphed is None or self._graphed[0] != keep:
            self._ready, self._graphed = {}, None  # frees its graphs
            model = shared_copy(self.stock[1])
            vtc.enable(model, **({"method": "none"} if keep is None else {"keep": keep}))
            if self.device.type == "cuda":
                vtc.graphs(model)
            else:
                play_graphs(model)
            self._graphed = keep, model
        return self._graphed[1]

    @functools.cached_property
    def copy(self) -> float:
        return timing.copy_gb_per_s(self.device)

    @functools.cached_property
    def matmul(self) -> float:
        return timing.matmul_tflop_per_s(self.device, self.stock[1].dtype)

    @contextlib.contextmanager
    def running(self, variant: Variant) -> Iterator[LlavaForConditionalGeneration]:
        if variant.graphs:
            model = self.graphed(variant.keep)
        elif variant.keep is None:
            model = self.stock[1]
        else:
            model = self.compressed
            vtc.enable(model, keep=variant.keep)
        before = torch.backends.cuda.cudnn_sdp_enabled()
        with torch.no_grad():
            torch.backends.cuda.enable_cudnn_sdp(before and variant.cudnn)
            try:
                yield model
            finally:
                torch.backends.cuda.enable_cudnn_sdp(before)

    def stages(self, model: LlavaForConditionalGeneration, batch: int, variant: Variant) -> Stages:
        """The stages, kept for one variant and its stock: each holds a KV cache. Those that failed raise again."""
        wanted = ((batch, variant), (batch, variant.stock))
        self._ready = {key: ready for key, ready in self._ready.items() if key in wanted}
        if (batch, variant) not in self._ready:
            try:
                stages = Stages(model, make_inputs(model, batch), variant.keep)
                stages.check()
                if variant.graphs:
                    self._check_graphs(stages, batch, variant)
                self._ready[batch, variant] = stages
            except Exception as error:  # out of memory, say
                self._ready[batch, variant] = error
        ready = self._ready[batch, variant]
        if isinstance(ready, Exception):
            raise ready
        return ready

    def _check_graphs(self, stages: Stages, batch: int, variant: Variant) -> None:
        """The gate of graphs: they were replayed, and give the logits of the model without them."""
        logits = stages.first_token()
        made = graphs_of(stages.base)
        if made is None or not {"vision", "prompt"} <= made.replays.keys():
            raise WrongResult(f"nothing was replayed: {made}")
        with self.running(variant._replace(graphs=False)) as model:
            require_close("logits", logits, model(**stages.inputs, logits_to_keep=1).logits)

    def stock_timer(self, batch: int, variant: Variant, stage: str) -> Callable[[], float] | None:
        """A function that times the stock model's stage once; None if there is none to compare with, or it failed."""
        if variant == variant.stock or stage == "selection":
            return None
        try:
            with self.running(variant.stock) as model:
                call = self.stages(model, batch, variant.stock).call(stage)
        except Exception:  # the record of the stock model's stage says why
            return None

        def stock_ms() -> float:
            with self.running(variant.stock):
                return timing.host_ms(call, self.device)

        return stock_ms

    def number(self, batch: int, variant: Variant, stage: str, rep_ms: float, played: bool) -> list[Record]:
        stock = self.stock_timer(batch, variant, stage)
        with self.running(variant) as model:
            stages = self.stages(model, batch, variant)
            call, works = stages.call(stage), stages.works(stage)
            least = roofline.floor(works, self.copy, self.matmul)
            profiled = stages.decode if stage in GENERATE else call  # profiling one token is enough
            times = timing.measure(
                [call], self.device, rep_ms, not_captured=NOT_CAPTURED.get(stage), played=played, other=stock
            )
            made = record.make(
                suite="e2e", op=stage, model=self.name, dtype=self.stock[0], backend=variant.name, times=times,
                moved=sum(work.bytes for work in works), floor_ms=least.ms, bound=least.bound,
                shape={"B": batch, "visual": stages.features.shape[1], "text": TEXT_TOKENS}, copy=self.copy,
                matmul_tflop_per_s=self.matmul,
                peak_bytes=timing.peak_bytes(call, self.device), sdpa=timing.sdpa_backend(profiled), device=self.device,
            )  # fmt: skip
        return [made]


def jobs(device: torch.device, options: Options) -> list[Job]:
    """One job for each stage of each variant and batch size; new lengths are timed at the first size only."""
    # The next model takes the place of the last: both may not fit.
    bench = functools.lru_cache(maxsize=1)(lambda name: Bench(name, device, options.image_size))
    # cuDNN's SDPA spends tens of milliseconds on planning for each new length, and every generated token is one.
    variants = (Variant(None), *map(Variant, options.keeps))
    with_graphs = [Variant(keep, graphs=True) for keep in (None, options.keeps[-1])]
    lengths = [Variant(keep, cudnn) for keep in (None, options.keeps[-1]) for cudnn in (True, False)]
    short = [stage for stage in STAGES if stage not in (NEW_LENGTH, LONG)]
    made = []
    for name in options.models:
        numbers = [
            (batch, v, stage)
            for batch in options.batches
            for v in variants
            for stage in short
            if stage != "selection" or v.keep
        ]
        first = options.batches[0]
        graphed = [(batch, v, stage) for v in with_graphs for batch in options.batches for stage in WITH_GRAPHS]
        place = sum(batch == first for batch, _, _ in numbers)  # early, as most depends on them
        numbers[place:place] = graphed
        numbers += [(first, v, stage) for v in lengths for stage in (NEW_LENGTH, *GENERATE)]
        numbers += [(batch, v, LONG) for batch in options.batches for v in variants]  # last, as they take the longest
        for batch, variant, stage in dict.fromkeys(numbers):
            # The first job of a worker builds the model, also after a crash, so every job has the long limit.
            call = functools.partial(_number, bench, name, batch, variant, stage, options)
            made.append(Job(f"{name} B={batch} {variant.name} {stage}", call, limit=60))
    return made


def _number(
    bench: Callable[[str], Bench], name: str, batch: int, variant: Variant, stage: str, options: Options
) -> list[Record]:
    return bench(name).number(batch, variant, stage, options.rep_ms, options.played)


def run(device: torch.device, options: Options, out: Path | None, say: Callable[[str], None] = print) -> int:
    """Time every stage; returns the exit status, 1 if a gate failed."""
    records, failed = run_jobs(jobs(device, options), out)
    for line in (*shares(records), *speedups.bounds(records)):
        say(line)
    if records:
        say("\n" + speedups.with_graphs(records) + "\n")
        say("\n" + table.tables(records) + "\n\n" + table.provenance_line(records[-1]))
    for name, why in failed.items():
        say(f"NO NUMBER: {name}: {why}")
    return 1 if failed or not records else 0


def shares(records: list[Record]) -> list[str]:
    """The time that VTC adds to the vision tower, in percent of the stock tower's."""
    tower = {(r.model, r.shape["B"]): r.ms for r in records if (r.op, r.backend) == ("vision", "sdpa")}
    return [
        f"{r.model} B={r.shape['B']} {r.backend}: the selection takes {100 * r.ms / stock:.2f} % of the stock tower"
        for r in records
        if r.op == "selection" and (stock := tower.get((r.model, r.shape["B"])))
    ]
