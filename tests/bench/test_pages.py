"""The documents say what was recorded; `tests/test_documents.py` has the generated blocks."""

import json
import re

import pytest

from bench import card, checkout, pages, quality, record, speedups
from vtc.methods import METHODS


def test_the_records_of_quality_are_of_the_bundled_model():
    """With every method at every number of tokens."""
    records = quality.read(checkout.ROOT / "bench/results/quality/quality.jsonl")
    assert {r.checkpoint for r in records} == {quality.checkpoint()}
    assert all(r.questions >= 1000 and not r.dirty for r in records)
    assert records[0].name == "all tokens"
    made = [(r.method, r.options if "schedule" in r.options else {"keep": r.keep, **r.options}) for r in records[1:]]
    every = [(each.method, each.options) for each in quality.settings(quality.KEEPS, METHODS, True, 6)]
    assert sorted(map(json.dumps, made)) == sorted(map(json.dumps, every))


RESULTS = checkout.ROOT / "bench/results"


@pytest.mark.parametrize(("gpu", "runs"), [("h100", ("first", "second")), ("h200", (".",))])
def test_what_is_said_of_a_gpu_is_what_was_recorded(gpu, runs):
    page_text = (RESULTS / gpu / "README.md").read_text()
    whole = record.read(RESULTS / gpu / runs[-1] / "e2e.jsonl")
    assert speedups.first_tokens(whole) in page_text
    single = [r for run in runs for r in record.read(RESULTS / gpu / run / "micro.jsonl")]
    rows = re.findall(r"^\| `(\w+)`.*?" + 4 * r"\| ([\d.() ]*) ?" + r"\|$", page_text, re.MULTILINE)
    assert {op for op, *_ in rows} == {r.op for r in single if r.suite == "micro"}
    for op, *cells in rows:
        for batch, cell in zip((1, 4, 16, 64), cells, strict=True):
            times = {  # the second run's, if both have one
                r.backend: f"{1e3 * r.ms:.1f}"
                for r in single
                if (r.suite, r.op, r.model, r.shape["B"], r.shape.get("K", 64)) == ("micro", op, "LLaVA-1.5", batch, 64)
            }
            ours = [times.pop(name) for name in ("triton", "triton-fused") if name in times]
            assert cell.strip() == (f"{ours[0]} ({min(times.values(), key=float)})" if ours else "")


def test_what_is_said_of_tests_and_gate_is_what_was_recorded():
    tests = [line["outcome"] for line in record.lines(RESULTS / "h100/second/tests.jsonl") if "outcome" in line]
    page_text = (RESULTS / "h100/README.md").read_text()
    assert f"{tests.count('passed')} passed, none failed, {tests.count('skipped')} skipped" in page_text
    assert set(tests) == {"passed", "skipped"}
    gate = RESULTS / "h200/gate.jsonl"
    assert not record.failures(gate)
    passed = len(record.lines(gate))
    assert f"The gate passed: {passed} of {passed}" in (RESULTS / "h200/README.md").read_text()


def test_new_lengths_and_generation_have_a_table():
    table = speedups.new_lengths(record.read(RESULTS / "h200/e2e.jsonl"))
    assert [line.split("|")[4:6] for line in table.replace(" ", "").splitlines()[2:]] == [
        [what, cudnn] for what in ("generate(...)", "model(...),anewlengtheachtime") for cudnn in ("no", "yes")
    ]


def test_a_figure_of_the_card_needs_its_record():
    records = quality.read(card.RECORDS)
    with pytest.raises(ValueError, match="no record of vtc-cls with 192 tokens; run python -m bench quality"):
        card.accuracy_table([r for r in records if r.keep != 192])


def test_another_block_leaves_the_rest_of_a_page(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    pages.put("new", page, "a")
    assert page.read_text() == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter\n"
    with pytest.raises(ValueError, match="lacks the lines <!-- b --> and <!-- /b -->"):
        pages.put("new", page, "b")
