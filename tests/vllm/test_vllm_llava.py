"""LLaVA-1.5 in vLLM: the answers of transformers with VTC, token for token."""

from __future__ import annotations

import pytest
from engines import ask, engine, equal, references

from vtc import tiny
from vtc.tiny.scenes import Scene

SETTINGS = {
    "stock": None,
    "none": {"method": "none"},
    "128": {"keep": 128},
    "64": {"keep": 64},
    "ratio": {"ratio": 0.06},
    "fastervlm": {"method": "fastervlm", "keep": 64},
    "visionzip": {"method": "visionzip", "keep": 64},
    "pool": {"method": "pool", "keep": 64},
    "random": {"method": "random", "keep": 64},
    "coverage": {"method": "coverage", "keep": 32},
    "scope": {"method": "scope", "keep": 64},
    "divprune": {"method": "divprune", "keep": 64},
    "vispruner": {"method": "vispruner", "keep": 64},
    "hiprune": {"method": "hiprune", "keep": 64},
    "received": {"method": "received", "keep": 64},
}
QUESTIONS = ("how many objects are there ?", "is there a blue circle ?")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("scenes")
    found = []
    for number in range(10):
        path = folder / f"{number}.png"
        Scene("test", number).image.save(path)
        found += [{"text": tiny.prompt(question), "images": [str(path)]} for question in QUESTIONS]
    return found


@pytest.fixture(scope="module")
def expected(prompts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    cases = [{"model": tiny.CHECKPOINT, "settings": settings, "prompts": prompts} for settings in SETTINGS.values()]
    return dict(zip(SETTINGS, references(tmp_path_factory.mktemp("references"), cases), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_answers(name, prompts, expected) -> None:
    with engine(tiny.CHECKPOINT, SETTINGS[name]) as llm:
        equal(ask(llm, prompts), expected[name])
