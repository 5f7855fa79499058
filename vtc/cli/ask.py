"""`vtc run`: one question about one image. Load, prompt, answer, measure."""

from __future__ import annotations

import re
import statistics
import time
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

import vtc
from vtc.eval.answerer import Answerer
from vtc.eval.model import BUNDLED, ModelSpec, pick_device, pick_dtype
from vtc.eval.protocol import HFProtocol, Prompt
from vtc.eval.setting import Setting
from vtc.hf import names

WARM_RUNS = 5


def load(model: str | None, device: str | None, dtype: str) -> tuple[Any, Any]:
    """A LLaVA-1.5 model and its processor, from a folder or the hub; the bundled one for None.

    Raises
    ------
    ValueError
        If there is no such model, device or dtype, or the model is another one.
    """
    where = pick_device(device)
    spec = ModelSpec(model or BUNDLED, str(where), str(pick_dtype(dtype, where)).removeprefix("torch."))
    if (kind := spec.config().model_type) != "llava":
        raise ValueError(
            f"model {model!r} is of type {kind!r}; this command runs 'llava' (LLaVA-1.5), README says which models VTC "
            "supports in Python"
        )
    return spec.load(), spec.processor()


def prepare(model: Any, processor: Any, image: Image.Image, question: str) -> Any:
    """Model inputs for one question, on the model's device."""
    if not question.strip():
        raise ValueError("the question is empty; ask something about the image")
    inputs = HFProtocol(processor, model.config).prepare([Prompt(question, [image])])
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


def compare(model: Any, processor: Any, inputs: Any, length: int, timed: bool = True, **options: Any) -> dict[str, Any]:
    """The answer with compression and, if `timed`, the one without, with what both cost.

    Parameters
    ----------
    model, processor, inputs
        From `load` and `prepare`; the model is a stock one, before and afterwards.
    length : int
        Longest answer in tokens.
    timed : bool
        Whether to measure, and to run the uncompressed model at all.
    **options
        Fields of `VTCConfig`.

    Returns
    -------
    dict
        `compressed` and `uncompressed` (None if not `timed`), each with `visual_tokens` per image, `answer` and, if
        `timed`, `time_to_first_token_ms` and `kv_cache_bytes`; `backend`, by operation.
    """

    answerer = Answerer(model, processor)

    def side() -> dict[str, Any]:
        texts, *_ = answerer.generate(inputs, Setting(), max_new_tokens=length)  # the open block compresses
        found: dict[str, Any] = {"answer": texts[0]}
        if timed:
            seconds, kv_bytes = first_token(model, inputs)
            found |= {"time_to_first_token_ms": round(1000 * seconds, 2), "kv_cache_bytes": kv_bytes}
        return found

    with vtc.compress(model, **options) as run:
        compressed = side()
    return {
        "compressed": {"visual_tokens": run.tokens_after, **compressed},
        "uncompressed": {"visual_tokens": run.tokens_before, **side()} if timed else None,
        "backend": dict(run.backend),
    }


def comparison(result: dict[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, columns and rows of the table of `vtc run --compare`, of its JSON document."""
    columns = ("", "visual tokens", "time to first token", "KV cache", "answer")
    rows: list[tuple[str, ...]] = [
        (
            name,
            str(side["visual_tokens"]),
            f"{side['time_to_first_token_ms']:.1f} ms",
            f"{side['kv_cache_bytes'] / 2**20:.2f} MiB",
            " ".join(side["answer"].split()),
        )
        for name, side in (("all tokens", result["uncompressed"]), (result["method"], result["compressed"]))
    ]
    return result["question"], columns, rows


def footnote(result: dict[str, Any]) -> str:
    """How the figures of the table were measured."""
    return (
        f"Time to first token: median of {WARM_RUNS} warm runs on {result['device']}, {result['dtype']}, "
        "from pixels to token. KV cache: after the prompt."
    )


def first_token(model: Any, inputs: Any, runs: int = WARM_RUNS) -> tuple[float, int]:
    """Time to first token, and the size of the KV cache that the prompt leaves behind.

    Returns
    -------
    seconds : float
        Median over `runs` after one warm-up: from pixels on the device to the first new token on the host.
    kv_bytes : int
        Bytes of the keys and values in the cache, all layers.
    """
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        out.sequences.cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    layers = names.cache_of(out).layers
    return statistics.median(times[1:]), sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def as_seen(image: Image.Image, processor: Any, pixel_values: torch.Tensor) -> Image.Image:
    """The image to draw kept patches on: `image` itself if the processor only resizes and crops its centre.

    Otherwise (padding, distortion) it is recovered from `pixel_values` [1, 3, H, W].
    """
    steps = processor.image_processor
    crop = {steps.crop_size["height"], steps.crop_size["width"]} if steps.do_center_crop else set()
    if steps.do_resize and crop == {steps.size.get("shortest_edge")} and not getattr(steps, "do_pad", False):
        return image
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (steps.image_mean, steps.image_std))
    pixels = (pixel_values[0].float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).numpy())
