"""`vtc demo`: what it measures, and the sheet that it draws."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from support.cli import BYTES, LAYERS, WIDTH, call, refused, succeed

from vtc import tiny
from vtc.cli import demo, sheet
from vtc.eval import answerer
from vtc.eval.intervals import wilson
from vtc.eval.measure import FirstToken
from vtc.methods import METHODS
from vtc.tiny.scenes import Question, balanced_questions

COST = FirstToken((1.0, 2.0, 3.0), 2**20)


def test_demo_measures_each_setting(model_dir, tmp_path, monkeypatch, few_runs):
    monkeypatch.setattr(tiny, "CHECKPOINT", Path(model_dir))
    used = []
    stock = answerer.compress  # around what is timed, and around each batch
    monkeypatch.setattr(answerer, "compress", lambda model, **options: used.append(options) or stock(model, **options))
    monkeypatch.setattr(demo, "BATCH", 4)
    out = tmp_path / "demo.png"
    result = succeed("demo", "--questions", 6, "--out", out, "--json")
    found = json.loads(result.stdout)
    expected = [("vtc-cls", 192), ("vtc-cls", 128), ("vtc-cls", 64), ("vtc-cls", 32), ("random", 64)]
    settings = [None, *({"keep": keep, "method": name} for name, keep in expected)]  # in turns
    turns = [settings[first:] + settings[:first] for first in (0, 1, 0, 1)]  # a warm-up, a timed run, two batches
    assert used == [setting for turn in turns for setting in turn if setting]
    assert [row["visual_tokens"] for row in found["rows"]] == [576, 192, 128, 64, 32, 64]
    assert found["questions"] == 6
    cache = [row["kv_cache_bytes"] for row in found["rows"]]
    assert [(cache[0] - size) // (2 * LAYERS * WIDTH * BYTES) for size in cache] == [0, 384, 448, 512, 544, 512]
    families = [question.family for _, question in balanced_questions("test", 6)]
    for row in found["rows"]:
        shares = [
            round(row["accuracy_by_family"][family] * families.count(family)) for family in dict.fromkeys(families)
        ]
        assert sum(shares) == row["right"]
        assert row["accuracy"] == pytest.approx(row["right"] / 6, abs=1e-4)
        assert row["accuracy_interval"] == pytest.approx(wilson(row["right"], 6)[1:], abs=1e-4)
        for times in (row["time_to_first_token_ms"], row["per_question_ms"]):
            assert 0 < times["min"] <= times["median"] <= times["max"]
    assert Image.open(out).format == "PNG"
    assert (found["sheet"], found["cpu_threads"]) == (str(out), 1)


def test_demo_of_all_methods(model_dir, tmp_path, monkeypatch, few_runs):
    """At 64 tokens each; those that keep another number say which."""
    monkeypatch.setattr(tiny, "CHECKPOINT", Path(model_dir))
    out = tmp_path / "demo.png"
    rows = json.loads(succeed("demo", "--questions", 5, "--method", "all", "--out", out, "--json").stdout)["rows"]
    assert [row["selection"] for row in rows] == ["all tokens", *(name for name in METHODS if name != "none")]
    tokens = {row["selection"]: row["visual_tokens"] for row in rows}
    assert tokens.pop("all tokens") == 576
    assert 0 < tokens.pop("prumerge") <= 145
    assert 33 < tokens.pop("prumerge+") <= 66
    assert set(tokens.values()) == {64}
    assert Image.open(out).format == "PNG"


def test_demo_of_a_method_that_chooses_no_patches(model_dir, tmp_path, monkeypatch, few_runs):
    monkeypatch.setattr(tiny, "CHECKPOINT", Path(model_dir))
    monkeypatch.setattr(demo, "FEWER", (30,))
    out = tmp_path / "demo.png"
    rows = json.loads(succeed("demo", "--questions", 5, "--method", "pool", "--out", out, "--json").stdout)["rows"]
    expected = [("all tokens", 576), ("pool", 25), ("random", 64)]
    assert [(row["selection"], row["visual_tokens"]) for row in rows] == expected
    assert Image.open(out).format == "PNG"


def test_what_demo_measures():
    assert demo.settings("vtc-cls") == demo.SETTINGS
    assert [row[:2] for row in demo.settings("random")] == [("all tokens", 576), ("random", 64)]
    assert [row[:2] for row in demo.settings("none")] == [("all tokens", 576)]
    assert [row[0] for row in demo.settings("prumerge")] == ["all tokens", "prumerge", "random"]
    assert demo.setting_of("prumerge", 64).options == {}
    assert demo.setting_of("pool", 64).options == {"keep": 64}
    assert [row[:2] for row in demo.settings("visionzip")] == [
        ("all tokens", 576),
        *(("visionzip", tokens) for tokens in (192, 128, 64, 32)),
        ("random", 64),
    ]


def test_demo_labels_its_answers():
    rows = [demo.Row(name, tokens, [], [], {}, COST, COST) for name, tokens, _ in demo.SETTINGS]
    assert [sheet._label(demo.Demo([], rows, {}, "cpu", 1), row) for row in rows] == [
        *("576", "192", "128", "64", "32"),
        "random 64",
    ]
    rows = [demo.Row(name, tokens, [], [], {}, COST, COST) for name, tokens, _ in demo.settings("all")]
    labels = [sheet._label(demo.Demo([], rows, {}, "cpu", 1), row) for row in rows]
    assert labels[:3] == ["576", "vtc-cls 64", "fastervlm 64"]


def test_demo_prints_a_plain_table(model_dir, tmp_path, monkeypatch, few_runs):
    monkeypatch.setattr(tiny, "CHECKPOINT", Path(model_dir))
    monkeypatch.chdir(tmp_path)
    asked = [question.answer for _, question in balanced_questions("test", 5)]
    stock = answerer.Answerer.generate

    def the_same(self, inputs, setting, **arguments):
        texts, *rest = stock(self, inputs, setting, **arguments)
        return [asked[0]] * len(texts), *rest

    monkeypatch.setattr(answerer.Answerer, "generate", the_same)
    result = succeed("demo", "--questions", 5)
    assert (tmp_path / "demo.png").exists()
    assert "\x1b" not in result.stdout
    pattern = r"^(?:all tokens|vtc-cls|random) +(\d+) +(\d)/5 +([\d.]+) % \(\d+-\d+\) +[\d.]+ \([\d.-]+\) ms +[\d.]+ \("
    rows = re.findall(pattern, result.stdout, re.MULTILINE)
    assert [int(tokens) for tokens, _, _ in rows] == [576, 192, 128, 64, 32, 64]
    right = asked.count(asked[0])
    assert 0 < right < 5
    assert {(int(count), float(share)) for _, count, share in rows} == {(right, 20.0 * right)}


def test_demo_refuses_before_it_works(tmp_path):
    assert "create it" in refused("demo", "--out", tmp_path / "no" / "demo.png")
    assert call("demo", "--questions", 1).exit_code == 2
    assert "got 'tome'" in refused("demo", "--method", "tome")


def test_an_accuracy_of_1_has_an_interval_and_noisy_times_are_named():
    row = demo.Row("vtc-cls", 64, ["yes"] * 5, [True] * 5, {}, COST, COST)
    assert row.cells()[2:6] == ("5/5", "100.0 % (57-100)", "2000 (1000-3000) ms", "2000 (1000-3000) ms")
    lines = demo.Demo([(None, None)] * 5, [row], {}, "cpu", 1).footnotes()
    assert "on cpu, 1 thread" in lines[0]
    assert lines[1].startswith("The timings are noisy: the slowest run of vtc-cls with 64 tokens took 3.0 times")


def test_the_table_comes_before_the_sheet(model_dir, tmp_path, monkeypatch, few_runs):
    """And the old sheet stays if the new one cannot be drawn."""
    monkeypatch.setattr(tiny, "CHECKPOINT", Path(model_dir))
    monkeypatch.setattr(demo, "settings", lambda method: demo.SETTINGS[3:4])

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    out = tmp_path / "demo.png"
    out.write_text("old")
    result = call("demo", "--questions", 5, "--out", out)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "vtc: No space left on device")
    assert "vtc-cls    64" in result.stdout
    assert out.read_text() == "old"


def made_up_demo(right):
    asked = balanced_questions("test", 6)
    answers = [q.answer if ok else "nothing of the kind" for ok, (_, q) in zip(right, asked, strict=True)]
    rows = [demo.Row(name, tokens, answers, right, {}, COST, COST) for name, tokens, _ in demo.SETTINGS]
    pictures = {n: Image.new("RGB", (demo.SIDE, demo.SIDE)) for n in range(6)}
    return demo.Demo(asked, rows, pictures, "cpu", 2)


def test_demo_picture_colours_answers_by_whether_they_are_right():
    right = [True, False, True, True, True, False]
    drawn = sheet.draw(made_up_demo(right))
    cells = [
        (column * (sheet.CARD[0] + sheet.MARGIN) + sheet.MARGIN, row * (sheet.CARD[1] + sheet.MARGIN) + sheet.HEAD)
        for row in range(3)
        for column in range(2)
    ]
    for ok, (x, y) in zip(right, cells, strict=True):
        chips = drawn.crop((x, y + demo.SIDE, x + sheet.CARD[0], y + sheet.CARD[1]))
        count = dict((colour, n) for n, colour in chips.getcolors(1 << 20))
        assert (count.get(sheet.RIGHT, 0) > 10_000) is ok
        assert (count.get(sheet.WRONG, 0) > 10_000) is not ok


def test_demo_shows_one_question_of_each_family_and_a_disagreement():
    asked = [(None, Question(family, "", "yes")) for family in ("digit", "existence", *demo.FAMILIES, "digit")]
    answers = [["yes"] * 8, ["yes"] * 7 + ["no"]]
    rows = [demo.Row("vtc-cls", 64, given, [True] * 8, {}, COST, COST) for given in answers]
    assert demo._cards(asked, rows) == [1, 3, 4, 5, 0, 7]
    assert demo._cards(asked, rows[:1]) == [1, 3, 4, 5, 0, 2]
