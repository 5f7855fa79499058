"""One question about images: the model, the prompt, and the image as the model sees it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from vtc.eval import BUNDLED
from vtc.eval.model import ModelSpec, pick_device, pick_dtype
from vtc.eval.protocol import HFProtocol, Prompt


def use_threads(count: int | None, model: str = BUNDLED) -> int:
    """Let torch use so many threads on the CPU, and return their number.

    By default one for the bundled model, for which a second gains little on a quiet machine, and on a busy one the
    threads wait for each other: times then vary tenfold. For other models as many as torch takes, but no more than the
    cores that this process may use.

    Raises
    ------
    ValueError
        If it is not between 1 and 4 times the number of these cores: more threads may end the process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count is not None and not 1 <= count <= 4 * cores:
        raise ValueError(f"threads must be from 1 to {4 * cores}, for {cores} cores, got {count}")
    if count is None:
        count = min(torch.get_num_threads(), cores) if model != BUNDLED else 1
    torch.set_num_threads(count)
    return count


def load(model: str, device: str | None, dtype: str, revision: str | None = None) -> tuple[Any, Any]:
    """A LLaVA-1.5 model and its processor, from a folder or the hub, or the bundled one.

    Raises
    ------
    ValueError
        If there is no such model, device or dtype, or the model is another one.
    """
    where = pick_device(device)
    spec = ModelSpec(model, str(where), str(pick_dtype(dtype, where)).removeprefix("torch."), revision)
    if (kind := spec.config().model_type) != "llava":
        raise ValueError(
            f"model {model!r} is of type {kind!r}; this command runs 'llava' (LLaVA-1.5), README says which models VTC "
            "supports in Python"
        )
    processor = spec.processor()  # first: a checkpoint without one is refused before its weights are read
    return spec.load(), processor


def prepare(model: Any, processor: Any, images: Image.Image | Sequence[Image.Image], question: str) -> Any:
    """Model inputs for one question about one image or several, on the model's device.

    Raises
    ------
    ValueError
        If the prompt, all visual tokens included, is longer than the model's positions: its answer means nothing.
    """
    several = [images] if isinstance(images, Image.Image) else images
    inputs = HFProtocol(processor, model.config).prepare([Prompt(question, several)])
    length = inputs["input_ids"].shape[1]
    positions = getattr(model.config.text_config, "max_position_embeddings", length)  # some models have no limit
    if length > positions:
        raise ValueError(
            f"the prompt has {counted(length, 'token')}, with {counted(len(several), 'image')}, and the model has "
            f"{positions} positions; shorten the question, or give fewer images"
        )
    return BatchFeature(inputs).to(model.device, model.dtype)


def unknown_words(processor: Any, question: str) -> list[str]:
    """Words of the question that the tokenizer does not know; empty for tokenizers of word pieces."""
    tokenizer = processor.tokenizer
    unknown = tokenizer.unk_token_id
    return [
        word
        for word in re.findall(r"\w+", question)
        if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]
    ]


def counted(count: float, noun: str) -> str:
    """ "1 thread", "2 threads", "98.5 visual tokens"."""
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def as_seen(image: Image.Image, processor: Any, pixel_values: torch.Tensor, index: int = 0) -> Image.Image:
    """The image to draw kept patches on: `image` itself if the processor only resizes and crops its centre.

    Otherwise (padding, distortion) it is recovered from image `index` of `pixel_values` [B, 3, H, W].
    """
    steps = processor.image_processor
    crop = {steps.crop_size["height"], steps.crop_size["width"]} if steps.do_center_crop else set()
    if steps.do_resize and crop == {steps.size.get("shortest_edge")} and not getattr(steps, "do_pad", False):
        return image
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (steps.image_mean, steps.image_std))
    levels = (pixel_values[index].float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).numpy())
