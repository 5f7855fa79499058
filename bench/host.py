"""`python -m bench host`: what the first token of `generate()` costs the host, with and without graphs.

The model has the layers of LLaVA-1.5-7B, 24 and 32, but they are 32 features wide and an image has 16 patches. So
arithmetic takes almost no time, and what is left is what a GPU waits for at batch size 1: Python and the launches. The
replay of a graph is counted and left out: on a GPU it is one launch.

Counts do not depend on the machine. Microseconds do, and a launch on a GPU costs the host more than one on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtc
from bench import cpu, launches, record
from bench.record import Provenance, Record
from vtc.hf.graphs import model as graphs

FILE = "host.jsonl"
COMPILED = "compiled.jsonl"
VARIANTS = {
    "stock": "the stock model",
    "stock, graphs": '`vtc.graphs` on a model that keeps all tokens, `method="none"`',
    "vtc": "`vtc.enable(model, keep=4)`",
    "vtc, graphs": "and `vtc.graphs(model)`",
}
TIMES = ("before_us", "between_us", "after_us")
STEPS = 8
TEXT, KEEP = 8, 4
REPLAYED: list[str] = []  # what was replayed; a Python list, as the counts are taken by others


@dataclasses.dataclass(kw_only=True)
class Host(Provenance):
    """One variant: counts of the first token, then the least times on this CPU."""

    variant: str
    kernels: int
    launches: int
    replays: int
    reads: int
    before_us: float  # from the call of generate() to the first launch of the vision tower
    between_us: float  # from there to the first launch of the language model
    after_us: float  # from there to the token
    step_us: float  # each further token
    processor: str


@dataclasses.dataclass(kw_only=True)
class Compiled(Provenance):
    """The first token of the bundled model on a CPU, as it is and with tower and language model compiled.

    Medians of `rounds` pairs, and the median of their ratios.
    """

    processor: str
    threads: int
    rounds: int
    ms: float
    compiled_ms: float
    speedup: float
    compile_s: float  # for one length of prompt


class CountingRecorder:
    """A `vtc.hf.graphs.capture.Recorder` whose replays do nothing but count. The results are those of the recording."""

    def begin(self) -> None:
        """Nothing runs on another stream."""

    def record(
        self, function: Callable[[], Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Callable[[], None]:
        """As `Recorder.record`."""
        function()
        return _replayed


def _replayed() -> None:
    REPLAYED.append("replay")
    _stamp()


@functools.cache
def build() -> LlavaForConditionalGeneration:
    """A LLaVA with the layers of LLaVA-1.5-7B, and almost nothing in them."""
    narrow = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=56, patch_size=14, num_hidden_layers=24, projection_dim=32, **narrow),
        text_config=LlamaConfig(vocab_size=100, num_hidden_layers=32, eos_token_id=None, **narrow),
        image_token_id=99,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.pad_token_id = 0
    return model


def prompt(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """A prompt of one image."""
    ids = torch.tensor([[1, 2, 3, *[model.config.image_token_id] * 16, *range(4, 4 + TEXT)]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@contextlib.contextmanager
def variant(name: str) -> Iterator[LlavaForConditionalGeneration]:
    """The model as a variant runs it."""
    model = build()
    try:
        if name != "stock":
            vtc.enable(model, **({"method": "none"} if name.startswith("stock") else {"keep": KEEP}))
        if name.endswith("graphs"):
            graphs.switch_on(model.model, graphs.Graphs(model.model, recorder=lambda _: CountingRecorder()))
        yield model
    finally:
        vtc.disable(model)


_STAMPS: list[float] = []  # when the vision tower was launched, then the language model


def _stamp() -> None:
    _STAMPS.append(time.perf_counter())


@contextlib.contextmanager
def stamped(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Stamp the calls of the tower and of the language model that no graph replays."""
    with contextlib.ExitStack() as stack:
        for module in (model.model.vision_tower, model.model.language_model):
            owner = type(module)
            stack.callback(setattr, owner, "forward", owner.forward)
            owner.forward = _with_stamp(owner.forward)  # type: ignore[method-assign]
        yield


def _with_stamp(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        _stamp()
        return forward(*args, **kwargs)

    return run


def times(model: LlavaForConditionalGeneration, rounds: int) -> dict[str, float]:
    """The least microseconds of each part of the first token, and of each further one."""
    inputs = prompt(model)
    found = []
    with stamped(model):
        for _ in range(rounds + 2):
            _STAMPS.clear()
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            end = time.perf_counter()
            tower, language = _STAMPS
            model.generate(**inputs, max_new_tokens=1 + STEPS, do_sample=False)
            longer = time.perf_counter() - end
            parts = (tower - start, language - tower, end - language, (longer - (end - start)) / STEPS)
            found.append(parts)
    least = [round(1e6 * min(each), 1) for each in zip(*found[2:], strict=True)]
    return dict(zip((*TIMES, "step_us"), least, strict=True))


def measure(rounds: int = 30) -> Iterator[Host]:
    """The record of each variant.

    Raises
    ------
    ValueError
        If Triton was imported without its interpreter.
    """
    launches.require_interpreter()
    for name in VARIANTS:
        with variant(name) as model:
            inputs = prompt(model)
            first = functools.partial(model.generate, **inputs, max_new_tokens=1, do_sample=False)
            first()
            REPLAYED.clear()
            found = launches.counts(first)
            counts = {key: found[key] for key in ("kernels", "launches", "reads")} | {"replays": len(REPLAYED)}
            taken = times(model, rounds)
        facts = record.provenance(torch.device("cpu"))
        yield Host(variant=name, **counts, **taken, processor=cpu.processor(), **facts)


def compiled(rounds: int) -> Compiled:
    """What torch.compile gains on a CPU."""
    with launches.variant("enable") as plain, launches.variant("enable") as other:
        for part in (other.model.vision_tower, other.model.language_model):
            part.compile(dynamic=False)

        def seconds(model: Any) -> float:
            start = time.perf_counter()
            model.generate(**launches.prompt(), max_new_tokens=1, do_sample=False)
            return time.perf_counter() - start

        seconds(plain)
        first = seconds(other)
        pairs = [(seconds(plain), seconds(other)) for _ in range(rounds)]
    ours, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
    return Compiled(
        processor=cpu.processor(), threads=torch.get_num_threads(), rounds=rounds, ms=round(1000 * ours, 1),
        compiled_ms=round(1000 * theirs, 1), speedup=round(statistics.median(a / b for a, b in pairs), 2),
        compile_s=round(first, 1), **record.provenance(torch.device("cpu")),
    )  # fmt: skip


def about_compiled(found: Compiled) -> str:
    """One sentence."""
    return (
        f"torch.compile of the tower and the language model: {found.compiled_ms} instead of {found.ms} ms to the first "
        f"token of the bundled model, {found.speedup:.2f} times as fast, after {found.compile_s:.0f} s of compiling "
        f"for one length of prompt ({found.processor}, {found.threads} thread, medians of {found.rounds} pairs)."
    )


def run(out: Path | None, rounds: int, compiles: bool = False, say: Callable[[str], None] = print) -> int:
    """Measure all variants, or what torch.compile gains; replaces the record in `out`. Returns the exit status."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made: list[Any]
    try:
        made = [compiled(rounds)] if compiles else list(measure(rounds))
    finally:
        torch.set_num_threads(before)
    say(about_compiled(made[0]) if compiles else table(made))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        file = out / (COMPILED if compiles else FILE)
        file.unlink(missing_ok=True)
        record.append(file, made)
    return 0


def expected(records: Sequence[Record], hosts: Sequence[Host]) -> str:
    """Markdown: milliseconds to the first token with graphs, by batch size, and the least that they save.

    The host's time before the tower and between the tower and the language model is added to the GPU's time, as if
    neither worked while the other does.
    """
    host = {each.variant: (each.before_us + each.between_us) / 1000 for each in hosts}
    found = {(r.shape["B"], r.op, r.backend): r for r in records if r.model == "LLaVA-1.5-7B"}
    stages = ("vision", "projector", "prefill")
    rows = [["B", "tokens", "stock, measured", "stock: GPU + host = with graphs", "VTC: GPU + host = with graphs"]]
    rows[0] += ["to stock", "to stock with graphs"]
    for batch, op, name in found:
        if op != "first token" or not name.startswith("vtc"):
            continue
        gpu = {each: sum(found[batch, op, each].ms for op in stages) for each in ("sdpa", name)}
        # The stock model's, sampled in turn with VTC's: the least, as this host's speed changes.
        turns = [r for (size, what, _), r in found.items() if (size, what) == (batch, op) and r.speedup_50]
        called = min(r.ms_50 * (r.speedup_50 or 0) for r in turns)
        stock, ours = gpu["sdpa"] + host["stock, graphs"], gpu[name] + host["vtc, graphs"]
        sums = [
            f"{gpu[each]:.1f} + {host[kind]:.1f} = {total:.1f}"
            for each, kind, total in (("sdpa", "stock, graphs", stock), (name, "vtc, graphs", ours))
        ]
        ratios = [f"{each / ours:.1f}x" for each in (called, stock)]
        rows.append([str(batch), name.removeprefix("vtc "), f"{called:.1f}", *sums, *ratios])
    return _markdown(rows)


def table(made: list[Host]) -> str:
    """Markdown: one row for each variant."""
    rows = [["first token of", "kernels", "Triton launches", "graphs", "reads", "ms before the tower"]]
    rows[0] += ["to the language model", "to the token", "together", "each further token"]
    for each in made:
        parts = [getattr(each, name) for name in TIMES]
        shown = [f"{us / 1000:.2f}" for us in (*parts, sum(parts), each.step_us)]
        rows.append([each.variant, *map(str, (each.kernels, each.launches, each.replays, each.reads)), *shown])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
