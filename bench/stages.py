"""A LLaVA and its stages as calls that can be timed: vision, selection, projector, prefill, decode, generation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bench.accuracy import WrongResult
from vtc import ops, reference
from vtc.hf import encode, names
from vtc.hf.settings import Settings
from vtc.hf.views import plan_of
from vtc.methods import VisionOutputs

TEXT_TOKENS = 40
NEW_TOKENS = 16


def build(device: torch.device, image_size: int = 336) -> tuple[str, str, LlavaForConditionalGeneration]:
    """Name, dtype and model: LLaVA-1.5-7B with random weights; on a CPU a small model, also with 576 visual tokens."""
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


def shared_copy(module: Any) -> Any:
    """A copy of `module`, configuration included, that shares its tensors."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def make_inputs(model: LlavaForConditionalGeneration, batch: int, text_tokens: int = TEXT_TOKENS) -> dict[str, Tensor]:
    """`batch` prompts of one image and `text_tokens` of text."""
    vision, image = model.config.vision_config, model.config.image_token_id
    size = vision.image_size
    generator = torch.Generator().manual_seed(batch)
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    text = torch.randint(3, 900, (batch, text_tokens), generator=generator)
    placeholders = torch.full((batch, (size // vision.patch_size) ** 2), image)
    ids = torch.cat([text[:, :5], placeholders, text[:, 5:]], dim=1)
    return {"input_ids": ids.to(model.device), "pixel_values": pixels.to(model.device, model.dtype)}


class Stages:
    """The stages of one model on one batch as calls that can be timed. The caller switches compression on or off."""

    def __init__(self, model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], keep: int | None) -> None:
        self.model, self.base, self.inputs, self.keep = model, model.model, inputs, keep
        self.settings = Settings.of(model)
        self.plan = plan_of(self.settings, views=inputs["pixel_values"])
        self.features = self.vision()
        visual = self.projector()
        ids = inputs["input_ids"]
        embeds = model.get_input_embeddings()
        self.embeds = torch.cat([embeds(ids[:, :5]), visual, embeds(ids[:, 5 + self.plan.num_tokens :])], dim=1)
        self.token = embeds(ids[:, -1:])
        self.cache = names.cache_of(self.language(self.embeds))
        heads = self.base.vision_tower.config.num_attention_heads
        layer = torch.randn(3, len(ids), 1 + self.plan.num_tokens, heads, self.features.shape[-1] // heads)
        layer = layer.to(model.device, model.dtype)
        self.query, self.key = layer[0].transpose(1, 2), layer[1].transpose(1, 2)
        self.hidden = layer[2].flatten(2)
        self.lengths = itertools.count(TEXT_TOKENS + 1)
        self.prompt = [(layer.keys, layer.values) for layer in self.cache.layers]

    def call(self, stage: str) -> tuple[Callable[[], Any], int]:
        """The call of a stage, and the bytes that it must read or write at least: mostly its weights, once."""
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
        """The tower, up to the projector's input; with VTC that includes `select`."""
        pixels = self.inputs["pixel_values"]
        if self.keep is not None:
            return encode.reduce(self.settings, pixels, self.plan)[0].features
        return self.base.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    def select(self) -> Tensor:
        """What VTC adds to the tower: [CLS] probabilities of the scored layers, and the selection."""
        queries, keys = ([x] * len(self.plan.scored) for x in (self.query[:, :, 0], self.key))
        cls_probs = ops.cls_probs(queries, keys, skip=1, backend=self.plan.config.backend)
        return self.plan.method.reduce(
            VisionOutputs(self.hidden, self.plan.grid, cls_probs), self.plan.num_kept
        ).features

    def projector(self) -> Tensor:
        return self.base.multi_modal_projector(self.features)

    def language(self, embeds: Tensor, cache: Any = None) -> Any:
        return self.base.language_model(inputs_embeds=embeds, **{names.CACHE: cache}, use_cache=True)

    def prefill(self) -> Tensor:
        return self.model.lm_head(self.language(self.embeds).last_hidden_state[:, -1:])

    def decode(self) -> Tensor:
        """One token on top of the prompt; afterwards the cache has the prompt's own tensors again.

        Replays of a graph read these tensors, so they must not be the ones made during the capture.
        """
        try:
            return self.model.lm_head(self.language(self.token, self.cache).last_hidden_state)
        finally:
            for layer, (keys, values) in zip(self.cache.layers, self.prompt, strict=True):
                layer.keys, layer.values = keys, values

    def first_token(self) -> Tensor:
        """The model's own forward, from pixels to the first logits."""
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
        """The gate: raise unless forward and the stages agree, and the patches are those of the formula."""
        _close("logits", self.first_token(), self.prefill())
        if self.keep is None:
            return
        pixels, base = self.inputs["pixel_values"], self.base
        kept, indices, scores = self._selected()
        if not torch.equal(indices, reference.topk(scores, self.keep)):
            raise WrongResult("indices: not those of the highest scores")
        tower = shared_copy(base.vision_tower)
        tower.set_attn_implementation("eager")
        seen = tower(pixels[:1], output_hidden_states=True, output_attentions=True)
        expected = sum(seen.attentions[number][:, :, 0, 1:].float().mean(dim=1) for number in self.plan.scored)
        _close("scores", scores[:1], expected.to(kept.dtype).float(), kept.dtype)
        patches = seen.hidden_states[max(self.plan.feature_layers)][:, 1:]
        _close("kept features", kept[:1], reference.compact(patches, indices[:1]))

    def _selected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, K, D], indices [B, K] and scores [B, N] of the patches that stay."""
        tokens, _ = encode.reduce(self.settings, self.inputs["pixel_values"], self.plan)
        return tokens.features, tokens.indices, tokens.scores


def _nbytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _close(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless the difference's norm is within 16 units of rounding of the norm: layers accumulate rounding."""
    eps = torch.finfo(dtype or expected.dtype).eps
    error = ((actual - expected).double().norm() / expected.double().norm()).item()
    if not error <= 16 * eps:
        raise WrongResult(f"{what}: relative error {error:.3g} > {16 * eps:.3g}")
