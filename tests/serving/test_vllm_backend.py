"""vLLM's Transformers backend, for other vision towers and families: the answers of transformers with VTC."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkpoints import draw, pil, saved  # noqa: F401
from engines import ask, engine, equal, references
from vllm.model_executor.models import transformers as backend

from vtc import tiny
from vtc.tiny.scenes import Scene

BACKEND = {"model_impl": "transformers"}


class Case(NamedTuple):
    """Settings of an engine, and of every other request."""

    model: str
    settings: dict[str, Any]
    own: dict[str, Any]
    how: dict[str, Any] = BACKEND


CASES = {
    "clip": Case("tiny", {"keep": 64}, {"keep": 32}),
    "dinov2": Case("dinov2", {"keep": 12}, {"ratio": 0.2}),
    "registers": Case("registers", {"keep": 12}, {"keep": 5}),
    "vit": Case("vit", {"method": "hiprune", "keep": 12}, {"keep": 9}),
    "vipllava": Case("vipllava", {"method": "visionzip", "keep": 12}, {"keep": 7}),
    "next": Case("next", {"keep": 40}, {"keep": 20}),
    "next-visionzip": Case("next", {"method": "visionzip", "keep": 39}, {"keep": 25}),
    "siglip-divprune": Case("siglip", {"method": "divprune", "keep": 12}, {"keep": 9}),
    "siglip-random": Case("siglip", {"method": "random", "keep": 12}, {"keep": 9}),
    "siglip-pool": Case("siglip", {"method": "pool", "keep": 9}, {"keep": 4}),
    "siglip-own-class": Case("siglip", {"method": "received", "keep": 12}, {"keep": 9}, {}),
}
SIZES = [(84, 84), (168, 84), (90, 200), (300, 200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backend")


@pytest.fixture(scope="module")
def models(folder) -> dict[str, Path]:
    names = {case.model for case in CASES.values()} - {"tiny"}
    return {"tiny": tiny.CHECKPOINT, **saved(folder, sorted(names))}


@pytest.fixture(scope="module")
def prompts(folder) -> dict[str, list[dict]]:
    """By case: each image alone, two in one prompt, and none; every other prompt has settings of its own."""
    paths = [draw(folder / f"{number}.png", size, number) for number, size in enumerate(SIZES)]
    scenes = [str(folder / f"scene{number}.png") for number in range(4)]
    for number, path in enumerate(scenes):
        Scene("test", number).image.save(path)
    found = {}
    for name, case in CASES.items():
        images = scenes if case.model == "tiny" else paths
        own = [{"text": tiny.prompt("how many objects are there ?"), "images": [path]} for path in images]
        own += [{"text": tiny.prompt("is there a blue circle ?"), "images": [path]} for path in images[:3]]
        own.append({"text": "USER: <image> or <image> ? ASSISTANT:", "images": [images[0], images[3]]})
        own.append({"text": "USER: what is there ? ASSISTANT:", "images": []})
        found[name] = [{**each, "settings": case.own} if number % 2 else each for number, each in enumerate(own)]
    return found


@pytest.fixture(scope="module")
def expected(folder, models, prompts) -> dict[str, list]:
    cases = []
    for name, case in CASES.items():
        own = {"method": case.settings.get("method", "vtc-cls"), **case.own}  # those of a request and engine
        asked = [{**prompt, "settings": own} if "settings" in prompt else prompt for prompt in prompts[name]]
        cases.append({"model": models[case.model], "settings": case.settings, "prompts": asked})
    return dict(zip(CASES, references(folder, cases), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_answers(name, folder, models, prompts, expected) -> None:
    case = CASES[name]
    with engine(models[case.model], case.settings, **case.how) as running:
        equal(ask(running, prompts[name]), expected[name])
        if case.how == BACKEND:
            assert isinstance(running.model, backend.TransformersMultiModalForCausalLM)
        if name == "clip":
            language_model_is_stock(running.model)
        if name in ("clip", "next", "siglip-own-class"):
            pixels_of_a_stock_processor(running.model)
            stock_worker(running, draw(folder / "new.png", (168, 84), 99))


def language_model_is_stock(model: Any) -> None:
    """vLLM makes a language model's class of those that the model's class inherits from."""
    stock = object.__new__(backend.TransformersMultiModalForCausalLM)
    vars(stock).update(vars(model))
    assert type(model.get_language_model()).__bases__ == type(stock.get_language_model()).__bases__


def pixels_of_a_stock_processor(model: Any) -> None:
    with pytest.raises(RuntimeError, match="has no VTC"):
        model.embed_multimodal(pixel_values=model)


def stock_worker(running: Any, new_image: str) -> None:
    """A worker without VTC has vLLM's class, which fails with what VTC's processor has prepared."""
    own, _, stock, *_ = type(running.model).__mro__
    assert stock.__module__.startswith("vllm.")
    prompt = {"text": "USER: <image> ? ASSISTANT:", "images": [new_image]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "embed_multimodal", stock.embed_multimodal)
        with pytest.raises(AssertionError, match="multimodal embeddings"):
            ask(running, [prompt])


@pytest.mark.parametrize("method", ["received", "hiprune"])
def test_refuses_attention_of_siglip(method, models) -> None:
    with (
        pytest.raises(ValueError, match=f"method '{method}' needs the attention of SigLIP"),
        engine(models["siglip"], {"method": method, "keep": 9}, **BACKEND),
    ):
        pass
