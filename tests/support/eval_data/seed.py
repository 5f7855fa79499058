"""SEED-Bench: nine questions about images, one id twice, and two about videos."""

from __future__ import annotations

import json
from pathlib import Path

from vtc.tiny.scenes import Scene

TYPES = {"Scene Understanding": 1, "Instances Counting": 5, "Text Understanding": 9, "Action Recognition": 10}
LAST_LINE = "Answer with the option's letter from the given choices directly."

# Id, data id, type, question, answer; the choices are below.
QUESTIONS = (
    ("90001", "1000000_2000000", 1, "What is shown?", "A"),
    ("90002", "1000001_2000001", 1, "Which shape is on top?", "B"),
    ("49914", "1000002_2000002", 5, "How many shapes are there?", "C"),
    ("90004", "1000003_2000003", 5, "How many stars are there?", "D"),
    ("v1", "10_1.mp4", 10, "What happens?", "A"),
    ("90005", "1000000_2000000", 5, "How many squares are there?", "A"),
    ("49914", "1000002_2000002", 9, "Which digit is on the shape?", "B"),
    ("90007", "1000001_2000001", 9, "Which word is on the sign?", "C"),
    ("90008", "1000003_2000003", 9, "What says the note? \"none\"", "D"),
    ("90009", "1000000_2000000", 1, "Is it day or night?", "A"),
    ("v2", "10_2.mp4", 10, "What happens then?", "B"),
)  # fmt: skip
CHOICES = {"choice_a": "one", "choice_b": "two", "choice_c": "3", "choice_d": "None"}


def write(folder: Path, layout: str = "llava") -> None:
    """Write questions, answers and images into `folder`, in the layout "llava", "paper" or "flat"."""
    data = folder if layout == "flat" else folder / "seed_bench"
    questions = folder / "eval/seed_bench" if layout == "paper" else data
    for made in (questions, data / "SEED-Bench-image"):
        made.mkdir(parents=True, exist_ok=True)

    gold, lines = [], []
    for number, (identifier, image, kind, question, answer) in enumerate(QUESTIONS):
        video = identifier.startswith("v")
        gold.append(
            {"answer": answer, **CHOICES, "data_id": image, "data_type": "video" if video else "image"}
            | {"question": question, "question_id": identifier, "question_type_id": kind}
        )
        choices = (f"{letter}. {choice}" for letter, choice in zip("ABCD", CHOICES.values(), strict=True))
        lines.append(
            {
                "image": f"SEED-Bench-video-image/{kind}_{number}.png" if video else f"SEED-Bench-image/{image}",
                "text": "\n".join([question, *choices, LAST_LINE]),
                "category": next(name for name, number in TYPES.items() if number == kind),
                "question_id": identifier if video else int(identifier),
            }
        )
    content = {"questions": gold, "question_type": TYPES}
    (data / "SEED-Bench.json").write_text(json.dumps(content), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (questions / "llava-seed-bench.jsonl").write_text(text, encoding="utf-8")
    for number, name in enumerate(
        sorted({image for _, image, *_ in QUESTIONS if "mp4" not in image})
    ):  # names without extension
        scene = Scene("test", number, (196, 140)).image
        scene = scene.convert("P") if number == 0 else scene
        scene.save(data / "SEED-Bench-image" / name, "JPEG" if number == 2 else "PNG")
