"""VTC in Ray: batches with ray.data, and a server of Ray Serve LLM.

vLLM has no Ray executor for CPUs ("current platform cpu does not support ray"), so workers on several machines are not
tested here.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve.llm")

import openai  # noqa: E402
from engines import ids, references  # noqa: E402
from PIL import Image  # noqa: E402
from ray import serve  # noqa: E402
from ray.llm._internal.serve.core.configs.accelerators import CPUAccelerator  # noqa: E402
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine  # noqa: E402
from ray.serve.llm import LLMConfig  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

import vtc.vllm  # noqa: E402
from vtc import tiny  # noqa: E402
from vtc.tiny.scenes import Scene  # noqa: E402

PAGE = Path(__file__).parent.parent.parent / "vtc/vllm/README.md"
QUESTION = "how many objects are there ?"
TEXT = 11  # tokens of a prompt besides those of its image
ENGINE = {
    "hf_overrides": {"vtc": {"keep": 64}},
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "block_size": 32,
    "max_num_seqs": 8,
}
ON_CPU = {"bundles": [{"CPU": 1}]}


@pytest.fixture(scope="module")
def logs() -> Iterator[Path]:
    """A cluster of this machine, and the folder of what its processes print."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # with Ray's 15, an engine starts in minutes beside other tests
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with ray.init(
            num_cpus=8, num_gpus=0, include_dashboard=False, object_store_memory=2**28, log_to_driver=False
        ) as context:
            yield Path(context.address_info["session_dir"]) / "logs"
            serve.shutdown()


def printed(logs: Path, text: str) -> bool:
    return any(text in path.read_text(errors="replace") for path in logs.glob("*") if path.is_file())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("scenes")
    for number in (1, 2):
        Scene("test", number).image.save(folder / f"{number}.png")
    return [str(folder / "1.png"), str(folder / "2.png")]


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[int]]]:
    """transformers' answers, by keep."""
    prompts = [{"text": tiny.prompt(QUESTION), "images": [image]} for image in images]
    cases = [{"model": tiny.CHECKPOINT, "settings": {"keep": keep}, "prompts": prompts} for keep in (64, 32)]
    found = references(tmp_path_factory.mktemp("references"), cases)
    return {keep: [answer["ids"] for answer in answers] for keep, answers in zip((64, 32), found, strict=True)}


class Asker:
    """An engine in an actor of Ray."""

    def __init__(self, model: str, register: bool = False) -> None:
        if register:
            vtc.vllm.register()
        self.llm = LLM(model=model, **ENGINE)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        images = [{"image": Image.open(path).convert("RGB")} for path in batch["image"]]
        requests = [{"prompt": tiny.prompt(QUESTION), "multi_modal_data": image} for image in images]
        outputs = self.llm.generate(requests, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        return {"ids": ids(outputs), "length": [len(output.prompt_token_ids) for output in outputs]}


def test_an_engine_in_map_batches(logs, images, expected) -> None:
    rows = ray.data.from_items([{"image": image} for image in images]).repartition(1)
    model = (str(tiny.CHECKPOINT),)
    found = rows.map_batches(Asker, fn_constructor_args=model, batch_size=2, num_cpus=1, concurrency=1).take_all()
    assert [list(row["ids"]) for row in found] == expected[64]
    assert [row["length"] for row in found] == [TEXT + 64] * 2


def test_workers_without_vtc_refuse_the_images_of_a_process_that_has_it(logs, images, tmp_path: Path) -> None:
    shutil.copytree(tiny.CHECKPOINT, tmp_path / "model")  # with the names of weights that vLLM's own class expects
    weights = load_file(tiny.CHECKPOINT / "model.safetensors")
    stock = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()}
    save_file(stock, tmp_path / "model" / "model.safetensors")
    without = {"env_vars": {"VLLM_PLUGINS": "none"}}
    actor = ray.remote(Asker).options(runtime_env=without).remote(str(tmp_path / "model"), register=True)
    with pytest.raises(ray.exceptions.RayTaskError, match="EngineDeadError"):
        ray.get(actor.__call__.remote({"image": images[:1]}))
    assert printed(logs, "Expected number of multimodal embeddings")
    ray.kill(actor)


def snippet(number: int, names: dict[str, Any], *changes: tuple[str, str]) -> dict[str, Any]:
    """Run a snippet of the page with the bundled model on a CPU; returns what it has defined."""
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[number].split("```")[0]
    for old, new in (('"llava-hf/llava-1.5-7b-hf"', repr(str(tiny.CHECKPOINT))), *changes):
        assert old in code
        code = code.replace(old, new)
    exec(code, names)
    return names


def test_the_pages_data_llm_with_a_keep_of_each_row(logs, images, expected) -> None:
    settings = 'engine_kwargs={"hf_overrides": {"vtc": {"keep": 64}}}'
    on_cpu = "engine_kwargs=dict(ENGINE), placement_group_config=ON_CPU, concurrency=1, batch_size=4"
    processor = snippet(3, {"ENGINE": ENGINE, "ON_CPU": ON_CPU}, (settings, on_cpu))["processor"]
    rows = [{"path": path, "keep": keep, "question": QUESTION} for keep in (64, 32) for path in images]
    found = processor(ray.data.from_items(rows)).take_all()
    assert len(found) == 4
    for row in found:
        number = images.index(row["path"])
        assert list(row["generated_tokens"]) == expected[row["keep"]][number]
        assert row["prompt_tokens"] == TEXT + row["keep"]


class EngineAsOnGPUs(VLLMEngine):
    """Ray's engine on a CPU, which gets its config from a task, as it does on GPUs."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        CPUAccelerator.requires_remote_initialization = True
        return super()._prepare_engine_config(callback_ctx)


@pytest.fixture
def client(logs) -> Iterator[openai.OpenAI]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    given = {
        "placement_group_config": ON_CPU,
        "runtime_env": {"env_vars": {"RAYLLM_VLLM_ENGINE_CLS": f"{__name__}.{EngineAsOnGPUs.__name__}"}},
        "deployment_config": {"num_replicas": 1},
    }
    snippet(
        2,
        {"ENGINE": ENGINE, "given": given},
        ('server_cls="vtc.vllm.ray:LLMServer"', 'server_cls="vtc.vllm.ray:LLMServer", **given'),
        ('"hf_overrides": {"vtc": {"keep": 64}}', "**ENGINE"),
        (", blocking=True", ""),
    )
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    serve.shutdown()


def chat(client: openai.OpenAI, image: str, **body: Any) -> Any:
    url = "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    messages: Any = [{"role": "user", "content": content}]
    body = {"add_special_tokens": True, "return_token_ids": True, **body}  # vLLM leaves out the first token of a chat
    return client.chat.completions.create(
        model="llava", messages=messages, temperature=0, max_tokens=4, extra_body=body
    )


def test_serve(client, images, expected) -> None:
    for keep, body in ((64, {}), (32, {"mm_processor_kwargs": {"vtc": {"keep": 32}}})):
        found = [chat(client, image, **body) for image in images]
        assert [each.choices[0].token_ids for each in found] == expected[keep]
        assert [each.usage.prompt_tokens for each in found] == [TEXT + keep] * 2


def test_a_server_whose_workers_would_not_have_vtc(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc.vllm.ray import LLMServer

    config = LLMConfig(model_loading_config={"model_id": "llava", "model_source": str(tiny.CHECKPOINT)})
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    with pytest.raises(
        ValueError, match=r"plug-ins \['lora_filesystem_resolver'\] .* must load 'vtc'; install vtc-cls"
    ):
        asyncio.run(LLMServer.sync_init(config, engine_cls=lambda config: pytest.fail("an engine starts")).start())


def test_without_ray_serve_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vtc.vllm.ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray.serve.llm", None)
    with pytest.raises(ImportError, match=r"vtc.vllm.ray needs Ray Serve LLM, .* install 'ray\[llm\]'"):
        importlib.import_module("vtc.vllm.ray")
