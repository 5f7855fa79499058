"""`python -m bench e2e`: a whole LLaVA, stage by stage, stock SDPA with all visual tokens against VTC with few."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtc
from bench import record, table, timing
from bench.accuracy import WrongResult
from bench.jobs import Job
from bench.jobs import run as run_jobs
from bench.record import Record
from vtc import ops, reference
from vtc.hf.patch import Plan, encode, settings
from vtc.methods import VisionOutputs

TEXT_TOKENS = 40
NEW_TOKENS = 16
NOT_CAPTURED = {
    "first token": "transformers reads values back",
    "first token, new length": "each call is longer than the last",
    "generate": "transformers reads values back",
}
STAGES = ("vision", "select", "projector", "prefill", "decode", "first token", "first token, new length", "generate")


class Variant(NamedTuple):
    """What stands side by side: how many visual tokens are kept, None for the stock model, and by which SDPA."""

    keep: int | None
    cudnn: bool = True

    @property
    def name(self) -> str:
        return ("sdpa" if self.keep is None else f"vtc {self.keep}") + ("" if self.cudnn else ", no cudnn")

    @property
    def stock(self) -> Variant:
        """What it is compared with."""
        return self._replace(keep=None)


VARIANTS = (Variant(None), Variant(128), Variant(64))
# A prompt of a new length takes cuDNN's SDPA tens of milliseconds of planning. Every token that is generated is one.
LENGTHS = tuple(Variant(keep, cudnn) for keep in (None, 64) for cudnn in (True, False))


def build(device: torch.device, image_size: int = 336) -> tuple[str, str, LlavaForConditionalGeneration]:
    """Name, dtype and model: LLaVA-1.5-7B with random weights; on a CPU a small one, its images of 576 tokens, too."""
    on_gpu = device.type == "cuda"
    wide = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    slim = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=2)
    small = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, vocab_size=1000)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=image_size, patch_size=14, **(wide if on_gpu else slim)),
        text_config=LlamaConfig(max_position_embeddings=4096, **({"vocab_size": 32064} if on_gpu else small)),
        image_token_id=32000 if on_gpu else 999,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with device:
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    return ("LLaVA-1.5-7B", "bf16", model) if on_gpu else ("small LLaVA", "fp32", model)


def make_inputs(model: LlavaForConditionalGeneration, batch: int, text_tokens: int = TEXT_TOKENS) -> dict[str, Tensor]:
    """`batch` prompts of one image and `text_tokens` of text."""
    size, image = model.config.vision_config.image_size, model.config.image_token_id
    generator = torch.Generator().manual_seed(batch)
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    text = torch.randint(3, 900, (batch, text_tokens), generator=generator)
    placeholders = torch.full((batch, Plan.of(model.model).tokens), image)
    ids = torch.cat([text[:, :5], placeholders, text[:, 5:]], dim=1)
    return {"input_ids": ids.to(model.device), "pixel_values": pixels.to(model.device, model.dtype)}


class Stages:
    """The stages of one model on one batch as calls that can be timed; `model` compresses already, or does not."""

    def __init__(self, model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], keep: int | None) -> None:
        self.model, self.base, self.inputs, self.keep = model, model.model, inputs, keep
        self.plan = Plan.of(self.base, inputs["pixel_values"])
        self.features = self.vision()
        visual = self.projector()
        ids = inputs["input_ids"]
        embeds = model.get_input_embeddings()
        self.embeds = torch.cat([embeds(ids[:, :5]), visual, embeds(ids[:, 5 + self.plan.tokens :])], dim=1)
        self.token = embeds(ids[:, -1:])
        self.cache = self.language(self.embeds).past_key_values
        heads = self.base.vision_tower.config.num_attention_heads
        layer = torch.randn(3, len(ids), 1 + self.plan.tokens, heads, self.features.shape[-1] // heads)
        layer = layer.to(model.device, model.dtype)
        self.query, self.key = layer[0].transpose(1, 2), layer[1].transpose(1, 2)
        self.hidden = layer[2].flatten(2)
        self.lengths = itertools.count(TEXT_TOKENS + 1)
        self.prompt = [(layer.keys, layer.values) for layer in self.cache.layers]

    def call(self, stage: str) -> tuple[Callable[[], Any], int]:
        """What a stage calls, and the bytes it has to read or write at least: mostly its weights, once."""
        base, size = self.base, self.model.dtype.itemsize
        language = _nbytes(base.language_model) + _nbytes(self.model.lm_head)
        everything = _nbytes(self.model)
        cached = sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))
        kept = 2 * (self.keep or 0) * self.hidden.shape[0] * self.hidden.shape[2] * size
        return {
            "vision": (self.vision, _nbytes(base.vision_tower)),
            "select": (self.select, len(self.plan.scored) * self.key.nbytes + kept),
            "projector": (self.projector, _nbytes(base.multi_modal_projector)),
            "prefill": (self.prefill, language),
            "decode": (self.decode, language + cached),
            "first token": (self.first_token, everything),
            "first token, new length": (self.new_length, everything),
            "generate": (self.generate, everything + (NEW_TOKENS - 1) * (language + cached)),
        }[stage]

    def vision(self) -> Tensor:
        """The tower and what it hands to the projector; with VTC that includes `select`."""
        pixels = self.inputs["pixel_values"]
        if self.keep is not None:
            return encode(self.base, pixels, self.plan)[0]
        return self.base.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    def select(self) -> Tensor:
        """What VTC adds to the tower, alone: scores of the scored layers, topk, compact."""
        config = settings(self.base)
        rows = [
            ops.row_scores(self.query[:, :, 0], self.key, skip=1, backend=config.backend).unsqueeze(1)
            for _ in self.plan.scored
        ]
        tower = VisionOutputs(self.hidden, self.plan.grid, torch.stack(rows))
        return self.plan.method.reduce(tower, self.plan.kept).features

    def projector(self) -> Tensor:
        return self.base.multi_modal_projector(self.features)

    def language(self, embeds: Tensor, cache: Any = None) -> Any:
        return self.base.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)

    def prefill(self) -> Tensor:
        return self.model.lm_head(self.language(self.embeds).last_hidden_state[:, -1:])

    def decode(self) -> Tensor:
        """One token on top of the prompt; afterwards the cache has the prompt's own tensors again.

        A graph's replays read them, so they must not be those that the capture has made.
        """
        try:
            return self.model.lm_head(self.language(self.token, self.cache).last_hidden_state)
        finally:
            for layer, (keys, values) in zip(self.cache.layers, self.prompt, strict=True):
                layer.keys, layer.values = keys, values

    def first_token(self) -> Tensor:
        """All of it through the model's own forward, from pixels to the first logits."""
        return self.model(**self.inputs, logits_to_keep=1).logits

    def new_length(self) -> Tensor:
        """As `first_token`, one token of text longer at each call."""
        ids = self.inputs["input_ids"]
        ids = torch.cat([ids, ids[:, -1:].expand(-1, next(self.lengths) - TEXT_TOKENS)], dim=1)
        return self.model(**{**self.inputs, "input_ids": ids}, logits_to_keep=1).logits

    def generate(self) -> Tensor:
        """NEW_TOKENS tokens, greedy, as a user generates them."""
        return self.model.generate(
            **self.inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )

    def check(self) -> None:
        """The gate: raise unless forward gives what the stages give, and the patches are those the formula chooses."""
        _close("logits", self.first_token(), self.prefill())
        if self.keep is None:
            return
        pixels, base = self.inputs["pixel_values"], self.base
        kept, selection = encode(base, pixels, self.plan)
        if not torch.equal(selection.indices, reference.topk(selection.scores, self.keep)):
            raise WrongResult("indices: not those of the highest scores")
        with vtc.compress(self.model):
            vtc.disable(self.model)
            base.set_attn_implementation({"vision_config": "eager"})
            seen = base.vision_tower(pixels[:1], output_hidden_states=True, output_attentions=True)
        scores = sum(seen.attentions[number][:, :, 0, 1:].float().mean(dim=1) for number in self.plan.scored)
        _close("scores", selection.scores[:1], scores.to(kept.dtype).float(), kept.dtype)
        _close(
            "kept rows", kept[:1], reference.compact(seen.hidden_states[self.plan.stop][:, 1:], selection.indices[:1])
        )


def _nbytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _close(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless the difference's norm is within 16 units of rounding of the norm: layers add up their roundings."""
    eps = torch.finfo(dtype or expected.dtype).eps
    error = ((actual - expected).double().norm() / expected.double().norm()).item()
    if not error <= 16 * eps:
        raise WrongResult(f"{what}: relative error {error:.3g} > {16 * eps:.3g}")


class Bench:
    """The model, and the stages of one variant on one batch: both are made, and gated, when they are first needed."""

    def __init__(self, device: torch.device, image_size: int) -> None:
        self.device, self.image_size = device, image_size
        self._ready: dict[tuple[int, Variant], Stages | Exception] = {}

    @functools.cached_property
    def model(self) -> tuple[str, str, LlavaForConditionalGeneration]:
        return build(self.device, self.image_size)

    @functools.cached_property
    def copy(self) -> float:
        return timing.copy_gb_per_s(self.device)

    @contextlib.contextmanager
    def running(self, variant: Variant) -> Iterator[LlavaForConditionalGeneration]:
        _, _, model = self.model
        before = torch.backends.cuda.cudnn_sdp_enabled()
        with vtc.compress(model, **({"keep": variant.keep} if variant.keep else {})), torch.no_grad():
            if variant.keep is None:
                vtc.disable(model)
            torch.backends.cuda.enable_cudnn_sdp(before and variant.cudnn)
            try:
                yield model
            finally:
                torch.backends.cuda.enable_cudnn_sdp(before)

    def stages(self, model: LlavaForConditionalGeneration, batch: int, variant: Variant) -> Stages:
        """Kept as long as the batch is the same. What failed fails again at once."""
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
        """What times the stock model's stage once; None if there is nothing to compare, or it has failed itself."""
        if variant == variant.stock or stage == "select":
            return None
        try:
            with self.running(variant.stock) as model:
                call, _ = self.stages(model, batch, variant.stock).call(stage)
        except Exception:  # the stock model's own number says why
            return None

        def stock_ms() -> float:
            with self.running(variant.stock):
                return timing.host_ms(call, self.device)

        return stock_ms

    def number(self, batch: int, variant: Variant, stage: str, rep_ms: float, played: bool) -> list[Record]:
        stock = self.stock_timer(batch, variant, stage)
        with self.running(variant) as model:
            name, dtype, _ = self.model
            stages = self.stages(model, batch, variant)
            call, moved = stages.call(stage)
            profiled = stages.decode if stage == "generate" else call  # of many tokens, one tells as much
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
    """One for each stage of each variant and batch size; what new lengths cost is asked at the first size alone."""
    bench = Bench(device, image_size=168 if played else 336)
    *stages, new_length, generate = STAGES

    def of(batch: int) -> list[tuple[int, Variant, str]]:
        return [(batch, v, s) for v in VARIANTS for s in stages if s != "select" or v.keep]

    first, *others = batches
    lengths = [(first, v, s) for v in LENGTHS for s in (new_length, generate)]
    asked = of(first) + lengths + [one for batch in others for one in of(batch)]
    # Whichever comes first, after a crash too, builds the model: all may take as long.
    return [
        Job(f"B={b} {v.name} {s}", functools.partial(bench.number, b, v, s, rep_ms, played), limit=60)
        for b, v, s in asked
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
    """What VTC adds to the vision tower, in percent of the stock tower's time."""
    tower = {r.shape["B"]: r.ms for r in records if (r.op, r.backend) == ("vision", "sdpa")}
    return [
        f"B={r.shape['B']} {r.backend}: select takes {100 * r.ms / tower[r.shape['B']]:.2f} % of the stock tower"
        for r in records
        if r.op == "select" and r.shape["B"] in tower
    ]
