"""`vtc eval` from the command line to the last file, on generated data in the official formats."""

import csv
import json

import pytest
from openpyxl import load_workbook
from support.cli import call, refused, succeed
from support.eval_data import write_all

from vtc.cli import eval as evaluation
from vtc.cli.options import options_of
from vtc.eval.result import read
from vtc.eval.tasks import BENCHMARKS, TASKS
from vtc.methods import METHODS

QUICK = ("--device", "cpu", "--batch-size", 8, "--max-new-tokens", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def everything(data, tmp_path_factory):
    """The folder of one command over all eight tasks, and what it printed."""
    out = tmp_path_factory.mktemp("out")
    return out, succeed("eval", "--all", "--data", data, "--out", out, "--keep", 16, *QUICK)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_all_eight_run_to_their_last_file(data, everything):
    out, printed = everything
    results = {result.task: result for result in read(out / "results.jsonl")}
    assert list(results) == list(BENCHMARKS)
    for name, result in results.items():
        questions = TASKS[name](data).questions
        assert (result.complete, result.answered) == (True, len(questions)), name
        assert (result.figures == {}) == (name == "mmvet")
        assert result.visual_tokens == 16
        assert any(note.startswith("answers end at 2 tokens") for note in result.notes)
        (answers,) = (out / name).glob("*/submission/answers.jsonl")
        (stored,) = (out / name).glob("*/answers-0.jsonl")
        texts = {entry["line"]: entry["text"] for entry in lines_of(stored)}
        assert [entry["text"] for entry in lines_of(answers)] == [texts[question.line] for question in questions]
        assert [entry["question_id"] for entry in lines_of(answers)] == [question.id for question in questions]
    made = {path.name for path in out.rglob("submission/*")} - {"answers.jsonl"}
    assert made == {
        *("testdev_balanced_predictions.json", "mmbench.xlsx", "mmbench_cn.xlsx", "bundled-vtc-cls-16.json"),
    }
    (sheet,) = out.rglob("mmbench.xlsx")
    assert load_workbook(sheet).active.max_row == 1 + len(TASKS["mmbench"](data).questions)
    columns = printed.stdout.splitlines()[1].split()
    assert columns == ["method", "tokens", "SciQA", "GQA", "TextVQA", "POPE", "MMB", "MMB-CN", "MMVet", "SEED"]
    assert "a server or a judge scores this task" in printed.stdout


def test_the_report_stands_in_three_files(everything):
    out, printed = everything
    text = (out / "report.md").read_text()
    for heading in ("## Scores of bundled", "## GQA, all figures", "## Time of bundled", "## Provenance"):
        assert heading in text
    with (out / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == set(BENCHMARKS)
    assert "generation: per question" in printed.stdout


def test_the_same_command_again_asks_nothing(data, everything, monkeypatch):
    out, printed = everything
    monkeypatch.setattr(evaluation.LocalEngine, "answerer", None)  # loading would fail
    again = succeed("eval", "--all", "--data", data, "--out", out, "--keep", 16, *QUICK)
    assert again.stdout.splitlines()[:4] == printed.stdout.splitlines()[:4]


def test_answers_made_elsewhere_are_scored(data, everything, tmp_path):
    """The file that a complete run wrote gives the run's score; a cut one is refused."""
    out, _ = everything
    (answers,) = (out / "pope").glob("*/submission/answers.jsonl")
    found = json.loads(succeed("eval", "pope", "--data", data, "--answers", answers, "--json").stdout)
    (ours,) = (result for result in read(out / "results.jsonl") if result.task == "pope")
    assert found["results"][0]["figures"] == {name: list(figure) for name, figure in ours.figures.items()}
    lines = answers.read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:-1]))
    arguments = ("eval", "pope", "--data", data, "--answers", cut)
    assert f"answers {len(lines) - 1} of the {len(lines)} questions of pope" in refused(*arguments)
    partial = json.loads(succeed(*arguments, "--partial", "--json").stdout)["results"][0]
    assert (partial["complete"], partial["answered"]) == (False, len(lines) - 1)
    cut.write_text("".join([*lines, lines[0]]))
    assert "once more; two runs were put into one file" in refused(*arguments)
    cut.write_text(lines[0].replace('"question_id": 1,', '"question_id": 7,'))
    assert "answers question 7, which pope does not ask" in refused(*arguments)


def test_doubled_ids_of_textvqa_are_told_apart_by_the_prompt(data, everything):
    out, _ = everything
    (answers,) = (out / "textvqa").glob("*/submission/answers.jsonl")
    reversed_file = out / "reversed.jsonl"
    reversed_file.write_text("".join(reversed(answers.read_text().splitlines(keepends=True))))
    ids = [entry["question_id"] for entry in lines_of(answers)]
    assert len(set(ids)) < len(ids)
    found = evaluation.read_answers(TASKS["textvqa"](data), reversed_file)
    assert list(dict(sorted(found.items())).values()) == [entry["text"] for entry in lines_of(answers)]


def test_a_table_of_every_method_with_scenes(tmp_path):
    out = tmp_path / "out"
    arguments = ("--all-methods", "--limit", 5, "--batch-size", 5, "--device", "cpu", "--out", out, "--plots")
    printed = succeed("eval", "scenes", *arguments).stdout
    results = read(out / "results.jsonl")
    assert [result.method for result in results] == ["none", *(name for name in METHODS if name != "none"), "floor"]
    assert {result.label for result in results if result.method == "vtc-cls"} == {"vtc-cls-128-batch5-limit5"}
    assert results[0].visual_tokens == 576
    assert results[-1].visual_tokens is None
    rows = [line.split()[0] for line in printed.splitlines()[1 : len(results) + 2]]
    assert (rows[:2], rows[-1]) == (["method", "none"], "floor")
    assert sorted(rows[1:]) == sorted(result.method for result in results)
    assert {path.name for path in out.glob("*.png")} == {"accuracy-over-tokens.png", "accuracy-over-time.png"}
    assert "![accuracy-over-tokens](accuracy-over-tokens.png)" in (out / "report.md").read_text()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    """Here too few tokens for one of the methods."""
    arguments = ("--methods", "visionzip,random", "--keep", 1, "--limit", 2, "--no-baselines", "--device", "cpu")
    result = call("eval", "scenes", *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("vtc: 1 run(s) failed: scenes visionzip-1: ")
    assert [found.method for found in read(tmp_path / "results.jsonl")] == ["random"]
    assert "random" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give tasks, or --all for the eight; there are sqa, gqa"),
        (("gqa", "--all"), "give tasks, or --all for the eight"),
        (("vqav2",), "unknown task vqav2; there are sqa, gqa"),
        (("gqa",), "give --data DIR"),
        (("gqa", "--data", "nowhere"), "the data folder nowhere does not exist"),
        (("gqa", "--data", "."), "found no questions at gqa/llava_gqa_testdev_balanced.jsonl"),
        (("scenes", "--method", "best"), "method must be one of"),
        (("scenes", "--methods", "best"), "unknown method 'best'; there are "),
        (("scenes", "--method", "none", "--keep", "3"), "'none' is a baseline without options, got keep"),
        (("scenes", "--sweep", "keep=a"), "--sweep takes numbers of tokens, such as keep=256,128,64, got 'keep=a'"),
        (("scenes", "--sweep", "layer=1"), "--sweep takes numbers of tokens"),
        (("scenes", "--sweep", "keep=4", "--keep", "3"), "got both --keep 3 and --sweep keep=4"),
        (("scenes", "--keep", "3", "--ratio", "0.5"), "give one of them"),
        (("scenes", "--methods", "random", "--keep", "0"), "keep"),
        (("scenes", "--methods", "random", "--all-methods"), "got both --all-methods and --methods random"),
        (("scenes", "--methods", "none", "--no-baselines"), "nothing is left to run"),
        (("scenes", "--option", "method=fastv"), "--option takes name=value with a name among"),
        (("scenes", "--option", "depth=3"), "--option takes name=value with a name among"),
        (("scenes", "--option", "seed"), "--option takes name=value"),
        (("scenes", "--method", "random", "--start-layer", "2"), "--start-layer is an option of 'vtc-cls'"),
        (("scenes", "--protocol", "best"), "unknown protocol 'best'; there are llava, hf"),
        (("scenes", "--engine", "best"), "unknown engine 'best'; there are local, ray"),
        (("scenes", "--model", "./nowhere"), "is no directory"),
        (("scenes", "--dtype", "int8"), "dtype is 'int8'"),
        (("scenes", "--partial"), "holds no answers yet"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("eval", *arguments)
    assert result.exit_code == 2, result.exception
    assert result.stderr.splitlines()[-1].startswith("vtc: ")
    assert says in result.stderr.splitlines()[-1]


def test_options_become_pythons_values():
    given = ["seed=3", "ensemble=mean", "adaptive_count=false", "start_layer=none", "ratio=0.5"]
    assert options_of(given) == {
        **{"seed": 3, "ensemble": "mean", "adaptive_count": False, "start_layer": None, "ratio": 0.5}
    }


def test_one_setting_or_a_table():
    def labels(method="vtc-cls", methods=None, every=False, swept=None, baselines=True, keep=None, **options):
        return [s.label for s in evaluation.settings_of(method, methods, every, swept, baselines, keep, options)]

    assert labels() == ["vtc-cls-128"]
    assert labels("none") == ["none"]
    assert labels("prumerge") == ["prumerge"]
    assert labels(ratio=0.25) == ["vtc-cls-0.25"]
    assert labels(swept="keep=8,4") == ["none", "vtc-cls-8", "vtc-cls-4", "floor"]
    assert labels(methods="random,none", baselines=False) == ["random-128"]
    assert labels(methods="random,pool", baselines=False, ratio=0.25) == ["random-0.25", "pool-0.25"]
    assert labels(methods="pool,pool", swept="keep=8,8", baselines=False) == ["pool-8"]
    assert labels(methods="random,pool", keep=9, seed=1) == ["none", "random-9-seed=1", "pool-9", "floor"]
    assert labels(methods="prumerge,vtc-cls", swept="keep=8,4", start_layer=2) == [
        *("none", "prumerge", "vtc-cls-8-start_layer=2", "vtc-cls-4-start_layer=2", "floor")
    ]


def test_the_report_keeps_the_runs_of_earlier_commands(tmp_path):
    arguments = ("--limit", 1, "--max-new-tokens", 1, "--device", "cpu", "--out", tmp_path, "--keep", 8)
    for method in ("random", "vtc-cls", "random"):
        succeed("eval", "scenes", "--method", method, *arguments)
    assert [result.method for result in read(tmp_path / "results.jsonl")] == ["vtc-cls", "random"]
