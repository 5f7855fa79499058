"""Masks over image tokens, and samples packed in one row, as the stock model treats them."""

import itertools

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.models import IMAGE, TOKENS, ids
from support.prompts import LAYERS, STEPS, detailed
from test_forward_columns import kept_patches, places

import vtc

KEEP = 9
ROW = ids(6, "image", 7)
START = 7  # the column of the first placeholder
HIDDEN = {  # columns of ROW
    "the whole image": range(START, START + TOKENS),
    "a part of the image": range(START, START + 20),
    "every other placeholder": range(START, START + TOKENS, 2),
    "text in the middle": range(2, 4),
    "text and a part of the image": [*range(4, START + 12), START + TOKENS + 1],
}


def masked_call(name, padding=0):
    """ROW with padding on the left, and the mask that hides columns."""
    call = models.batch([[models.PAD] * padding + ROW])
    call["attention_mask"][0, :padding] = 0
    call["attention_mask"][0, [padding + column for column in HIDDEN[name]]] = 0
    return call | {"pixel_values": models.images(1)}


class Short:
    """The golden short prompt of ROW: embeddings, which of its tokens are seen, where each column stands in it."""

    def __init__(self, eager, name, keep):
        self.model, pixels = eager, models.images(1)
        with torch.no_grad():
            self.embeds, _ = golden.splice(eager, ROW, pixels, keep, LAYERS, TOKENS)
        kept = kept_patches(eager, pixels, keep)
        self.places = places(ROW, kept)
        own = [column for column in range(len(ROW)) if self.is_kept(column, kept[0][1])]
        self.seen = [column not in HIDDEN[name] for column in own]

    @staticmethod
    def is_kept(column, patches):
        return ROW[column] != IMAGE or column - START in patches

    @torch.no_grad()
    def logits(self, new=(), count=False):
        """Logits of the short prompt and the `new` ids. `count`: positions count what is seen, as in generate()."""
        seen = torch.tensor([self.seen + [True] * len(new)])
        embeds = torch.cat([self.embeds, self.model.get_input_embeddings()(torch.tensor([[*new]]).long())], 1)
        positions = (seen.long().cumsum(1) - 1).clamp(min=0) if count else torch.arange(seen.shape[1])[None]
        text = self.model.model.language_model
        out = text(inputs_embeds=embeds, attention_mask=seen.long(), position_ids=positions, use_cache=False)
        return self.model.lm_head(out.last_hidden_state)[0]


@pytest.fixture(params=[KEEP, TOKENS], ids=["vtc", "all"])
def keep(request):
    """With all patches kept the model is the stock one, which shows that the oracle is right."""
    return request.param


@pytest.mark.supported("Prompts", "`attention_mask` that hides an image, a part of it, or text")
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", HIDDEN)
def test_generate_honours_a_mask_over_image_tokens(model, eager, name, keep, padding):
    vtc.configure(model, keep=keep)
    out = model.generate(**masked_call(name, padding), **detailed())
    short, new = Short(eager, name, keep), []
    for step in range(STEPS):
        expected = short.logits(new, count=True)[-1]
        golden.close(out.logits[step][0], expected)
        new.append(int(expected.argmax()))
    assert out.sequences[0, padding + len(ROW) :].tolist() == new


@pytest.mark.supported("forward()", "`attention_mask` that hides an image, a part of it, or text")
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", HIDDEN)
@torch.no_grad()
def test_forward_honours_a_mask_over_image_tokens(model, eager, name, keep, padding):
    """Positions count hidden tokens, too, as in the stock model's forward()."""
    vtc.configure(model, keep=keep)
    call = masked_call(name, padding)
    logits, short = model(**call).logits[0, padding:], Short(eager, name, keep)
    assert len(logits) == len(ROW)
    visible = [column for column in range(len(ROW)) if column not in HIDDEN[name] and ROW[column] != IMAGE]
    golden.close(logits[visible], short.logits()[[short.places[column] for column in visible]])


def test_what_is_hidden_matters(eager):
    """Guards the guards: were these alike, the tests above could not fail."""
    last = {name: Short(eager, name, KEEP).logits()[-1] for name in HIDDEN}
    with torch.no_grad():
        last["nothing"] = golden.logits(eager, Short(eager, "text in the middle", KEEP).embeds)[-1]
    for a in last:
        for b in last:
            assert a == b or (last[a] - last[b]).abs().max() > 1e-2, (a, b)


@pytest.mark.supported(
    "Training", "samples packed in a row: `position_ids` that start again, and no mask; `prune_layer=0`"
)
@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_packed_samples_do_not_see_each_other(model, eager, keep, count):
    """Rows of equal lengths become unequally short."""
    vtc.configure(model, keep=keep)
    samples = [[ids(2, "image", 3), ids(4, "image", 2, seed=1)], [ids(2, "image", 3, seed=2)]]
    samples[1].append(ids(sum(map(len, samples[0])) - len(samples[1][0]) - 1, seed=3))
    rows, pixels = samples[:count], models.images(3)[: 1 + count]
    call = {
        "input_ids": torch.tensor([[*itertools.chain(*row)] for row in rows]),
        "position_ids": torch.tensor([[i for sample in row for i in range(len(sample))] for row in rows]),
        "pixel_values": pixels,
        "use_cache": False,
    }
    logits, images = model(**call).logits, iter(pixels)
    assert logits.shape[:2] == call["input_ids"].shape
    for found, row in zip(logits, rows, strict=True):
        for sample in row:
            own = [next(images)] if IMAGE in sample else []
            embeds, _ = golden.splice(eager, sample, own, keep, LAYERS, TOKENS)
            where = places(sample, kept_patches(eager, own, keep))
            golden.close(found[: len(sample)], golden.logits(eager, embeds)[where])
            found = found[len(sample) :]


@pytest.mark.supported("Training", "the loss of packed samples")
@torch.no_grad()
def test_the_loss_of_packed_samples_is_that_of_each_alone(model, eager):
    vtc.configure(model, keep=KEEP)
    samples, pixels = [ids(2, "image", 3), ids(4, "image", 2, seed=1)], models.images(2)
    labels = [[-100, *(-100 if token == IMAGE else token for token in sample[1:])] for sample in samples]
    call = {
        "input_ids": torch.tensor([[*itertools.chain(*samples)]]),
        "position_ids": torch.tensor([[i for sample in samples for i in range(len(sample))]]),
        "labels": torch.tensor([[*itertools.chain(*labels)]]),
    }
    total, count = 0, 0
    for sample, own, image in zip(samples, labels, pixels, strict=True):
        embeds, _ = golden.splice(eager, sample, [image], KEEP, LAYERS, TOKENS)
        log_p, where = golden.logits(eager, embeds).log_softmax(-1), places(sample, kept_patches(eager, [image]))
        total -= sum(log_p[where[j - 1], label] for j, label in enumerate(own) if label != -100)
        count += sum(label != -100 for label in own)
    golden.close(model(**call, pixel_values=pixels, use_cache=False).loss, total / count)


@pytest.mark.refused(
    "samples packed in a row, with `prune_layer` > 0 or a `schedule`", instead="one sample in each row, or `keep`"
)
@pytest.mark.parametrize("positions", ["packed", "original"])
@pytest.mark.parametrize(
    "settings",
    [
        {"prune_layer": 1, "keep": KEEP},
        {"schedule": [(0, KEEP), (1, 4)]},
        {"method": "fastv", "prune_layer": 1, "keep": KEEP},
        {"method": "fastv", "prune_layer": 1, "keep": KEEP, "reselect": True},
        {"method": "dart", "prune_layer": 1, "keep": KEEP},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
@torch.no_grad()
def test_packed_samples_cannot_be_pruned_inside_the_language_model(model, settings, positions):
    """They would see each other; a row of one sample has the mask of any other."""
    vtc.configure(model, **settings, positions=positions)
    samples = [ids(2, "image", 3), ids(4, "image", 2, seed=1)]
    call = {
        "input_ids": torch.tensor([[*itertools.chain(*samples)]]),
        "position_ids": torch.tensor([[i for sample in samples for i in range(len(sample))]]),
        "pixel_values": models.images(2),
        "use_cache": False,
    }
    with pytest.raises(ValueError, match=r"pack several samples in a row, .* pass one sample in each row"):
        model(**call)
    row = torch.tensor([samples[0]])
    alone = {"input_ids": row, "pixel_values": models.images(1), "use_cache": False}
    where = torch.arange(row.shape[1])[None]
    golden.close(model(**alone, position_ids=where).logits, model(**alone).logits)


@pytest.mark.parametrize("offset", [0, 26, 27, 28])
@torch.no_grad()
def test_positions_may_start_anywhere(model, offset):
    """Rows that become unequally short get padding, which is no part of a sample, wherever that begins."""
    vtc.configure(model, keep=9)
    rows = [ids("image", "image", 3), ids("image", 3 + TOKENS, seed=1)]
    call = dict(input_ids=torch.tensor(rows), pixel_values=models.images(3), use_cache=False)
    positions = torch.arange(len(rows[0]))[None].expand(2, -1) + offset
    golden.close(model(**call, position_ids=positions).logits, model(**call).logits)
