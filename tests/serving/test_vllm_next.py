"""LLaVA-NeXT in vLLM: the answers of transformers with VTC, token for token, whatever the number of tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import IMAGE, TOKENS, draw, pil, saved  # noqa: F401
from engines import ask, engine, equal, references
from transformers import AutoProcessor
from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtc.vllm.processing import num_tiles

# The views of images by width and height. Their tiles are padded above and below, left and right, or not at all.
VIEWS = {
    (84, 84): 3,
    (168, 84): 3,
    (168, 60): 3,
    (60, 200): 4,
    (300, 90): 3,
    (84, 240): 4,
    (168, 168): 5,
    (200, 130): 5,
    (130, 200): 5,
    (40, 33): 3,
}
SIZES = list(VIEWS)
SETTINGS: dict[str, Any] = {
    "stock": None,
    "keep": {"keep": 40},
    "ratio": {"ratio": 0.3},
    "equal": {"keep": 40, "tiles": "equal"},
    "fastervlm": {"method": "fastervlm", "keep": 33},
    "visionzip": {"method": "visionzip", "keep": 39},
    "scope": {"method": "scope", "keep": 40},
    "coverage": {"method": "coverage", "ratio": 0.25},
}
COUNTS: dict[str, Callable[[int, int], int]] = {  # of an image's placeholders and views
    "stock": lambda tokens, views: tokens,
    "ratio": lambda tokens, views: math.ceil(0.3 * tokens),
    "fastervlm": lambda tokens, views: 33,
    "visionzip": lambda tokens, views: 39 // views * views,
    "coverage": lambda tokens, views: math.ceil(0.25 * tokens),
}
SCHEDULED = {  # tokens of a step: the tower sees as many views in one pass as have these, or one image
    "keep": 8 * TOKENS,  # two or three images
    "visionzip": TOKENS,  # one, whatever its tiles; fewer tokens than an image with three views keeps
}
QUESTIONS = ("what", "how many", "is there", "red or blue", "left", "right", "above", "below", "digit", "no")
SMALLER = {"keep": 20}  # of a request
SIGLIP = {"method": "received", "keep": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("next")


@pytest.fixture(scope="module")
def models(folder) -> dict[str, Path]:
    return saved(folder, ["next", "next-siglip-layers"])


@pytest.fixture(scope="module")
def prompts(folder) -> list[dict]:
    """Each size alone, several images in one prompt, and none."""
    paths = [draw(folder / f"{number}.png", size, number) for number, size in enumerate(SIZES)]
    found = [
        {"text": f"USER: <image> {question} ? ASSISTANT:", "images": [path]}
        for question, path in zip(QUESTIONS, paths, strict=True)
    ]
    found.append({"text": "USER: <image> or <image> or <image> ? ASSISTANT:", "images": [paths[n] for n in (6, 0, 3)]})
    found.append({"text": "USER: <image> <image> above ? ASSISTANT:", "images": [paths[n] for n in (1, 8)]})
    return [*found, {"text": "USER: what is there ? ASSISTANT:", "images": []}]


@pytest.fixture(scope="module")
def mixed(prompts) -> list[dict]:
    """The same, and every other one has settings of its own."""
    return [{**prompt, "settings": SMALLER} if number % 2 else prompt for number, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def expected(folder, models, prompts, mixed) -> dict[str, list]:
    cases = {name: {"model": models["next"], "settings": own, "prompts": prompts} for name, own in SETTINGS.items()}
    cases["mixed"] = {**cases["keep"], "prompts": mixed}
    cases["siglip"] = {"model": models["next-siglip-layers"], "settings": SIGLIP, "prompts": prompts}
    return dict(zip(cases, references(folder, list(cases.values())), strict=True))


def lengths(model: Path, prompts: list[dict], counts: list[Callable[[int, int], int]]) -> list[int]:
    """The tokens of prompts whose images keep `counts` of their placeholders, which transformers' processor makes."""
    processor = AutoProcessor.from_pretrained(model)
    found = []
    for prompt, count in zip(prompts, counts, strict=True):
        ids = processor.tokenizer(prompt["text"])["input_ids"]
        total = len(ids) - ids.count(IMAGE)
        for path in prompt["images"]:
            size = SIZES[int(Path(path).stem)]
            tokens = processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])["num_image_tokens"][0]
            total += count(tokens, VIEWS[size])
        found.append(total)
    return found


def passes_of(running: Any) -> list[int]:
    """A list that gets the number of views of each pass of the vision tower."""
    found: list[int] = []
    running.model.vision_tower.register_forward_pre_hook(lambda module, args: found.append(len(args[0])))
    return found


def info_of(running: Any) -> Any:
    return MULTIMODAL_REGISTRY.create_processor(running.llm.model_config).info


@pytest.mark.parametrize("name", SETTINGS)
def test_answers(name, models, prompts, mixed, expected) -> None:
    given = {"max_num_batched_tokens": SCHEDULED[name]} if name in SCHEDULED else {}
    count = COUNTS.get(name, lambda tokens, views: 40)
    with engine(models["next"], SETTINGS[name], **given) as running:
        passes = passes_of(running)
        outputs = ask(running, prompts)
        equal(outputs, expected[name])
        found = [len(output.prompt_token_ids) for output in outputs]
        assert found == lengths(models["next"], prompts, [count] * len(prompts))
        if name == "keep":
            assert 1 < max(passes) <= 8  # never more than their tokens
            most_tiles(info_of(running))
            outputs = ask(running, mixed)
            equal(outputs, expected["mixed"])
            counts = [(lambda *_: 20) if "settings" in prompt else count for prompt in mixed]
            assert [len(output.prompt_token_ids) for output in outputs] == lengths(models["next"], mixed, counts)
        if name == "visionzip":
            assert sorted(set(passes)) == [3, 4, 5]  # every image alone


def most_tiles(info: Any) -> None:
    """vLLM measures memory with the image that has the most tiles. By tokens after compression, all are alike."""
    size = info.get_image_size_with_most_features()
    assert num_tiles(info.get_hf_config(), size.height, size.width) == 5
    size = LlavaNextProcessingInfo.get_image_size_with_most_features(info)  # by the tokens that stay
    assert num_tiles(info.get_hf_config(), size.height, size.width) == 3


def test_several_layers_of_siglip(models, prompts, expected) -> None:
    with engine(models["next-siglip-layers"], SIGLIP) as running:
        equal(ask(running, prompts), expected["siglip"])
