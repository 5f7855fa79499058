"""MM-Vet: seven questions over four images."""

from __future__ import annotations

import json
from pathlib import Path

from vtc.tiny.scenes import Scene

QUESTIONS = (  # the image and the question
    ("v1_0.png", "What is the sum on the note?"),
    ("v1_1.jpg", "Which shapes are there?\nName them all.\nBegin at the top."),
    ("v1_2.png", "What is the colour of the star?"),
    ("v1_0.png", "Who would write such a note?"),
    ("v1_4.jpg", "How far is the circle from the square?"),
    ("v1_4.jpg", "What does 你好 mean?"),
    ("v1_2.png", "Tell a story about it."),
)
CAPABILITIES = (["ocr", "math"], ["rec", "spat"], ["rec"], ["know", "gen"], ["spat"], ["ocr", "know"], ["gen", "rec"])


def write(folder: Path, layout: str = "llava") -> None:
    """Write questions, the judge's answers and images into `folder`, in the layout "llava", "paper" or "flat"."""
    data = folder if layout == "flat" else folder / "mm-vet"
    questions = folder / "eval/mm-vet" if layout == "paper" else data
    for made in (questions, data / "images"):
        made.mkdir(parents=True, exist_ok=True)

    lines = [
        {"image": image, "text": text, "category": "conv", "question_id": number}
        for number, (image, text) in enumerate(QUESTIONS)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (questions / "llava-mm-vet.jsonl").write_text(text, encoding="utf-8")
    gold = {
        f"v1_{number}": {"imagename": image, "question": text, "answer": "12<OR>twelve", "imagesource": "made-up"}
        | {"capability": CAPABILITIES[number]}
        for number, (image, text) in enumerate(QUESTIONS)
    }
    (data / "mm-vet.json").write_text(json.dumps(gold, indent=4), encoding="utf-8")
    for number, name in enumerate(sorted({image for image, _ in QUESTIONS})):
        scene = Scene("test", number, (196, 140)).image
        (scene.convert("P") if number == 0 else scene).save(data / "images" / name)
