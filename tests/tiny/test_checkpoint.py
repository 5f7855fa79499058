"""The bundled checkpoint: stock transformers loads it, and it answers as its card says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest

from vtc import tiny
from vtc.eval.engine import answer_all
from vtc.eval.local import LocalEngine
from vtc.eval.model import ModelSpec
from vtc.eval.setting import Setting
from vtc.eval.tasks.scenes import Scenes
from vtc.tiny.recipe import RECIPE
from vtc.tiny.scenes import FAMILIES, Scene

CARD = tiny.CHECKPOINT / "README.md"


def test_no_module_of_the_model_imports_the_command() -> None:
    for file in tiny.CHECKPOINT.parent.glob("*.py"):
        assert "vtc.cli" not in file.read_text(), file


def test_stock_transformers_loads_the_checkpoint() -> None:
    """In a process that never hears of vtc."""
    code = (
        "import sys, torch; from transformers import AutoProcessor, LlavaForConditionalGeneration as L\n"
        f"path = {str(tiny.CHECKPOINT)!r}; m = L.from_pretrained(path); p = AutoProcessor.from_pretrained(path)\n"
        "assert not any(n.split('.')[0] == 'vtc' for n in sys.modules)\n"
        "assert next(m.parameters()).dtype == torch.float16\n"
        "print(m.config.vision_config.image_size, m.config.vision_config.patch_size, type(p).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["336", "14", "LlavaProcessor"]


def test_prompt_has_one_placeholder_per_visual_token() -> None:
    _, processor = tiny.load()
    question = Scene("test", 0).questions[0]
    inputs = processor(images=Scene("test", 0).image, text=tiny.prompt(question.text), return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 576
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]


def test_chat_template_gives_the_training_prompt() -> None:
    _, processor = tiny.load()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many objects are there ?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    ids = processor.tokenizer(text).input_ids
    assert ids == processor.tokenizer(tiny.prompt("how many objects are there ?")).input_ids


def test_the_card_describes_this_checkpoint() -> None:
    text = CARD.read_text()
    training = json.loads((tiny.CHECKPOINT / "training.json").read_text())
    assert training["recipe"] == [asdict(phase) for phase in RECIPE]
    assert f"seed {training['seed']}, {training['minutes']:.0f} minutes on a CPU, torch {training['torch']}." in text
    model, _ = tiny.load()
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters" in text


def card_figure(row: str) -> dict[str, float]:
    """One row of the card's accuracy table, as shares."""
    line = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", CARD.read_text(), re.MULTILINE)
    assert line, f"no row {row!r} in the card"
    values = [float(cell) / 100 for cell in line[1].split("|")]
    return dict(zip(("all", *FAMILIES), values, strict=True))


@pytest.mark.parametrize(
    ("row", "setting"), [("all 576 tokens", Setting()), ("vtc-cls 64", Setting("vtc-cls", {"keep": 64}))]
)
def test_accuracy_is_what_the_card_says(row: str, setting: Setting) -> None:
    """On the first 100 of the card's questions: within four standard errors of its figure."""
    task = Scenes(count=100)
    answers = answer_all(LocalEngine(), ModelSpec(), task, setting, batch_size=16)
    measured, count = task.score({answer.line: answer.text for answer in answers}).figures["accuracy"]
    claimed = card_figure(row)["all"]
    assert count == 100
    assert abs(measured / 100 - claimed) <= 4 * (claimed * (1 - claimed) / count) ** 0.5 + 1 / count


def test_card_meets_the_target() -> None:
    full, kept, control = (card_figure(row) for row in ("all 576 tokens", "vtc-cls 64", "random 64"))
    assert full["all"] >= 0.90
    assert min(full.values()) >= 0.80
    assert kept["all"] >= 0.95 * full["all"]
    assert kept["all"] >= control["all"] + 0.05
