"""The bundled model's training: it runs and resumes, each stage learns its part, and batches hold what they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vtc.tiny.data import MEAN, STD, Scenes, attention_of
from vtc.tiny.model import PhraseContrast, build_model, encode
from vtc.tiny.recipe import RECIPE, Phase, ViewGroup
from vtc.tiny.scenes import COUNTING, Scene
from vtc.tiny.train import _export, features, train, trainable


def test_training_runs_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    phases = (
        Phase("vision", 112, 2, 2, 1e-3),
        Phase("text", 112, 1, 2, 1e-3),
        Phase("projector", 112, 1, 2, 1e-3),
        Phase("language", 112, 1, 2, 1e-3),
    )
    assert train(tmp_path / "whole", phases)
    interruptions = 0
    while not train(tmp_path / "parts", phases, minutes=0):
        interruptions += 1
    assert interruptions >= 3
    whole, parts = (load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, weights in whole.items():
        torch.testing.assert_close(weights, parts[name], rtol=1e-3, atol=1e-4, msg=name)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    phases = tuple(Phase(stage, 112, 1, 2, 1e-3) for stage in ("vision", "text", "language"))
    assert train(tmp_path / "first", phases[:2])
    first = tmp_path / "first/checkpoint"
    assert train(tmp_path / "more", phases, start=first)
    before, after = (load_file(path / "model.safetensors") for path in (first, tmp_path / "more/checkpoint"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in changed)
    assert any("projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
    with pytest.raises(ValueError, match="append new phases"):
        train(tmp_path / "other", phases[1:], start=first)
    with pytest.raises(ValueError, match="vision stage cannot go on"):
        train(tmp_path / "other", (*phases[:2], phases[0]), start=first)


def test_training_refuses_to_replace_its_start_and_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint")
    for start in (tmp_path / "checkpoint", tmp_path / "link"):
        with pytest.raises(ValueError, match="the checkpoint to go on from, and would be replaced"):
            train(tmp_path, start=start)
    (tmp_path / "state.pt").mkdir()
    with pytest.raises(ValueError, match=r"state\.pt is a directory"):
        train(tmp_path)


def test_an_export_replaces_the_files_of_an_earlier_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoint"
    _export(build_model(), tmp_path, RECIPE, 0, 60.0)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert {"model.safetensors", "config.json", "training.json", "tokenizer.json"} <= before.keys()

    def killed(self: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)  # of training.json, the last file that is made
    with pytest.raises(KeyboardInterrupt):
        _export(build_model(), tmp_path, RECIPE, 1, 120.0)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("stage", ["vision", "text", "projector", "language"])
def test_each_stage_learns_only_its_part(stage: str) -> None:
    model = build_model()
    contrast = PhraseContrast(model.model.vision_tower)
    learns = {id(p) for p in trainable(stage, contrast, model).values()}
    for name, parameter in model.named_parameters():
        part = "vision" if "vision_tower" in name else "projector" if "projector" in name else "text"
        expected = part == stage or (stage == "language" and part != "vision")
        assert (id(parameter) in learns) == parameter.requires_grad == expected, name


def test_encode_is_the_stock_tower() -> None:
    torch.manual_seed(0)
    tower = build_model().model.vision_tower.eval()
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        stock = tower(pixels, output_hidden_states=True).hidden_states
        ours = encode(tower, pixels, torch.zeros(1, 2, dtype=torch.long))
    assert len(stock) == len(ours)
    for a, b in zip(stock, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_window_uses_its_own_positions() -> None:
    """The first hidden states of a window are those rows of the whole canvas."""
    torch.manual_seed(0)
    tower = build_model().model.vision_tower.eval()
    pixels, (x, y) = torch.randn(1, 3, 336, 336), (5, 11)
    window = pixels[..., y * 14 : y * 14 + 112, x * 14 : x * 14 + 196]  # 14 patches wide, 8 high
    with torch.no_grad():
        whole = encode(tower, pixels, torch.zeros(1, 2, dtype=torch.long))[0][0, 1:].unflatten(0, (24, 24))
        part = encode(tower, window, torch.tensor([[x, y]]))[0][0, 1:].unflatten(0, (8, 14))
    torch.testing.assert_close(part, whole[y : y + 8, x : x + 14])


def test_mixed_phases_take_turns_and_keep_the_tokens_in_a_batch_alike() -> None:
    def drawn(mixed: str) -> list[ViewGroup]:
        phase = Phase("language", 336, 10, 10, 1e-3, mixed=mixed)
        groups = [phase.groups(step) for step in range(300)]
        assert groups == [phase.groups(step) for step in range(300)]
        assert {len(group) for group in groups} == {1}
        return [group for (group,) in groups]

    whole = ViewGroup(10, (336, 336))
    sizes = drawn("sizes")
    numbers = zip((30, 20, 15, 12, 10), (112, 168, 224, 280, 336), strict=True)
    assert sizes == [ViewGroup(number, (side, side)) for number, side in numbers] * 60
    shapes = drawn("shapes")
    assert set(shapes[::3]) == {whole}
    assert len(set(shapes)) > 150
    for number, (width, height), zoom, blank in shapes:
        assert (zoom, blank) == (1, False)
        assert width % 14 == height % 14 == 0
        assert 70 <= min(width, height) <= max(width, height) <= 336
        assert 10 <= number <= 48
    batch = Scenes(Phase("language", 336, 10, 10, 1e-3, mixed="shapes"), 0)[1]
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
    assert {round(group.zoom) for group in zooms} == {1, 2, 3}


def test_images_share_a_prompt_and_are_counted_together() -> None:
    phase = Phase("language", 168, 40, 6, 1e-3, draws=1, images=3, counting=5.0)
    scenes = Scenes(phase, 0)
    ids = scenes.tokenizer(f"{COUNTING} ASSISTANT:", add_special_tokens=False).input_ids
    counts = set()
    for step in range(12):
        batch, first = scenes[step], 6 * step
        for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights, strict=True):
            shown = int((tokens == 4).sum()) // 144
            objects = sum(len(Scene("train", first + i, 168).objects) for i in range(shown))
            first += shown
            counts.add(shown)
            start = next(i for i in range(len(tokens)) if tokens[i : i + len(ids)].tolist() == ids)
            answer = start + len(ids) - 1
            assert (int(targets[answer]), float(weights[answer])) == (scenes.tokenizer.vocab[str(objects)], 5.0)
            if shown > 1:
                assert (weights >= 1).sum() == 2  # the answer and the end: several images get no other question
        assert first == 6 * step + len(batch.pixels[0]) == 6 * step + 6
    assert counts == {1, 2, 3}


def test_albums_mix_shapes_in_a_prompt() -> None:
    """A prompt has the visual tokens of its own images, whatever their shapes, and the number of their objects."""
    torch.manual_seed(0)
    phase = Phase("language", 336, 40, 6, 1e-3, draws=1, mixed="albums", images=4, objects=5, zoom=3.0)
    assert {phase.images_per_prompt(step) for step in range(40)} == {1, 2, 3, 4}
    for step in range(0, 40, 4):
        assert (phase.groups(step), phase.images_per_prompt(step)) == ([ViewGroup(6, (336, 336))], 1)
    step = 7
    assert phase.images_per_prompt(step) > 1
    groups = phase.groups(step)
    assert [group.blank for group in groups] == [False, False, True, True, False]
    assert [group.size == (336, 336) for group in groups] == [True, False, True, False, False]
    assert [group.zoom > 1 for group in groups] == [False] * 4 + [True]

    scenes = Scenes(phase, 0)
    batch, group_of = scenes[step], [group for group in groups for _ in range(group.number)]
    assert sorted(batch.order) == list(range(len(group_of))) != batch.order
    album = [Scene("train", 6 * step + i, *group_of[i][1:]) for i in batch.order]
    tower = build_model().model.vision_tower.eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    expected = []
    for scene in album:
        pixels = (torch.tensor(np.asarray(scene.image)).permute(2, 0, 1) / 255 - mean) / std
        origin = torch.tensor([scene.origin]) // 14
        expected.append(encode(tower, pixels[None], origin)[-2][0, 1:])
    torch.testing.assert_close(features(tower, batch), torch.cat(expected), rtol=1e-4, atol=1e-4)

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
    step = next(step for step in range(40) if phase.images_per_prompt(step) == 4)
    assert [len(group) for group in scenes._grouped([one] * 4, step)] == [3, 1], "as many tokens as memory has room for"


def test_packed_questions_are_as_if_asked_alone() -> None:
    """Several questions in one row give each the logits it has on its own."""
    torch.manual_seed(0)
    model = build_model().eval()
    batch = Scenes(Phase("text", 112, 1, 1, 1e-3), 0)[0]
    allowed, positions = attention_of(batch.segments)
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
