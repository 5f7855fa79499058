"""Prompts with several lengths and numbers of images, and checks of what `generate()` returns for them."""

import torch

from support import models
from support.golden import llava as golden
from support.models import IMAGE, TOKENS, ids

LAYERS = (2, 3, 4)  # of 6; the feature layer is hidden_states[-2], the output of layer 4
STEPS = 7

# Prompts (rows of a batch) with several lengths and several numbers of images, and none.
PROMPTS = {
    "one": [[3, "image", 5]],
    "image_first_and_last": [["image", 4, "image"]],
    "left_padded": [[3, "image", 5], [2, "image", 11], [9, "image", 2]],
    "several_images": [[2, "image", 3, "image", "image", 4]],
    "unequal_images": [[2, "image", 3], [1, "image", "image", 6], [4, "image", 2, "image", 1, "image", 2]],
    "unequal_same_length": [[2, "image", 3 + TOKENS], [2, "image", "image", 3]],
    "text_only_row": [[2, "image", 3], [8], [5, "image", 7]],
}


def prompts(name):
    return [ids(*parts, seed=i) for i, parts in enumerate(PROMPTS[name])]


def count_images(row):
    return row.count(IMAGE) // TOKENS


def inputs(rows):
    return {**models.batch(rows), "pixel_values": models.images(sum(map(count_images, rows)))}


def spliced(eager, rows, pixels, keep):
    """Golden embeddings and short ids of each row."""
    pixels, result = list(pixels), []
    for row in rows:
        own, pixels = pixels[: count_images(row)], pixels[count_images(row) :]
        with torch.no_grad():
            result.append(golden.splice(eager, row, own, keep, LAYERS, TOKENS))
    return result


def check_generated(out, call, eager, rows, keep):
    """`out`: generate()'s dict with scores. Full prompts first, then the golden tokens, from the golden logits."""
    length = call["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], call["input_ids"])
    for i, (embeds, _) in enumerate(spliced(eager, rows, call.get("pixel_values", []), keep)):
        new, logits = golden.decode(eager, embeds, STEPS)
        assert out.sequences[i, length:].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


def detailed(**kwargs):
    return dict(max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs)
