"""Times to first token of several settings of one prompt."""

from __future__ import annotations

from typing import Any

import pytest

from vtc.eval.answerer import Answerer
from vtc.eval.local import LocalEngine
from vtc.eval.measure import FirstToken, Times, cell, first_tokens, noise
from vtc.eval.model import ModelSpec
from vtc.eval.protocol import HFProtocol, Prompt
from vtc.eval.setting import NONE, Setting
from vtc.hf import settings as hf_settings
from vtc.tiny.scenes import Scene

SETTINGS = [Setting(NONE), Setting("vtc-cls", {"keep": 64}), Setting("random", {"keep": 32})]


@pytest.fixture(scope="module")
def answerer(engine: LocalEngine, spec: ModelSpec) -> Answerer:
    return engine.answerer(spec)


@pytest.fixture(scope="module")
def inputs(answerer: Answerer) -> Any:
    prompt = Prompt("is there a circle ?", [Scene("test", 0).image])
    return HFProtocol(answerer.processor, answerer.model.config).prepare([prompt])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, answerer: Answerer) -> list[str]:
    """The methods that compress the calls of `generate`, in their order."""
    seen: list[str] = []
    stock = answerer.model.generate

    def generate(**arguments: Any) -> Any:
        assert arguments["max_new_tokens"] == 1
        block = hf_settings.block_of(answerer.model.base_model)
        seen.append(NONE if block is None else block.config.method)
        return stock(**arguments)

    monkeypatch.setattr(answerer.model, "generate", generate)
    return seen


def test_settings_take_turns(answerer: Answerer, inputs: Any, calls: list[str]) -> None:
    """Every round runs each once and begins with another one; the warm-up round is not counted."""
    found = first_tokens(answerer, inputs, SETTINGS, runs=2)
    assert calls == [NONE, "vtc-cls", "random", "vtc-cls", "random", NONE, "random", NONE, "vtc-cls"]
    assert [len(each.seconds) for each in found] == [2, 2, 2]
    assert all(second > 0 for each in found for second in each.seconds)


def test_the_cache_is_that_of_the_shorter_prompt(answerer: Answerer, inputs: Any) -> None:
    config, prompt = answerer.model.config.text_config, inputs["input_ids"].shape[1]
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4  # float32
    found = first_tokens(answerer, inputs, SETTINGS, runs=1)
    assert [each.kv_bytes for each in found] == [per_token * (prompt - 576 + kept) for kept in (576, 64, 32)]


def test_the_median_is_of_all_runs() -> None:
    assert FirstToken((3.0, 1.0, 8.0), 0).median == 3.0


def test_times_are_a_median_with_the_fastest_and_the_slowest() -> None:
    record = Times((0.2, 0.15, 0.1534)).record()
    assert record == {"median": 153.4, "min": 150.0, "max": 200.0}
    assert cell(record) == "153 (150-200) ms"
    assert cell({"median": 12.34, "min": 9.876, "max": 1200.4}) == "12.3 (9.88-1200) ms"


def test_the_noisiest_times_are_named() -> None:
    quiet, loud = Times((1.0, 1.4)), Times((1.0, 2.0))
    assert noise({"quiet": quiet}) is None
    assert noise({}) is None
    assert str(noise({"quiet": quiet, "loud": loud})).startswith(
        "The timings are noisy: the slowest run of loud took 2.0 times as long as the fastest."
    )
