"""What vLLM refuses with VTC: before weights load, with VTC's own reason."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import engine
from transformers import LlamaConfig
from vllm import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins

from vtc import tiny
from vtc.tiny.scenes import Scene


def config_of(settings: Any, model: Path = tiny.CHECKPOINT, **given: Any) -> Any:
    """vLLM's config of a model, made before weights load."""
    load_general_plugins()
    overrides = {} if settings is None else {"vtc": settings}
    return EngineArgs(model=str(model), hf_overrides=overrides, **given).create_model_config()


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("vllm.vtc")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def engine_config_of(settings: Any, **given: Any) -> Any:
    """vLLM's config of an engine of the bundled model."""
    load_general_plugins()
    overrides = {} if settings is None else {"vtc": settings}
    return EngineArgs(model=str(tiny.CHECKPOINT), hf_overrides=overrides, **given).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "prumerge+", "keep": 64}, r"method 'prumerge\+' counts an image's tokens by its features"),
        ({"method": "fastv", "keep": 64}, "method 'fastv' would drop tokens inside the language model"),
        ({"method": "mmtok", "keep": 64}, "method 'mmtok' selects by the question"),
        ({"keep": 64, "prune_layer": 2}, "would drop tokens inside the language model"),
        ({"keep": 577}, "an image of this model has only 576 visual tokens"),
        ({"kep": 64}, "unknown option"),
        ({"keep": 64, "start_layer": 5}, "cannot score vision layers"),
    ],
)
@pytest.mark.parametrize("model_impl", ["vllm", "transformers"])
def test_settings(settings: dict, says: str, model_impl: str) -> None:
    with pytest.raises(ValueError, match=says):
        config_of(settings, model_impl=model_impl)


def test_a_model_that_vllm_serves_without_vtc(tmp_path: Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"], hidden_size=64, num_attention_heads=1).save_pretrained(tmp_path)
    given = {"skip_tokenizer_init": True}
    assert config_of(None, tmp_path, **given).architecture == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="this model is of type 'llama', which is not supported"):
        config_of({"keep": 64}, tmp_path, **given)


def test_a_llava_in_a_class_of_vllm_that_vtc_does_not_know(tmp_path: Path) -> None:
    config = json.loads((tiny.CHECKPOINT / "config.json").read_text())
    config["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
    for file in tiny.CHECKPOINT.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_of(None, tmp_path).architecture == "LlavaOnevisionForConditionalGeneration"
    with pytest.raises(ValueError, match="which vLLM's LlavaOnevisionForConditionalGeneration would ignore; remove "):
        config_of({"keep": 64}, tmp_path)


@pytest.mark.parametrize("settings", [None, {"keep": 64}])
def test_settings_among_the_processors(settings: dict | None) -> None:
    with pytest.raises(ValueError, match=r"--mm-processor-kwargs holds vtc=.*; give .* --hf-overrides\.vtc"):
        engine_config_of(settings, mm_processor_kwargs={"vtc": {"keep": 32}})


def test_engines_that_hand_over_kv_caches_are_warned(caplog_vllm: pytest.LogCaptureFixture) -> None:
    given = {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}
    engine_config_of(None, **given)
    assert "need the same settings" not in caplog_vllm.text
    engine_config_of({"keep": 64}, **given)
    assert "need the same settings" in caplog_vllm.text


def test_lora_on_the_tower() -> None:
    given = {"enable_lora": True, "enable_tower_connector_lora": True}
    assert engine_config_of(None, **given).lora_config.enable_tower_connector_lora
    with pytest.raises(ValueError, match="VTC does not run with LoRA adapters on the vision tower"):
        engine_config_of({"keep": 64}, **given)


@pytest.mark.parametrize("model_impl", ["vllm", "transformers"])
def test_a_step_encodes_as_many_images_as_without_vtc(model_impl: str) -> None:
    given = {"max_num_batched_tokens": 2048, "model_impl": model_impl}
    budgets = {
        name: engine_config_of(settings, **given).scheduler_config.max_num_encoder_input_tokens
        for name, settings in (("stock", None), ("64", {"keep": 64}), ("pool", {"method": "pool", "keep": 60}))
    }
    assert budgets == {"stock": 2048, "64": 227, "pool": 174}
    for also in ({"enable_mm_embeds": True}, {"enable_prompt_embeds": True}):  # they may be as long as a whole image
        assert engine_config_of({"keep": 64}, **given, **also).scheduler_config.max_num_encoder_input_tokens == 2048


@pytest.mark.parametrize("model_impl", ["vllm", "transformers"])
def test_a_request_with_settings_for_an_engine_without(model_impl: str) -> None:
    processor = MULTIMODAL_REGISTRY.create_processor(config_of(None, model_impl=model_impl))
    items = processor.info.parse_mm_data({"image": [Scene("test", 1).image]})
    assert len(processor([4], items)["prompt_token_ids"]) == 576
    with pytest.raises(ValueError, match="this engine was started without; start it with --hf-overrides"):
        processor([4], items, hf_processor_mm_kwargs={"vtc": {"keep": 64}})


def test_a_compiled_tower_of_the_transformers_backend() -> None:
    given = {"model_impl": "transformers", "compilation_config": {"compile_mm_encoder": True}}
    with (
        pytest.raises(ValueError, match="which compile_mm_encoder hides"),
        engine(tiny.CHECKPOINT, {"keep": 64}, **given),
    ):
        pass
