"""Tensor parallelism: two processes, which see half of the vision tower's heads each, give the answers of one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from checkpoints import draw, pil, saved  # noqa: F401
from engines import ask, engine, equal, first_logprobs, references

from vtc.vllm import settings, tower, transformers_backend

KEEP = 12
METHODS = ("vtc-cls", "visionzip", "hiprune")  # by [CLS]; by keys, too; by the attention received
ALONE = "alone"  # vtc-cls, without the mean over the processes
MODELS = ("clip", "next")


class Extension:
    """What an engine asks its workers: to encode the next images by another method that keeps as many tokens."""

    model_runner: Any

    def set_method(self, method: str, alone: bool) -> None:
        model = self.model_runner.model
        config = copy.copy(model.config)
        config.vtc = {"method": method, "keep": KEEP}
        model.vtc = settings.plan_of(config)
        for name in ("vtc_encoder", "vtc_settings"):
            vars(model).pop(name, None)
        if alone:
            tower.mean_over_ranks = transformers_backend.mean_over_ranks = lambda shards: None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def models(folder) -> dict[str, Path]:
    return saved(folder, MODELS)


@pytest.fixture(scope="module")
def prompts(folder) -> dict[str, list[dict]]:
    """By method; each has images of its own, which no cache knows."""
    found: dict[str, list[dict]] = {}
    for number, name in enumerate((*METHODS, ALONE)):
        paths = [draw(folder / f"{name}{seed}.png", (84, 84), 10 * number + seed) for seed in range(6)]
        found[name] = [{"text": "USER: <image> what is there ? ASSISTANT:", "images": [path]} for path in paths]
    return found


@pytest.fixture(scope="module")
def answers(folder, models, prompts) -> dict[tuple[str, str], list]:
    """transformers', by model and method."""
    cases = {}
    for model in MODELS:
        for name, own in prompts.items():
            settings = {"method": "vtc-cls" if name == ALONE else name, "keep": KEEP}
            cases[model, name] = {"model": models[model], "settings": settings, "prompts": own}
    return dict(zip(cases, references(folder, list(cases.values())), strict=True))


@pytest.mark.parametrize(("implementation", "model"), [("vllm", "clip"), ("vllm", "next"), ("transformers", "clip")])
def test_two_processes(implementation, model, models, prompts, answers, monkeypatch) -> None:
    expected = {name: answers[model, name] for name in prompts}
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    given = {
        "model_impl": implementation,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "worker_extension_cls": "test_vllm_parallel.Extension",
        "enable_prefix_caching": False,
    }
    with engine(models[model], {"keep": KEEP}, **given) as running:
        try:
            for method in METHODS:
                running.llm.collective_rpc("set_method", args=(method, False))
                equal(ask(running, prompts[method]), expected[method])
            running.llm.collective_rpc("set_method", args=("vtc-cls", True))
            found = first_logprobs(ask(running, prompts[ALONE]))
        finally:
            running.llm.llm_engine.engine_core.shutdown()
    differences = [abs(own - each["first"][token]) for (token, own), each in zip(found, expected[ALONE], strict=True)]
    assert max(differences) > 1e-2
