"""Tables, files and plots of results: what stands in them, and that nothing incomplete stands there unmarked."""

import csv
import json
import sys
from dataclasses import replace

import pytest

from vtc.eval import plots, published
from vtc.eval.report import csv_rows, tables, write
from vtc.eval.result import Result, Timing, read
from vtc.eval.rows import rows_of
from vtc.eval.tables import Table, figure_table, score_table
from vtc.eval.task import Figure
from vtc.eval.times import baseline, time_table, waiting, whole_per_question

LLAVA_7B = "llava-hf/llava-1.5-7b-hf"
ALL = published.COLUMNS


def result(task="gqa", method="none", keep=None, value=60.0, **changes):
    """The result of a complete run of 1000 questions, each 0.1 s."""
    fields = {
        "task": task,
        "title": task.upper(),
        "model": LLAVA_7B,
        "method": method,
        "label": method if keep is None else f"{method}-{keep}",
        "options": {} if keep is None else {"keep": keep},
        "figures": {"accuracy": Figure(value, 1000)},
        "complete": True,
        "questions": 1000,
        "answered": 1000,
        "skipped": 0,
        "limit": None,
        "visual_tokens": {"none": 576.0, "floor": None}.get(method, keep),
        "notes": (),
        "timing": Timing(1000, 0.1, 0.02, 2.0, whole_seconds=120.0, wait_seconds=6.0, load_seconds=9.0, workers=4),
        "fingerprint": {"protocol": "llava", "dtype": "float16", "batch_size": 1},
        "environment": {"torch": "2.13.0", "device": "cuda:0", "gpu": "GPU A", "date": "2026-01-02T03:04:05+00:00"},
    }
    fields |= changes
    return Result(**{"token_layers": fields["visual_tokens"], **fields})


def cells(table, method, tokens=None):
    """The row of that name, by column."""
    rows = [row for row in table.rows if row[0] == method and tokens in (None, row[1])]
    assert len(rows) == 1, table.rows
    return dict(zip(table.columns, rows[0], strict=True))


def test_a_table_like_the_published_one():
    results = [
        result("pope", "floor", value=45.0),
        result("gqa", "floor", value=38.04),
        result("gqa", "vtc-cls", 64, 55.0, label="vtc-cls-64-start_layer=16", options={"keep": 64, "start_layer": 16}),
        result("gqa", "vtc-cls", 64, 55.55),
        result("pope", "vtc-cls", 64, 79.0),
        result("gqa", "none", value=61.96),
        result("pope", "none", value=86.0, complete=False, answered=400, figures={"F1": Figure(86.0, 390)}),
    ]
    assert score_table(results).markdown() == (
        """\
## Scores of llava-hf/llava-1.5-7b-hf (protocol llava, float16, batch 1)

| method                        | tokens | GQA   | POPE         | Avg      |
| ----------------------------- | ------ | ----- | ------------ | -------- |
| none                          | 576    | 62.0  | 86.0 [1]     | 74.0 [1] |
| none, published by VTC-CLS    | 576    | 62.0  | 85.9         | -        |
| none, published by LLaVA      | 576    | 62.0  | 85.9         | -        |
| none, published by FasterVLM  | 576    | 61.94 | 85.87        | -        |
| vtc-cls start_layer=16        | 64     | 55.0  | -            | -        |
| vtc-cls                       | 64     | 55.5  | 79.0         | 67.3     |
| vtc-cls, published by VTC-CLS | 64     | 55.7  | 78.8         | -        |
| floor                         | 0      | 38.0  | 45.0         | 41.5     |
| floor, published by FasterVLM | 0      | 37.38 | 47.21        | -        |
| questions                     |        | 1,000 | 390 to 1,000 |          |

- [1] partial: 400 of 1,000 questions have an answer.
- GQA: accuracy. Published: accuracy, testdev balanced, 12,578 questions.
- POPE: accuracy or F1. Published: mean F1 of the three splits, 8,910 questions.
- Avg: the mean of the 2 tasks, if each has a figure; the published average is over eight.
- Published figures are not measured here. VTC-CLS: the table in its authors' repository, LLaVA-1.5-7B, """
        """scored layers not stated; LLaVA: its authors' figures for LLaVA-1.5; FasterVLM: its authors' own runs of """
        """LLaVA-1.5.
"""
    )


@pytest.mark.parametrize(
    ("changes", "cell", "note"),
    [
        (
            {"complete": False, "answered": 412},
            "60.0 [1]",
            "[1] partial: 412 of 1,000 questions have an answer.",
        ),
        (
            {"limit": 50, "questions": 52, "answered": 52},
            "60.0 [1]",
            "[1] a sample of 52 questions (--limit 50).",
        ),
        (
            {"skipped": 3, "answered": 997},
            "60.0 [1]",
            "[1] without 3 of 1,000 questions: their images cannot be read.",
        ),
        ({"figures": {}}, "- [1]", "[1] a server or a judge scores this task; the run wrote the file for it."),
        ({"figures": {"accuracy": Figure(None, 0)}}, "- [1]", "[1] no question counts for this figure."),
    ],
)
def test_an_incomplete_figure_is_marked_and_explained(changes, cell, note):
    marked = result(**changes)
    assert cells(score_table([marked]), "none")["GQA"] == cell
    assert note in score_table([marked]).notes


def test_a_figure_has_all_its_marks_and_the_same_reason_has_one_number():
    both = {"limit": 10, "questions": 10, "answered": 9, "complete": False}
    table = score_table([
        result("gqa", limit=10, questions=10, answered=10),
        result("pope", **both),
        result("seed", limit=10, questions=10, answered=10),
    ])  # fmt: skip
    row = cells(table, "none")
    assert (row["GQA"], row["POPE"], row["SEED"]) == ("60.0 [1]", "60.0 [1,2]", "60.0 [1]")
    assert row["Avg"] == "60.0 [1,2]"


def test_times_are_marked_too_but_not_for_want_of_a_server():
    table = time_table([result("mmvet", figures={}), result("gqa", limit=10)])
    assert [row[1] for row in table.rows if "published" not in row[1]] == ["none [1]", "none"]
    assert "[1] a sample of 1,000 questions (--limit 10)." in table.notes


def test_the_average_needs_every_task_of_the_table():
    values = dict(zip(ALL, range(10, 90, 10), strict=True))
    results = [result(task, "none", value=value) for task, value in values.items()]
    results += [result(task, "vtc-cls", 64, value) for task, value in values.items() if task != "mmvet"]
    table = score_table(results)
    assert cells(table, "none")["Avg"] == "45.0"
    assert cells(table, "vtc-cls")["Avg"] == "-"
    assert cells(table, "none, published by VTC-CLS")["Avg"] == "62.1"
    assert cells(table, "vtc-cls, published by VTC-CLS")["Avg"] == "58.4"
    assert cells(table, "none, published by LLaVA")["Avg"] == "-"
    assert "Avg" not in score_table([result("gqa")]).columns
    assert table.columns == [
        "method",
        "tokens",
        "SciQA",
        "GQA",
        "TextVQA",
        "POPE",
        "MMB",
        "MMB-CN",
        "MMVet",
        "SEED",
        "Avg",
    ]


def test_a_published_figure_of_another_kind_is_not_in_the_column():
    table = score_table([result("sqa", value=70.0), result("seed", value=66.0)])
    assert cells(table, "none, published by VTC-CLS")["SciQA"] == "70.2"
    assert "none, published by LLaVA" not in [row[0] for row in table.rows]
    assert (
        "SciQA, none: 66.8, published by LLaVA, is another figure: accuracy over the 2,017 questions with an image."
        in table.notes
    )
    assert any(note.startswith("SEED, none: 58.6, published by LLaVA, is another figure") for note in table.notes)


def test_there_is_no_published_figure_beside_another_model():
    for model in ("bundled", "llava-hf/llava-v1.6-vicuna-7b-hf", "/models/my-7b", "llava-1.5-70b"):
        assert published.size_of(model) is None
        table = score_table([result(model=model), result("pope", model=model)])
        assert not any("ublished" in text for row in table.rows for text in row)
        assert not any("Published" in note for note in table.notes)
        assert not any("published" in row[1] for row in time_table([result(model=model)]).rows)
    assert published.size_of("liuhaotian/llava-v1.5-13b") == "13b"
    assert published.size_of("../models/LLaVA-v1.5-7b") == "7b"


def test_another_protocol_than_the_published_one_is_named():
    other = {"protocol": "hf", "dtype": "float16", "batch_size": 1}
    note = "Published figures are with LLaVA's prompts and padded images, not with protocol hf."
    assert note in score_table([result(fingerprint=other)]).notes
    assert note not in score_table([result()]).notes


def look_up(*key):
    return [(p.source, p.value, p.same) for p in published.published(*key)]


def test_published_figures_are_found_by_task_method_tokens_and_size():
    assert look_up("gqa", "vtc-cls", 128, "7b") == [("VTC-CLS", 58.2, True)]
    assert look_up("pope", "fastv", 64, "7b") == [("VTC-CLS", 35.6, True)]
    assert look_up("mmvet", "prumerge+", 256, "7b") == [("VTC-CLS", 31.8, True)]
    assert look_up("sqa", "none", None, "13b") == [("LLaVA", 71.6, False), ("FasterVLM", 72.78, False)]
    assert look_up("gqa", "scope", 32, "7b") == [("TOPS", 56.2, True)]
    assert look_up("seed", "mmtok", 64, "7b") == [("MMTok", 57.15, False)]
    assert look_up("sqa", "divprune", 128, "7b") == [("TOPS", 68.6, False), ("MMTok", 68.66, False)]
    assert look_up("sqa", "floor", None, "7b") == [("FasterVLM", 63.06, False)]
    assert look_up("mmbench", "none", None, "7b") == [
        ("VTC-CLS", 64.7, True), ("LLaVA", 64.3, True), ("FasterVLM", 64.69, True)
    ]  # fmt: skip
    for key in (
        ("gqa", "vtc-cls", 100, "7b"),
        ("gqa", "vtc-cls", 64, "13b"),
        ("gqa", "vtc-cls", 0.25, "7b"),
        ("gqa", "vtc-cls", None, "7b"),
        ("gqa", "none", None, None),
        ("scenes", "none", None, "7b"),
    ):
        assert look_up(*key) == []


def test_two_harnesses_that_ran_visionzip_agree():
    """Both papers print VisionZip's own figures, so a slip in one of the tables shows."""
    tables = [
        {(p.task, p.keep): p.value for p in published.PUBLISHED if (p.method, p.source) == ("visionzip", source)}
        for source in (published.TOPS, published.MMTOK)
    ]
    common = tables[0].keys() & tables[1].keys()
    assert len(common) == 10
    assert all(abs(tables[0][key] - tables[1][key]) < 0.25 for key in common)


def test_the_published_averages_are_the_means_of_the_published_rows():
    for (method, keep), average in published.AVERAGES.items():
        found = [p for task in ALL for p in published.published(task, method, keep, "7b") if p.source == "VTC-CLS"]
        assert [p.task for p in found] == list(ALL)
        mean = sum(p.value for p in found) / len(ALL)
        assert average == pytest.approx(mean, abs=0.07)  # each value is rounded, and two of the averages are cut
    assert published.average("vtc-cls", 64, "7b") == 58.4
    assert published.average("vtc-cls", 64, "13b") is None


def test_published_times_are_per_question():
    assert published.time("gqa", "none", None, "7b").per_question == pytest.approx(0.240, abs=5e-4)
    assert published.time("pope", "vtc-cls", 64, "7b").per_question == pytest.approx(0.136, abs=6e-4)
    assert published.time("gqa", "vtc-cls", 256, "7b") is None
    assert published.time("gqa", "vtc-cls", 64, "13b") is None


def test_rows_are_ordered_by_baseline_tokens_and_method():
    order = [("floor", None), ("vtc-cls", 64), ("fastv", 64), ("vtc-cls", 128), ("prumerge", 256), ("none", None)]
    results = [result("gqa", method, keep) for method, keep in order]
    results[4] = replace(results[4], visual_tokens=37.6, token_layers=37.6)  # prumerge ignores `keep`
    found = [(row.name, row.tokens) for row in rows_of(results)]
    assert found == [
        ("none", "576"), ("vtc-cls", "128"), ("vtc-cls", "64"), ("fastv", "64"), ("prumerge", "38"), ("floor", "0")
    ]  # fmt: skip


def test_tokens_tell_what_was_kept():
    row = rows_of([
        result("gqa", "prumerge+", 64, visual_tokens=65.2), result("pope", "prumerge+", 64, visual_tokens=61.0)
    ])[0]  # fmt: skip
    assert row.tokens == "64 (61 to 65)"
    ratio = rows_of([result("gqa", "vtc-cls", label="vtc-cls-0.25", options={"ratio": 0.25}, visual_tokens=144.0)])[0]
    assert (ratio.name, ratio.tokens) == ("vtc-cls", "144")


def test_runs_under_other_conditions_have_their_own_rows():
    batch = {"protocol": "llava", "dtype": "float16", "batch_size": 8}
    results = [result("gqa"), result("gqa", value=59.0, fingerprint=batch), result("pope", fingerprint=batch)]
    table = score_table(results)
    assert table.title == f"Scores of {LLAVA_7B} (protocol llava, float16)"
    assert (cells(table, "none, batch 1")["GQA"], cells(table, "none, batch 1")["POPE"]) == ("60.0", "-")
    assert (cells(table, "none, batch 8")["GQA"], cells(table, "none, batch 8")["POPE"]) == ("59.0", "60.0")
    assert len(rows_of([result(), result()])) == 2  # nothing is hidden


def test_figures_of_a_task_have_a_row_for_each_setting():
    figures = {"accuracy": Figure(90.0, 1000), "shape": Figure(80.0, 500)}
    results = [
        result("scenes", "none", model="bundled", title="scenes", figures=figures, notes=("five families",)),
        result("scenes", "vtc-cls", 36, model="bundled", title="scenes", figures=figures, notes=("five families", "x")),
        result("scenes", "floor", model="bundled", title="scenes", figures=figures, notes=("five families",)),
    ]
    table = tables(results)[0]
    assert table.columns == ["method", "tokens", "accuracy", "shape"]
    assert table.rows == [
        ["none", "576", "90.0", "80.0"],
        ["vtc-cls", "36", "90.0", "80.0"],
        ["floor", "0", "90.0", "80.0"],
        ["questions", "", "1,000", "500"],
    ]
    assert table.notes == ["five families.", "vtc-cls-36: x."]


def test_many_figures_run_down():
    figures = {"mean F1": Figure(85.0, 30), "random, F1": Figure(86.0, 10), "popular, F1": Figure(84.0, 20)}
    table = figure_table([result("pope", figures=figures, complete=False, answered=7)])
    assert table.columns == ["method", "none", "questions"]
    assert table.rows == [
        ["tokens", "576", ""],
        ["mean F1", "85.0 [1]", "30"],
        ["random, F1", "86.0 [1]", "10"],
        ["popular, F1", "84.0 [1]", "20"],
    ]


def test_each_model_has_its_own_tables():
    titles = [table.title for table in tables([result(), result(model="other"), result("pope", model="other")])]
    where = "(protocol llava, float16, batch 1)"
    on = "(GPU A, protocol llava, float16, batch 1, processes 1, workers 4)"
    assert titles == [
        f"Scores of {LLAVA_7B} {where}", f"GQA, all figures of {LLAVA_7B} {where}", f"Time of {LLAVA_7B} {on}",
        f"Scores of other {where}", f"Time of other {on}",
    ]  # fmt: skip
    full = [table.title for table in tables([result(), result("pope")], full=True)]
    assert full[1:3] == [f"GQA, all figures of {LLAVA_7B} {where}", f"POPE, all figures of {LLAVA_7B} {where}"]


def test_answers_from_a_file_have_neither_conditions_nor_times():
    titles = [table.title for table in tables([
        result(method="answers", model="mine.jsonl", fingerprint={}, timing=Timing(1000, 0.0, 0.0, 0.0))
    ])]  # fmt: skip
    assert titles == ["Scores of mine.jsonl", "GQA, all figures of mine.jsonl"]


def timing(generate, whole, **changes):
    return Timing(**{"answers": 1000, "generate_seconds": generate, "prepare_seconds": 0.02, "new_tokens": 2.0,
                     "whole_seconds": whole, "wait_seconds": 6.0, "load_seconds": 9.0, **changes})  # fmt: skip


def test_the_table_of_time():
    results = [
        result("gqa", "none", timing=timing(0.1, 120.0)),
        result("gqa", "vtc-cls", 64, timing=timing(0.04, 80.0, wait_seconds=24.0)),
        result("gqa", "vtc-cls", 32, timing=timing(0.03, None, wait_seconds=None, load_seconds=None)),
    ]
    table = time_table(results)
    assert [row[:10] for row in table.rows] == [
        ["GQA", "none", "576", "100.0", "1.00", "20.0", "120.0", "1.00", "5 %", "generation"],
        ["GQA", "none, published by VTC-CLS", "576", "-", "-", "-", "239.9", "1.00", "-", "-"],
        ["GQA", "vtc-cls", "64", "40.0", "2.50", "20.0", "80.0", "1.50", "30 %", "preparation"],
        ["GQA", "vtc-cls, published by VTC-CLS", "64", "-", "-", "-", "139.1", "1.72", "-", "-"],
        ["GQA", "vtc-cls", "32", "30.0", "3.33", "20.0", "-", "-", "-", "-"],
    ]
    assert [row[10:] for row in table.rows] == [
        ["120.0", "9.0"], ["3018.0", "-"], ["80.0", "9.0"], ["1750.0", "-"], ["-", "-"]
    ]  # fmt: skip
    assert table.title == f"Time of {LLAVA_7B} (GPU A, protocol llava, float16, batch 1, processes 1, workers 0)"
    assert any(note.startswith("No whole time: a process was killed") for note in table.notes)
    assert any("whether loading the model counts is not stated" in note for note in table.notes)


def test_whole_time_is_that_of_all_processes():
    two = result(timing=timing(0.1, 60.0, processes=2, wait_seconds=30.0))
    assert whole_per_question(two) == pytest.approx(0.12)
    assert waiting(two) == pytest.approx(0.25)
    none_answered = result(timing=timing(0.0, 0.0, answers=0))
    assert whole_per_question(none_answered) is None
    assert waiting(none_answered) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "pope"},
        {"model": "other"},
        {"method": "floor", "label": "floor"},
        {"complete": False},
        {"limit": 1000},
        {"answered": 999, "skipped": 1},
        {"environment": {"gpu": "GPU B"}},
        {"fingerprint": {"protocol": "llava", "dtype": "float16", "batch_size": 2}},
        {"fingerprint": {"protocol": "llava", "dtype": "bfloat16", "batch_size": 1}},
        {"timing": timing(0.1, 120.0, processes=2, workers=4)},
    ],
)
def test_a_ratio_needs_the_complete_baseline_under_the_same_conditions(changes):
    ours = result("gqa", "vtc-cls", 64)
    assert baseline(ours, [ours, result()]) == result()
    assert baseline(ours, [ours, result(**changes)]) is None


def test_an_incomplete_run_has_no_ratio():
    assert baseline(result("gqa", "vtc-cls", 64, complete=False), [result()]) is None


def test_the_csv_has_a_row_for_each_figure(tmp_path):
    results = [
        result(
            "gqa", "vtc-cls", 64, 55.123456789, figures={"accuracy": Figure(55.123456789, 12), "open": Figure(1 / 3, 6)}
        ),
        result("mmvet", "none", figures={}, limit=5, notes=("a, b", 'say "c"\nd'), environment={"new": 1}),
    ]
    write(results, tmp_path)
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["figure"], row["main"]) for row in rows] == [
        ("gqa", "accuracy", "True"), ("gqa", "open", "False"), ("mmvet", "", "False")
    ]  # fmt: skip
    assert [float(row["value"]) for row in rows[:2]] == [55.123456789, 1 / 3]
    assert [row["figure_questions"] for row in rows] == ["12", "6", ""]
    assert [(row["published"], row["published_source"]) for row in rows[:2]] == [("55.7", "VTC-CLS"), ("", "")]
    assert json.loads(rows[0]["options"]) == {"keep": 64}
    assert (rows[0]["keep"], rows[0]["visual_tokens"], rows[0]["dtype"], rows[0]["batch_size"]) == (
        "64", "64", "float16", "1"
    )  # fmt: skip
    assert (rows[0]["generate_seconds"], rows[0]["whole_seconds_per_question"], rows[0]["bound"]) == (
        "0.1", "0.12", "generation"
    )  # fmt: skip
    assert (rows[2]["value"], rows[2]["limit"], rows[2]["notes"]) == ("", "5", 'a, b; say "c"\nd')
    assert (rows[2]["environment_new"], rows[0]["environment_new"]) == ("1", "")


def test_an_incomplete_run_is_so_in_the_csv():
    row = csv_rows(result(complete=False, answered=7, skipped=2, limit=9))[0]
    assert [row[name] for name in ("complete", "answered", "skipped", "limit")] == [False, 7, 2, 9]


def test_results_are_read_back_as_they_were(tmp_path):
    results = [result(notes=("a\u2028b", "é")), result("mmvet", figures={})]
    assert read(write(results, tmp_path / "new" / "folder")[2]) == results


def test_the_report_has_every_table_the_plots_and_the_provenance(tmp_path):
    results = [result(), result("pope", environment={"torch": "2.13.0", "device": "cpu", "date": "2026-01-01"})]
    results.append(result("seed", environment={**result().environment, "date": "2026-01-05"}))
    text = write(results, tmp_path, [tmp_path / "accuracy-over-time.png"])[0].read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {table.title}" for table in tables(results, full=True)
    ] + ["## Provenance"]
    assert "\n![accuracy-over-time](accuracy-over-time.png)\n" in text
    assert text.endswith(
        f"- {LLAVA_7B}, GPU A, torch 2.13.0; 2026-01-02T03:04:05+00:00 to 2026-01-05\n"
        f"- {LLAVA_7B}, cpu, torch 2.13.0; 2026-01-01\n"
    )


def test_a_bar_in_a_name_does_not_break_the_table():
    text = Table("t", ["a|b", "c"], [["1", "2"]], []).markdown()
    assert text == "## t\n\n| a\\|b | c |\n| ---- | - |\n| 1    | 2 |\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in this order."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure as Drawing

    figures = []
    save = Drawing.savefig

    def savefig(self, file, **options):
        figures.append(self)
        save(self, file, **options)

    monkeypatch.setattr(Drawing, "savefig", savefig)
    return figures


def points(panel, label):
    return [list(zip(*line.get_data(), strict=True)) for line in panel.get_lines() if line.get_label() == label]


def hollow(panel):
    """The points of hollow markers and their colours."""
    lines = [line for line in panel.get_lines() if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    return {next(zip(*line.get_data(), strict=True)): line.get_color() for line in lines}


def test_plots_show_lines_baselines_published_and_incomplete_figures(tmp_path, drawn):
    results = [result("gqa", value=62.5), result("gqa", "floor", value=38.0), result("mmvet", figures={})]
    results += [result("gqa", "vtc-cls", keep, keep / 4 + 40) for keep in (64, 32)]
    results += [
        result("gqa", "fastv", 64, 46.5, limit=3, timing=timing(0.05, 60.0, workers=4)),
        result("scenes", value=99.0),
        result("sqa", value=70.0),
    ]
    files = plots.draw(results, tmp_path / "plots")
    assert [file.name for file in files] == ["accuracy-over-tokens.png", "accuracy-over-time.png"]
    for file in files:
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert file.stat().st_size > 10_000
    over_tokens, over_time = drawn
    sqa, gqa, scenes = over_tokens.axes
    assert [panel.get_title() for panel in (sqa, gqa, scenes)] == ["SciQA", "GQA", "SCENES"]
    assert points(gqa, "vtc-cls") == [[(32, 48.0), (64, 56.0)]]
    assert [line.get_ydata()[0] for line in gqa.get_lines() if line.get_label() in ("none", "floor")] == [62.5, 38.0]
    assert points(gqa, "incomplete") == [[(64, 46.5)]]
    color = {line.get_label(): line.get_color() for line in gqa.get_lines()}
    assert hollow(gqa) == {
        (256, 59.1): color["fastv"], (128, 54.1): color["fastv"], (64, 46.0): color["fastv"],
        (256, 60.3): color["vtc-cls"], (128, 58.2): color["vtc-cls"], (64, 55.7): color["vtc-cls"],
        (576, 62.0): "black", (576, 61.94): "black",
    }  # fmt: skip
    assert hollow(sqa) == {(576, 70.2): "black"}
    assert not hollow(scenes)
    time = over_time.axes[1]
    assert points(time, "none") == [[(100.0, 62.5)]]
    assert points(time, "fastv") == [[(50.0, 46.5)]]
    assert not hollow(time)


def test_each_model_has_its_own_plots(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, **options: None)  # it takes a second
    files = plots.draw([result(), result(model="a/other")], tmp_path)
    assert [file.name for file in files] == [
        "accuracy-over-tokens-1-llava-1.5-7b-hf.png", "accuracy-over-time-1-llava-1.5-7b-hf.png",
        "accuracy-over-tokens-2-other.png", "accuracy-over-time-2-other.png",
    ]  # fmt: skip


def test_plots_without_matplotlib_or_figures_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no result has a figure to plot"):
        plots.draw([result("mmvet", figures={})], tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'vtc-cls\[eval\]'"):
        plots.draw([result()], tmp_path)


@pytest.mark.parametrize(
    ("whole", "wait", "processes", "bound"),
    [
        (100, 20, 1, "generation"),
        (100, 21, 1, "preparation"),
        (100, 40, 2, "generation"),
        (100, 41, 2, "preparation"),
        (None, 1, 1, None),
        (100, None, 1, None),
    ],
)
def test_preparation_bounds_a_run_whose_models_wait_for_more_than_a_fifth(whole, wait, processes, bound):
    assert Timing(9, 0.1, 0.1, 2, whole, wait, 1, processes).bound == bound


def test_a_command_that_is_killed_while_it_writes_leaves_the_results_of_before(tmp_path, monkeypatch):
    write([result()], tmp_path)
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write([result(), result("pope")], tmp_path)
    assert read(tmp_path / "results.jsonl") == [result()]


def test_tokens_that_differ_between_layers_stand_beside_the_budget():
    """FastV's 64 are 96 on average: all 576 pass the first 2 of 32 layers."""
    fastv = [result(task, "fastv", 64, token_layers=96.0) for task in ("gqa", "pope")]
    (row,) = rows_of(fastv)
    assert row.tokens == "64; 96 a layer"
    assert rows_of([replace(fastv[0], visual_tokens=64.4), replace(fastv[1], token_layers=97.2)])[0].tokens == (
        "64; 96 to 97 a layer"
    )
    note = "a layer: visual tokens of an image, averaged over the layers of the language model."
    for table in (score_table(fastv), figure_table(fastv[:1]), time_table(fastv)):
        assert note in table.notes
    for table in (score_table([result()]), figure_table([result()]), time_table([result()])):
        assert note not in table.notes
    assert csv_rows(fastv[0])[0]["token_layers"] == 96.0
    line = fastv[0].to_json()
    assert Result.from_json(line) == fastv[0]
    old = json.loads(line)
    del old["token_layers"]
    assert Result.from_json(json.dumps(old)).token_layers is None
    assert rows_of([replace(fastv[0], token_layers=None)])[0].tokens == "64"
