"""MMBench dev, English and Chinese: a question counts if it is answered right in every order of its options."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from vtc.eval.files import DataError, DataFile, read_tsv
from vtc.eval.join import LETTER_ANSWER
from vtc.eval.question import EncodedImage, Question
from vtc.eval.task import Figure, Score, Task
from vtc.files import replacing

LETTERS = "ABCD"
ROUND = 10**6  # the index of a question's pass k is its first pass's plus k times this
REFERENCE = 64  # a cell of `image` up to this length is the index of the row that has the image
COLUMNS = ("index", "question", *LETTERS, "answer", "image")
UPLOADED = ("index", "question", *LETTERS, "prediction", "answer", "split")

# LLaVA reads the file with pandas, which takes these texts for missing values; it takes "nan" and "none" itself.
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
LONGEST_CELL = 32767  # of a spreadsheet
NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

logger = logging.getLogger("vtc")


class MMBench(Task):
    """CircularEval by exact letters: a question is right if the answers to all of its passes are the right letters.

    The file holds the passes as rows: pass k has the options rotated by k. An answer is right if it is the letter and
    nothing else. The server infers a letter from other answers; LLaVA-1.5 answers with letters alone.
    """

    name: ClassVar[str] = "mmbench"
    title: ClassVar[str] = "MMBench"
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(
            "questions",
            (
                "mmbench/mmbench_dev_20230712.tsv",
                "mmbench_dev_20230712.tsv",
                "mmbench/MMBench_DEV_EN_legacy.tsv",
                "MMBench_DEV_EN_legacy.tsv",
                "mmbench/MMBench_DEV_EN.tsv",
                "MMBench_DEV_EN.tsv",
            ),
            "download https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv",
        ),
    )
    max_new_tokens: ClassVar[int] = 1024
    last_line: ClassVar[str] = LETTER_ANSWER
    versions: ClassVar[dict[tuple[int, int], str]] = {  # rows and questions
        (4377, 1176): "the file of July 2023, which LLaVA's published figures are over",
        (4329, 1164): "the newer file, which the server counts; LLaVA's published figures are over 1176 questions",
    }

    def __init__(self, data: Path) -> None:
        require_openpyxl()
        super().__init__(data)
        self.path = self.found["questions"]
        self.rows = read_tsv(self.path, COLUMNS)
        self.options = [_options(row) for row in self.rows]
        images: dict[str, str] = {}
        for number, row in enumerate(self.rows, start=1):
            if not row["index"].isdecimal() or row["index"] in images:
                problem = "occurs twice" if row["index"] in images else "is no number"
                raise self._error(f"the index {row['index']!r} of row {number} {problem}")
            images[row["index"]] = row["image"]
            if row["answer"] not in tuple(LETTERS) or not row[row["answer"]]:
                raise self._error(f"the answer {row['answer']!r} of index {row['index']} is none of its options")
        self.references = sum(len(image) <= REFERENCE for image in images.values())

        self.passes: dict[int, list[int]] = {}  # from the index of the first pass to lines
        self.questions = []
        for line, row in enumerate(self.rows):
            index, image = int(row["index"]), row["image"]
            if len(image) <= REFERENCE:
                image = images.get(image, "")
                if len(image) <= REFERENCE:
                    raise self._error(f"index {index} has the image of index {row['image']!r}, which has none")
            self.passes.setdefault(index % ROUND, []).append(line)
            text = f"{self._asked(line)}\n{self.last_line}"
            source = EncodedImage(image, f"{self.path}, index {index}")
            self.questions.append(Question(line, index, text, source, unit=index % ROUND))
        for unit, lines in self.passes.items():
            lines.sort(key=lambda line: int(self.rows[line]["index"]))
            self._check_passes(unit, lines)

    def _asked(self, line: int) -> str:
        """Hint, question and options."""
        row = self.rows[line]
        hint = row.get("hint", "")
        lines = [] if _is_missing(hint) else [hint]
        options = (
            f"{letter}. {option}" for letter, option in zip(self._letters(line), self.options[line], strict=True)
        )
        return "\n".join([*lines, row["question"], *options])

    def _check_passes(self, unit: int, lines: list[int]) -> None:
        rounds = [int(self.rows[line]["index"]) // ROUND for line in lines]
        options = len(self.options[lines[0]])
        fewest = max(2, 3 if options == len(LETTERS) else options)  # D stays in place in some questions with four
        if rounds != list(range(len(rounds))) or len(rounds) < fewest:
            raise self._error(
                f"question {unit} with {options} options has the passes {rounds}, expected 0 to {fewest - 1} at "
                "least; the file is cut, or it is not the one with the options rotated"
            )

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self.path}: {problem}; {self.files[0].source}")

    def score(self, answers: Mapping[int, str]) -> Score:
        counted = [lines for lines in self.passes.values() if all(line in answers for line in lines)]
        right = {line: answers[line] == self.rows[line]["answer"] for lines in counted for line in lines}
        circular = {lines[0]: all(right[line] for line in lines) for lines in counted}
        figures = {
            "CircularEval accuracy": _share(circular.values()),
            "first pass alone, not MMBench": _share(right[line] for line in circular),
            "all passes apart, not MMBench": _share(right.values()),
        }
        for column in ("l2-category", "category"):
            for name in sorted({self.rows[line].get(column, "") for line in circular} - {""}):
                figures[f"{column} {name}"] = _share(
                    ok for line, ok in circular.items() if self.rows[line][column] == name
                )
        letters = sum(answers[line] in self._letters(line) for line in right)
        notes = [self._version()]
        if "hint" not in self.rows[0]:
            notes.append("the file has no column hint, so that questions are asked without their hints")
        if hidden := sum(row["answer"] not in self._letters(line) for line, row in enumerate(self.rows)):
            notes.append(
                f"rows that do not show their right option: {hidden}, LLaVA reads it or one before it as missing"
            )
        if len(answers) > len(right):
            notes.append(f"{len(answers) - len(right)} answers do not count: other passes of their questions lack one")
        if letters < len(right):
            notes.append(
                f"{len(right) - letters} of {len(right)} answers are not one of the letters alone and count as wrong; "
                "the server infers a letter from them"
            )
        return Score(figures, tuple(notes))

    def _letters(self, line: int) -> list[str]:
        return list(LETTERS[: len(self.options[line])])

    def _version(self) -> str:
        rows, questions = len(self.rows), len(self.passes)
        version = self.versions.get((rows, questions), "not a known version")
        reference = ", images by the index of another row" if self.references else ""
        return f"{questions} questions in {rows} rows of {self.path.name}{reference}: {version}"

    def llava_line(self, question: Question, text: str, model: str) -> dict[str, Any]:
        line = super().llava_line(question, text, model)
        return {
            "question_id": line.pop("question_id"),
            "round_id": 0,
            "prompt": self._asked(question.line),
            "text": line.pop("text"),
            "options": self.options[question.line],
            "option_char": self._letters(question.line),
        } | {key: value for key, value in line.items() if key != "prompt"}

    def submission(self, answers: Mapping[int, str], folder: Path, model: str) -> list[Path]:
        """Write LLaVA's file of answers and the spreadsheet that the server takes, `<task>.xlsx`."""
        files = super().submission(answers, folder, model)
        table = []
        for question in self.questions:
            if question.line in answers:
                cells: dict[str, Any] = {
                    column: None if text in MISSING else text for column, text in self.rows[question.line].items()
                }
                cells |= {"index": question.id, "prediction": answers[question.line]}
                table.append([cells.get(column) for column in UPLOADED])
        return [*files, _write_spreadsheet(folder / f"{self.name}.xlsx", UPLOADED, table)]


class MMBenchCN(MMBench):
    """MMBench with Chinese text."""

    name: ClassVar[str] = "mmbench_cn"
    title: ClassVar[str] = "MMBench-CN"
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(
            "questions",
            (
                "mmbench_cn/mmbench_dev_cn_20231003.tsv",
                "mmbench/mmbench_dev_cn_20231003.tsv",
                "mmbench_dev_cn_20231003.tsv",
                "mmbench/MMBench_DEV_CN_legacy.tsv",
                "MMBench_DEV_CN_legacy.tsv",
                "mmbench/MMBench_DEV_CN.tsv",
                "MMBench_DEV_CN.tsv",
            ),
            "download https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_cn_20231003.tsv",
        ),
    )
    last_line: ClassVar[str] = "请直接回答选项字母。"
    versions: ClassVar[dict[tuple[int, int], str]] = {
        (4329, 1164): "the questions that LLaVA's published figures are over, and the server's",
    }


def _is_missing(text: str) -> bool:
    return text in MISSING or text.lower() in ("nan", "none")


def _options(row: Mapping[str, str]) -> list[str]:
    """A to D until the first that is missing."""
    options: list[str] = []
    for letter in LETTERS:
        if _is_missing(row[letter]):
            break
        options.append(row[letter])
    return options


def _share(right: Iterable[bool]) -> Figure:
    right = list(right)
    return Figure.share(sum(right), len(right))


def require_openpyxl() -> None:
    """Raise ValueError if the sheet cannot be written, before hours are spent on the answers."""
    try:
        import openpyxl  # noqa: F401
    except ImportError as error:
        raise ValueError("the file for MMBench's server needs openpyxl: pip install 'vtc-cls[eval]'") from error


def _write_spreadsheet(path: Path, header: Sequence[str], rows: list[list[Any]]) -> Path:
    """One sheet with texts as texts: no formulas. What a spreadsheet cannot hold is left out, and logged."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(header)
    changed = 0
    for row in rows:
        cells = []
        for value in row:
            text = NOT_IN_XML.sub("", value)[:LONGEST_CELL] if isinstance(value, str) else value
            changed += text != value
            cell = WriteOnlyCell(sheet, text)
            if isinstance(value, str):
                cell.data_type = "s"  # not a formula, whatever it begins with
            cells.append(cell)
        sheet.append(cells)
    with replacing(path) as made:
        book.save(made)
    if changed:
        logger.warning("%s: %d cells lost characters that a spreadsheet cannot hold", path, changed)
    return path
