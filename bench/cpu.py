"""`python -m bench cpu`: `generate()` with fewer visual tokens against stock on a CPU, and what the selection costs.

All times are taken in turn, round by round, and the ratios are those of one round. Nothing is timed before its result
was checked: with all visual tokens VTC computes the stock model's bits; with fewer, the same tokens as a transcription
in plain PyTorch, and the same bits in each round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtc
from bench import record, table, timing
from bench.accuracy import WrongResult
from bench.jobs import Job
from bench.jobs import run as run_jobs
from bench.record import Record
from bench.stages import make_inputs, require_close, shared_copy
from vtc import ops, reference, tiny
from vtc.hf import encode
from vtc.hf.settings import Settings
from vtc.hf.views import plan_of
from vtc.plan import Plan

KEEPS = (192, 128, 64, 32)
BATCHES = (1, 4, 8)
ROUNDS = 5
NEW_TOKENS = 32
QUESTION = "how many objects are there ?"
DEVICE = torch.device("cpu")
STOCK, ALL_LAYERS, NOT_SELECTED = "stock", "eager, all attentions", "vtc without selection"


@dataclasses.dataclass(kw_only=True)
class OnCPU(Record):
    """A row of this suite; `speedup_*` are the stock model's time divided by this one, of samples of one round."""

    threads: int
    processor: str


class Subject(NamedTuple):
    """A stock model, its name, and prompts of one image each for it."""

    name: str
    model: LlavaForConditionalGeneration
    prompts: Callable[[int], dict[str, Tensor]]


def bundled() -> Subject:
    """The bundled model, asked one question about several scenes."""
    model, processor = tiny.load()

    def prompts(batch: int) -> dict[str, Tensor]:
        images = [tiny.scenes.Scene("test", number).image for number in range(batch)]
        return dict(processor(images=images, text=[tiny.prompt(QUESTION)] * batch, return_tensors="pt"))

    return Subject("bundled model", model, prompts)


def scaled(image_size: int = 336, tower_layers: int = 24, language_layers: int = 10) -> Subject:
    """A LLaVA with random weights: as deep a tower and as many tokens as LLaVA-1.5, and much narrower."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=image_size,
            patch_size=14,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=tower_layers,
            num_attention_heads=2,
        ),
        text_config=LlamaConfig(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=language_layers,
            num_attention_heads=8,
            vocab_size=1000,
            max_position_embeddings=4096,
        ),
        image_token_id=999,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    return Subject("scaled LLaVA", model, functools.partial(make_inputs, model))


SUBJECTS = {"bundled": bundled, "scaled": scaled}


class Out(NamedTuple):
    """What `generate()` returned: the new tokens [B, NEW_TOKENS], and the logits they come from."""

    tokens: Tensor
    logits: Tensor


class Watch:
    """Adds up the seconds that calls of `vtc.ops` take, seen from outside."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._depth = 0.0, 0, 0

    def _timed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        self._depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._depth -= 1
            self.calls += 1
            if not self._depth:  # an operation that another one calls is counted once
                self.seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for op in ops.OPS:
                watched = functools.partial(self._timed, getattr(ops, op))
                stack.enter_context(mock.patch.object(ops, op, watched))
            yield


class Bench:
    """One stock model, and copies that share its weights: one that compresses, one whose tower runs eagerly."""

    def __init__(self, subject: Subject) -> None:
        self.name, self.stock, self.prompts = subject
        self.compressed = shared_copy(self.stock)
        self.eager = shared_copy(self.stock.model.vision_tower)
        self.eager.set_attn_implementation("eager")
        tower = self.stock.config.vision_config
        self.num_tokens = (tower.image_size // tower.patch_size) ** 2

    def switch(self, **settings: Any) -> None:
        """Other settings, and none of the last ones."""
        vtc.disable(self.compressed)
        vtc.enable(self.compressed, **settings)

    def generate(self, model: LlavaForConditionalGeneration, inputs: dict[str, Tensor]) -> Out:
        """NEW_TOKENS tokens, greedy."""
        out = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return Out(out.sequences[:, -NEW_TOKENS:], torch.stack(out.logits))

    def all_layers(self, pixels: Tensor, plan: Plan, keep: int) -> Tensor:
        """The published way: attention matrices of all layers, of which a few [CLS] rows are used; features [B, K, D].

        See `transcribed` for the check.
        """
        scores, patches = self.seen(pixels, plan)
        return reference.compact(patches, scores.topk(keep).indices.sort().values)

    def seen(self, pixels: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Scores [B, N] and all patches [B, N, D] of a tower that returns the attention matrices of all layers."""
        out = self.eager(pixels, output_hidden_states=True, output_attentions=True)
        scores = torch.stack([out.attentions[number][:, :, 0, 1:].mean(dim=1) for number in plan.scored]).sum(dim=0)
        return scores, out.hidden_states[max(plan.feature_layers)][:, 1:]

    def transcribed(self, pixels: Tensor, keep: int) -> Tensor:
        """The features [B, K, D] by a transcription in plain PyTorch. Raises WrongResult if VTC's are others.

        VTC's scores must be the transcription's up to rounding, and its indices those of its own highest scores. The
        transcription takes those indices: two patches whose scores differ by rounding alone may change places.
        """
        plan, settings = self.planned(pixels)
        tokens = encode.reduce(settings, pixels, plan).tokens
        scores, patches = self.seen(pixels, plan)
        if tokens.indices is None or tokens.scores is None:
            raise WrongResult("the method selects no patches")
        require_close("scores", tokens.scores, scores)
        if not torch.equal(tokens.indices, reference.topk(tokens.scores, keep)):
            raise WrongResult("indices: not those of the highest scores")
        features = reference.compact(patches, tokens.indices)
        require_close("kept features", tokens.features, features)
        return features

    def few_tokens(self, inputs: dict[str, Tensor], keep: int) -> Tensor:
        """The new tokens of the stock language model, which sees the transcription's features in place of the image."""
        ids = inputs["input_ids"]
        visual = self.stock.model.multi_modal_projector(self.transcribed(inputs["pixel_values"], keep))
        embeds = self.stock.get_input_embeddings()(ids)
        start = int((ids[0] == self.stock.config.image_token_id).nonzero()[0])  # prompts differ in their images alone
        embeds = torch.cat([embeds[:, :start], visual, embeds[:, start + self.num_tokens :]], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        return self.generate(self.stock, {"inputs_embeds": embeds, "attention_mask": mask}).tokens

    def planned(self, pixels: Tensor) -> tuple[Plan, Settings]:
        settings = Settings.of(self.compressed)
        return plan_of(settings, views=pixels), settings

    def check(self, inputs: dict[str, Tensor], keeps: Sequence[int]) -> dict[str, Out]:
        """The gate: what each variant has to return in each round. Raises WrongResult."""
        expected = {STOCK: self.generate(self.stock, inputs)}
        self.switch(keep=self.num_tokens)
        require_same(f"vtc {self.num_tokens}, all tokens", self.generate(self.compressed, inputs), expected[STOCK])
        for keep in keeps:
            self.switch(keep=keep)
            made = expected[f"vtc {keep}"] = self.generate(self.compressed, inputs)
            if not torch.equal(made.tokens, self.few_tokens(inputs, keep)):
                raise WrongResult(f"vtc {keep}: other tokens than those of the transcription in plain PyTorch")
        return expected

    @torch.no_grad()
    def generation(self, batch: int, keeps: Sequence[int], rounds: int) -> list[OnCPU]:
        """Time `generate()` of the stock model and with each number of visual tokens."""
        inputs = self.prompts(batch)
        expected = self.check(inputs, keeps)

        def timed(name: str, keep: int | None) -> float:
            if keep is not None:
                self.switch(keep=keep)  # outside of what is timed: it is done once
            made: list[Out] = []
            model = self.stock if keep is None else self.compressed
            taken = timing.host_ms(lambda: made.append(self.generate(model, inputs)), DEVICE)
            require_same(name, made[0], expected[name])
            return taken

        calls = {STOCK: functools.partial(timed, STOCK, None)}
        calls |= {f"vtc {keep}": functools.partial(timed, f"vtc {keep}", keep) for keep in keeps}
        visual = {STOCK: self.num_tokens} | {f"vtc {keep}": keep for keep in keeps}
        return self.records("generate", batch, in_turn(calls, rounds), visual)

    @torch.no_grad()
    def tower(self, batch: int, keep: int, rounds: int) -> list[OnCPU]:
        """Time the vision tower: stock, with VTC's selection and without it, and with all attention matrices.

        The selection's own time, that of the operations, is a record of its own.
        """
        pixels = self.prompts(batch)["pixel_values"]
        watch, ours, selections = Watch(), f"vtc {keep}", []
        plans = {}
        for name, settings in {NOT_SELECTED: {"method": "none"}, ours: {"keep": keep}}.items():
            self.switch(**settings)
            plans[name] = self.planned(pixels)
        self.transcribed(pixels, keep)

        def reduced(name: str) -> float:
            plan, settings = plans[name]
            watch.seconds, watch.calls = 0.0, 0
            with watch.watching():
                taken = timing.host_ms(lambda: encode.reduce(settings, pixels, plan), DEVICE)
            if name == ours:
                if not watch.calls:
                    raise WrongResult("the selection called no operation of vtc.ops")
                selections.append(1e3 * watch.seconds)
            return taken

        stock = self.stock.model.vision_tower
        calls = {
            STOCK: lambda: timing.host_ms(lambda: stock(pixels, output_hidden_states=True), DEVICE),
            ours: functools.partial(reduced, ours),
            NOT_SELECTED: functools.partial(reduced, NOT_SELECTED),
            ALL_LAYERS: lambda: timing.host_ms(lambda: self.all_layers(pixels, plans[ours][0], keep), DEVICE),
        }
        for call in calls.values():  # fills caches; `generation` has called everything for its check
            call()
        samples = in_turn(calls, rounds)
        visual = {STOCK: self.num_tokens, ours: keep, NOT_SELECTED: self.num_tokens, ALL_LAYERS: keep}
        made = self.records("tower", batch, samples, visual)
        parts = {STOCK: samples[STOCK], ours: selections[-rounds:]}
        return made + self.records("selection", batch, parts, visual)[1:]

    def records(self, op: str, batch: int, samples: dict[str, list[float]], visual: dict[str, int]) -> list[OnCPU]:
        weights = self.stock if op == "generate" else self.stock.model.vision_tower
        moved = sum(parameter.nbytes for parameter in weights.parameters())
        made = []
        for name, taken in samples.items():
            ratios = [theirs / own for theirs, own in zip(samples[STOCK], taken, strict=True)]
            times = timing.Times(
                timing.quantiles(taken), None, "no GPU", None if name == STOCK else timing.quantiles(ratios)
            )
            one = record.make(
                suite="cpu", op=op, model=self.name, dtype="fp32", backend=name, times=times, moved=moved,
                shape={"B": batch, "visual": visual[name]}, copy=copy_gb_per_s(), peak_bytes=None, sdpa=None,
                device=DEVICE,
            )  # fmt: skip
            made.append(OnCPU(**dataclasses.asdict(one), threads=torch.get_num_threads(), processor=processor()))
        return made


def require_same(name: str, made: Out, expected: Out) -> None:
    if not torch.equal(made.logits, expected.logits) or not torch.equal(made.tokens, expected.tokens):
        raise WrongResult(f"{name}: other logits than those that were checked, or than the stock model's")


def in_turn(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call all of `calls` in each round, which begins with another one each time; samples by name, one a round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            samples[name].append(calls[name]())
    return samples


@functools.cache
def copy_gb_per_s() -> float:
    return timing.copy_gb_per_s(DEVICE)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def jobs(models: Sequence[str], batches: Sequence[int], keeps: Sequence[int], rounds: int) -> list[Job]:
    """Two jobs for each model and batch size: the tower, and `generate()`.

    Raises
    ------
    ValueError
        For an unknown model.
    """
    if unknown := [name for name in models if name not in SUBJECTS]:
        raise ValueError(f"unknown model {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    bench = functools.cache(lambda name: Bench(SUBJECTS[name]()))
    selected = 64 if 64 in keeps else keeps[0]
    made = []
    for name in models:
        for batch in batches:
            tower = functools.partial(lambda n, *given: bench(n).tower(*given), name, batch, selected, rounds)
            generation = functools.partial(lambda n, *given: bench(n).generation(*given), name, batch, keeps, rounds)
            made += [Job(f"{name} B={batch} tower", tower), Job(f"{name} B={batch} generate", generation)]
    return made


def run(
    models: Sequence[str] = tuple(SUBJECTS),
    batches: Sequence[int] = BATCHES,
    keeps: Sequence[int] = KEEPS,
    rounds: int = ROUNDS,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Check and time; returns the exit status, 1 if a number is missing. `out` is overwritten."""
    if too_many := [keep for keep in keeps if keep >= 576]:
        raise ValueError(f"--keep must be below the 576 visual tokens of an image, got {too_many[0]}")
    todo = jobs(models, batches, keeps, rounds)
    if out:
        out.unlink(missing_ok=True)
    records, failed = run_jobs(todo, out)
    if records:
        say(tables(records))
    for name, why in failed.items():
        say(f"NO NUMBER: {name}: {why}")
    return 1 if failed or not records else 0


def tables(records: Sequence[OnCPU]) -> str:
    """How many times as fast as the stock model, by batch size; and the times of the tower. Markdown."""
    if not records:
        return "Not measured yet: the command above writes the records."
    parts = []
    for op, title in (
        ("generate", f"`generate()`, {NEW_TOKENS} tokens: stock's time divided by VTC's"),
        ("tower", "The vision tower's time, stock's = 1"),
        ("selection", "The selection's share of the stock tower's time"),
    ):
        chosen = [r for r in records if r.op == op and r.speedup_50 is not None]
        if not chosen:
            continue
        batches = sorted({r.shape["B"] for r in chosen})
        found = {(r.model, r.backend, r.shape["B"]): r for r in chosen}
        rows = [
            [model, backend, *(_cell(op, found.get((model, backend, batch))) for batch in batches)]
            for model, backend in dict.fromkeys((r.model, r.backend) for r in chosen)
        ]
        columns = ["model", "variant", *(f"B = {batch}" for batch in batches)]
        parts.append(f"{title}:\n\n{table.markdown(columns, rows)}")
    last = records[-1]
    threads = f"{last.threads} thread{'s' * (last.threads > 1)}"
    parts.append(
        f"{last.processor}, {threads}; medians and, in parentheses, 20 to 80 % of the rounds; "
        + table.provenance_line(last)
    )
    return "\n\n".join(parts)


def _cell(op: str, one: OnCPU | None) -> str:
    if one is None or one.speedup_20 is None or one.speedup_50 is None or one.speedup_80 is None:
        return ""
    low, middle, high = one.speedup_20, one.speedup_50, one.speedup_80
    if op == "generate":
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"
    low, middle, high = 1 / high, 1 / middle, 1 / low
    if op == "tower":
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"
    return f"{100 * middle:.1f} % ({100 * low:.1f}-{100 * high:.1f})"
