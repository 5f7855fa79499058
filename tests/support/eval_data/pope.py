"""POPE on COCO: 6 adversarial, 5 random and 6 popular questions about four images; gold lines in another order."""

from __future__ import annotations

from pathlib import Path

from support.eval_data.llava_files import SHORT, scene, shuffled, write_image, write_lines

PLACES = {  # the question file, the folder of the gold files, the images
    "llava": ("pope/llava_pope_test.jsonl", "pope/coco", "pope/val2014"),
    "paper": ("eval/pope/llava_pope_test.jsonl", "pope/output/coco", "coco2014/val2014"),
    "flat": ("llava_pope_test.jsonl", ".", "val2014"),
}
COUNTS = {"adversarial": 6, "random": 5, "popular": 6}  # in the order of the question file and of the ids


def write(folder: Path, layout: str = "llava") -> None:
    """Write the data set below `folder`."""
    questions, gold, images = PLACES[layout]
    lines = []
    for place, (split, count) in enumerate(COUNTS.items()):
        labels = []
        for key in range(1, count + 1):
            number = (key + place) % 4
            image = f"COCO_val2014_{number + 1:012}.jpg"
            label = "yes" if key % 2 else "no"
            of_scene = scene(number).questions
            asked = next(q.text for q in of_scene if q.family == "existence" and q.answer == label)
            text = asked.removesuffix(" ?").capitalize() + " in the image?"
            if key == 3:  # the template of the first version, where a word begins with a vowel
                text = "Is there an object in the imange?"
            line = {"question_id": 10_000_000 * place + key, "image": image, "text": text + SHORT, "category": split}
            lines.append(line)
            labels.append({"question_id": key, "image": image, "text": text, "label": label})
        write_lines(folder / gold / f"coco_pope_{split}.json", shuffled(labels))
    for number in range(4):
        write_image(folder / images / f"COCO_val2014_{number + 1:012}.jpg", number)
    write_lines(folder / questions, lines)
