"""`bench quality`: intervals, settings, tables, and the measurement itself."""

import re

import pytest
import torch

from bench import __main__ as command
from bench import plots, quality, quality_answers, quality_tables
from vtc import compress, tiny
from vtc.eval.engine import answer_all
from vtc.eval.intervals import paired, wilson
from vtc.eval.local import LocalEngine
from vtc.eval.model import ModelSpec
from vtc.eval.question import Answer
from vtc.eval.setting import Setting
from vtc.eval.tasks.scenes import Scenes
from vtc.hf.towers import tower_of
from vtc.methods import METHODS
from vtc.tiny.scenes import balanced_questions


def test_intervals_are_those_of_the_textbook():
    """Newcombe (1998): 81 of 263 is 0.2553 to 0.3662 by Wilson's method."""
    assert wilson(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=1e-4)
    ours, theirs = [True] * 40 + [False] * 60, [True] * 30 + [False] * 10 + [True] * 2 + [False] * 58
    half = 1.96 * (10 + 2 - 8**2 / 100) ** 0.5 / 100
    assert paired(ours, theirs) == pytest.approx((0.08, 0.08 - half, 0.08 + half))
    assert paired(ours, ours) == (0.0, 0.0, 0.0)


def test_quality_asks_every_method_the_same_questions(tmp_path, monkeypatch):
    """The model's part is played: it is right wherever enough tokens are kept, and random does worse."""

    def play(task, settings, batch_size, processes, advance):
        assert (task.count, task.split, processes) == (50, "val", 2)
        advance(50)
        return [play_one(task, setting) for setting in settings]

    def play_one(task, setting):
        share = {"vtc-cls": 0.8, "random": 0.2, "prumerge": 0.6, "none": 1.0}[setting.method]
        known = round(share * 50 * (0.5 if setting.options.get("ensemble") == "min" else 1))
        first, last = (number for _, number in setting.options.get("schedule", [(0, setting.keep)] * 2))
        kept = {"none": 576.0, "prumerge": 29.3}.get(setting.method, last)
        texts = [question.answer if i < known else "?" for i, (_, question) in enumerate(task.asked)]
        first = 576 if "prune_layer" in setting.options else first if "schedule" in setting.options else kept
        layers = (first + kept) / 2
        return [Answer(line, text, kept, token_layers=layers) for line, text in enumerate(texts)]

    monkeypatch.setattr(quality, "answer_all", play)
    records = quality.run(
        50,
        (64, 16),
        ("vtc-cls", "prumerge", "random"),
        tmp_path / "quality.jsonl",
        sweep=True,
        split="val",
        processes=2,
    )
    assert [(r.name, r.keep, r.tokens) for r in records[:13]] == [
        *(("all tokens", 576, 576), ("vtc-cls", 64, 64), ("vtc-cls", 16, 16), ("prumerge", 64, 29.3)),
        *(("random", 64, 64), ("random", 16, 16), ("vtc-cls scheduled", 64, 32), ("vtc-cls scheduled", 16, 8)),
        *(("vtc-cls positions=original", 64, 64), ("vtc-cls positions=original", 16, 16)),
        *(("vtc-cls prune_layer=2", 64, 64), ("vtc-cls prune_layer=2", 16, 16), ("vtc-cls prune_layer=1", 64, 64)),
    ]
    layers = [576, 64, 16, 29.3, 64, 16, 64, 16, 64, 16, 320, 296, 320]
    assert [r.token_layers for r in records[:13]] == layers
    full, ours, _, _, random = records[:5]
    assert (full.accuracy[0], ours.accuracy[0], random.accuracy[0]) == (1.0, 0.8, 0.2)
    assert (full.agreement, ours.difference) == (None, None)
    assert random.agreement == wilson(10, 50)
    assert random.difference == paired([True] * 10 + [False] * 40, [True] * 40 + [False] * 10)
    families = [question.family for _, question in balanced_questions("val", 50)]
    for family in ("existence", "attribute", "relation", "counting", "digit"):
        assert ours.families[family] == wilson(families[:40].count(family), families.count(family))
    swept = [next(iter(r.options.items())) for r in records[13:]]
    assert swept == [("ensemble_layers", n) for n in (1, 2, 4, 5)] + [("ensemble", e) for e in ("mean", "max", "min")]
    text = quality_tables.tables(records)
    assert re.search(r"\| random +\| 20\.0 ± ", text)
    assert re.search(r"\| vtc-cls prune_layer=2 +\| 80\.0 ± \d+\.\d \(320 a layer\) +\|", text)
    assert re.search(r"\| prumerge +\| 60\.0 ± \d+\.\d \(29 tokens\) +\| +\|", text)
    methods, settings = re.findall(r"^Against vtc-cls .* own\): (.*)$", text, re.MULTILINE)
    assert methods == (
        "worse: prumerge, random; no clear difference: vtc-cls scheduled, vtc-cls positions=original, "
        "vtc-cls prune_layer=2, vtc-cls prune_layer=1."
    )
    assert settings.startswith("worse: vtc-cls ensemble=min; no clear difference: vtc-cls ensemble_layers=1, ")
    read = quality.read(tmp_path / "quality.jsonl")
    assert [(r.name, r.keep, r.accuracy[0]) for r in read] == [(r.name, r.keep, r.accuracy[0]) for r in records]
    light, dark = plots.draw_quality(read, tmp_path / "quality")
    assert "<!-- random -->" in light.read_text()
    assert light.read_text() != dark.read_text()


@pytest.mark.parametrize("method", ["vtc-cls", "prumerge", "fastv", "pool"])
def test_quality_is_what_the_model_answers_one_by_one(method):
    """Asked here with stock transformers in a block of `vtc.compress`."""
    asked = balanced_questions("val", 5)
    record = next(r for r in quality.run(5, (16,), (method,), None, split="val") if r.method == method)
    model, processor = tiny.load()
    right, kept = [], []
    for scene, question in asked:
        inputs = processor(images=scene.image, text=tiny.prompt(question.text), return_tensors="pt")
        with compress(model, method=method, keep=16) as run:
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        right.append(text == question.answer)
        kept.append(run.tokens_after)
    assert record.accuracy == wilson(sum(right), 5)
    assert {family: share[0] for family, share in record.families.items()} == {
        question.family: float(ok) for (_, question), ok in zip(asked, right, strict=True)
    }
    assert record.tokens == pytest.approx(sum(kept) / 5, abs=0.5)


def test_many_settings_are_answered_as_each_alone():
    """Also in two processes, and with batches of unequal size."""
    task = Scenes(count=7, split="val")
    settings = [Setting(), *(Setting(method, {"keep": 16}) for method in ("vtc-cls", "prumerge", "fastv", "pool"))]
    alone = [answer_all(LocalEngine(), ModelSpec(), task, setting, 4) for setting in settings]
    for processes in (1, 2):
        together = quality_answers.answer_all(task, settings, 4, processes)
        assert [[(each.line, each.text, each.visual_tokens) for each in own] for own in together] == [
            [(each.line, each.text, each.visual_tokens) for each in own] for own in alone
        ]


def test_the_tower_runs_once_for_the_same_pixels():
    """What later calls get is what the tower computes, and the hooks on projections see the same values."""
    model, _ = tiny.load()
    tower = model.base_model.vision_tower
    size = tower.config.image_size
    first, second = torch.rand(2, 1, 3, size, size)
    projection = tower_of(tower.config).attentions_of(tower)[2].k_proj
    passes, keys = [], []
    tower.embeddings.register_forward_hook(lambda *_: passes.append(1))
    projection.register_forward_hook(lambda _module, _args, output: keys.append(output))
    with torch.no_grad(), quality_answers.one_pass(tower):
        found = [tower(pixels, output_hidden_states=True).hidden_states for pixels in (first, second, first.clone())]
    assert len(passes) == 2
    assert len(keys) == 3
    assert torch.equal(keys[0], keys[2])
    assert not torch.equal(keys[0], keys[1])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    with torch.no_grad():
        again = tower(first, output_hidden_states=True).hidden_states
    assert len(passes) == 3  # the block has ended
    assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_every_method_has_a_group():
    assert quality.grouped() == quality.GROUPS
    assert sorted(name for group in quality.GROUPS.values() for name in group) == sorted(set(METHODS) - {"none"})


def test_a_new_method_is_in_a_group_of_its_own(monkeypatch):
    monkeypatch.setitem(METHODS, "new", METHODS["random"])
    assert list(quality.grouped().items())[-1] == (quality.OTHERS, ("new",))


def test_quality_measures_the_bundled_model(tmp_path, capsys):
    arguments = ["--questions", "5", "--keep", "64", "--method", "random", "--split", "val"]
    assert command.main(["quality", *arguments, "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"quality.jsonl", "quality-light.svg", "quality-dark.svg"}
    printed = capsys.readouterr().out
    assert "| all tokens |" in printed
    assert "| random     |" in printed
    assert command.main(["quality", "--method", "best"]) == 2
    assert "unknown method best; there are" in capsys.readouterr().err
