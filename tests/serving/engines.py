"""Engines of vLLM in this process, and transformers' answers to the same prompts from another one."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine is in this process, where tests reach it
HERE = Path(__file__).parent


class Engine:
    """Holds the one reference to an `LLM`, which has to be freed before the next one starts."""

    def __init__(self, **given: Any) -> None:
        self.llm: Any = LLM(**given)

    @property
    def model(self) -> Any:
        """The model inside an engine that runs in this process."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


@contextlib.contextmanager
def engine(model: Path | str, settings: dict[str, Any] | None = None, **given: Any) -> Iterator[Engine]:
    """An engine that compresses by `settings`; `given` are more arguments of `LLM`."""
    overrides = {} if settings is None else {"vtc": settings}
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "block_size": 32,
        "max_num_seqs": 8,
        "disable_log_stats": False,
    }
    made = None
    try:
        made = Engine(model=str(model), hf_overrides=overrides, **{**defaults, **given})
        yield made
    finally:
        if made is not None:
            made.llm.llm_engine.engine_core.shutdown()
            made.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(engine: Engine, prompts: Sequence[dict[str, Any]], max_tokens: int = 4) -> list[Any]:
    """vLLM's outputs for prompts {"text", "images": paths, maybe "settings"}, all in one batch."""
    requests = []
    for prompt in prompts:
        images = [Image.open(path).convert("RGB") for path in prompt["images"]]
        request: dict[str, Any] = {"prompt": prompt["text"]}
        if images:
            request["multi_modal_data"] = {"image": images if len(images) > 1 else images[0]}
        if prompt.get("uuid"):
            request["multi_modal_uuids"] = {"image": [prompt["uuid"]] * len(images)}
        if prompt.get("settings"):
            request["mm_processor_kwargs"] = {"vtc": prompt["settings"]}
        requests.append(request)
    how = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=1)
    return engine.llm.generate(requests, how, use_tqdm=False)


def ids(outputs: Sequence[Any]) -> list[list[int]]:
    """The new tokens of vLLM's outputs."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def first_logprobs(outputs: Sequence[Any]) -> list[tuple[int, float]]:
    """The first new token of each output, and its log-probability."""
    first = [next(iter(output.outputs[0].logprobs[0].items())) for output in outputs]
    return [(token, found.logprob) for token, found in first]


def references(folder: Path, cases: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """transformers' answers, for each case and each of its prompts; see reference.py.

    vLLM changes classes of transformers in its process, and needs an older one than VTC's `generate()`. So another
    Python is asked, which the variable VTC_PYTHON names.
    """
    python = os.environ.get("VTC_PYTHON")
    if not python:
        raise RuntimeError(
            "set VTC_PYTHON to a Python that has VTC and transformers 5.23 or newer: transformers is the reference"
        )
    source, target = folder / "cases.json", folder / "answers.json"
    full = [
        {"settings": None, "dtype": "float32", "max_tokens": 4, **case, "model": str(case["model"])} for case in cases
    ]
    source.write_text(json.dumps(full))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([python, str(HERE / "reference.py"), str(source), str(target)], env=environment, check=True)
    found: list[list[dict[str, Any]]] = json.loads(target.read_text())
    return found


def equal(outputs: Sequence[Any], expected: Sequence[dict[str, Any]], tolerance: float = 1e-4) -> None:
    """Assert that vLLM's outputs have the expected tokens, and the first the expected log-probability."""
    assert ids(outputs) == [each["ids"] for each in expected]
    for (token, found), each in zip(first_logprobs(outputs), expected, strict=True):
        assert abs(found - each["first"][token]) < tolerance
