"""MMBench: what is asked, CircularEval by exact letters, the versions of the file, and the server's spreadsheet."""

import io
import json
import logging
import sys

import openpyxl
import pytest
from support.eval_data import mmbench as data

from vtc.eval.files import DataError
from vtc.eval.tasks.mmbench import MISSING, UPLOADED, MMBench, MMBenchCN, _is_missing

FILE = "mmbench/mmbench_dev_20230712.tsv"
ENGLISH = "Answer with the option's letter from the given choices directly."
CIRCULAR, FIRST, ALL = "CircularEval accuracy", "first pass alone, not MMBench", "all passes apart, not MMBench"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmbench")
    data.write(folder)
    return MMBench(folder)


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmbench_cn")
    data.write_cn(folder)
    return MMBenchCN(folder)


@pytest.fixture
def made(tmp_path):
    """A task over the given rows."""

    def make(rows):
        data.write_tsv(tmp_path / FILE, rows)
        return MMBench(tmp_path)

    return make


@pytest.fixture
def rows():
    return data.rows()


def texts(task):
    return {question.id: question.text for question in task.questions}


def right_answers(task):
    return {line: row["answer"] for line, row in enumerate(task.rows)}


def test_what_is_asked(task):
    asked = texts(task)
    assert asked[11] == f"Which cup is full?\nA. left\nB. right\n{ENGLISH}"
    hint = "A board\twith shapes.\nWhat is shown?\nLook closely."
    assert asked[12] == f"{hint}\nA. one\nB. two\nC. three\n{ENGLISH}"
    assert asked[1000012] == f"{hint}\nA. three\nB. one\nC. two\n{ENGLISH}"
    code = "for i in x:\n    print(i)"
    assert asked[23] == f"Which code prints it?\nA. {code}\nB. print(x)\\nx\nC. x\nD. y\n{ENGLISH}"
    assert asked[3000023] == f"Which code prints it?\nA. print(x)\\nx\nB. x\nC. y\nD. {code}\n{ENGLISH}"
    assert asked[24] == f'Which note is right?\nA. "quoted" text\nB. =1+1\nC. NaN-like\nD. #tag\n{ENGLISH}'


def test_an_option_that_pandas_reads_as_missing_ends_the_options(task):
    assert texts(task)[40] == f"Shapes.\nWhich of these is it?\nA. circle\nB. square\nC. star\n{ENGLISH}"
    assert texts(task)[77] == f"Which side is empty?\nA. top\nB. bottom\nC. left\n{ENGLISH}"


def test_a_hint_that_pandas_reads_as_missing_is_none(task):
    assert texts(task)[42] == f"Which name fits?\nA. Ann\nB. Bob\n{ENGLISH}"


def test_what_is_asked_in_chinese(chinese):
    assert texts(chinese)[1000012] == (
        "图中有一块板。\n图中有几个物体？\n请仔细看。\nA. 三个\nB. 一个\nC. 两个\n请直接回答选项字母。"  # noqa: RUF001
    )
    assert chinese.max_new_tokens == MMBench.max_new_tokens == 1024


@pytest.mark.parametrize("text", ["", "nan", "NAN", "NaN", "None", "none", "NONE", "NA", "N/A", "n/a", "null", "NULL"])
def test_missing_texts(text):
    assert _is_missing(text)


@pytest.mark.parametrize("text", ["na", "Null", "n.a.", " ", " NA", "NaN-like", "none of these", "0", "<na>"])
def test_texts_that_are_not_missing(text):
    assert not _is_missing(text)


def test_the_missing_texts_are_those_of_pandas():
    pandas = pytest.importorskip("pandas")
    from pandas._libs.parsers import STR_NA_VALUES

    assert MISSING == STR_NA_VALUES
    column = pandas.read_table(io.StringIO("x\ty\n" + "".join(f"{text}\ttext\n" for text in sorted(MISSING))))["x"]
    assert column.isna().all()


def test_all_passes_of_a_question_are_one_unit(task):
    assert [question.line for question in task.questions] == list(range(24))
    assert [question.id for question in task.questions[:9]] == [11, 12, 23, 24, 40, 41, 42, 77, 1000011]
    assert {question.unit for question in task.questions if question.id % 10**6 == 23} == {23}
    assert len({question.unit for question in task.questions}) == 8


def test_images_are_decoded_in_their_own_mode(task):
    images = {question.id: question.image for question in task.questions}
    assert (images[11].open().mode, images[24].open().mode) == ("P", "RGB")
    assert images[3000024].open().format == "JPEG"
    assert len(images[12].data) > 131072  # above the csv module's limit
    assert images[12].open().size == (336, 336)


def test_a_question_counts_if_all_of_its_passes_are_right(task):
    answers = right_answers(task)
    score = task.score(answers)
    assert {figure.value for figure in score.figures.values()} == {100}
    line = {question.id: question.line for question in task.questions}
    answers[line[3000023]] = "A"  # the last pass of 11, 12, 23 …; all others stay right
    answers[line[42]] = answers[line[1000042]] = "A"  # right in the first pass alone
    score = task.score(answers)
    assert next(iter(score.figures)) == CIRCULAR
    assert score.figures[CIRCULAR] == (100 * 6 / 8, 8)
    assert score.figures[FIRST] == (100, 8)
    assert score.figures[ALL] == (100 * 22 / 24, 24)
    assert score.figures["category code"] == (0, 1)
    assert score.figures["category other"] == (50, 2)
    assert score.figures["category ocr"] == (100, 1)
    assert score.figures["l2-category logic"] == (100 / 3, 3)
    assert score.figures["l2-category finegrained_perception (instance-level)"] == (100, 5)


@pytest.mark.parametrize("text", ["b", "B.", "B. right", "(B)", "", "A", "AB", "右边的"])
def test_an_answer_is_right_only_as_the_exact_letter(task, text):
    assert task.questions[0].id == 11
    assert task.rows[0]["answer"] == "B"
    assert task.score(right_answers(task) | {0: text}).figures[CIRCULAR] == (87.5, 8)


def test_answers_that_are_no_letter_are_counted(task):
    answers = right_answers(task)
    assert len(task.score(answers).notes) == 1
    answers |= {0: "C", 1: "AB", 2: "", 3: "A."}  # question 11 has two options
    assert "4 of 24 answers are not one of the letters alone" in task.score(answers).notes[1]


def test_only_questions_whose_passes_are_all_answered_count(task):
    complete = right_answers(task)
    answers = {question.line: complete[question.line] for question in task.questions if question.unit in (11, 23)}
    assert task.score(answers).figures[ALL] == (100, 6)
    answers.pop(max(answers))  # a pass of 23
    score = task.score(answers)
    assert score.figures[CIRCULAR] == (100, 1)
    assert score.figures[FIRST] == (100, 1)
    assert "category code" not in score.figures
    assert "3 answers do not count" in score.notes[1]
    assert task.score({}).figures[CIRCULAR] == (None, 0)


def official(question_counts):
    """Rows with the numbers of questions by options and passes, images by reference."""
    shapes = [shape for shape, count in question_counts.items() for _ in range(count)]
    questions = [
        (number, "Which?", "", ("p", "q", "r", "s")[:options], 0, passes, "made-up", "made-up", 0)
        for number, (options, passes) in enumerate(shapes)
    ]
    rows = data.rows(tuple(questions))
    return [row | {"image": data.image(0) if row["index"] == "0" else "0"} for row in rows]


def test_the_file_of_2023_is_recognised_and_13b_s_published_figure_is_796_of_its_1176(made):
    task = made(official({(4, 4): 938, (4, 3): 53, (3, 3): 96, (2, 2): 89}))
    assert len(task.questions) == 4377
    answers = {q.line: task.rows[q.line]["answer"] if q.unit < 796 else "D" for q in task.questions}
    score = task.score(answers)
    assert score.figures[CIRCULAR] == (100 * 796 / 1176, 1176)
    assert "1176 questions in 4377 rows" in score.notes[0]
    assert "LLaVA's published figures" in score.notes[0]


def test_the_newer_file_is_recognised(made):
    task = made(official({(4, 4): 926, (4, 3): 53, (3, 3): 96, (2, 2): 89}))
    assert len(task.questions) == 4329
    assert "1164 questions in 4329 rows" in task.score({}).notes[0]
    assert "the newer file" in task.score({}).notes[0]


def test_another_number_of_questions_is_named(task):
    assert "8 questions in 24 rows of mmbench_dev_20230712.tsv: not a known version" in task.score({}).notes[0]


def test_images_by_reference(task, made, rows):
    first = {row["index"]: row["image"] for row in rows[:8]}
    for row in rows[8:]:
        row["image"] = str(int(row["index"]) % 10**6)
        assert row["image"] in first
    other = made(rows)
    assert [q.image.data for q in other.questions] == [q.image.data for q in task.questions]
    assert "images by the index of another row" in other.score({}).notes[0]
    assert "images by" not in task.score({}).notes[0]


@pytest.mark.parametrize("reference", ["999", "11", "1000011", ""])  # none such, a reference in turn, itself, empty
def test_broken_references_are_refused(made, rows, reference):
    rows[0]["image"] = "12" if reference == "11" else rows[0]["image"]
    rows[8]["image"] = reference
    with pytest.raises(
        DataError, match=f"index 1000011 has the image of index '{reference}', which has none; download"
    ):
        made(rows)


def test_columns_that_only_describe_may_be_absent(task, made, rows):
    absent = ("category", "source", "comment", "l2-category", "split")
    other = made([{name: text for name, text in row.items() if name not in absent} for row in rows])
    assert texts(other) == texts(task)
    score = other.score(right_answers(other))
    assert list(score.figures) == [CIRCULAR, FIRST, ALL]
    assert len(score.notes) == 1


def test_an_absent_hint_is_named(made, rows):
    other = made([{name: text for name, text in row.items() if name != "hint"} for row in rows])
    assert texts(other)[12].startswith("What is shown?")
    assert "no column hint" in other.score({}).notes[1]


def test_a_file_without_answers_is_refused(made, rows):
    with pytest.raises(DataError, match=r"lacks the column\(s\) answer"):
        made([{name: text for name, text in row.items() if name != "answer"} for row in rows])


@pytest.mark.parametrize("answer", ["C", "E", "", "b", "AB"])
def test_an_answer_that_is_no_option_is_refused(made, rows, answer):
    rows[0]["answer"] = answer
    with pytest.raises(DataError, match=f"the answer '{answer}' of index 11 is none of its options; download"):
        made(rows)


def test_a_right_option_that_llava_does_not_show_is_named(task, made, rows):
    assert len(task.score({}).notes) == 1
    rows[2]["B"] = "None"  # C is right
    other = made(rows)
    assert texts(other)[23].endswith(f"print(i)\n{ENGLISH}")
    assert "rows that do not show their right option: 1" in other.score({}).notes[1]


@pytest.mark.parametrize(
    ("index", "problem"), [("x1", "'x1' of row 1 is no number"), ("12", "'12' of row 2 occurs twice")]
)
def test_indices_are_checked(made, rows, index, problem):
    rows[0]["index"] = index
    with pytest.raises(DataError, match=f"the index {problem}; download"):
        made(rows)


@pytest.mark.parametrize(
    ("dropped", "problem"),
    [
        (lambda index: index == 11, r"question 11 with 2 options has the passes \[1\], expected 0 to 1 at least"),
        (lambda index: index == 1000012, r"question 12 with 3 options has the passes \[0, 2\], expected 0 to 2"),
        (lambda index: index in (2000041, 3000041), r"question 41 with 4 options has the passes \[0, 1\]"),
        (lambda index: index > 10**6, r"question 11 with 2 options has the passes \[0\].*not the one with the options"),
    ],
)
def test_a_file_that_lacks_passes_is_refused(made, rows, dropped, problem):
    with pytest.raises(DataError, match=problem):
        made([row for row in rows if not dropped(int(row["index"]))])


def table(path):
    book = openpyxl.load_workbook(path)
    assert book.sheetnames == ["Sheet1"]
    return [[cell.value for cell in row] for row in book.active.iter_rows()]


def test_the_spreadsheet_for_the_server(task, tmp_path):
    answers = right_answers(task) | {0: "None", 1: "=1+1", 3: " B\n"}
    files = task.submission(answers, tmp_path, "made/model")
    assert files == [tmp_path / "answers.jsonl", tmp_path / "mmbench.xlsx"]
    header, *lines = table(files[1])
    assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert len(lines) == 24
    assert lines[0] == [11, "Which cup is full?", "left", "right", None, None, "None", "B", "dev"]
    asked = "What is shown?\nLook closely."
    assert lines[1] == [12, asked, "one", "two", "three", None, "=1+1", "A", "dev"]
    assert lines[3][2:] == ['"quoted" text', "=1+1", "NaN-like", "#tag", " B\n", "B", "dev"]
    assert lines[4][2:6] == ["circle", "square", "star", None]  # pandas reads "None" as missing
    assert lines[8] == [1000011, "Which cup is full?", "right", "left", None, None, "A", "A", "dev"]
    types = {
        cell.data_type for row in openpyxl.load_workbook(files[1]).active.iter_rows() for cell in row if cell.value
    }
    assert types == {"n", "s"}  # no formula


def test_the_spreadsheet_holds_what_pandas_reads_from_the_file(task, tmp_path):
    pandas = pytest.importorskip("pandas")
    answers = right_answers(task)
    ours = pandas.read_excel(task.submission(answers, tmp_path, "model")[1])
    file = pandas.read_table(task.path)
    file["prediction"] = pandas.Series(answers)
    pandas.testing.assert_frame_equal(ours, file[list(UPLOADED)])


def test_what_a_spreadsheet_cannot_hold_is_left_out_and_logged(task, tmp_path, caplog):
    answers = right_answers(task) | {0: "a\x00b\x0bc\uffffde\t\U0001f600", 1: "x" * 40000}
    with caplog.at_level(logging.WARNING, "vtc"):
        file = task.submission(answers, tmp_path, "model")[1]
    assert [row[6] for row in table(file)[1:3]] == ["abcde\t\U0001f600", "x" * 32767]
    assert caplog.messages == [f"{file}: 2 cells lost characters that a spreadsheet cannot hold"]


def test_a_missing_openpyxl_is_found_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r"pip install 'vtc-cls\[eval\]'"):
        MMBench(tmp_path)


def test_llava_s_file_of_answers(task, chinese, tmp_path):
    files = task.submission(right_answers(task), tmp_path, "model")
    lines = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 24
    keys = "question_id round_id prompt text options option_char answer_id model_id metadata"
    assert list(lines[4]) == keys.split()
    assert len(lines[4].pop("answer_id")) == 22
    assert lines[4] == {
        "question_id": 40,
        "round_id": 0,
        "prompt": "Shapes.\nWhich of these is it?\nA. circle\nB. square\nC. star",
        "text": "A",
        "options": ["circle", "square", "star"],
        "option_char": ["A", "B", "C"],
        "model_id": "model",
        "metadata": {},
    }
    assert [path.name for path in chinese.submission(right_answers(chinese), tmp_path, "model")][1] == "mmbench_cn.xlsx"
    assert table(tmp_path / "mmbench_cn.xlsx")[1][1:4] == ["哪个杯子是满的？", "左边的", "右边的"]  # noqa: RUF001
