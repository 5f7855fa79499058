"""`vtc.select` with whole inputs: for methods inside the language model, what the golden path and `generate()` keep."""

import copy

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.golden import prune as golden_prune
from support.models import IMAGE, TOKENS, ids
from transformers import BatchFeature

import vtc
from vtc import api
from vtc.hf import names, settings

LAYERS, KEEP, SCORED = 4, 9, (2, 3, 4)
PROMPTS = {
    "one": [[3, "image", 5]],
    "left_padded": [[3, "image", 5], [2, "image", 11]],
    "unequal_images": [[2, "image", 3], [1, "image", "image", 6], [7]],
    "image_last": [[2, "image", 3, "image"], [3 + 2 * TOKENS + 4]],
}


@pytest.fixture(scope="module")
def stock():
    return models.build(text_layers=LAYERS)


@pytest.fixture(scope="module")
def eager(stock):
    return golden.eager(stock)


def prompts(name):
    return [ids(*parts, seed=i) for i, parts in enumerate(PROMPTS[name])]


def inputs(rows):
    count = sum(row.count(IMAGE) for row in rows) // TOKENS
    return {**models.batch(rows), "pixel_values": models.images(count)}


def patches_of(selection):
    """The patches kept of each image."""
    counts = [selection.indices.shape[1]] * len(selection.indices)
    counts = counts if selection.counts is None else selection.counts.tolist()
    for row, count in zip(selection.indices, counts, strict=True):
        assert (row[count:] == -1).all()
    return [row[:count].tolist() for row, count in zip(selection.indices, counts, strict=True)]


def kept_by_generate(stock, call, **options):
    """The image tokens in the compacted cache of `generate()`, found by their keys in the first layer."""
    with vtc.compress(stock, kv="compact", **options):
        short = stock.generate(**call, max_new_tokens=1, return_dict_in_generate=True)
    full = stock.generate(**call, max_new_tokens=1, return_dict_in_generate=True)
    own, every = (names.cache_of(out).layers[0].keys.movedim(2, 1).flatten(2) for out in (short, full))  # [B, S, D]
    found = ((own[:, :, None] - every[:, None]).abs().amax(-1) < 1e-4).any(1)  # [B, L]
    return [kept.nonzero()[:, 0].tolist() for kept in found[call["input_ids"] == IMAGE].unflatten(0, (-1, TOKENS))]


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("method", ["fastv", "dart"])
def test_it_is_what_the_golden_path_and_generate_keep(stock, eager, name, layer, method):
    rows, options = prompts(name), {"method": method, "keep": KEEP, "prune_layer": layer}
    call = inputs(rows)
    selection = vtc.select(stock, call, **options)
    assert selection.grid == (6, 6)
    kept = patches_of(selection)
    pixels, number = list(call["pixel_values"]), 0
    for row in rows:
        images = row.count(IMAGE) // TOKENS
        path = golden_prune.prompt(eager, row, pixels[:images], KEEP, SCORED, TOKENS, method, layer, True)
        pixels = pixels[images:]
        path.decode(1)
        columns = [column for column, token in enumerate(row) if token == IMAGE]
        for first in range(0, len(columns), TOKENS):
            own = columns[first : first + TOKENS]
            assert kept[number] == [column - own[0] for column in path.kept if column in own]
            if method == "fastv":
                golden.close(selection.scores[number], path.scores[own])
            number += 1
    assert number == len(kept) == len(selection.scores)
    assert kept == kept_by_generate(stock, call, **options)


@pytest.mark.parametrize("method", ["fastv", "dart"])
def test_image_tokens_that_the_mask_hides_are_chosen_last(stock, method):
    call = inputs([ids(3, "image", 5)])
    hidden = [*range(0, 12), *range(20, 30)]
    start = call["input_ids"][0].tolist().index(IMAGE)
    call["attention_mask"][0, [start + n for n in hidden]] = 0
    seen = [n for n in range(TOKENS) if n not in hidden]
    options = {"method": method, "prune_layer": 1}
    assert set(patches_of(vtc.select(stock, call, keep=KEEP, **options))[0]) < set(seen)
    assert set(patches_of(vtc.select(stock, call, keep=len(seen) + 2, **options))[0]) > set(seen)


def test_the_question_decides(stock):
    pixels = models.images(1)
    found = [
        vtc.select(
            stock, {**models.batch([ids(3, "image", 5, seed=seed)]), "pixel_values": pixels}, method="fastv", keep=9
        )
        for seed in (0, 1)
    ]
    assert found[0].counts is None
    assert found[0].indices.shape == (1, 9)
    assert not torch.equal(found[0].indices, found[1].indices)


def test_the_images_of_a_prompt_share_its_tokens(stock):
    selection = vtc.select(stock, inputs(prompts("unequal_images")), method="fastv", keep=KEEP)
    assert selection.counts[0] == KEEP
    assert selection.counts[1:].sum() == 2 * KEEP
    assert selection.counts[1] != selection.counts[2]  # else the test shows nothing
    assert selection.indices.shape == (3, selection.counts.max())


@pytest.mark.parametrize("change", [{"reselect": True}, {"kv": "full"}, {"kv": "compact"}])
def test_the_prompts_last_token_selects_in_every_variant(stock, change):
    call = inputs(prompts("left_padded"))
    want = vtc.select(stock, call, method="fastv", keep=KEEP)
    got = vtc.select(stock, call, method="fastv", keep=KEEP, **change)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.scores, want.scores)


def test_all_tokens_are_kept_of_an_image_that_is_not_compressed(stock):
    selection = vtc.select(stock, inputs(prompts("left_padded")), method="fastv", keep=TOKENS)
    assert selection.indices.tolist() == 2 * [list(range(TOKENS))]
    assert (selection.scores > 0).all()


def test_the_model_is_read_up_to_the_layer_that_selects_and_is_as_it_was(stock):
    model, ran = copy.deepcopy(stock), []
    call = inputs(prompts("one"))
    want = model.generate(**call, max_new_tokens=3)
    for number, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    vtc.select(model, call, method="fastv", keep=KEEP, prune_layer=2)
    assert ran == [0, 1]
    assert not settings.OPEN
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert torch.equal(model.generate(**call, max_new_tokens=3), want)


def test_it_counts_nothing_in_an_open_block(stock):
    with vtc.compress(stock, keep=KEEP) as run:
        vtc.select(stock, inputs(prompts("one")), method="fastv")
    assert run.images == 0
    assert run.prompt_before is None


@pytest.mark.parametrize("beams", [1, 3])
def test_settings_of_generation_change_nothing(stock, beams):
    model, call = copy.deepcopy(stock), inputs(prompts("left_padded"))
    want = vtc.select(model, call, method="fastv", keep=KEEP)
    model.generation_config.update(num_beams=beams, num_return_sequences=beams, do_sample=beams == 1)
    assert torch.equal(vtc.select(model, call, method="fastv", keep=KEEP).indices, want.indices)


def test_a_model_without_a_head_and_an_enabled_one(stock):
    call = inputs(prompts("left_padded"))
    want = vtc.select(stock, call, method="fastv", keep=KEEP)
    assert torch.equal(vtc.select(stock.model, call, method="fastv", keep=KEEP).indices, want.indices)
    model = copy.deepcopy(stock)
    vtc.enable(model, method="fastv", keep=KEEP)
    assert torch.equal(vtc.select(model, call).indices, want.indices)


@pytest.mark.parametrize("kind", [dict, BatchFeature])
@pytest.mark.parametrize(
    "method", [name for name, each in vtc.methods.METHODS.items() if each.selects and not each.needs_prompt()]
)
def test_other_methods_take_the_pixels_of_the_inputs(stock, kind, method):
    call = inputs(prompts("left_padded"))
    want = vtc.select(stock, call["pixel_values"], method=method, keep=KEEP)
    got = vtc.select(stock, kind(call), method=method, keep=KEEP)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.scores, want.scores)


@pytest.mark.parametrize(
    ("change", "method", "says"),
    [
        (
            lambda call: call["pixel_values"],
            "fastv",
            r"'fastv' selects patches by the question.*select\(model, inputs\)",
        ),
        (lambda call: {"pixel_values": call["pixel_values"]}, "fastv", "pass all of the processor's inputs"),
        (lambda call: call | {"input_ids": None}, "fastv", "pass all of the processor's inputs"),
        (lambda call: {"input_ids": call["input_ids"]}, "fastv", "have no pixel_values, only input_ids; pass an image"),
        (lambda call: {}, "vtc-cls", "have no pixel_values, only nothing"),
        (lambda call: call | {"pixel_values": models.images(1)}, "fastv", r"got 1 image\(s\), but the rows"),
        (lambda call: call | {"pixel_values": None}, "fastv", "got a NoneType"),
    ],
)
def test_inputs_that_lack_something_are_refused(stock, change, method, says):
    with pytest.raises(ValueError, match=says):
        vtc.select(stock, change(inputs(prompts("left_padded"))), method=method, keep=KEEP)


def test_a_model_that_does_not_run_its_layers_is_refused(stock, monkeypatch):
    monkeypatch.setattr(type(stock), "generate", lambda self, **call: call["input_ids"])
    with pytest.raises(
        ValueError, match=r"the generate\(\) of a LlavaForCondit\w+ did not run layer 2 .*; pass a LLaVA"
    ):
        vtc.select(stock, inputs(prompts("one")), method="fastv", keep=KEEP)


def test_only_methods_that_select_no_patches_are_refused():
    refused = []
    for name in vtc.methods.METHODS:
        try:
            api.require_selection(name)
        except ValueError:
            refused.append(name)
    assert refused == ["pool", "downsample", "none"]
