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


@pytest.mark.parametrize(
    ("counts", "interval"),  # counts: both right, gains, losses, neither
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),  # an example of Newcombe (1998), method 10
        ((0, 0, 0, 50), (-0.0713, 0.0713)),  # Wilson's for 0 of 50, in both directions
        ((993, 4, 0, 3), (-0.0009, 0.0105)),  # p = 0.125 by McNemar's exact test: 0 is inside
        ((990, 8, 0, 2), (0.0023, 0.0159)),  # p = 0.008: 0 is outside
    ],
)
def test_paired_differences(counts, interval):
    def of(both, gains, losses, neither):
        ours = [True] * (both + gains) + [False] * (losses + neither)
        return paired(ours, [True] * both + [False] * gains + [True] * losses + [False] * neither)

    both, gains, losses, neither = counts
    difference, low, high = of(*counts)
    assert difference == pytest.approx((gains - losses) / sum(counts))
    assert (low, high) == pytest.approx(interval, abs=1e-4)
    assert of(both, losses, gains, neither) == pytest.approx((-difference, -high, -low))


SHARES = {"vtc-cls": 0.8, "random": 0.2, "prumerge": 0.6, "mmtok": 0.7, "none": 1.0}


@pytest.fixture
def played(monkeypatch):
    """The model's part is played: so many of the answers are right, and fewer with the smallest of the tokens."""

    def play(task, settings, batch_size, processes, advance):
        advance(task.count)
        return [play_one(task, setting) for setting in settings]

    def play_one(task, setting):
        options = setting.options
        known = round(SHARES[setting.method] * task.count * (0.5 if options.get("ensemble") == "min" else 1))
        first, last = (number for _, number in options.get("schedule", [(0, setting.keep)] * 2))
        kept = {"none": 576.0, "prumerge": 29.3}.get(setting.method, last)
        texts = [question.answer if i < known else "?" for i, (_, question) in enumerate(task.asked)]
        inside = "prune_layer" in options or setting.method == "fastv"
        first = 576 if inside else first if "schedule" in options else kept
        share = options.get("prune_layer", 2) / 4
        layers = first * share + kept * (1 - share)
        return [Answer(line, text, kept, token_layers=layers) for line, text in enumerate(texts)]

    monkeypatch.setattr(quality, "answer_all", play)


@pytest.mark.usefixtures("played")
def test_quality_asks_every_method_the_same_questions(tmp_path):
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
    layers = [576, 64, 16, 29.3, 64, 16, 64, 16, 64, 16, 320, 296, 192]
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
    assert re.search(r"\| random +\| 20\.0 \(11\.2 to 33\.0\)", text)
    assert re.search(r"\| vtc-cls prune_layer=2 +\| 80\.0 \(\d+\.\d to \d+\.\d\) \(320 a layer\) +\|", text)
    assert re.search(r"\| prumerge +\| 60\.0 \(\d+\.\d to \d+\.\d\) \(29 tokens\) +\| +\|", text)
    rest = 100 * sum(share[0] for family, share in random.families.items() if family != "counting") / 4
    assert re.search(rf"\| random +\| 20\.0 \(11\.2 to 33\.0\) +\| {rest:.1f} +\|", text)
    inside, methods, settings = re.findall(r"^Against vtc-cls .* own\): (.*)$", text, re.MULTILINE)
    assert inside == "no clear difference: vtc-cls scheduled at 64, vtc-cls scheduled at 16."
    assert methods == ("worse: prumerge, random; no clear difference: vtc-cls scheduled, vtc-cls positions=original.")
    assert settings.startswith("worse: vtc-cls ensemble=min; no clear difference: vtc-cls ensemble_layers=1, ")
    read = quality.read(tmp_path / "quality.jsonl")
    assert [(r.name, r.keep, r.accuracy[0]) for r in read] == [(r.name, r.keep, r.accuracy[0]) for r in records]
    light, dark = plots.draw_quality(read, tmp_path / "quality")
    assert "<!-- random -->" in light.read_text()
    assert light.read_text() != dark.read_text()


@pytest.mark.usefixtures("played")
def test_inside_the_language_model_the_budget_is_that_of_all_layers(monkeypatch):
    """64 tokens after layer 1 of 4 cost what 192 do before, and are compared with them."""
    monkeypatch.setitem(SHARES, "fastv", 0.9)
    records = quality.run(50, (192, 64), ("fastv",), None)
    found = {(r.method, r.keep, r.options.get("prune_layer")): r for r in records}
    assert found["fastv", 64, 1].token_layers == 192
    assert found["fastv", 64, 1].difference == paired([True] * 45 + [False] * 5, [True] * 40 + [False] * 10)
    assert found["fastv", 192, 1].difference is None  # 288, where the baseline was not measured
    assert found["fastv", 64, None].difference is None  # 320
    assert re.search(r"fastv prune_layer=1 at 192", quality_tables.tables(records))


@pytest.mark.usefixtures("played")
def test_the_question_is_its_words(monkeypatch):
    """As in the papers: no template, no special tokens, no function words."""
    records = quality.run(5, (16,), ("mmtok", "random"), None)
    words = {r.method: r.options.get("ignore", ()) for r in records}
    tokenizer = ModelSpec().processor().tokenizer
    assert set(tokenizer("USER: the ASSISTANT:")["input_ids"]) <= set(words["mmtok"])
    assert tokenizer("circle", add_special_tokens=False)["input_ids"][0] not in words["mmtok"]
    assert words["random"] == ()
    assert [r.name for r in records] == ["all tokens", "vtc-cls", "mmtok", "random"]


@pytest.mark.usefixtures("played")
def test_other_settings_of_a_file_stay(tmp_path, monkeypatch):
    """If their questions and the model are the same."""
    out = tmp_path / "quality.jsonl"
    quality.run(10, (64, 16), ("random", "mmtok"), out)
    monkeypatch.setitem(SHARES, "random", 0.5)
    both = quality.run(10, (16,), ("mmtok", "random"), out)
    assert [(r.name, r.keep, r.date) for r in quality.read(out)] == [(r.name, r.keep, r.date) for r in both]
    assert [(r.name, r.keep) for r in both] == [
        *(("all tokens", 576), ("vtc-cls", 64), ("vtc-cls", 16), ("random", 64), ("random", 16)),
        *(("mmtok", 64), ("mmtok", 16)),
    ]
    assert [r.accuracy[0] for r in both[3:5]] == [0.2, 0.5]
    assert len(quality.run(15, (16,), ("random",), out)) == len(quality.read(out)) == 3


def test_schedules_have_the_nominal_number_on_average():
    chosen = quality.settings((192, 33, 2, 1), ("vtc-cls",), False, 6)
    schedules = [setting.options["schedule"] for setting in chosen if "schedule" in setting.options]
    assert schedules == [[[0, 288], [2, 96]], [[0, 3], [2, 1]]]


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
