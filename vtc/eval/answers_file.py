"""Score answers that were made elsewhere: a file of answers as LLaVA's programs write it."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from vtc.eval.files import DataError, read_jsonl
from vtc.eval.task import Task


def read_answers(task: Task, path: Path, partial: bool = False) -> dict[int, str]:
    """The answers of a file, by the question's line.

    An entry belongs to the question with its `question_id` and `prompt`; the prompt is not compared where the id is the
    only one.

    Raises
    ------
    DataError
        If an entry belongs to no question or to one that has an answer already, or questions have no answer and not
        `partial`.
    """
    by_prompt: dict[tuple[str, str], list[int]] = defaultdict(list)
    by_id: dict[str, list[int]] = defaultdict(list)
    for question in task.questions:
        prompt = task.llava_line(question, "", "")["prompt"]
        by_prompt[str(question.id), prompt].append(question.line)
        by_id[str(question.id)].append(question.line)
    answers: dict[int, str] = {}
    used: Counter[tuple[str, str]] = Counter()
    for number, entry in enumerate(read_jsonl(path, ("question_id", "text")), start=1):
        name, where = str(entry["question_id"]), f"line {number} of {path}"
        key = name, str(entry.get("prompt", ""))
        lines = by_id[name] if len(by_id[name]) == 1 else by_prompt[key]
        if not lines:
            raise DataError(f"{where} answers question {name}, which {task.name} does not ask; is it this task's file?")
        key = (name, "") if len(by_id[name]) == 1 else key
        if used[key] == len(lines):
            raise DataError(f"{where} answers question {name} once more; two runs were put into one file")
        answers[lines[used[key]]] = entry["text"]
        used[key] += 1
    if len(answers) < len(task.questions) and not partial:
        missing = next(question for question in task.questions if question.line not in answers)
        raise DataError(
            f"{path} answers {len(answers)} of the {len(task.questions)} questions of {task.name}; the first one "
            f"without an answer is {missing.id}. A chunk was lost; score what is there with --partial"
        )
    return answers
