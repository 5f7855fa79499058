"""LLaVA-1.5 in vLLM: the answers of transformers with VTC, token for token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from engines import ask, engine, equal, ids, references
from safetensors.torch import load_file, save_file
from vllm.model_executor.models import llava
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.multimodal.processing import ProcessorInputs

from vtc import tiny
from vtc.tiny.scenes import Scene
from vtc.vllm import processing
from vtc.vllm.llava import VTCLlavaForConditionalGeneration

SETTINGS: dict[str, Any] = {
    "stock": None,
    "none": {"method": "none"},
    "128": {"keep": 128},
    "64": {"keep": 64},
    "32": {"ratio": 0.055},
    "fastervlm": {"method": "fastervlm", "keep": 64},
    "visionzip": {"method": "visionzip", "keep": 64},
    "pool": {"method": "pool", "keep": 60},
    "random": {"method": "random", "keep": 64},
    "received": {"method": "received", "keep": 64},
    "divprune": {"method": "divprune", "keep": 64},
}
QUESTIONS = ("how many objects are there ?", "is there a blue circle ?")
TEXT = 11  # tokens of the first question's prompt besides those of its image
SAME_PIXELS = {"mm_processor_kwargs": {"backend": "pil"}}  # as in the reference: "random" looks at their bits


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(8):
        Scene("test", number).image.save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(8)]


@pytest.fixture(scope="module")
def prompts(paths: list[str]) -> list[dict[str, Any]]:
    return [{"text": tiny.prompt(question), "images": [path]} for path in paths for question in QUESTIONS]


@pytest.fixture(scope="module")
def mixed(paths: list[str]) -> list[dict[str, Any]]:
    """One and two images, no image, an image in the second turn, and budgets of their own."""
    found: list[dict[str, Any]] = []
    one, two = tiny.prompt(QUESTIONS[0]), tiny.prompt(f"<image>\n{QUESTIONS[1]}")
    turns = f"USER: {QUESTIONS[0]} ASSISTANT: 5 {one}"
    for number, settings in enumerate((None, {"keep": 32}, {"keep": 16}, {"ratio": 0.1})):
        first, second, third = (paths[(number + step) % 8] for step in range(3))
        found += [{"text": one, "images": [first]}, {"text": two, "images": [second, third]}]
        found += [{"text": turns, "images": [third]}, {"text": f"USER: {QUESTIONS[0]} ASSISTANT:", "images": []}]
        for prompt in found[-4:]:
            if settings and prompt["images"]:
                prompt["settings"] = settings
    return found


@pytest.fixture(scope="module")
def expected(prompts: list, mixed: list, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    cases = [{"model": tiny.CHECKPOINT, "settings": settings, "prompts": prompts} for settings in SETTINGS.values()]
    cases.append({"model": tiny.CHECKPOINT, "settings": SETTINGS["64"], "prompts": mixed})
    cases.append({"model": tiny.CHECKPOINT, "settings": SETTINGS["64"], "prompts": prompts, "dtype": "bfloat16"})
    found = references(tmp_path_factory.mktemp("references"), cases)
    return dict(zip((*SETTINGS, "mixed", "bfloat16"), found, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_answers(name: str, prompts: list, expected: dict) -> None:
    with engine(tiny.CHECKPOINT, SETTINGS[name], **SAME_PIXELS if name == "random" else {}) as llm:
        equal(ask(llm, prompts), expected[name])


def test_answers_in_half_precision(prompts: list, expected: dict) -> None:
    with engine(tiny.CHECKPOINT, SETTINGS["64"], dtype="bfloat16") as llm:
        assert ids(ask(llm, prompts)) == [each["ids"] for each in expected["bfloat16"]]


def test_answers_of_a_compiled_language_model(prompts: list, expected: dict) -> None:
    with engine(tiny.CHECKPOINT, SETTINGS["64"], enforce_eager=False) as llm:
        equal(ask(llm, prompts), expected["64"])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_num_batched_tokens": 40, "max_num_seqs": 4},  # less than an image
        {"mm_processor_cache_gb": 0, "enable_prefix_caching": False},
    ],
    ids=["default", "chunked", "no_caches"],
)
def test_requests_of_all_kinds_in_one_batch(given: dict, mixed: list, expected: dict) -> None:
    with engine(tiny.CHECKPOINT, SETTINGS["64"], **given) as llm:
        for _ in range(2):  # the second time from the caches
            equal(ask(llm, mixed), expected["mixed"])


def test_a_prefix_is_found_again_for_the_same_budget_alone(paths: list[str]) -> None:
    prompt = {"text": tiny.prompt(QUESTIONS[0]), "images": [paths[0]]}
    with engine(tiny.CHECKPOINT, SETTINGS["64"], enable_prefix_caching=True) as llm:
        found = [ask(llm, [prompt | {"settings": own}])[0] for own in (None, None, {"keep": 48}, {"keep": 64})]
    assert [each.num_cached_tokens for each in found] == [0, 64, 0, 64]
    assert [len(each.prompt_token_ids) for each in found] == [TEXT + 64, TEXT + 64, TEXT + 48, TEXT + 64]


# What would be wrong without a word.


def connector(folder: Path, role: str) -> dict[str, Any]:
    return {
        "ec_transfer_config": {
            "ec_connector": "ECExampleConnector",
            "ec_role": role,
            "ec_buffer_device": "cpu",
            "ec_connector_extra_config": {"shared_storage_path": str(folder)},
        },
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
    }


@pytest.mark.parametrize("salted", [True, False])
def test_engines_that_share_a_cache(
    salted: bool, tmp_path: Path, prompts: list, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of encoded images, one with keep=128 and one with 64. Without VTC's part of the hash the second is wrong.

    The caller names every other image.
    """
    if not salted:
        stock = ProcessorInputs.get_mm_hashes

        def get_mm_hashes(self: Any, model_id: str, *args: Any) -> Any:
            kept = self.hf_processor_mm_kwargs
            self.hf_processor_mm_kwargs = {k: v for k, v in kept.items() if k != processing.KEY}
            found = stock(self, model_id.partition("+vtc")[0], *args)
            self.hf_processor_mm_kwargs = kept
            return found

        monkeypatch.setattr(ProcessorInputs, "get_mm_hashes", get_mm_hashes)
    named, right = [{"uuid": f"{number}"} if number % 4 < 2 else {} for number in range(len(prompts))], {}
    for name in ("128", "64"):
        with engine(tiny.CHECKPOINT, SETTINGS[name], **connector(tmp_path, "ec_both")) as llm:
            found = ids(ask(llm, [prompt | own for prompt, own in zip(prompts, named, strict=True)]))
        equals = [own == each["ids"] for own, each in zip(found, expected[name], strict=True)]
        right[name] = {
            kind: all(e for e, own in zip(equals, named, strict=True) if bool(own) == kind) for kind in (True, False)
        }
    assert right == {"128": {True: True, False: True}, "64": {True: salted, False: salted}}
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("renamed", [True, False])
def test_a_worker_without_vtc(renamed: bool, prompts: list, expected: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets no pixels by the name that it knows, and says so. With that name its answers would be wrong."""
    monkeypatch.setattr(
        VTCLlavaForConditionalGeneration, "embed_multimodal", llava.LlavaForConditionalGeneration.embed_multimodal
    )
    if not renamed:
        monkeypatch.setattr(processing, "PIXELS", "pixel_values")
    if renamed:
        with (
            pytest.raises(Exception, match="Expected number of multimodal embeddings"),
            engine(tiny.CHECKPOINT, SETTINGS["64"]) as llm,
        ):
            ask(llm, prompts)
        return
    with engine(tiny.CHECKPOINT, SETTINGS["64"]) as llm:
        found = ids(ask(llm, prompts))
    assert found != [each["ids"] for each in expected["64"]]


def test_a_process_that_reads_prompts_without_vtc(prompts: list) -> None:
    with engine(tiny.CHECKPOINT, SETTINGS["64"]) as llm:
        model = llm.model
        pixels = model.vision_tower.vision_model.embeddings.position_embedding.weight.new_zeros(1, 3, 336, 336)
        with pytest.raises(RuntimeError, match="the process that reads the prompts has no VTC"):
            model.embed_multimodal(pixel_values=pixels)


@pytest.mark.parametrize("bounded", [True, False])
def test_a_step_encodes_no_more_images_than_without_vtc(
    bounded: bool, prompts: list, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM counts an image by the tokens that stay: 1152 of them are 2 images of 576, or 18 of 64."""
    if not bounded:
        monkeypatch.delitem(MODELS_CONFIG_MAP, "LlavaForConditionalGeneration", raising=False)
    sizes: list[int] = []
    with engine(tiny.CHECKPOINT, SETTINGS["64"], max_num_batched_tokens=1152, max_num_seqs=16) as llm:
        llm.model.vtc_batch = 1000
        llm.model.__dict__.pop("vtc_encoder", None)
        llm.model.vision_tower.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
        equal(ask(llm, prompts), expected["64"])
    assert (max(sizes) <= 2) == bounded


@pytest.mark.parametrize("bounded", [True, False])
def test_a_pass_of_the_tower_is_bounded_whatever_requests_keep(bounded: bool, prompts: list) -> None:
    sizes: list[int] = []
    with engine(tiny.CHECKPOINT, SETTINGS["64"], max_num_batched_tokens=1152, max_num_seqs=16) as llm:
        assert llm.model.vtc_batch == 2
        if not bounded:
            llm.model.vtc_batch = 1000
            llm.model.__dict__.pop("vtc_encoder", None)
        llm.model.vision_tower.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
        ask(llm, [prompt | {"settings": {"keep": 16}} for prompt in prompts])
    assert (max(sizes) <= 2) == bounded


# Checkpoints and their settings.


def test_settings_that_save_pretrained_wrote(prompts: list, expected: dict, tmp_path: Path) -> None:
    code = "import sys, vtc; from vtc import tiny; m, p = tiny.load(); vtc.enable(m, keep=64); "
    code += "m.save_pretrained(sys.argv[1]); p.save_pretrained(sys.argv[1])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([os.environ["VTC_PYTHON"], "-c", code, str(tmp_path)], env=environment, check=True)
    assert json.loads((tmp_path / "config.json").read_text())["vtc"]["keep"] == 64
    with engine(tmp_path) as llm:
        equal(ask(llm, prompts), expected["64"])
    with engine(tmp_path, {"method": "none"}) as llm:
        equal(ask(llm, prompts), expected["none"])


def test_checkpoints_with_the_names_of_either_transformers(
    prompts: list, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled one was saved by transformers 5, and vLLM's own class does not load it."""
    shutil.copytree(tiny.CHECKPOINT, tmp_path / "old")
    file = tmp_path / "old/model.safetensors"
    weights = load_file(file)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): own for name, own in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    with engine(tmp_path / "old") as llm:
        equal(ask(llm, prompts), expected["stock"])
    stock = llava.LlavaForConditionalGeneration.hf_to_vllm_mapper
    monkeypatch.setattr(VTCLlavaForConditionalGeneration, "hf_to_vllm_mapper", stock)
    missing = r"no module or parameter named 'vision_tower\.embeddings'"
    with pytest.raises(ValueError, match=missing), engine(tiny.CHECKPOINT):
        pass
