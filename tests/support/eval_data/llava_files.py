"""Writing what LLaVA's question files and their gold files consist of."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vtc.tiny.scenes import Question, Scene

SHORT = "\nAnswer the question using a single word or phrase."
SHAPES = ((168, 112), (112, 168), (112, 112), (196, 84))  # of the images: not all are square


@functools.cache
def scene(number: int) -> Scene:
    """The scene of the image with this number."""
    return Scene("test", number, SHAPES[number % len(SHAPES)])


def question_of(number: int, family: str) -> Question:
    """A question of the scene, of another family if it has none of this one."""
    questions = scene(number).questions
    return next((question for question in questions if question.family == family), questions[0])


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")


def write_lines(path: Path, entries: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def write_image(path: Path, number: int, mode: str = "RGB") -> None:
    """The scene's image, in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = scene(number).image.convert(mode)
    if mode == "RGBA":
        image.putalpha(200)
    image.save(path)


def shuffled(entries: list[Any]) -> list[Any]:
    """The entries in another order, always the same."""
    return random.Random(1).sample(entries, len(entries))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file, or the list of objects of a file with one a line, in place or to what `change` returns."""
    if path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        content = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        changed = change(content)
        write_lines(path, content if changed is None else changed)
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        changed = change(content)
        write_json(path, content if changed is None else changed)
