"""Further turns: a cache that holds a compressed conversation, and the caller's whole one."""

import copy

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.models import VOCAB, ids
from support.prompts import STEPS, count_images, detailed, inputs, prompts, spliced
from transformers import DynamicCache, StaticCache

import vtc


@pytest.mark.supported("Caches", "a further turn on a returned cache")
@pytest.mark.parametrize("name", ["one", "left_padded", "unequal_images", "text_only_row"])
def test_second_turn(model, eager, name):
    vtc.configure(model, keep=9)
    rows = prompts(name)
    call = inputs(rows)
    first = model.generate(**call, **detailed())
    question = torch.randint(4, VOCAB, (len(rows), 4), generator=torch.Generator().manual_seed(5))
    whole = torch.cat([first.sequences, question], 1)
    mask = torch.cat([call["attention_mask"], torch.ones(len(rows), STEPS + 4, dtype=torch.long)], 1)
    vtc.configure(model, keep=4)  # the cache knows better
    second = model.generate(input_ids=whole, attention_mask=mask, past_key_values=first.past_key_values, **detailed())
    assert torch.equal(second.sequences[:, : whole.shape[1]], whole)
    answered = [row + whole[i, call["input_ids"].shape[1] :].tolist() for i, row in enumerate(rows)]
    for i, (embeds, _) in enumerate(spliced(eager, answered, call["pixel_values"], 9)):
        new, logits = golden.decode(eager, embeds, STEPS)
        assert second.sequences[i, whole.shape[1] :].tolist() == new
        golden.close(torch.stack(second.logits)[:, i], logits)


@pytest.mark.supported("Caches", "further turns with new images")
@pytest.mark.parametrize("first_turn", ["one", "text"])
def test_further_turns_with_new_images(model, eager, first_turn):
    """With the caller's own cache, which `generate()` does not return."""
    vtc.configure(model, keep=9)
    row = prompts("one")[0] if first_turn == "one" else ids(6)
    pixels = models.images(count_images(row))
    cache = DynamicCache(config=model.config)
    for turn in range(3):
        new_image = {"pixel_values": pixels if turn == 0 else models.images(1, seed=turn)}
        pixels = new_image["pixel_values"] if turn == 0 else torch.cat([pixels, new_image["pixel_values"]])
        call = {**models.batch([row]), **(new_image if turn or first_turn == "one" else {})}
        out = model.generate(**call, past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
        assert out[0, : len(row)].tolist() == row
        new, _ = golden.decode(eager, spliced(eager, [row], pixels, 9)[0][0], STEPS)
        assert out[0, len(row) :].tolist() == new
        row = out[0].tolist() + ids(2, "image", 3, seed=9 + turn)


@pytest.mark.refused(
    "a further turn without the whole conversation", instead="pass what `generate()` returned, then the new question"
)
def test_second_turn_that_cannot_be_right(model, stock):
    vtc.configure(model, keep=9)
    rows = prompts("one")
    call = inputs(rows)
    first = model.generate(**call, **detailed())
    cache = first.past_key_values
    with pytest.raises(ValueError, match="whole conversation"):
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=copy.deepcopy(cache), max_new_tokens=2)
    with pytest.raises(ValueError, match="whole conversation"):
        model.generate(
            input_ids=first.sequences,
            attention_mask=torch.ones(1, len(rows[0]) + 2),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=2,
        )
    whole = models.batch([first.sequences[0].tolist() + ids("image", 2)])
    other = whole["input_ids"].clone()
    other[0, len(rows[0]) + 1] += 1
    with pytest.raises(ValueError, match="begins with other tokens"):
        model.generate(other, pixel_values=models.images(1), past_key_values=copy.deepcopy(cache), max_new_tokens=2)
    uncompressed = stock.generate(**call, **detailed()).past_key_values
    with pytest.raises(ValueError, match="not compressed"):
        model.generate(**whole, pixel_values=models.images(1), past_key_values=uncompressed, max_new_tokens=2)


def test_a_conversation_keeps_its_settings(model, eager, caplog):
    """A new image is compressed as the conversation began, in spite of other settings, and a warning says so."""
    vtc.configure(model, keep=9)
    row = prompts("one")[0]
    cache = DynamicCache(config=model.config)
    turn = dict(past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
    row = model.generate(**models.batch([row]), pixel_values=models.images(1), **turn)[0].tolist()
    vtc.configure(model, keep=4)
    row += ids(2, "image", 3, seed=9)
    with caplog.at_level("WARNING", "vtc"):
        out = model.generate(**models.batch([row]), pixel_values=models.images(1, seed=1), **turn)
    assert "began with" in caplog.text
    pixels = torch.cat([models.images(1), models.images(1, seed=1)])
    new, _ = golden.decode(eager, spliced(eager, [row], pixels, 9)[0][0], STEPS)
    assert out[0, len(row) :].tolist() == new


def test_uncompressed_cache_is_continued_as_stock(model, stock):
    vtc.configure(model, keep=9)
    call = inputs(prompts("one"))
    first = stock.generate(**call, **detailed())
    whole = models.batch([[*first.sequences[0].tolist(), 5, 6]])
    ours, theirs = (
        m.generate(**whole, past_key_values=copy.deepcopy(first.past_key_values), max_new_tokens=4, do_sample=False)
        for m in (model, stock)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.supported("Caches", "a cache that was reset")
@pytest.mark.parametrize("first", ["generate", "forward"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_a_cache_that_was_reset_forgets(model, first, static):
    """Text of the next conversation, and a further turn of it, are as with a cache of their own."""
    vtc.configure(model, keep=9)
    text = model.config.get_text_config()

    def new():
        return StaticCache(text, max_cache_len=160) if static else DynamicCache(config=text)

    cache, call = new(), inputs(prompts("one"))
    if first == "generate":
        model.generate(**call, past_key_values=cache, max_new_tokens=4, do_sample=False)
    else:
        model(**call, past_key_values=cache)
    cache.reset()

    def two_turns(cache):
        ids_ = torch.tensor([ids(60, seed=9)])
        out = model.generate(ids_, past_key_values=cache, max_new_tokens=4, do_sample=False)
        whole = torch.cat([out, torch.tensor([ids(40, seed=10)[1:]])], 1)
        return model.generate(whole, past_key_values=cache, max_new_tokens=6, do_sample=False)

    assert torch.equal(two_turns(cache), two_turns(new()))


def test_a_cache_pruned_inside_and_reset_takes_a_prompt_pruned_before(model):
    cache, call = DynamicCache(config=model.config.get_text_config()), inputs(prompts("one"))
    vtc.configure(model, keep=9, prune_layer=1)
    model.generate(**call, past_key_values=cache, max_new_tokens=2)
    cache.reset()
    vtc.configure(model, prune_layer=0)
    again = model.generate(**call, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, model.generate(**call, max_new_tokens=4, do_sample=False))


def test_a_mask_of_one_row_in_a_further_turn(model):
    vtc.configure(model, keep=9)
    rows = [ids(3, "image", 5), ids(3, "image", 5, seed=1)]
    call = inputs(rows)
    call["attention_mask"] = torch.ones(1, len(rows[0]), dtype=torch.long)
    first = model.generate(**call, **detailed())
    whole = torch.cat([first.sequences, torch.full((2, 3), 7)], 1)
    masks = (torch.ones(rows, whole.shape[1], dtype=torch.long) for rows in (1, 2))
    caches = (first.past_key_values, copy.deepcopy(first.past_key_values))
    one, two = (
        model.generate(whole, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
        for mask, cache in zip(masks, caches, strict=True)
    )
    assert torch.equal(one, two)
