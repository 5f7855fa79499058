"""The models of `bench serve` as folders that vLLM loads, their prompts, and the answers that are expected of them."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from bench.serving import Request
from bench.stages import TEXT_TOKENS, config_of
from vtc import reference, tiny
from vtc.tiny.scenes import Scene
from vtc.vllm import settings

QUESTION = "how many objects are there ?"
WEIGHTS = "model.safetensors"


class Subject(NamedTuple):
    """A model to serve.

    Attributes
    ----------
    name : str
        In the records.
    write : callable
        Write its folder, given its path.
    dtype : str
        In which vLLM computes.
    has_weights : bool
        Whether the folder holds weights; otherwise vLLM makes up some.
    text : callable
        The ids of a prompt with one image placeholder, given the number of the request.
    """

    name: str
    write: Callable[[Path], None]
    dtype: str
    has_weights: bool
    text: Callable[[int], list[int]]


def requests(subject: Subject, first: int, count: int) -> list[Request]:
    """`count` requests, the first with the number `first`; each has an image of its own."""
    return [Request(subject.text(number), number) for number in range(first, first + count)]


@functools.cache
def question() -> list[int]:
    """A question that the bundled model knows."""
    ids: list[int] = AutoTokenizer.from_pretrained(tiny.CHECKPOINT)(tiny.prompt(QUESTION))["input_ids"]
    return ids


@functools.cache
def image_token() -> int:
    """The id of an image placeholder, in all folders that are written here."""
    token: int = AutoTokenizer.from_pretrained(tiny.CHECKPOINT).convert_tokens_to_ids("<image>")
    return token


def words(number: int) -> list[int]:
    """An image and TEXT_TOKENS random words of the bundled tokenizer, other ones for each number."""
    generator = torch.Generator().manual_seed(number)
    found = torch.randint(image_token() + 1, 72, (TEXT_TOKENS,), generator=generator).tolist()
    return [*found[:5], image_token(), *found[5:]]


def write_bundled(folder: Path) -> None:
    """The bundled model."""
    _write_processor(folder)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(tiny.CHECKPOINT / name, folder)
    _save(load_file(tiny.CHECKPOINT / WEIGHTS), folder)


def scaled_config(hidden: tuple[int, int] = (384, 512), layers: int = 12, vocab_size: int = 32000) -> LlavaConfig:
    """A LLaVA of 77 million parameters by default, whose images have 576 tokens like LLaVA-1.5's.

    `hidden` is the width of the vision tower and of the language model, which have `layers` layers each.
    """
    vision, language = hidden
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=336,
            patch_size=14,
            hidden_size=vision,
            intermediate_size=4 * vision,
            num_hidden_layers=layers,
            num_attention_heads=vision // 64,
        ),
        text_config=LlamaConfig(
            hidden_size=language,
            intermediate_size=11 * language // 4,
            num_hidden_layers=layers,
            num_attention_heads=language // 64,
            vocab_size=vocab_size,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        ),
        image_token_id=image_token(),
        tie_word_embeddings=True,
    )


def write_scaled(folder: Path, config: LlavaConfig | None = None) -> None:
    """A LLaVA with random weights; `config` is by default `scaled_config()`."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config or scaled_config(), dtype=torch.float32)
    model.save_pretrained(folder)
    _write_processor(folder)
    _save(load_file(folder / WEIGHTS), folder)


def write_7b(folder: Path) -> None:
    """LLaVA-1.5-7B's configuration without weights, with the bundled model's tokenizer."""
    config = config_of("LLaVA-1.5-7B")
    config.image_token_id = image_token()
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    _write_processor(folder)


SUBJECTS = {
    "bundled": Subject("bundled model", write_bundled, "float32", True, lambda number: question()),
    "scaled": Subject("77 M LLaVA", write_scaled, "float32", True, words),
    "7b": Subject("LLaVA-1.5-7B", write_7b, "bfloat16", False, words),
}


def _write_processor(folder: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny.CHECKPOINT / name, folder)


def _save(weights: dict[str, Any], folder: Path) -> None:
    """Save weights by the names that LLaVA-1.5 has on the hub: vLLM knows no other ones of its vision tower."""
    prefix = re.compile(r"^vision_tower\.(?!vision_model\.)")
    named = {prefix.sub("vision_tower.vision_model.", name): tensor for name, tensor in weights.items()}
    save_file(named, folder / WEIGHTS, {"format": "pt"})


class Transcription:
    """What answers the prompts of a folder as they should be answered, in plain PyTorch, with transformers' model."""

    def __init__(self, folder: Path) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        model.generation_config.eos_token_id = None  # the requests go on, too
        self.model, self.processor = model.eval(), AutoProcessor.from_pretrained(folder).image_processor

    @torch.no_grad()
    def answer(self, request: Request, keep: int | None, new_tokens: int) -> list[int]:
        """The new tokens of one request, of the stock model, or with the visual tokens that VTC has to keep."""
        base = self.model.model
        pixels = self.processor(Scene("test", request.scene).image, return_tensors="pt")["pixel_values"]
        tower = base.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        config = self.model.config
        config.vtc = {"method": "none"} if keep is None else {"keep": keep}
        features = tower.hidden_states[config.vision_feature_layer][:, 1:]
        if (plan := settings.plan_of(config)) is not None:
            scores = torch.stack([tower.attentions[number][:, :, 0, 1:].mean(dim=1) for number in plan.scored]).sum(0)
            features = reference.compact(features, reference.topk(scores, plan.num_outputs))
        visual = base.multi_modal_projector(features)
        embeds, start = base.get_input_embeddings()(torch.tensor([request.ids])), request.ids.index(image_token())
        embeds = torch.cat([embeds[:, :start], visual, embeds[:, start + 1 :]], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        out = self.model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        tokens: list[int] = out[0].tolist()
        return tokens

    def answers(self, requests: Sequence[Request], keep: int | None, new_tokens: int) -> list[list[int]]:
        """The new tokens of each request."""
        return [self.answer(request, keep, new_tokens) for request in requests]
