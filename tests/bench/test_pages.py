"""README, the model card and the page of the H100 say what was recorded."""

import re

import pytest

from bench import __main__ as command
from bench import card, checkout, quality, quality_tables, readme, record, speedups
from bench.workloads import WORKLOADS
from vtc import ops
from vtc.methods import METHODS


def test_the_readmes_comparison_of_methods_is_what_was_recorded():
    """And of the model that is bundled now, with every method at every number of tokens."""
    records = quality.read(checkout.ROOT / "bench/results/quality/quality.jsonl")
    assert quality_tables.tables(records) in (checkout.ROOT / "README.md").read_text()
    assert {r.checkpoint for r in records} == {quality.checkpoint()}
    assert all(r.questions >= 1000 and not r.dirty for r in records)
    made = [(r.method, r.options, r.keep) for r in records[1:]]
    settings = quality.settings(quality.KEEPS, METHODS, True, 6)
    assert made == [(name, options, keep) for name, options, keeps in settings for keep in keeps]


H100 = checkout.ROOT / "bench/results/h100"


def test_what_is_said_of_the_h100_is_what_was_recorded():
    said = (H100 / "README.md").read_text()
    whole = record.read(H100 / "second/e2e.jsonl")
    for text in (said, (checkout.ROOT / "README.md").read_text()):
        assert speedups.first_tokens(whole) in text
    single = [r for run in ("first", "second") for r in record.read(H100 / run / "micro.jsonl")]
    rows = re.findall(r"^\| `(\w+)`.*?" + 4 * r"\| ([\d.() ]*) ?" + r"\|$", said, re.MULTILINE)
    assert {op for op, *_ in rows} == set(WORKLOADS)
    for op, *cells in rows:
        for batch, cell in zip((1, 4, 16, 64), cells, strict=True):
            times = {  # the second run's, if both have one
                r.backend: f"{1e3 * r.ms:.1f}"
                for r in single
                if (r.suite, r.op, r.model, r.shape["B"], r.shape.get("K", 64)) == ("micro", op, "LLaVA-1.5", batch, 64)
            }
            ours = [times.pop(name) for name in ("triton", "triton-fused") if name in times]
            assert cell.strip() == (f"{ours[0]} ({min(times.values(), key=float)})" if ours else "")
    tests = [line["outcome"] for line in record.lines(H100 / "second/tests.jsonl") if "outcome" in line]
    assert f"{tests.count('passed')} passed, none failed, {tests.count('skipped')} skipped" in said
    assert set(tests) == {"passed", "skipped"}


def test_the_models_card_is_what_was_recorded(tmp_path):
    """And the recipe that made the checkpoint."""
    shown = card.CARD.read_text()
    copy = tmp_path / "README.md"
    copy.write_text(shown.replace("99.3", "100.0").replace("| vision | 70 |", "| vision | 99 |"))
    card.write(card=copy)
    assert copy.read_text() == shown, "run: python -m bench card"
    with pytest.raises(ValueError, match="no record of vtc-cls with 192 tokens; run python -m bench quality"):
        card.accuracy_table([r for r in quality.read(card.RECORDS) if r.keep != 192])
    with pytest.raises(ValueError, match="lacks the lines <!-- accuracy --> and <!-- /accuracy -->"):
        card.written("# A card", quality.read(card.RECORDS), {"recipe": []})


def test_the_readmes_table_of_kernels_is_current(tmp_path):
    page = (checkout.ROOT / "README.md").read_text()
    (shown,) = re.findall(r"<!-- kernels -->\n(.*?)\n<!-- /kernels -->", page, re.DOTALL)
    assert shown == readme.kernels(), "run: python -m bench kernels --readme README.md"
    assert [line.split("`")[1] for line in shown.splitlines()[2:]] == list(ops.OPS)
    copy = tmp_path / "README.md"
    copy.write_text(page.replace(shown, "old"))
    assert command.main(["kernels", "--readme", str(copy)]) == 0
    assert copy.read_text() == page


def test_every_operation_of_the_table_must_be_complete(monkeypatch):
    monkeypatch.delitem(WORKLOADS, "compact")
    with pytest.raises(ValueError, match="compact lacks a workload"):
        readme.kernels()
