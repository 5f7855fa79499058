"""Reports, plots and submissions survive `kill -9` at any moment: each file is the old one or the new one, whole."""

import hashlib
import io
import sys
from pathlib import Path

import pytest
from openpyxl import load_workbook
from support.eval_data import write_all
from support.killed import kill_while_it_writes

from vtc.cli import eval as evaluation
from vtc.eval import plots, report
from vtc.eval.result import Result, Timing
from vtc.eval.setting import Setting
from vtc.eval.task import Figure
from vtc.eval.tasks import TASKS

WRITERS = ("gqa", "mmbench", "mmvet", "report")


def results(version):
    """Of two versions, so that every file differs."""
    figures = {"accuracy": Figure(50.0 + version, 100)}
    timing = Timing(100, 0.1 + version, 0.0, 2.0)
    fields = ("", "", "bundled", "vtc-cls", "label", {}, figures, True, 100, 100, 0, None, 64.0, (), timing)
    return [
        Result(task, task.upper(), *fields[2:], {}, {"date": f"200{version}"}) for task in ("gqa", "pope", "scenes")
    ]


def write(name, version, task, folder):
    """What a run writes whole, in one of two versions."""
    if name == "report":
        report.write(results(version), folder, plots.draw(results(version), folder))
    else:
        answers = {question.line: f"answer {version} " * 2000 for question in task.questions}
        task.submission(answers, folder, "model")


FOREVER = f"""
import itertools, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from eval.test_killed_writers import TASKS, write
name, data, out = sys.argv[1], *map(Path, sys.argv[2:])
task = None if name == "report" else TASKS[name](data)
for number in itertools.count(1):
    write(name, number % 2, task, out)
"""


def digests(folder):
    made = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".vtc-")}
    return {name: _digest(name, content) for name, content in made.items()}


def _digest(name, content):
    if name.endswith(".xlsx"):  # holds the time of its making
        content = repr([*load_workbook(io.BytesIO(content)).active.values]).encode()
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_leaves_each_file_whole(name, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_all(data)
    task = None if name == "report" else TASKS[name](data)
    versions = []
    for version in range(2):
        out = tmp_path / f"version{version}"
        out.mkdir()
        write(name, version, task, out)
        versions.append(digests(out))
    assert versions[0].keys() == versions[1].keys()
    assert not set(versions[0].values()) & set(versions[1].values())
    out = tmp_path / "version0"
    kill_while_it_writes([sys.executable, "-c", FOREVER, name, data, out], out)
    found = digests(out)
    assert found.keys() == versions[0].keys()
    for file, digest in found.items():
        assert digest in (versions[0][file], versions[1][file]), file


def test_a_report_takes_the_place_of_the_old_one(tmp_path):
    """A file that was written in its place would be cut short for a moment, however small it is."""
    old = [tmp_path / f"old-{name}" for name in report.FILES]
    for link, file in zip(old, report.write(results(0), tmp_path), strict=True):
        link.hardlink_to(file)
    before = [link.read_bytes() for link in old]
    after = [file.read_bytes() for file in report.write(results(1), tmp_path)]
    assert [link.read_bytes() for link in old] == before
    assert not set(before) & set(after)


def unchanged(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_data_folder_may_be_the_one_of_the_answers_and_loses_nothing(tmp_path):
    write_all(tmp_path)
    before = unchanged(tmp_path)
    tasks = [TASKS["gqa"](tmp_path), TASKS["pope"](tmp_path)]
    for task in tasks:
        folder = tmp_path / task.name / "vtc-cls-64" / "submission"
        folder.mkdir(parents=True)
        task.submission({question.line: "x" for question in task.questions}, folder, "model")
    report.write(results(0), tmp_path)
    after = unchanged(tmp_path)
    assert before.items() <= after.items()


@pytest.mark.parametrize("kind", ["symlink", "hard"])
def test_a_report_that_is_a_file_of_the_benchmark_is_refused_before_anything_runs(tmp_path, monkeypatch, kind):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    write_all(data)
    task = TASKS["gqa"](data)
    place = out / "report.csv"
    place.symlink_to(task.found["questions"]) if kind == "symlink" else place.hardlink_to(task.found["questions"])
    monkeypatch.setattr(evaluation, "run_all", lambda *_: pytest.fail("ran"))
    machine = evaluation.Machine("bundled", None, "cpu", "auto", "local", 1)
    with pytest.raises(ValueError, match=r"is the input .* which would be lost"):
        evaluation.evaluate([task], [Setting()], machine, evaluation.Options(out), False)


def test_a_folder_that_takes_no_files_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "run_all", lambda *_: pytest.fail("ran"))
    machine = evaluation.Machine("bundled", None, "cpu", "auto", "local", 1)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "report" / "report.md").mkdir(parents=True)
    for out, says in (
        ("/proc/x", "/proc/.vtc-out cannot be written"),
        ("/proc", "report.md cannot be written"),
        (tmp_path / "file", "cannot be a folder, because .*/file is none; choose another --out"),
        (tmp_path / "file" / "below", "cannot be a folder, because .*/file is none"),
        (tmp_path / "dangling", "cannot be a folder, because .*/dangling is none"),
        (tmp_path / "report", "report.md is a directory"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluation.evaluate([], [Setting()], machine, evaluation.Options(Path(out)), False)
    report.require_folder(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
