"""Further turns: a cache that holds a compressed conversation, and the caller's whole one."""

import copy
import functools
import pickle

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.models import TOKENS, VOCAB, ids
from support.prompts import LAYERS, STEPS, count_images, detailed, inputs, prompts, spliced
from transformers import DynamicCache, MistralConfig, StaticCache

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


@pytest.mark.parametrize("keep", [9, 36])
def test_a_caller_may_use_its_tensors_again(model, keep):
    """With all 36 tokens nothing is shortened, and what the cache remembers must not be the caller's own memory."""
    vtc.configure(model, keep=keep)
    answers = []
    for overwritten in (False, True):
        call = inputs(prompts("one"))
        cache = DynamicCache(config=model.config)
        first = model.generate(**call, past_key_values=cache, max_new_tokens=3, do_sample=False)
        filled = model(**inputs(prompts("one")) | {"input_ids": call["input_ids"]})
        if overwritten:
            call["input_ids"].fill_(5)
            call["attention_mask"].fill_(0)
        more = {"pixel_values": models.images(1, seed=3), "max_new_tokens": 3, "do_sample": False}
        whole = models.batch([first[0].tolist() + ids(2, "image", 3, seed=9)])
        answers.append(model.generate(**whole, past_key_values=cache, **more))
        whole = models.batch([prompts("one")[0] + ids(2, "image", 3, seed=9)])
        answers.append(model.generate(**whole, past_key_values=filled.past_key_values, **more))
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[3])


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
    whole = first.sequences[:, : len(rows[0]) + STEPS - 1]  # all that the cache holds, and nothing new
    for wrong in (torch.tensor([[5, 6, 7]]), whole):
        with pytest.raises(ValueError, match="for a further turn pass the whole conversation"):
            model.generate(input_ids=wrong, past_key_values=copy.deepcopy(cache), max_new_tokens=2)
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


@pytest.mark.parametrize("now", [{"keep": 4}, {"keep": 4, "prune_layer": 1}], ids=str)
def test_a_conversation_keeps_its_settings(model, eager, caplog, now):
    """A new image is compressed as the conversation began, in spite of other settings, and a warning says so."""
    vtc.configure(model, keep=9)
    row = prompts("one")[0]
    cache = DynamicCache(config=model.config)
    turn = dict(past_key_values=cache, max_new_tokens=STEPS, do_sample=False)
    row = model.generate(**models.batch([row]), pixel_values=models.images(1), **turn)[0].tolist()
    vtc.configure(model, **now)
    row += ids(2, "image", 3, seed=9)
    with caplog.at_level("WARNING", "vtc"):
        out = model.generate(**models.batch([row]), pixel_values=models.images(1, seed=1), **turn)
    assert "began with {'method': 'vtc-cls', 'keep': 9" in caplog.text
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


def two_turns(model, rows, order=None, question=4, **more):
    """The first turn of `rows`, and what a further turn on its cache needs, with its rows in another order."""
    call = inputs(rows)
    first = model.generate(**call, **detailed(**more))
    asked = torch.randint(4, VOCAB, (len(rows), question), generator=torch.Generator().manual_seed(5))
    ids_ = torch.cat([first.sequences, asked], 1)
    mask = torch.cat([call["attention_mask"], torch.ones(len(rows), STEPS + question, dtype=torch.long)], 1)
    order = list(range(len(rows))) if order is None else order
    return first.past_key_values, {"input_ids": ids_[order], "attention_mask": mask[order]}, call


def check_turn(out, turn, eager, pixels, keep=9):
    """`out`: generate()'s dict. The golden tokens of each conversation, whose padding is left out."""
    pixels = list(pixels)
    for i, (row, mask) in enumerate(zip(turn["input_ids"], turn["attention_mask"], strict=True)):
        row = row[mask.bool()].tolist()
        own, pixels = pixels[: count_images(row)], pixels[count_images(row) :]
        with torch.no_grad():
            embeds, _ = golden.splice(eager, row, own, keep, LAYERS, TOKENS)
        new, logits = golden.decode(eager, embeds, STEPS)
        assert out.sequences[i, turn["input_ids"].shape[1] :].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


def pixels_of(rows, pixels, order):
    parts = pixels.split([count_images(row) for row in rows])
    return torch.cat([parts[i] for i in order])


@pytest.mark.supported("Caches", "rows reordered, selected or repeated (`batch_select_indices`)")
@pytest.mark.parametrize("order", [[1, 2, 0], [2], [0, 0, 2, 1]])
def test_rows_of_a_cache_may_be_in_another_order(model, eager, order):
    vtc.configure(model, keep=9)
    rows = prompts("unequal_images")
    cache, turn, call = two_turns(model, rows, order)
    cache.batch_select_indices(torch.tensor(order))
    out = model.generate(**turn, past_key_values=cache, **detailed())
    check_turn(out, turn, eager, pixels_of(rows, call["pixel_values"], order))


@pytest.mark.supported("Caches", "an image read once by `forward()`, for several questions (`batch_repeat_interleave`)")
@torch.no_grad()
def test_one_image_for_several_questions(model, eager):
    vtc.configure(model, keep=9)
    prefix = ids(2, "image", 2)
    cache = DynamicCache(config=model.config.text_config)
    model(**models.batch([prefix]), pixel_values=models.images(1), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    turn = models.batch([prefix + ids(3, seed=1)[1:], prefix + ids(3, seed=2)[1:]])
    out = model.generate(**turn, past_key_values=cache, **detailed())
    check_turn(out, turn, eager, models.images(1).repeat(2, 1, 1, 1))


def test_rows_of_another_conversation_are_refused(model):
    vtc.configure(model, keep=9)
    cache, turn, _ = two_turns(model, prompts("one"))
    for layer in cache.layers:
        layer.keys = layer.keys + 1
    with pytest.raises(ValueError, match=r"row 0 of the cache is none of the 1 row\(s\)"):
        model.generate(**turn, past_key_values=cache, **detailed())


@pytest.mark.supported("Caches", "a conversation goes on after its block has ended, and after `vtc.disable`")
@pytest.mark.parametrize("options", [{}, {"prune_layer": 1, "kv": "full"}], ids=["before", "inside"])
@pytest.mark.parametrize("after", ["block", "disable", "other settings"])
def test_a_conversation_goes_on_as_it_began(stock, model, after, options):
    rows = prompts("left_padded")
    vtc.configure(model, keep=9, **options)
    cache, turn, _ = two_turns(model, rows)
    expected = model.generate(**turn, past_key_values=copy.deepcopy(cache), **detailed())
    if after == "disable":
        vtc.disable(model)
        other = model
    elif after == "block":
        with vtc.compress(stock, keep=9, **options):
            cache, turn, _ = two_turns(stock, rows)
        other = stock
    else:
        vtc.configure(model, keep=4, method="random", prune_layer=0)
        other = model
    out = other.generate(**turn, past_key_values=cache, **detailed())
    assert torch.equal(out.sequences, expected.sequences)
    golden.close(torch.stack(out.logits), torch.stack(expected.logits))


@pytest.mark.supported("Caches", "`crop`, to an earlier token of an answer or of the prompt's text")
@pytest.mark.parametrize("removed", [2, STEPS - 1, STEPS])
def test_a_cropped_cache(model, eager, removed):
    vtc.configure(model, keep=9)
    rows = prompts("left_padded")
    cache, turn, call = two_turns(model, rows)
    cache.crop(-removed)
    end = call["input_ids"].shape[1] + STEPS - 1 - removed
    asked = torch.full((len(rows), 3), 9)
    turn = {"input_ids": torch.cat([turn["input_ids"][:, :end], asked], 1)}
    turn["attention_mask"] = torch.cat([call["attention_mask"], torch.ones(len(rows), STEPS + 3)], 1)[
        :, : end + 3
    ].long()
    out = model.generate(**turn, past_key_values=cache, **detailed())
    check_turn(out, turn, eager, call["pixel_values"])


@pytest.mark.refused("a cache that was cropped in the middle of an image", instead="crop it less, or start without it")
def test_a_cache_cropped_into_an_image_is_refused(model):
    vtc.configure(model, keep=9)
    cache, turn, _ = two_turns(model, prompts("one"))
    cache.crop(-(STEPS + 5 + 3))
    with pytest.raises(ValueError, match="in the middle of an image"):
        model.generate(**turn, past_key_values=cache, **detailed())


@pytest.mark.refused("a further turn on the cache of a beam search", instead="start without the cache")
def test_a_cache_that_is_not_what_was_returned(model):
    vtc.configure(model, keep=9)
    cache, turn, _ = two_turns(model, prompts("one"), num_beams=2)
    with pytest.raises(ValueError, match="searched with beams"):
        model.generate(**turn, past_key_values=cache, max_new_tokens=1)

    class Stop(Exception):
        pass

    def stop(ids_, scores):
        raise Stop

    cache, call = DynamicCache(config=model.config.text_config), inputs(prompts("one"))
    with pytest.raises(Stop):
        model.generate(**call, past_key_values=cache, max_new_tokens=3, logits_processor=[stop])
    with pytest.raises(ValueError, match="because it failed"):
        model.generate(**turn, past_key_values=cache, max_new_tokens=1)
    cache.reset()
    again = model.generate(**call, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(again, model.generate(**call, max_new_tokens=3, do_sample=False))


def test_an_error_before_the_cache_changes_costs_nothing(model):
    vtc.configure(model, keep=9)
    cache, turn, _ = two_turns(model, prompts("one"))
    expected = model.generate(**turn, past_key_values=copy.deepcopy(cache), **detailed()).sequences
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(**turn, past_key_values=cache, nonsense=1)
    assert torch.equal(model.generate(**turn, past_key_values=cache, **detailed()).sequences, expected)


def test_samples_of_one_prompt_go_on(model, eager):
    """num_return_sequences: the cache has a row for each."""
    vtc.configure(model, keep=9)
    call = inputs(prompts("one"))
    torch.manual_seed(0)
    first = model.generate(
        **call, max_new_tokens=STEPS, do_sample=True, num_return_sequences=2, return_dict_in_generate=True
    )
    assert not torch.equal(first.sequences[0], first.sequences[1])
    ids_ = torch.cat([first.sequences, torch.full((2, 3), 9)], 1)
    turn = {"input_ids": ids_, "attention_mask": torch.ones_like(ids_)}
    out = model.generate(**turn, past_key_values=first.past_key_values, **detailed())
    check_turn(out, turn, eager, call["pixel_values"].repeat(2, 1, 1, 1))


def test_an_answer_may_end_with_the_placeholder(model, stock):
    """Without a new image it is a token as any other."""
    vtc.configure(model, keep=TOKENS)
    call = inputs(prompts("one"))
    length, forced = call["input_ids"].shape[1], [20, 21, models.IMAGE]
    answers = []
    for each in (model, stock):
        first = each.generate(
            **call,
            max_new_tokens=3,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda _, ids_: [forced[len(ids_) - length]],
        )
        whole = models.batch([[*first.sequences[0].tolist(), 7, 8, 9]])
        answers.append(each.generate(**whole, past_key_values=first.past_key_values, **detailed()).sequences)
    assert torch.equal(*answers)


def test_a_cache_with_its_note_is_pickled(model):
    vtc.configure(model, keep=9)
    cache, turn, _ = two_turns(model, prompts("left_padded"))
    again = pickle.loads(pickle.dumps(cache))
    one, two = (model.generate(**turn, past_key_values=each, **detailed()).sequences for each in (cache, again))
    assert torch.equal(one, two)


def test_a_cache_rebuilt_from_its_tensors_is_refused(model):
    vtc.configure(model, keep=9)
    cache, turn, _ = two_turns(model, prompts("one"))
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with pytest.raises(ValueError, match="a copy of its tensors"):
        model.generate(**turn, past_key_values=rebuilt, max_new_tokens=1)


@torch.no_grad()
def test_other_tokens_may_follow_a_crop(model, eager):
    """By forward(), and then a further turn of generate(), with the rows repeated."""
    vtc.configure(model, keep=9)
    cache, turn, call = two_turns(model, prompts("one"))
    cache.crop(-2)
    end = call["input_ids"].shape[1] + STEPS - 3
    model(torch.tensor([[11, 12]]), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    whole = torch.cat([turn["input_ids"][:, :end], torch.tensor([[11, 12, 13]])], 1).repeat(2, 1)
    turn = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    out = model.generate(**turn, past_key_values=cache, **detailed())
    check_turn(out, turn, eager, call["pixel_values"].repeat(2, 1, 1, 1))


@torch.no_grad()
def test_a_sliding_window_that_nobody_touched(tmp_path):
    """Its first layer need not hold every column, so only a cache that was left alone can be continued."""
    text = functools.partial(MistralConfig, sliding_window=200)
    model = models.build(text=text)
    vtc.enable(model, keep=9)
    call = inputs(prompts("left_padded"))
    expected = model.generate(**call, max_new_tokens=2, do_sample=False)[:, -2:]
    out = model(**call)
    token = out.logits[:, -1:].argmax(-1)
    mask = torch.cat([call["attention_mask"], torch.ones_like(token)], 1)
    again = model(token, attention_mask=mask, past_key_values=out.past_key_values).logits[:, -1:].argmax(-1)
    assert torch.equal(torch.cat([token, again], 1), expected)
    out.past_key_values.batch_select_indices(torch.tensor([1, 0, 2]))
    with pytest.raises(ValueError, match="tells its rows apart"):
        model(token, past_key_values=out.past_key_values)
