"""ScienceQA, test: eight questions; four have an image, in four modes; hints, newlines, two to five choices."""

from __future__ import annotations

from pathlib import Path

from support.eval_data.llava_files import shuffled, write_image, write_json

PLACES = {  # the question file, the folder of the two gold files, the images
    "llava": ("scienceqa/llava_test_CQM-A.json", "scienceqa", "scienceqa/images/test"),
    "paper": ("eval/scienceqa/llava_test_CQM-A.json", "scienceqa", "scienceqa/test"),
    "flat": ("llava_test_CQM-A.json", ".", "test"),
}
PROBLEMS = (  # id, mode of the image, hint, question, choices, answer
    ("7001", "RGB", "Figure: a made-up moss.", "Which part holds water?", ("the stem", "the cup"), 1),
    ("7002", None, "", "Which word is a noun?", ("kettle", "slowly", "above"), 0),
    ("7003", "P", "", "what shape is the object ?", ("a circle", "a star", "a cross", "a ring"), 2),
    ("7004", "RGBA", "A note.\nIt has two lines.", "is it blue ?", ("yes", "no"), 1),
    ("7005", None, "Select the best estimate.", "How warm is tea?", ("60°C", "60°F"), 0),
    ("7010", "L", "", "What is the ratio?", ("0:4", "4:0", "2:2", "1:3", "3:1"), 4),
    ("7011", None, "", "Which is in order?\nlamp - lawn", ("lane", "late", "law", "leaf"), 1),
    ("7012", None, "", "Who said “Ça ira”?", ("nobody", "somebody", "everybody"), 2),
)


def write(folder: Path, layout: str = "llava") -> None:
    """Write the data set below `folder`."""
    questions, gold, images = PLACES[layout]
    entries, problems = [], []
    for number, (key, mode, hint, question, choices, answer) in enumerate(PROBLEMS):
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False))
        asked = ("<image>\n" if mode else "") + (f"Context: {hint}\n" if hint else "") + question + options
        entry = {
            "id": key,
            "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "ABCDE"[answer]}],
        }
        if mode:
            write_image(folder / images / key / "image.png", number, mode)
            entry = {"id": key, "image": f"{key}/image.png", "conversations": entry["conversations"]}
        entries.append(entry)
        problems.append((key, _problem(question, choices, answer, hint, "image.png" if mode else None, "test")))
    train = _problem("Which one?", ("this", "that"), 0, "", None, "train")
    write_json(folder / questions, entries, indent=2)
    write_json(folder / gold / "problems.json", dict(shuffled([*problems, ("1", train)])))
    splits = {"train": ["1"], "val": [], "test": [key for key, *_ in PROBLEMS], "minitest": ["7001"]}
    write_json(folder / gold / "pid_splits.json", splits)


def _problem(
    question: str, choices: tuple[str, ...], answer: int, hint: str, image: str | None, split: str
) -> dict[str, object]:
    return {
        "question": question,
        "choices": list(choices),
        "answer": answer,
        "hint": hint,
        "image": image,
        "task": "closed choice",
        "grade": "grade3",
        "subject": "natural science",
        "topic": "plants",
        "category": "Invented plants",
        "skill": "Name the parts",
        "lecture": "",
        "solution": "",
        "split": split,
    }
