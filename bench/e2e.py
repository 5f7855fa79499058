"""`python -m bench e2e`: a whole LLaVA, stage by stage, stock SDPA with all visual tokens against VTC with few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtc
from bench import record, table, timing
from bench.record import Record
from bench.workloads import WrongResult
from vtc import ops, reference
from vtc.llava import Plan, encode, settings
from vtc.methods import Tower

TEXT_TOKENS = 40
KEEPS = (None, 128, 64)  # None: the stock model, every visual token
STAGES = ("vision", "select", "projector", "prefill", "decode", "first token")


def build(device: torch.device) -> tuple[str, str, LlavaForConditionalGeneration]:
    """Name, dtype and model: LLaVA-1.5-7B with random weights; on a CPU a small one, its images of 576 tokens, too."""
    on_gpu = device.type == "cuda"
    wide = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    slim = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=2)
    small = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, vocab_size=1000)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **(wide if on_gpu else slim)),
        text_config=LlamaConfig(max_position_embeddings=4096, **({"vocab_size": 32064} if on_gpu else small)),
        image_token_id=32000 if on_gpu else 999,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with device:
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    return ("LLaVA-1.5-7B", "bf16", model) if on_gpu else ("small LLaVA", "fp32", model)


def make_inputs(model: LlavaForConditionalGeneration, batch: int) -> dict[str, Tensor]:
    """`batch` prompts of one image and TEXT_TOKENS of text."""
    size, image = model.config.vision_config.image_size, model.config.image_token_id
    generator = torch.Generator().manual_seed(batch)
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    text = torch.randint(3, 900, (batch, TEXT_TOKENS), generator=generator)
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

    def calls(self) -> Iterator[tuple[str, Callable[[], Any], int]]:
        """Stage, call, and the bytes it has to read or write at least: mostly its weights, once."""
        base, size = self.base, self.model.dtype.itemsize
        cached = sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))
        language = _nbytes(base.language_model) + _nbytes(self.model.lm_head)
        yield "vision", self.vision, _nbytes(base.vision_tower)
        if self.keep is not None:
            kept = 2 * self.keep * self.hidden.shape[0] * self.hidden.shape[2] * size
            yield "select", self.select, len(self.plan.scored) * self.key.nbytes + kept
        yield "projector", self.projector, _nbytes(base.multi_modal_projector)
        yield "prefill", self.prefill, language
        yield "decode", self.decode, language + cached
        yield "first token", self.first_token, _nbytes(self.model)

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
        tower = Tower(self.hidden, self.plan.grid, torch.stack(rows))
        return self.plan.method.compress(tower, self.plan.kept).rows

    def projector(self) -> Tensor:
        return self.base.multi_modal_projector(self.features)

    def language(self, embeds: Tensor, cache: Any = None) -> Any:
        return self.base.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)

    def prefill(self) -> Tensor:
        return self.model.lm_head(self.language(self.embeds).last_hidden_state[:, -1:])

    def decode(self) -> Tensor:
        """One token on top of the prompt; the cache is cut back to the prompt within the call."""
        logits = self.model.lm_head(self.language(self.token, self.cache).last_hidden_state)
        self.cache.crop(-1)
        return logits

    def first_token(self) -> Tensor:
        """All of it through the model's own forward, from pixels to the first logits."""
        return self.model(**self.inputs, logits_to_keep=1).logits

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


@torch.no_grad()
def run(
    device: torch.device,
    batches: tuple[int, ...],
    out: Path | None,
    rep_ms: float = 100.0,
    say: Callable[[str], None] = print,
) -> int:
    """Time every stage for every batch size and K; returns the exit status, 1 if a gate failed."""
    name, dtype, model = build(device)
    copy = timing.copy_gb_per_s(device)
    records, failures = [], []
    for batch in batches:
        inputs = make_inputs(model, batch)
        timed: list[Record] = []
        for keep in KEEPS:
            with vtc.compress(model, **({"keep": keep} if keep else {})):
                if keep is None:
                    vtc.disable(model)
                variant = f"vtc {keep}" if keep else "sdpa"
                stages = Stages(model, inputs, keep)
                try:
                    stages.check()
                except WrongResult as error:
                    failures.append(f"B={batch} {variant} {error}")
                    continue
                for stage, call, moved in stages.calls():
                    shape = {"B": batch, "visual": stages.features.shape[1], "text": TEXT_TOKENS}
                    peak, times = timing.peak_bytes(call, device), timing.time_ms(call, device, rep_ms)
                    timed.append(
                        record.make(
                            suite="e2e", op=stage, model=name, shape=shape, dtype=dtype, backend=variant, times=times,
                            moved=moved, copy=copy, peak_bytes=peak, device=device,
                        )
                    )  # fmt: skip
                del stages
        for stage in STAGES:
            record.compare_within([r for r in timed if r.op == stage])
        records += timed
        if out:
            record.append(out, timed)
        for line in shares(timed):
            say(line)
    if records:
        say("\n" + table.tables(records) + "\n\n" + table.provenance_line(records[-1]))
    for failure in failures:
        say(f"NO NUMBER: {failure}")
    return 1 if failures or not records else 0


def shares(records: list[Record]) -> list[str]:
    """What VTC adds to the vision tower, in percent of the stock tower's time."""
    tower = {r.shape["B"]: r.ms_50 for r in records if (r.op, r.backend) == ("vision", "sdpa")}
    return [
        f"B={r.shape['B']} {r.backend}: select takes {100 * r.ms_50 / tower[r.shape['B']]:.2f} % of the stock tower"
        for r in records
        if r.op == "select" and r.shape["B"] in tower
    ]
