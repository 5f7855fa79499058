"""What transformers renamed: both words for the KV cache are the same, and none of them is silently ignored."""

import logging

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.golden import prune as golden_prune
from support.prompts import STEPS, detailed, inputs, prompts, spliced
from transformers import DynamicCache

import vtc
from vtc import tiny
from vtc.hf import names
from vtc.tiny.scenes import Scene

WORDS = names.CACHE_WORDS
KEEP = 9


@pytest.fixture(scope="module")
def stock():
    return models.build(text_layers=4)


@pytest.fixture
def model(stock):
    vtc.enable(stock, keep=KEEP)
    yield stock
    vtc.disable(stock)


def second_turn(first, call):
    """The whole conversation with a new question for each row, and its mask."""
    rows = len(call["input_ids"])
    question = torch.randint(5, models.VOCAB, (rows, 4), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([call["attention_mask"], torch.ones(rows, STEPS + 4, dtype=torch.long)], 1)
    return {"input_ids": torch.cat([first.sequences, question], 1), "attention_mask": mask}


@pytest.mark.supported("Arguments", "`past_key_values` and `cache`, the older and the newer word")
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ["one", "left_padded", "unequal_images"])
def test_a_second_turn_with_either_word(model, stock, word, name):
    call = inputs(prompts(name))
    first = model.generate(**call, **detailed())
    turn = second_turn(first, call)
    second = model.generate(**turn, **{word: names.cache_of(first)}, **detailed())
    eager, length = golden.eager(stock), call["input_ids"].shape[1]
    rows = [row + turn["input_ids"][i, length:].tolist() for i, row in enumerate(prompts(name))]
    for i, (embeds, _) in enumerate(spliced(eager, rows, call["pixel_values"], KEEP)):
        new, logits = golden.decode(eager, embeds, STEPS)
        assert second.sequences[i, turn["input_ids"].shape[1] :].tolist() == new
        golden.close(torch.stack(second.logits)[:, i], logits)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("method", ["vtc-cls", "fastv"])
def test_a_second_turn_after_pruning_with_either_word(model, stock, word, method):
    vtc.configure(model, method=method, prune_layer=2, kv="full", keep=KEEP)
    call = inputs(prompts("left_padded"))
    first = model.generate(**call, **detailed())
    turn = second_turn(first, call)
    second = model.generate(**turn, **{word: names.cache_of(first)}, **detailed())
    eager, length = golden.eager(stock), call["input_ids"].shape[1]
    for i, (row, image) in enumerate(zip(prompts("left_padded"), call["pixel_values"], strict=True)):
        path = golden_prune.prompt(eager, row, [image], KEEP, (2, 3, 4), models.TOKENS, method, 2, False)
        new, logits = path.decode(STEPS, turn["input_ids"][i, length:].tolist())
        assert second.sequences[i, turn["input_ids"].shape[1] :].tolist() == new
        golden.close(torch.stack(second.logits)[:, i], logits)


@pytest.mark.refused("both `cache` and `past_key_values`", instead="one of them")
@pytest.mark.parametrize("prune_layer", [0, 2])
def test_both_words_at_once_are_refused(model, prune_layer):
    vtc.configure(model, prune_layer=prune_layer)
    call = inputs(prompts("one")) | {word: DynamicCache() for word in WORDS}
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="both cache and past_key_values"):
            run(**call)


@pytest.mark.parametrize("word", WORDS)
@torch.no_grad()
def test_forward_goes_on_with_either_word_and_from_a_tuple(model, word):
    """The note is left on the cache of a plain tuple, too: the mask of the full prompt is understood."""
    call = inputs(prompts("left_padded"))
    expected, outputs = model(**call), model(**call, return_dict=False)
    assert torch.equal(outputs[0], expected.logits)
    cache = names.cache_of(outputs)
    assert cache.get_seq_length() < expected.logits.shape[1]
    token = outputs[0][:, -1:].argmax(-1)
    mask = torch.cat([call["attention_mask"], torch.ones_like(token)], 1)
    found = model(input_ids=token, attention_mask=mask, **{word: cache}).logits
    assert torch.equal(found, model(input_ids=token, attention_mask=mask, cache=names.cache_of(expected)).logits)


@pytest.mark.parametrize("method", ["vtc-cls", "fastv"])
@torch.no_grad()
def test_forty_scenes(method):
    """The bundled model, left-padded, pruned inside the language model: the tokens of the golden path."""
    model, processor = tiny.load()
    scenes = [Scene("test", i) for i in range(40)]
    asked = ["How many objects are there?", "Is there a red circle?", "What is it?"]
    call = processor(
        images=[scene.image for scene in scenes],
        text=[tiny.prompt(asked[i % 3]) for i in range(40)],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert call["attention_mask"].sum(1).unique().numel() > 1
    vision = model.config.vision_config
    scored = range(vision.num_hidden_layers - 4, vision.num_hidden_layers - 1)
    tokens = (vision.image_size // vision.patch_size) ** 2
    with vtc.compress(model, method=method, keep=16, prune_layer=2):
        out = model.generate(**call, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    eager = golden.eager(model)
    for ids, mask, image, new in zip(
        call["input_ids"], call["attention_mask"], call["pixel_values"], out[:, -6:].tolist(), strict=True
    ):
        row = ids[mask.bool()].tolist()
        path = golden_prune.prompt(eager, row, [image], 16, scored, tokens, method, 2, method == "vtc-cls")
        path.logits(path.embeds)  # FastV chooses here
        logits = path.logits(path.after(new[:-1]))[-6:]
        logits[:, model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens forbids the end
        assert logits.argmax(-1).tolist() == new


def test_a_newer_transformers_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(names.transformers, "__version__", "5.99.1")
    names.warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING, "vtc"):
        names.warn_if_untested()
        names.warn_if_untested()
    (record,) = caplog.records
    assert "5.99.1" in record.getMessage()
    assert names.NEWEST in record.getMessage()
    names.warn_if_untested.cache_clear()


def test_the_tested_versions_do_not_warn(caplog):
    names.warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING, "vtc"):
        names.warn_if_untested()
    assert not caplog.records


@pytest.mark.refused("transformers older than 5.23", instead="a newer one")
def test_an_older_transformers_is_refused(stock, monkeypatch):
    monkeypatch.setattr(names.transformers, "__version__", "5.22.2")
    for function in (vtc.enable, vtc.configure, lambda model: vtc.compress(model).__enter__()):
        with pytest.raises(ValueError, match=r"transformers 5\.23 or newer, and this is 5\.22\.2"):
            function(stock)
