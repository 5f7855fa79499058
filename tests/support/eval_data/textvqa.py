"""TextVQA, val 0.5.1: eight questions about four images, so ids repeat; the gold file is in another order.

The same question is asked about two images. Gold questions have capitals. Three lines have no OCR token.
"""

from __future__ import annotations

from pathlib import Path

from support.eval_data.llava_files import SHORT, shuffled, write_image, write_json, write_lines

PLACES = {  # the question file, the gold file, the images
    "llava": (
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        "textvqa/TextVQA_0.5.1_val.json",
        "textvqa/train_images",
    ),
    "paper": (
        "eval/textvqa/llava_textvqa_val_v051_ocr.jsonl",
        "textvqa/TextVQA_0.5.1_val.json",
        "textvqa/train_images",
    ),
    "flat": ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json", "train_images"),
}
QUESTIONS = (  # number of the image, gold question, OCR tokens, people's answers
    (0, "What digit is on the sign?", ("7",), ["7"] * 8 + ["seven", "1"]),
    (0, "What is on the sign?", ("OPEN", "24h", "Café"), ["open"] * 3 + ["Open 24h"] * 4 + ["café"] * 3),
    (1, "What digit is on the sign?", (), ["3"] * 2 + ["three"] * 2 + ["8"] * 6),
    (1, "what is the brand?", ("Coca", "Cola"), ["Coca-Cola"] * 5 + ["coca cola", "coke", "the", "cola.", "pepsi"]),
    (2, "How much is it?", ("$5.00", "3,000"), ["$5.00"] * 9 + ["5"]),
    (2, "Who wrote this?", (), ["unanswerable"] * 6 + ["the"] * 2 + ["A", "..."]),
    (3, "What time is it?", ("it's", "5"), ["it's 5 o'clock"] * 2 + ["5 oclock"] * 2 + ["5"] * 6),
    (3, "Is this a stop sign?", (), ["yes"] * 10),
)


def image_id(number: int) -> str:
    return f"0f00aa00bb00cc0{number}"


def write(folder: Path, layout: str = "llava") -> None:
    """Write the data set below `folder`."""
    questions, gold, images = PLACES[layout]
    lines, entries = [], []
    for number, question, tokens, answers in QUESTIONS:
        key = image_id(number)
        text = f"{question.lower()}\nReference OCR token: {', '.join(tokens)}{SHORT}"
        lines.append({"question_id": key, "image": f"{key}.jpg", "text": text, "category": "default"})
        entries.append(
            {
                "question": question,
                "image_id": key,
                "image_classes": ["Sign"],
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "image_width": 168,
                "image_height": 112,
                "answers": answers,
                "question_tokens": question.lower().rstrip("?").split(),
                "question_id": 34602 + len(entries),
                "set_name": "val",
            }
        )
    for number in range(4):
        write_image(folder / images / f"{image_id(number)}.jpg", number)
    write_lines(folder / questions, lines)
    header = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / gold, header | {"data": shuffled(entries)})
