"""The bundled model: the recipe runs and resumes, the checkpoint is stock, and it answers as its card says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vtc
from vtc import tiny
from vtc.tiny import train as recipe
from vtc.tiny.evaluate import accuracy, answer, batches, recipe_row
from vtc.tiny.scenes import COUNTING, FAMILIES, Scene, balanced_questions

CARD = tiny.CHECKPOINT / "README.md"


def test_training_runs_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    phases = (
        recipe.Phase("vision", 112, 2, 2, 1e-3),
        recipe.Phase("text", 112, 1, 2, 1e-3),
        recipe.Phase("projector", 112, 1, 2, 1e-3),
        recipe.Phase("language", 112, 1, 2, 1e-3),
    )
    assert recipe.train(tmp_path / "whole", phases)
    interruptions = 0
    while not recipe.train(tmp_path / "parts", phases, minutes=0):
        interruptions += 1
    assert interruptions >= 3
    whole, parts = (load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, weights in whole.items():
        torch.testing.assert_close(weights, parts[name], rtol=1e-3, atol=1e-4, msg=name)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    phases = tuple(recipe.Phase(stage, 112, 1, 2, 1e-3) for stage in ("vision", "text", "language"))
    assert recipe.train(tmp_path / "first", phases[:2])
    first = tmp_path / "first/checkpoint"
    assert recipe.train(tmp_path / "more", phases, start=first)
    before, after = (load_file(path / "model.safetensors") for path in (first, tmp_path / "more/checkpoint"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in changed)
    assert any("projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
    with pytest.raises(ValueError, match="append new phases"):
        recipe.train(tmp_path / "other", phases[1:], start=first)
    with pytest.raises(ValueError, match="vision stage cannot go on"):
        recipe.train(tmp_path / "other", (*phases[:2], phases[0]), start=first)


@pytest.mark.parametrize("stage", ["vision", "text", "projector", "language"])
def test_each_stage_learns_only_its_part(stage: str) -> None:
    model = recipe.build_model()
    contrast = recipe.PhraseContrast(model.model.vision_tower)
    learns = {id(p) for p in recipe.trainable(stage, contrast, model).values()}
    for name, parameter in model.named_parameters():
        part = "vision" if "vision_tower" in name else "projector" if "projector" in name else "text"
        expected = part == stage or (stage == "language" and part != "vision")
        assert (id(parameter) in learns) == parameter.requires_grad == expected, name


def test_encode_is_the_stock_tower() -> None:
    torch.manual_seed(0)
    tower = recipe.build_model().model.vision_tower.eval()
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        stock = tower(pixels, output_hidden_states=True).hidden_states
        ours = recipe.encode(tower, pixels, torch.zeros(1, 2, dtype=torch.long))
    assert len(stock) == len(ours)
    for a, b in zip(stock, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_window_uses_its_own_positions() -> None:
    """The first hidden states of a window are those rows of the whole canvas."""
    torch.manual_seed(0)
    tower = recipe.build_model().model.vision_tower.eval()
    pixels, (x, y) = torch.randn(1, 3, 336, 336), (5, 11)
    window = pixels[..., y * 14 : y * 14 + 112, x * 14 : x * 14 + 196]  # 14 patches wide, 8 high
    with torch.no_grad():
        whole = recipe.encode(tower, pixels, torch.zeros(1, 2, dtype=torch.long))[0][0, 1:].unflatten(0, (24, 24))
        part = recipe.encode(tower, window, torch.tensor([[x, y]]))[0][0, 1:].unflatten(0, (8, 14))
    torch.testing.assert_close(part, whole[y : y + 8, x : x + 14])


def test_mixed_phases_take_turns_and_keep_the_tokens_in_a_batch_alike() -> None:
    def drawn(mixed: str) -> list[recipe.Alike]:
        phase = recipe.Phase("language", 336, 10, 10, 1e-3, mixed=mixed)
        kinds = [phase.kinds_of(step) for step in range(300)]
        assert kinds == [phase.kinds_of(step) for step in range(300)]
        assert {len(kind) for kind in kinds} == {1}
        return [kind for (kind,) in kinds]

    whole = recipe.Alike(10, (336, 336))
    sizes = drawn("sizes")
    numbers = zip((30, 20, 15, 12, 10), (112, 168, 224, 280, 336), strict=True)
    assert sizes == [recipe.Alike(number, (side, side)) for number, side in numbers] * 60
    shapes = drawn("shapes")
    assert set(shapes[::3]) == {whole}
    assert len(set(shapes)) > 150
    for number, (width, height), zoom, blank in shapes:
        assert (zoom, blank) == (1, False)
        assert width % 14 == height % 14 == 0
        assert 70 <= min(width, height) <= max(width, height) <= 336
        assert 10 <= number <= 48
    batch = recipe.Scenes(recipe.Phase("language", 336, 10, 10, 1e-3, mixed="shapes"), 0)[1]
    number, (width, height), *_ = shapes[1]
    assert batch.pixels[0].shape == (number, 3, height, width)
    assert (batch.tokens == 4).sum() == number * width * height // 14**2
    close = drawn("close-ups")
    assert set(close[::3]) == {whole}
    assert close[1:8:3] == [whole._replace(zoom=zoom) for zoom in (2, 1.5, 2)]
    assert close[2::3] == shapes[2::3]
    zooms = drawn("zooms")
    assert set(zooms[::4]) == {whole}
    for _, size, zoom, _ in zooms:
        assert 112 <= min(size) <= max(size) <= 336
        assert min(size) / zoom >= 111
    assert {round(kind.zoom) for kind in zooms} == {1, 2, 3}


def test_pictures_share_a_prompt_and_are_counted_together() -> None:
    phase = recipe.Phase("language", 168, 40, 6, 1e-3, draws=1, pictures=3, counting=5.0)
    scenes = recipe.Scenes(phase, 0)
    ids = scenes.tokenizer(f"{COUNTING} ASSISTANT:", add_special_tokens=False).input_ids
    pictures = set()
    for step in range(12):
        batch, first = scenes[step], 6 * step
        for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights, strict=True):
            shown = int((tokens == 4).sum()) // 144
            objects = sum(len(Scene("train", first + i, 168).objects) for i in range(shown))
            first += shown
            pictures.add(shown)
            start = next(i for i in range(len(tokens)) if tokens[i : i + len(ids)].tolist() == ids)
            answer = start + len(ids) - 1
            assert (int(targets[answer]), float(weights[answer])) == (scenes.tokenizer.vocab[str(objects)], 5.0)
            if shown > 1:
                assert (weights >= 1).sum() == 2  # the answer and the end: nothing else is asked of several pictures
        assert first == 6 * step + len(batch.pixels[0]) == 6 * step + 6
    assert pictures == {1, 2, 3}


def test_albums_mix_shapes_in_a_prompt() -> None:
    """A prompt has the visual tokens of its own pictures, whatever their shapes, and counts the objects of those."""
    torch.manual_seed(0)
    phase = recipe.Phase("language", 336, 40, 6, 1e-3, draws=1, mixed="albums", pictures=4, objects=5, zoom=3.0)
    assert {phase.pictures_of(step) for step in range(40)} == {1, 2, 3, 4}
    for step in range(0, 40, 4):
        assert (phase.kinds_of(step), phase.pictures_of(step)) == ([recipe.Alike(6, (336, 336))], 1)
    step = 7
    assert phase.pictures_of(step) > 1
    kinds = phase.kinds_of(step)
    assert [kind.blank for kind in kinds] == [False, False, True, True, False]
    assert [kind.size == (336, 336) for kind in kinds] == [True, False, True, False, False]
    assert [kind.zoom > 1 for kind in kinds] == [False] * 4 + [True]

    scenes = recipe.Scenes(phase, 0)
    batch, kind_of = scenes[step], [kind for kind in kinds for _ in range(kind.number)]
    assert sorted(batch.order) == list(range(len(kind_of))) != batch.order
    album = [Scene("train", 6 * step + i, *kind_of[i][1:]) for i in batch.order]
    tower = recipe.build_model().model.vision_tower.eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.MEAN, recipe.STD))
    expected = []
    for scene in album:
        pixels = (torch.tensor(np.asarray(scene.image)).permute(2, 0, 1) / 255 - mean) / std
        origin = torch.tensor([scene.origin]) // 14
        expected.append(recipe.encode(tower, pixels[None], origin)[-2][0, 1:])
    torch.testing.assert_close(recipe.features(tower, batch), torch.cat(expected), rtol=1e-4, atol=1e-4)

    together = 0
    for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights, strict=True):
        left, shown = int((tokens == 4).sum()), []
        while left > 0:
            shown.append(album.pop(0))
            left -= shown[-1].width * shown[-1].height // 14**2
        assert left == 0
        count = sum(len(scene.objects) for scene in shown)
        if len(shown) > 1 or count == 0:
            together += len(shown) > 1
            assert count <= 5
            assert targets[weights >= 1].tolist() == scenes.tokenizer.convert_tokens_to_ids([str(count), "</s>"])
    assert not album
    assert together >= 2
    one = next(scene for i in range(99) if len((scene := Scene("train", i)).objects) == 1)
    step = next(step for step in range(40) if phase.pictures_of(step) == 4)
    assert [len(group) for group in scenes._grouped([one] * 4, step)] == [3, 1], "as many tokens as memory has room for"


def test_packed_questions_are_as_if_asked_alone() -> None:
    """Several questions in one row give each the logits it has on its own."""
    torch.manual_seed(0)
    model = recipe.build_model().eval()
    batch = recipe.Scenes(recipe.Phase("text", 112, 1, 1, 1e-3), 0)[0]
    allowed, positions = recipe.attention_of(batch.segments)
    llama = model.model.language_model
    with torch.no_grad():
        packed = llama(
            inputs_embeds=model.get_input_embeddings()(batch.tokens), attention_mask=allowed, position_ids=positions
        ).last_hidden_state[0]
        for number in range(1, int(batch.segments.max()) + 1):
            keep = ((batch.segments[0] == 0) | (batch.segments[0] == number)).nonzero()[:, 0]
            alone = llama(input_ids=batch.tokens[:, keep]).last_hidden_state[0]
            mine = batch.segments[0, keep] == number
            torch.testing.assert_close(packed[keep[mine]], alone[mine], rtol=1e-4, atol=1e-5)


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


def test_card_reports_this_checkpoint() -> None:
    text = CARD.read_text()
    training = json.loads((tiny.CHECKPOINT / "training.json").read_text())
    for phase in training["recipe"]:
        assert recipe_row(phase) in text
    assert f"seed {training['seed']}," in text


def card_figure(row: str) -> dict[str, float]:
    """One row of the card's accuracy table, as shares."""
    line = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", CARD.read_text(), re.MULTILINE)
    assert line, f"no row {row!r} in the card"
    values = [float(cell) / 100 for cell in line[1].split("|")]
    return dict(zip(("all", *FAMILIES), values, strict=True))


@pytest.mark.parametrize(("row", "setting"), [("all 576 tokens", None), ("vtc-cls 64", {"keep": 64})])
def test_accuracy_is_what_the_card_says(row: str, setting: dict | None) -> None:
    """On the first 100 of the card's questions: within four standard errors of its figure."""
    model, processor = tiny.load(attn_implementation="sdpa")
    asked = balanced_questions("test", 100)
    if setting is not None:
        vtc.enable(model, **setting)
    measured, claimed = (
        accuracy(asked, answer(model, processor, batches(model, processor, asked)).texts)["all"],
        card_figure(row)["all"],
    )
    assert abs(measured - claimed) <= 4 * (claimed * (1 - claimed) / len(asked)) ** 0.5 + 1 / len(asked)


def test_card_meets_the_target() -> None:
    full, kept, control = (card_figure(row) for row in ("all 576 tokens", "vtc-cls 64", "random 64"))
    assert full["all"] >= 0.90
    assert min(full.values()) >= 0.80
    assert kept["all"] >= 0.95 * full["all"]
    assert kept["all"] >= control["all"] + 0.05
