"""GQA, test-dev balanced: twelve questions about four images; the gold file is in another order."""

from __future__ import annotations

from pathlib import Path

from support.eval_data.llava_files import SHORT, question_of, shuffled, write_image, write_json, write_lines

PLACES = {  # the question file, the gold file, the images
    "llava": (
        "gqa/llava_gqa_testdev_balanced.jsonl",
        "gqa/data/testdev_balanced_questions.json",
        "gqa/data/images",
    ),
    "paper": (
        "eval/gqa/llava_gqa_testdev_balanced.jsonl",
        "gqa/eval/testdev_balanced_questions.json",
        "gqa/images",
    ),
    "flat": ("llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json", "images"),
}
TYPES = {  # structural, semantic, detailed
    "existence": ("verify", "obj", "exist"),
    "attribute": ("query", "attr", "categoryThat"),
    "relation": ("choose", "rel", "relChooser"),
    "counting": ("query", "global", "count"),
    "digit": ("compare", "cat", "digit"),
}


def write(folder: Path, layout: str = "llava") -> None:
    """Write the data set below `folder`."""
    questions, gold, images = PLACES[layout]
    lines, answers = [], []
    for number in range(4):
        image = f"n{990001 + number}"
        write_image(folder / images / f"{image}.jpg", number)
        for family in ("existence", "attribute", "relation"):
            asked = question_of(number, family)
            key = str(900000001 + len(lines))
            text = asked.text + SHORT
            lines.append({"question_id": key, "image": f"{image}.jpg", "text": text, "category": "default"})
            structural, semantic, detailed = TYPES[asked.family]
            entry = {
                "semantic": [
                    {"operation": "select", "argument": "object (1)", "dependencies": []},
                    {"operation": structural, "argument": "?", "dependencies": [0]},
                ],
                "entailed": [],
                "equivalent": [key],
                "question": asked.text,
                "imageId": image,
                "isBalanced": True,
                "groups": {"global": None, "local": f"13-{asked.family}"},
                "answer": asked.answer,
                "semanticStr": f"select: object (1)->{structural}: ? [0]",
                "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
                "types": {"detailed": detailed, "semantic": semantic, "structural": structural},
                "fullAnswer": f"The answer is {asked.answer}.",
            }
            answers.append((key, entry))
    write_lines(folder / questions, lines)
    write_json(folder / gold, dict(shuffled(answers)))
