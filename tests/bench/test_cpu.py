"""`bench cpu`: what is checked before it is timed, in which order, and what is recorded. No time decides a test."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import vtc
from bench import __main__ as command
from bench import cpu, readme, record
from bench.accuracy import WrongResult
from vtc import ops
from vtc.methods.vtc_cls import VTCCLS

KEEP = 32


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """144 visual tokens in place of 576, 4 new ones, and few layers."""
    monkeypatch.setitem(cpu.SUBJECTS, "scaled", functools.partial(cpu.scaled, 168, tower_layers=5, language_layers=2))
    monkeypatch.setattr(cpu, "NEW_TOKENS", 4)
    monkeypatch.setattr(cpu, "copy_gb_per_s", lambda: 10.0)


@pytest.fixture
def bench() -> cpu.Bench:
    return cpu.Bench(cpu.SUBJECTS["scaled"]())


def test_every_variant_has_a_record(tmp_path, capsys):
    arguments = ["--model", "scaled", "--batch", "1", "2", "--keep", "64", "32", "--rounds", "1"]
    for _ in range(2):  # the second run replaces the records of the first
        assert command.main(["cpu", *arguments, "--out", str(tmp_path / "out")]) == 0
    records = record.read(tmp_path / "out/cpu.jsonl", cpu.OnCPU)
    found = {(r.op, r.backend, r.shape["B"], r.shape["visual"]) for r in records}
    towers = [(cpu.STOCK, 144), ("vtc 64", 64), (cpu.NOT_SELECTED, 144), (cpu.ALL_LAYERS, 64)]
    expected = {("tower", *each) for each in towers} | {("selection", "vtc 64", 64)}
    expected |= {("generate", *each) for each in [(cpu.STOCK, 144), ("vtc 64", 64), ("vtc 32", 32)]}
    assert found == {(op, name, batch, visual) for op, name, visual in expected for batch in (1, 2)}
    assert len(records) == len(found)
    assert all((r.speedup_50 is None) == (r.backend == cpu.STOCK) for r in records)
    assert all(r.threads == torch.get_num_threads() and r.processor and r.torch and r.date for r in records)
    out = capsys.readouterr().out
    assert cpu.tables(records) in out
    for name in ("vtc 64", "vtc 32", cpu.NOT_SELECTED, cpu.ALL_LAYERS):
        assert f"| scaled LLaVA | {name} " in out


def test_the_bundled_model_is_asked_about_several_scenes():
    name, model, prompts = cpu.bundled()
    inputs = prompts(2)
    assert (name, len(inputs["input_ids"])) == ("bundled model", 2)
    assert not torch.equal(*inputs["pixel_values"])
    assert inputs["attention_mask"].all()
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(1) == 576).all()


def test_ratios_are_those_of_one_round(bench):
    samples = {cpu.STOCK: [2.0, 30.0, 4.0], "vtc 32": [10.0, 1.0, 1.0]}
    stock, ours = bench.records("generate", 1, samples, {cpu.STOCK: 144, "vtc 32": 32})
    assert (stock.ms_50, ours.ms_50, ours.speedup_50) == (4.0, 1.0, 4.0)


def test_the_tables_show_speedups_and_shares(bench):
    generate = bench.records("generate", 1, {cpu.STOCK: [4.0], "vtc 32": [2.0]}, {cpu.STOCK: 144, "vtc 32": 32})
    tower = bench.records("tower", 4, {cpu.STOCK: [4.0], "vtc 32": [5.0]}, {cpu.STOCK: 144, "vtc 32": 32})
    selection = bench.records("selection", 4, {cpu.STOCK: [4.0], "vtc 32": [0.1]}, {cpu.STOCK: 144, "vtc 32": 32})
    text = cpu.tables([*generate, *tower, *selection])
    for cell in ("2.00 (2.00-2.00)", "1.25 (1.25-1.25)", "2.5 % (2.5-2.5)"):
        assert f"| {cell} |" in text


def test_rounds_take_turns():
    called = []
    calls = {name: lambda name=name: called.append(name) or float(len(called)) for name in "abc"}
    assert cpu.in_turn(calls, 3) == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}
    assert "".join(called) == "abcbcacab"


@torch.no_grad()
def test_all_tokens_must_be_the_stock_models_bits(bench, monkeypatch):
    inputs = bench.prompts(1)
    generate = cpu.Bench.generate

    def inexact(self, model, given):
        out = generate(self, model, given)
        return out._replace(logits=out.logits * (1 + 1e-7)) if model is self.compressed else out

    bench.check(inputs, [KEEP])
    monkeypatch.setattr(cpu.Bench, "generate", inexact)
    with pytest.raises(WrongResult, match=r"^vtc 144, all tokens: other logits than"):
        bench.check(inputs, [KEEP])


@torch.no_grad()
def test_few_tokens_must_be_the_transcriptions(bench, monkeypatch):
    inputs = bench.prompts(2)
    expected = bench.check(inputs, [KEEP])
    assert torch.equal(expected[f"vtc {KEEP}"].tokens, bench.few_tokens(inputs, KEEP))
    assert not torch.equal(expected[f"vtc {KEEP}"].logits[0], expected[cpu.STOCK].logits[0])
    monkeypatch.setattr(cpu.Bench, "few_tokens", lambda self, inputs, keep: expected[cpu.STOCK].tokens + 1)
    with pytest.raises(WrongResult, match="other tokens than those of the transcription"):
        bench.check(inputs, [KEEP])


@torch.no_grad()
def test_the_wrong_patches_get_no_number(bench, monkeypatch):
    select = VTCCLS.select
    monkeypatch.setattr(VTCCLS, "select", lambda *args: (select(*args)[0], -select(*args)[1]))
    for timed in (bench.generation, bench.tower):
        with pytest.raises(WrongResult, match=r"^scores: relative error"):
            timed(1, [KEEP] if timed == bench.generation else KEEP, 1)


def test_a_round_with_other_results_gets_no_number(bench, monkeypatch):
    checked, other = (cpu.Out(torch.zeros(1), torch.full((1,), value)) for value in (1.0, 2.0))
    monkeypatch.setattr(cpu.Bench, "check", lambda *_: dict.fromkeys((cpu.STOCK, f"vtc {KEEP}"), checked))
    monkeypatch.setattr(cpu.Bench, "generate", lambda *_: other)
    with pytest.raises(WrongResult, match="stock: other logits than those that were checked"):
        bench.generation(1, [KEEP], 1)


@torch.no_grad()
def test_the_selection_is_watched_from_outside(bench, monkeypatch):
    """Operations within operations are counted once, and afterwards nothing is watched."""
    before = {op: getattr(ops, op) for op in ops.OPS}
    bench.switch(keep=KEEP)
    pixels = bench.prompts(1)["pixel_values"]
    plan, settings = bench.planned(pixels)
    watch = cpu.Watch()
    with watch.watching():
        cpu.encode.reduce(settings, pixels, plan)
        assert watch.calls > 0
        assert watch.seconds > 0
    played = itertools.count()  # each reading of the clock is a second later
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: float(next(played)))
    watch = cpu.Watch()
    watch._timed(lambda: watch._timed(lambda: None))
    assert (watch.calls, watch.seconds) == (2, 2.0)
    assert {op: getattr(ops, op) for op in ops.OPS} == before


def test_the_stock_model_is_never_switched_on(bench):
    bench.generation(1, [KEEP], 1)
    assert bench.stock.model.vision_tower.config._attn_implementation == "sdpa"
    assert not vtc.status(bench.stock).compresses
    pairs = zip(bench.stock.parameters(), bench.compressed.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)


def test_a_number_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu.Bench, "tower", lambda *args: 1 / 0)
    said = []
    assert cpu.run(["scaled"], [1], [KEEP], 1, tmp_path / "cpu.jsonl", said.append) == 1
    assert said[-1].startswith("NO NUMBER: scaled B=1 tower: ZeroDivisionError")
    assert {r.op for r in record.read(tmp_path / "cpu.jsonl", cpu.OnCPU)} == {"generate"}
    assert list(record.failures(tmp_path / "cpu.jsonl")) == ["scaled B=1 tower"]


def test_an_unknown_model_is_explained(capsys):
    assert command.main(["cpu", "--model", "GPT"]) == 2
    assert "unknown model GPT; there are bundled, scaled" in capsys.readouterr().err


def test_a_page_without_records_says_so(tmp_path):
    assert readme.cpu_times(tmp_path / "README.md").startswith("Not measured yet")


def test_more_tokens_than_an_image_has_are_refused():
    with pytest.raises(ValueError, match="--keep must be below the 576 visual tokens of an image, got 577"):
        cpu.run(keeps=(64, 577))
