"""A LLaVA and its stages as calls that can be timed: vision, selection, projector, prefill, decode, generation."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bench import roofline
from bench.accuracy import WrongResult
from vtc import ops, reference
from vtc.hf import encode, names
from vtc.hf.settings import Settings
from vtc.hf.views import plan_of
from vtc.methods import VisionOutputs

TEXT_TOKENS = 40

CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
MODELS: dict[str, tuple[dict[str, int], dict[str, int]]] = {  # vision tower and language model
    "LLaVA-1.5-7B": (CLIP_L, dict(vocab_size=32064)),
    "LLaVA-1.5-13B": (
        CLIP_L,
        dict(vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    ),
    "small LLaVA": (
        dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=2),
        dict(vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4),
    ),
}


def config_of(name: str, image_size: int = 336) -> LlavaConfig:
    """The configuration of one of `MODELS`; with the default size of images it has 576 visual tokens."""
    vision, language = MODELS[name]
    return LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=image_size, patch_size=14, **vision),
        text_config=LlamaConfig(max_position_embeddings=4096, **language),
        image_token_id=min(32000, language["vocab_size"] - 1),
    )


def build(name: str, device: torch.device, image_size: int = 336) -> tuple[str, LlavaForConditionalGeneration]:
    """Dtype and model, with random weights: bf16 on a GPU, fp32 on a CPU."""
    torch.manual_seed(0)
    short, dtype = ("bf16", torch.bfloat16) if device.type == "cuda" else ("fp32", torch.float32)
    config = config_of(name, image_size)
    with device:
        return short, LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


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
        self.embeds = self.embed(self.projector())
        self.token = model.get_input_embeddings()(inputs["input_ids"][:, -1:])
        self.cache = names.cache_of(self.language(self.embeds))
        heads = self.base.vision_tower.config.num_attention_heads
        layer = torch.randn(3, len(self.features), 1 + self.plan.num_tokens, heads, self.features.shape[-1] // heads)
        layer = layer.to(model.device, model.dtype)
        self.query, self.key = layer[0].transpose(1, 2), layer[1].transpose(1, 2)
        self.hidden = layer[2].flatten(2)
        self.lengths = itertools.count(TEXT_TOKENS + 1)
        self.prompt = [(layer.keys, layer.values) for layer in self.cache.layers]

    def call(self, stage: str) -> Callable[[], Any]:
        """The call of a stage of `bench.e2e.STAGES`."""
        name, _, count = stage.partition(" ")
        if name == "generate":
            return functools.partial(self.generate, int(count))
        calls: dict[str, Callable[[], Any]] = {
            "first token": self.first_token,
            "first token, one graph": self.one_graph,
            "first token, new length": self.new_length,
        }
        return calls[stage] if stage in calls else getattr(self, stage)

    def works(self, stage: str) -> list[roofline.Work]:
        """What the stage must do at least."""
        batch, visual = self.features.shape[:2]
        size = self.model.dtype.itemsize
        return roofline.works(self.model.config, stage, batch=batch, visual=visual, text=TEXT_TOKENS, size=size)

    def vision(self) -> Tensor:
        """The tower, up to the projector's input; with VTC that includes the selection."""
        pixels = self.inputs["pixel_values"]
        if self.keep is not None:
            return encode.reduce(self.settings, pixels, self.plan).tokens.features
        return self.base.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    def selection(self) -> Tensor:
        """What VTC adds to the tower: [CLS] probabilities of the scored layers, and the selection."""
        queries, keys = ([x] * len(self.plan.scored) for x in (self.query[:, :, 0], self.key))
        cls_probs = ops.cls_probs(queries, keys, skip=1, backend=self.plan.config.backend)
        return self.plan.method.reduce(
            VisionOutputs(self.hidden, self.plan.grid, cls_probs), self.plan.num_kept
        ).features

    def projector(self) -> Tensor:
        return self.base.multi_modal_projector(self.features)

    def embed(self, visual: Tensor) -> Tensor:
        """The prompt as the language model sees it, with these visual tokens."""
        ids, embeds = self.inputs["input_ids"], self.model.get_input_embeddings()
        return torch.cat([embeds(ids[:, :5]), visual, embeds(ids[:, 5 + self.plan.num_tokens :])], dim=1)

    def language(self, embeds: Tensor, cache: Any = None) -> Any:
        return self.base.language_model(inputs_embeds=embeds, **{names.CACHE: cache}, use_cache=True)

    def prefill(self, embeds: Tensor | None = None) -> Tensor:
        embeds = self.embeds if embeds is None else embeds
        return self.model.lm_head(self.language(embeds).last_hidden_state[:, -1:])

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

    def one_graph(self) -> Tensor:
        """The same without the values that transformers reads back, so that one graph can hold it."""
        return self.prefill(self.embed(self.base.multi_modal_projector(self.vision())))

    def new_length(self) -> Tensor:
        """As `first_token`, one token of text longer at each call."""
        ids = self.inputs["input_ids"]
        ids = torch.cat([ids, ids[:, -1:].expand(-1, next(self.lengths) - TEXT_TOKENS)], dim=1)
        return self.model(**{**self.inputs, "input_ids": ids}, logits_to_keep=1).logits

    def generate(self, count: int) -> Tensor:
        """`count` tokens, greedy, as a user generates them."""
        return self.model.generate(
            **self.inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    def check(self) -> None:
        """The gate: raise unless forward and the stages agree, and the patches are those of the formula."""
        logits = self.first_token()
        require_close("logits", logits, self.prefill())
        require_close("logits of one graph", logits, self.one_graph())
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
        require_close("scores", scores[:1], expected.to(kept.dtype).float(), kept.dtype)
        patches = seen.hidden_states[max(self.plan.feature_layers)][:, 1:]
        require_close("kept features", kept[:1], reference.compact(patches, indices[:1]))

    def _selected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, K, D], indices [B, K] and scores [B, N] of the patches that stay."""
        tokens = encode.reduce(self.settings, self.inputs["pixel_values"], self.plan).tokens
        return tokens.features, tokens.indices, tokens.scores


def require_close(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless the difference's norm is within 16 units of rounding of the norm: layers accumulate rounding."""
    eps = torch.finfo(dtype or expected.dtype).eps
    error = ((actual - expected).double().norm() / expected.double().norm()).item()
    if not error <= 16 * eps:
        raise WrongResult(f"{what}: relative error {error:.3g} > {16 * eps:.3g}")
