"""MMBench dev, English and Chinese: eight questions over four images, with the passes that the official files have."""

# ruff: noqa: RUF001  (Chinese punctuation)

from __future__ import annotations

import base64
import csv
import functools
import io
from pathlib import Path

from vtc.tiny.scenes import Scene

COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"),
    *("source", "l2-category", "comment", "split"),
)
FINE = "finegrained_perception (instance-level)"

# Index, question, hint, options, right option, passes, category, l2-category, scene.
QUESTIONS = (
    (11, "Which cup is full?", "", ("left", "right"), 1, 2, "attribute_recognition", FINE, 0),
    (12, "What is shown?\nLook closely.", "A board\twith shapes.", ("one", "two", "three"), 0, 3, "counting", FINE, 1),
    (
        23,
        "Which code prints it?",
        "",
        ("for i in x:\n    print(i)", "print(x)\\nx", "x", "y"),
        2,
        4,
        "code",
        "logic",
        2,
    ),
    (24, "Which note is right?", "", ('"quoted" text', "=1+1", "NaN-like", "#tag"), 1, 4, "ocr", FINE, 3),
    (40, "Which of these is it?", "Shapes.", ("circle", "square", "star", "None"), 0, 3, "other", "logic", 0),
    (41, "Which one is it?", "", ("red", "green", "blue", "all of them"), 3, 3, "attribute_recognition", FINE, 1),
    (42, "Which name fits?", "N/A", ("Ann", "Bob"), 0, 2, "other", "logic", 2),
    (77, "Which side is empty?", "None", ("top", "bottom", "left", "NA"), 2, 3, "counting", FINE, 3),
)
CHINESE = (
    (11, "哪个杯子是满的？", "", ("左边的", "右边的"), 1, 2, "attribute_recognition", FINE, 0),
    (12, "图中有几个物体？\n请仔细看。", "图中有一块板。", ("一个", "两个", "三个"), 0, 3, "counting", FINE, 1),
    (23, "这是什么颜色？", "", ("红色", "绿色", "蓝色", "黄色"), 2, 4, "attribute_recognition", FINE, 2),
    (41, "哪一个是对的？", "", ("红", "绿", "蓝", "以上都是"), 3, 3, "other", "logic", 3),
)


def write(folder: Path, layout: str = "llava") -> None:
    """Write the English file into `folder`, in the layout "llava", "paper" or "flat"."""
    name = "mmbench_dev_20230712.tsv"
    write_tsv(folder / (name if layout == "flat" else f"mmbench/{name}"), rows(QUESTIONS))


def write_cn(folder: Path, layout: str = "llava") -> None:
    """Write the Chinese file."""
    name = "mmbench_dev_cn_20231003.tsv"
    write_tsv(folder / {"llava": f"mmbench_cn/{name}", "paper": f"mmbench/{name}", "flat": name}[layout], rows(CHINESE))


def rows(questions: tuple = QUESTIONS) -> list[dict[str, str]]:
    """The rows of the file: all first passes, then all second ones, and so on."""
    found = []
    for number in range(4):
        for index, question, hint, options, right, passes, category, broad, scene in questions:
            if number < passes:
                turned = options[:passes]  # what stands after these stays in its place
                turned = turned[-number:] + turned[:-number] if number else turned
                texts = (*turned, *options[passes:], *[""] * (4 - len(options)))
                answer = "ABCD"[(right + number) % passes if right < passes else right]
                cells = (index + 10**6 * number, question, hint, *texts, answer, category, image(scene))
                found.append(dict(zip(COLUMNS, (*map(str, cells), "made-up", broad, "", "dev"), strict=True)))
    return found


@functools.cache
def image(number: int) -> str:
    """A scene in base64: a palette PNG, a large PNG, and JPEGs."""
    file = io.BytesIO()
    scene = Scene("test", number, 336 if number == 1 else (196, 140)).image
    if number == 0:
        scene.convert("P").save(file, "PNG")
    else:
        scene.save(file, "PNG" if number == 1 else "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def write_tsv(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows with the columns of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
