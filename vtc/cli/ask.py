"""One question about images: load the model, make the prompt, answer, measure."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

import vtc
from vtc.eval import BUNDLED
from vtc.eval.answerer import Answerer
from vtc.eval.measure import RUNS, cell, first_tokens, noise
from vtc.eval.model import ModelSpec, pick_device, pick_dtype
from vtc.eval.progress import Progress
from vtc.eval.protocol import HFProtocol, Prompt
from vtc.eval.setting import Setting


def use_threads(count: int | None, model: str = BUNDLED) -> int:
    """Let torch use so many threads on the CPU, and return their number.

    By default one for the bundled model, for which a second gains little on a quiet machine, and on a busy one the
    threads wait for each other: times then vary tenfold. For other models as many as torch takes, but no more than the
    cores that this process may use.

    Raises
    ------
    ValueError
        If it is not positive.
    """
    if count is not None and count < 1:
        raise ValueError(f"--threads must be at least 1, got {count}")
    if count is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
    """Model inputs for one question about one image or several, on the model's device."""
    several = [images] if isinstance(images, Image.Image) else images
    inputs = HFProtocol(processor, model.config).prepare([Prompt(question, several)])
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


def compare(
    model: Any,
    processor: Any,
    inputs: Any,
    options: dict[str, Any],
    length: int,
    timed: bool = True,
    quiet: bool = True,
) -> dict[str, Any]:
    """The answer with compression and, if `timed`, the one without, with what both cost.

    Parameters
    ----------
    model, processor, inputs
        From `load` and `prepare`; the model is a stock one, before and afterwards.
    options : dict
        Fields of `VTCConfig`, and options of the method.
    length : int
        Longest answer in tokens.
    timed : bool
        Whether to measure, and to run the uncompressed model at all.
    quiet : bool
        Show no progress.

    Returns
    -------
    dict
        `method`; `prune_layer`; `compressed` and `uncompressed` (None if not `timed`), each with `visual_tokens` per
        image, `answer` and, if `timed`, `time_to_first_token_ms` (median, min, max) and `kv_cache_bytes`; `backend`, by
        operation; `noisy`, a warning about the times or None.
    """
    answerer = Answerer(model, processor)
    config = vtc.VTCConfig.of(**options)
    own = {name: value for name, value in options.items() if name != "method"}
    settings = [Setting(config.method, own), Setting()]
    with vtc.compress(model, **options) as run:
        texts, *_ = answerer.generate(inputs, Setting(), max_new_tokens=length)  # the open block compresses
    short: dict[str, Any] = {"visual_tokens": run.tokens_after, "answer": texts[0]}
    full: dict[str, Any] | None = None
    warning = None
    if timed:
        texts, *_ = answerer.generate(inputs, Setting(), max_new_tokens=length)
        full = {"visual_tokens": run.tokens_before, "answer": texts[0]}
        with Progress("timing", (RUNS + 1) * len(settings), quiet=quiet, unit="runs") as progress:
            found = first_tokens(answerer, inputs, settings, advance=progress.advance)
        for side, cost in zip((short, full), found, strict=True):
            side |= {"time_to_first_token_ms": cost.record(), "kv_cache_bytes": cost.kv_bytes}
        warning = noise({config.name: found[0], "all tokens": found[1]})
    return {
        "method": config.name,
        "prune_layer": config.prune_after,
        "compressed": short,
        "uncompressed": full,
        "backend": dict(run.backend),
        "noisy": warning,
    }


def comparison(result: dict[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, columns and rows of the table of `vtc run --compare`, of its JSON document."""
    columns = ("", "visual tokens", "time to first token", "KV cache", "answer")
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{side['visual_tokens']:g}",
            cell(side["time_to_first_token_ms"]),
            f"{side['kv_cache_bytes'] / 2**20:.2f} MiB",
            " ".join(side["answer"].split()),
        )
        for name, side in (("all tokens", result["uncompressed"]), (result["method"], result["compressed"]))
    ]
    return result["question"], columns, rows


def footnotes(result: dict[str, Any]) -> list[str]:
    """How the figures of the table were measured, and whether the times are noisy."""
    where = f"{result['device']}, {result['dtype']}"
    if result["device"] == "cpu":
        where += f", {threads_text(result['cpu_threads'])}"
    tokens = "Visual tokens: of each image. " if len(result["images"]) > 1 else ""
    return [
        f"{tokens}Time to first token: median (fastest-slowest) of {RUNS} warm runs, in turns, on {where}, from pixels "
        "to token. KV cache: after the prompt.",
        *([result["noisy"]] if result["noisy"] else []),
    ]


def threads_text(count: int) -> str:
    """ "1 thread", "2 threads"."""
    return f"{count} thread{'' if count == 1 else 's'}"


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
