"""`forward()` against the golden path: rows without a mask, gradients, decoding by hand, positions."""

import copy

import pytest
import torch
from support.golden import llava as golden
from support.models import IMAGE, TOKENS
from support.prompts import LAYERS, check_generated, count_images, detailed, inputs, prompts, spliced
from test_forward_columns import row_places

import vtc


@pytest.mark.supported("Prompts", "no mask, also where rows become unequally short")
def test_rows_that_become_unequal_need_no_mask(model, eager):
    vtc.configure(model, keep=9)
    rows = prompts("unequal_same_length")
    call = inputs(rows)
    del call["attention_mask"]
    check_generated(model.generate(**call, **detailed()), call, eager, rows, 9)
    with torch.no_grad():
        logits = model(**call).logits
    assert logits.shape[:2] == call["input_ids"].shape
    for i, (where, embeds) in enumerate(row_places(eager, rows, call["pixel_values"])):
        golden.close(logits[i], golden.logits(eager, embeds).detach()[where])


@pytest.mark.parametrize("ragged", ["left", "right"])
@pytest.mark.parametrize("name", ["one", "left_padded", "unequal_images", "unequal_same_length", "text_only_row"])
def test_labels_and_gradients(model, stock, name, ragged):
    vtc.configure(model, keep=9)
    rows = prompts(name)
    call = inputs(rows)
    labels = call["input_ids"].masked_fill((call["attention_mask"] == 0) | (call["input_ids"] == IMAGE), -100)
    if ragged == "right":  # as for training
        for i, row in enumerate(rows):
            shift = call["input_ids"].shape[1] - len(row)
            for tensor in (call["input_ids"], call["attention_mask"], labels):
                tensor[i] = tensor[i].roll(-shift)
    else:  # stock predicts a row's first token from its padding; that is no term of the row alone
        for i, row in enumerate(rows):
            labels[i, call["input_ids"].shape[1] - len(row)] = -100
    model.requires_grad_(True)
    out = model(**call, labels=labels)
    out.loss.backward()

    reference = golden.eager(stock).requires_grad_(True)
    total, terms, pixels = 0, 0, list(call["pixel_values"])
    for row in rows:
        own, pixels = pixels[: count_images(row)], pixels[count_images(row) :]
        embeds, short = golden.splice(reference, row, own, 9, LAYERS, TOKENS)
        wanted = [-100 if token == IMAGE else token for token in short]
        loss, count = golden.loss(reference, embeds, wanted)
        total, terms = total + loss, terms + count
    (total / terms).backward()
    golden.close(out.loss.detach(), (total / terms).detach())
    compared = set()
    for (key, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if key.endswith("k_proj.bias"):
            continue  # softmax does not see it: its gradient is zero but for rounding
        if theirs.grad is not None and theirs.grad.abs().max() > 0:
            scale = theirs.grad.abs().max()
            golden.close(ours.grad / scale, theirs.grad / scale)
            compared.add(key.split(".")[1])
    assert compared >= {"vision_tower", "multi_modal_projector", "language_model"}


def test_new_tokens_need_no_mask_where_nothing_is_padded(model, eager):
    """forward() with the cache it returned; images on top of that cache are refused."""
    vtc.configure(model, keep=9)
    rows = prompts("one")
    call = inputs(rows)
    with torch.no_grad():
        out = model(**call)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        step = model(input_ids=token, past_key_values=copy.deepcopy(out.past_key_values))
        embeds, _ = spliced(eager, rows, call["pixel_values"], 9)[0]
        new, logits = golden.decode(eager, embeds, 2)
        assert token.tolist() == [[new[0]]]
        golden.close(step.logits[0, -1], logits[1])
        with pytest.raises(ValueError, match="whole conversation"):
            model(**call, past_key_values=out.past_key_values)


@pytest.mark.supported("generate()", "`position_ids` of the full prompt")
def test_given_positions_close_up(model, eager):
    vtc.configure(model, keep=9)
    rows = prompts("several_images")
    call = inputs(rows)
    positions = torch.arange(len(rows[0]))[None]
    out = model.generate(**call, position_ids=positions, **detailed())
    check_generated(out, call, eager, rows, 9)
