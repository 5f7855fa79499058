"""`positions="original"`: every token that stays has its position in the full prompt, against the golden path.

The golden short prompt is embeddings of what stays at the columns where it stood, and the stock language model runs on
it. Without padding and hidden tokens a column is a position.
"""

import copy
import itertools
import logging

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.models import IMAGE, TOKENS, VOCAB, ids
from support.prompts import LAYERS, PROMPTS, STEPS, count_images, detailed, inputs, prompts
from test_compiling import Logits
from test_families import prompts as family_prompts
from test_methods_model import CASES, KEEP, SEED, Seen, options, projected
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

import vtc
from vtc import VTCConfig
from vtc.hf import names, positions, settings
from vtc.hf.prompt import placed_tokens

ORIGINAL = {"keep": KEEP, "positions": "original"}


@pytest.fixture
def model(saved):
    model = LlavaForConditionalGeneration.from_pretrained(saved, attn_implementation="vtc")
    vtc.configure(model, **ORIGINAL)
    return model


def spread_places(count):
    """Where tokens that are no patches stand; those that have no place at the last one."""
    if count >= TOKENS:
        return [min(number, TOKENS - 1) for number in range(count)]
    return [(2 * number + 1) * TOKENS // (2 * count) for number in range(count)]


def kept_of(eager, image, keep=KEEP):
    return golden.top(golden.scores(eager, image, LAYERS), keep)


@torch.no_grad()
def short(eager, row, pixels, keep=KEEP):
    """The golden embeddings of an unpadded row, and the columns that stay."""
    kept = [(TOKENS, kept_of(eager, image, keep)) for image in pixels]
    return golden.splice(eager, row, list(pixels), keep, LAYERS, TOKENS)[0], golden.columns(row, kept, IMAGE)


def shorts(eager, rows, pixels, keep=KEEP):
    pixels = iter(pixels)
    return [short(eager, row, [next(pixels) for _ in range(count_images(row))], keep) for row in rows]


def check_generated(out, call, golden_rows, eager, ends=None):
    """New tokens go on after the last position of the full prompt: `ends` (list of B), or the number of its tokens."""
    length = call["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], call["input_ids"])
    mask = call.get("attention_mask", call["input_ids"] != models.PAD)
    ends = mask.sum(1).tolist() if ends is None else ends
    for i, (embeds, columns) in enumerate(golden_rows):
        new, logits = golden.decode(eager, embeds, STEPS, positions=columns, length=ends[i])
        assert out.sequences[i, length:].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


def check_columns(logits, mask, golden_rows, eager):
    """`logits` `[B, L, V]`: of each token that of the last one that stays."""
    for found, real, (embeds, columns) in zip(logits, mask.bool(), golden_rows, strict=True):
        expected = golden.logits(eager, embeds, columns)
        golden.close(found[real], golden.spread(expected, columns, int(real.sum())))


# generate().


@pytest.mark.supported("generate()", '`positions="original"`')
@pytest.mark.parametrize("mask", ["given", "absent"])
@pytest.mark.parametrize("keep", [1, KEEP, TOKENS - 1])
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy(model, eager, name, keep, mask):
    vtc.configure(model, keep=keep)
    rows = prompts(name)
    call = inputs(rows)
    if mask == "absent":
        del call["attention_mask"]  # generate() infers it from the padding
    check_generated(model.generate(**call, **detailed()), call, shorts(eager, rows, call["pixel_values"], keep), eager)


def test_it_differs_from_packed_positions(model):
    """Guards the guards: the golden model is sensitive to positions."""
    call = inputs(prompts("one"))
    with torch.no_grad():
        original = model(**call).logits
        vtc.configure(model, positions="packed")
        assert (original - model(**call).logits).abs().max() > 0.1


@pytest.mark.parametrize("case", [*CASES, "prumerge+ full"])
def test_every_method(model, eager, case):
    """Tokens that are no patches are spread over their image."""
    case, pixels = (case, models.images(4, SEED)) if case in CASES else ("prumerge+ adaptive", models.images(4))
    vtc.configure(model, **options(case))
    rows = prompts("unequal_images")[:2]
    asked = [row for row in rows for _ in range(count_images(row))]
    left = [Seen(eager, image, row=row) for image, row in zip(pixels[:3], asked, strict=True)]
    call, golden_rows = {**models.batch(rows), "pixel_values": pixels[:3]}, []
    found = [CASES[case][1](seen) for seen in left]
    is_patch = vtc.VTCConfig.of(**options(case)).build_method().keeps_patches()
    visuals = iter([(TOKENS, kept if is_patch else spread_places(len(own))) for kept, own in found])
    features = iter([(TOKENS, projected(eager, own)) for _, own in found])
    for row in rows:
        own = [next(features) for _ in range(count_images(row))]
        with torch.no_grad():
            embeds = golden.splice_features(eager, row, own)
        golden_rows.append((embeds, golden.columns(row, [next(visuals) for _ in own], IMAGE)))
    check_generated(model.generate(**call, **detailed()), call, golden_rows, eager)
    with torch.no_grad():
        check_columns(model(**call).logits, call["attention_mask"], golden_rows, eager)


def test_places_of_tokens_that_are_no_patches():
    for tokens, count in itertools.product(range(1, 12), range(1, 14)):
        stays = placed_tokens(tokens, count, True).tolist()
        assert sum(stays) == count
        if count <= tokens:
            assert [place for place, often in enumerate(stays) if often] == [
                (2 * i + 1) * tokens // (2 * count) for i in range(count)
            ]
        else:
            assert stays == [1] * (tokens - 1) + [count - tokens + 1]


@pytest.mark.parametrize("name", ["one", "unequal_images", "text_only_row", "image_first_and_last"])
@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 8}])
def test_other_caches(model, eager, name, cache):
    """Without a cache, transformers takes gaps for ends of samples, and generate() drops a mask of ones."""
    rows = prompts(name)
    call = inputs(rows)
    out = model.generate(**call, **detailed(**cache))
    check_generated(out, call, shorts(eager, rows, call["pixel_values"]), eager)


def test_sampling(model, eager):
    rows = prompts("one")
    call = inputs(rows)
    torch.manual_seed(0)
    out = model.generate(**call, do_sample=True, top_k=0, max_new_tokens=STEPS)
    torch.manual_seed(0)
    embeds, columns = shorts(eager, rows, call["pixel_values"])[0]
    new, _ = golden.decode(eager, embeds, STEPS, sample=True, positions=columns, length=len(rows[0]))
    assert out[0, len(rows[0]) :].tolist() == new


@pytest.mark.parametrize("copies", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["left_padded", "unequal_images"])
def test_beams(model, eager, name, copies):
    """Golden: the stock beam search on the embeddings of each row alone, at their positions."""
    rows = prompts(name)
    call = inputs(rows)
    out = model.generate(**call, max_new_tokens=STEPS, do_sample=False, **copies)
    returned, length = copies.get("num_return_sequences", 1), call["input_ids"].shape[1]
    for i, (embeds, columns) in enumerate(shorts(eager, rows, call["pixel_values"])):
        more = {"attention_mask": torch.ones(embeds.shape[:2]), "position_ids": torch.tensor([columns])}
        alone = eager.generate(inputs_embeds=embeds, **more, max_new_tokens=STEPS, **copies)
        assert torch.equal(out[i * returned : (i + 1) * returned, length:], alone)


def test_several_samples_of_one_prompt(model, eager):
    rows = prompts("one")
    call = inputs(rows)
    out = model.generate(**call, **{**detailed(num_return_sequences=3), "do_sample": True})
    embeds, columns = shorts(eager, rows, call["pixel_values"])[0]
    for i, sequence in enumerate(out.sequences):
        new = eager.get_input_embeddings()(sequence[len(rows[0]) :])[None]
        after = [*columns, *range(len(rows[0]), len(rows[0]) + STEPS)]
        expected = golden.logits(eager, torch.cat([embeds, new], 1), after)[len(columns) - 1 : -1]
        golden.close(torch.stack(out.logits)[:, i], expected.detach())


@pytest.mark.parametrize("assistant", ["compresses", "stock", "itself", "the prompt"])
def test_assisted_decoding_changes_no_answer(model, eager, assistant):
    rows = prompts("one")
    call = inputs(rows)
    asked = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=[IMAGE])
    more = {"prompt_lookup_num_tokens": 2}
    if assistant != "the prompt":
        draft = copy.deepcopy(model) if assistant == "itself" else models.build(seed=1)
        if assistant == "compresses":
            vtc.enable(draft, **ORIGINAL)
        more = {"assistant_model": draft}
    assert torch.equal(model.generate(**call, **asked, **more), model.generate(**call, **asked))


@pytest.mark.parametrize("keep", [KEEP, TOKENS])
def test_positions_that_generate_is_given(model, eager, keep):
    vtc.configure(model, keep=keep)
    rows = prompts("one")
    call = inputs(rows)
    embeds, columns = shorts(eager, rows, call["pixel_values"], keep)[0]
    given = 3 * torch.arange(len(rows[0]))[None] + 5
    out = model.generate(**call, position_ids=given, **detailed())
    check_generated(out, call, [(embeds, [3 * column + 5 for column in columns])], eager, [3 * len(rows[0]) + 3])


@pytest.mark.parametrize("hidden", ["image", "part", "text"])
def test_a_mask_that_hides_tokens(model, stock, eager, hidden):
    """generate() counts no hidden token, so the full prompt's positions are those of what is seen."""
    row = ids(6, "image", 7)
    call = models.batch([row]) | {"pixel_values": models.images(1)}
    columns = {"image": range(7, 7 + TOKENS), "part": range(7, 27), "text": [2, 3]}[hidden]
    call["attention_mask"][0, list(columns)] = 0
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    model.generate(**call, **detailed())
    hook.remove()
    full = [
        0 if not real else sum(call["attention_mask"][0, :at].tolist())
        for at, real in enumerate(call["attention_mask"][0])
    ]
    kept = golden.columns(row, [(TOKENS, kept_of(eager, call["pixel_values"][0]))], IMAGE)
    assert seen[0] == [full[column] for column in kept]
    last = int(call["attention_mask"].sum())
    assert seen[1:] == [[last + step] for step in range(STEPS - 1)]


@pytest.mark.parametrize("method", ["vtc-cls", "pool"])
def test_keeping_all_is_the_stock_model(model, stock, method):
    vtc.configure(model, keep=TOKENS, method=method)
    call = inputs(prompts("unequal_images"))
    ours, theirs = model.generate(**call, **detailed()), stock.generate(**call, **detailed())
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))
    with torch.no_grad():
        assert torch.equal(model(**call).logits, stock(**call).logits)


def ending_in_an_image(eager, rows, pixels):
    """Golden rows, whose last token does not stay."""
    found = shorts(eager, rows, pixels)
    assert all(columns[-1] < len(row) - 1 for row, (_, columns) in zip(rows, found, strict=True))
    return found


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "more", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 8}, {"num_beams": 1}]
)
def test_a_prompt_that_ends_in_an_image(model, eager, more, rows):
    """New tokens go on after the last placeholder, whether it stays or not."""
    rows = [ids(3, "image"), ids(1, "image", seed=1)][:rows]
    call = inputs(rows)
    golden_rows = ending_in_an_image(eager, rows, call["pixel_values"])
    out = model.generate(**call, **detailed(**more))
    check_generated(out, call, golden_rows, eager)
    turn = models.batch(
        [
            own.tolist()[-len(row) - STEPS :] + ids(2, "image", seed=4)
            for own, row in zip(out.sequences, rows, strict=True)
        ]
    )
    if "cache_implementation" not in more and "use_cache" not in more:
        new = models.images(len(rows), seed=2)
        whole = [row[real.bool()].tolist() for row, real in zip(turn["input_ids"], turn["attention_mask"], strict=True)]
        second = model.generate(**turn, pixel_values=new, **{names.CACHE: names.cache_of(out)}, **detailed())
        pixels = torch.stack([*itertools.chain(*zip(call["pixel_values"], new, strict=True))])
        check_generated(second, turn, shorts(eager, whole, pixels), eager)


@torch.no_grad()
def test_a_prompt_that_ends_in_an_image_with_copies(model, eager):
    """Rows of samples and of beams; assisted decoding; further tokens by hand."""
    rows = [ids(3, "image"), ids(1, "image", seed=1)]
    call = inputs(rows)
    golden_rows = ending_in_an_image(eager, rows, call["pixel_values"])
    out = model.generate(**call, **{**detailed(num_return_sequences=2), "do_sample": True})
    for i, sequence in enumerate(out.sequences):
        (embeds, columns), row = golden_rows[i // 2], rows[i // 2]
        new = eager.get_input_embeddings()(sequence[call["input_ids"].shape[1] :])[None]
        after = [*columns, *range(len(row), len(row) + STEPS)]
        expected = golden.logits(eager, torch.cat([embeds, new], 1), after)[len(columns) - 1 : -1]
        golden.close(torch.stack(out.logits)[:, i], expected)
    one = inputs(rows[:1])
    asked = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=[IMAGE])
    expected = model.generate(**one, **asked)
    for more in ({"assistant_model": copy.deepcopy(model)}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(**one, **asked, **more), expected)
    cache = names.cache_of(model(**call))
    new = torch.tensor([[7], [8]])
    logits = model(
        input_ids=new,
        attention_mask=torch.cat([call["attention_mask"], torch.ones_like(new)], 1),
        **{names.CACHE: cache},
    ).logits
    for found, token, row, (embeds, columns) in zip(logits, new, rows, golden_rows, strict=True):
        embeds = torch.cat([embeds, eager.get_input_embeddings()(token)[None]], 1)
        golden.close(found, golden.logits(eager, embeds, [*columns, len(row)])[-1:])


# forward().


@pytest.mark.supported("forward()", '`positions="original"`, also of packed samples')
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["one", "unequal_images", "text_only_row"])
@torch.no_grad()
def test_forward(model, eager, name, use_cache, side):
    rows = prompts(name)
    call = inputs(rows)
    if side == "right":
        padding = (1 - call["attention_mask"]).sum(1).tolist()
        for each in ("input_ids", "attention_mask"):
            call[each] = torch.stack([row.roll(-count) for row, count in zip(call[each], padding, strict=True)])
    out, golden_rows = model(**call, use_cache=use_cache), shorts(eager, rows, call["pixel_values"])
    check_columns(out.logits, call["attention_mask"], golden_rows, eager)
    last = model(**call, use_cache=use_cache, logits_to_keep=5).logits
    assert torch.equal(last, out.logits[:, -5:])


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_forward_without_a_mask(model, eager, use_cache):
    """Rows of one length become equally or unequally short."""
    alike = [ids(3, "image", 5), ids(1, "image", 7, seed=1)]
    for rows in (prompts("one"), alike, prompts("unequal_same_length")):
        call = inputs(rows)
        mask = call.pop("attention_mask")
        golden_rows = shorts(eager, rows, call["pixel_values"])
        check_columns(model(**call, use_cache=use_cache).logits, mask, golden_rows, eager)


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("name", ["one", "unequal_same_length"])
@torch.no_grad()
def test_positions_that_forward_is_given(model, eager, name, has_mask):
    rows = prompts(name)
    call = inputs(rows)
    given = 5 + torch.arange(len(rows[0]))[None]
    if not has_mask:
        del call["attention_mask"]
    for use_cache in (True, False):
        logits = model(**call, position_ids=given, use_cache=use_cache).logits
        for found, (embeds, columns) in zip(logits, shorts(eager, rows, call["pixel_values"]), strict=True):
            expected = golden.logits(eager, embeds, [5 + column for column in columns])
            golden.close(found, golden.spread(expected, columns, len(rows[0])))


def packed_samples(count):
    """Rows of samples, two of which begin with an image, whose first patches may go, and their pixels."""
    samples = [[ids("image", 3)[1:], ids("image", 2, seed=1)[1:]], [ids(2, "image", 3, seed=2)]]
    samples[1].append(ids(sum(map(len, samples[0])) - len(samples[1][0]) - 1, seed=3))
    rows, pixels = samples[:count], models.images(3)[: 1 + count]
    return rows, {
        "input_ids": torch.tensor([[*itertools.chain(*row)] for row in rows]),
        "position_ids": torch.tensor([[i for sample in row for i in range(len(sample))] for row in rows]),
        "pixel_values": pixels,
        "use_cache": False,
    }


def check_samples(logits, rows, pixels, eager):
    pixels = iter(pixels)
    for found, row in zip(logits, rows, strict=True):
        for sample in row:
            own = [next(pixels) for _ in range(count_images(sample))]
            embeds, columns = short(eager, sample, own)
            expected = golden.spread(golden.logits(eager, embeds, columns), columns, len(sample))
            start = columns[0]  # columns before have no token of their own sample
            golden.close(found[start : len(sample)], expected[start:])
            found = found[len(sample) :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_packed_samples_do_not_see_each_other(model, eager, count, attention):
    model.model.language_model.set_attn_implementation(attention)
    rows, call = packed_samples(count)
    check_samples(model(**call).logits, rows, call["pixel_values"], eager)


def test_loss_and_gradients(model, eager):
    rows = prompts("unequal_images")
    call = inputs(rows)
    labels = call["input_ids"].masked_fill((call["attention_mask"] == 0) | (call["input_ids"] == IMAGE), -100)
    terms = []
    for row, (embeds, columns) in zip(rows, shorts(eager, rows, call["pixel_values"]), strict=True):
        full = golden.spread(golden.logits(eager, embeds, columns), columns, len(row)).log_softmax(-1)
        terms += [-full[j - 1, token] for j, token in enumerate(row) if j and token != IMAGE]
    model.train()
    loss = model(**call, labels=labels, use_cache=False).loss
    expected = torch.stack(terms).mean()
    golden.close(loss, expected)
    weights = [each.model.language_model.layers[0].self_attn.q_proj.weight for each in (model, eager)]
    ours, theirs = (
        torch.autograd.grad(each, weight)[0] for each, weight in zip((loss, expected), weights, strict=True)
    )
    golden.close(ours, theirs)


@pytest.mark.parametrize("family", ["vipllava", "llava_next", "llava_next_video"])
@torch.no_grad()
def test_tiles_frames_and_newlines(family):
    """A newline that stays keeps its place, too."""
    model = models.build(family=family)
    eager = golden.eager(model)
    vtc.enable(model, **ORIGINAL)
    given = family_prompts(family)
    markers = {IMAGE, models.VIDEO} if family == "llava_next_video" else {IMAGE}
    golden_rows = []
    for row, own, embeds in zip(given.ids, given.visuals, given.spliced(eager, KEEP), strict=True):
        marked = [IMAGE if token in markers else token for token in row]
        visuals = [(given.tokens(visual), given.kept(eager, visual, KEEP)) for visual in own]
        golden_rows.append((embeds, golden.columns(marked, visuals, IMAGE)))
    out = model.generate(**given.call, **detailed())
    check_generated(out, given.call, golden_rows, eager)
    check_columns(model(**given.call).logits, given.call["attention_mask"], golden_rows, eager)


# Caches.


@pytest.mark.parametrize("first_turn", ["one", "text"])
def test_further_turns_with_new_images(model, eager, first_turn):
    row = prompts("one")[0] if first_turn == "one" else ids(6)
    pixels, cache = models.images(count_images(row)), None
    for turn in range(3):
        new = models.images(1, seed=turn) if turn else pixels
        pixels = torch.cat([pixels, new]) if turn else pixels
        call = {**models.batch([row]), **({"pixel_values": new} if len(new) else {})}
        out = model.generate(**call, **({} if cache is None else {names.CACHE: cache}), **detailed())
        check_generated(out, call, [short(eager, row, pixels)], eager)
        cache = names.cache_of(out)
        row = out.sequences[0].tolist() + (ids(2, "image", 3, seed=9 + turn) if turn else ids(3))
        if not turn:  # a turn without a new image
            out = model.generate(**models.batch([row]), **{names.CACHE: cache}, **detailed())
            check_generated(out, models.batch([row]), [short(eager, row, pixels)], eager)
            row = out.sequences[0].tolist() + ids(2, "image", 3, seed=9 + turn)


def a_turn(model, rows, order=None):
    """The cache of a first turn, and the arguments of a further one."""
    call, count = inputs(rows), len(rows)
    first = model.generate(**call, **detailed())
    asked = torch.randint(4, VOCAB, (count, 4), generator=torch.Generator().manual_seed(5))
    order = list(range(count)) if order is None else order
    whole = torch.cat([first.sequences, asked], 1)
    mask = torch.cat([call["attention_mask"], torch.ones(count, STEPS + 4, dtype=torch.long)], 1)
    return names.cache_of(first), {"input_ids": whole[order], "attention_mask": mask[order]}, call["pixel_values"]


def check_turn(out, turn, eager, pixels):
    rows = [row[mask.bool()].tolist() for row, mask in zip(turn["input_ids"], turn["attention_mask"], strict=True)]
    check_generated(out, turn, shorts(eager, rows, pixels), eager)


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2, 0], [0, 0, 2, 1]])
def test_rows_of_a_cache_may_be_in_another_order(model, eager, order):
    rows = prompts("unequal_images")
    cache, turn, pixels = a_turn(model, rows, order)
    cache.batch_select_indices(torch.tensor(order))
    parts = pixels.split([count_images(row) for row in rows])
    out = model.generate(**turn, **{names.CACHE: cache}, **detailed())
    check_turn(out, turn, eager, torch.cat([parts[i] for i in order]))


@pytest.mark.parametrize("removed", [2, STEPS, STEPS + 3])
def test_a_cropped_cache(model, eager, removed):
    rows = prompts("one" if removed > STEPS else "left_padded")  # into the text after the image
    cache, turn, pixels = a_turn(model, rows)
    end = turn["input_ids"].shape[1] - 4 - 1 - removed
    cache.crop(-removed)
    asked = torch.full((len(rows), 3), 9)
    turn = {
        "input_ids": torch.cat([turn["input_ids"][:, :end], asked], 1),
        "attention_mask": torch.cat([turn["attention_mask"][:, :end], torch.ones_like(asked)], 1),
    }
    out = model.generate(**turn, **{names.CACHE: cache}, **detailed())
    check_turn(out, turn, eager, pixels)


@pytest.mark.parametrize("given", ["mask", "positions", "neither"])
@pytest.mark.parametrize("first", ["forward", "generate"])
@torch.no_grad()
def test_forward_goes_on_by_hand(model, eager, first, given):
    name = "one" if given == "neither" else "unequal_images"
    rows = prompts(name)
    call = inputs(rows)
    if first == "forward":
        out, sequences, mask = model(**call), call["input_ids"], call["attention_mask"]
    else:
        out = model.generate(**call, **detailed())
        sequences = out.sequences[:, :-1]
        mask = torch.cat([call["attention_mask"], torch.ones_like(sequences[:, call["input_ids"].shape[1] :])], 1)
    cache = names.cache_of(out)
    for count in (2, 1):
        new = torch.randint(4, VOCAB, (len(rows), count), generator=torch.Generator().manual_seed(count))
        sequences, mask = torch.cat([sequences, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        more = {} if given == "neither" else {"attention_mask": mask}
        if given == "positions":
            more["position_ids"] = (mask.cumsum(1) - 1)[:, -count:]
        logits = model(input_ids=new, **{names.CACHE: cache}, **more).logits
        unpadded = [row[real.bool()].tolist() for row, real in zip(sequences, mask, strict=True)]
        for found, (embeds, columns) in zip(logits, shorts(eager, unpadded, call["pixel_values"]), strict=True):
            golden.close(found, golden.logits(eager, embeds, columns)[-count:])


@pytest.mark.parametrize(("began", "then"), [("original", "packed"), ("packed", "original")])
def test_a_conversation_keeps_its_positions(model, caplog, began, then):
    vtc.configure(model, positions=began)
    cache, turn, _ = a_turn(model, prompts("one"))
    row = torch.cat([turn["input_ids"], torch.tensor([ids("image", 2, seed=3)])], 1)
    call = {"input_ids": row, "pixel_values": models.images(1, seed=3)}
    expected = model.generate(**call, **{names.CACHE: copy.deepcopy(cache)}, **detailed())
    vtc.configure(model, positions=then)
    with caplog.at_level(logging.WARNING, "vtc"):
        out = model.generate(**call, **{names.CACHE: cache}, **detailed())
    assert torch.equal(out.sequences, expected.sequences)
    assert all(map(torch.equal, out.logits, expected.logits))
    assert f"'positions': '{began}'" in caplog.text


# Flash attention, which finds samples by positions in every call.


def flash(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """What transformers' flash attention computes for these arguments, sample by sample."""
    batch, _, new, _ = query.shape
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    rows = [(0, new, 0, key.shape[2])]
    ends = (kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
    if ends[0] is None and _is_packed_sequence(position_ids, batch):
        ends, _ = prepare_fa_kwargs_from_position_ids(position_ids)
    if ends[0] is not None:
        assert batch == 1
        rows = [(*q, *k) for q, k in zip(*(itertools.pairwise(each.tolist()) for each in ends), strict=True)]
    out = torch.zeros_like(query)
    for first, end, first_key, end_key in rows:
        scores = query[:, :, first:end] @ key[:, :, first_key:end_key].transpose(2, 3) * scaling
        hidden = torch.ones(scores.shape[-2:]).tril(scores.shape[-1] - scores.shape[-2]) == 0
        if attention_mask is not None:
            hidden = hidden | ~attention_mask.bool()[:, None, None]
        out[:, :, first:end] = scores.masked_fill(hidden, -1e30).softmax(-1) @ value[:, :, first_key:end_key]
    return out.transpose(1, 2), None


@pytest.fixture
def flashing(model, monkeypatch):
    AttentionInterface.register("flash_test", flash)
    AttentionMaskInterface.register("flash_test", flash_attention_mask)
    monkeypatch.setattr(
        positions, "is_flash_attention_requested", lambda config: config._attn_implementation == "flash_test"
    )
    for config in (model.config.text_config, model.model.language_model.config):
        config._attn_implementation = "flash_test"
    return model


@torch.no_grad()
def test_flash_attention_takes_a_prompt_for_one_sample(flashing, eager):
    rows = prompts("one")
    call = inputs(rows)
    out = flashing.generate(**call, **detailed())
    check_generated(out, call, shorts(eager, rows, call["pixel_values"]), eager)
    row = out.sequences[0].tolist() + ids(2, "image", 3, seed=9)
    turn, new = models.batch([row]), models.images(1, seed=1)
    second = flashing.generate(**turn, pixel_values=new, **{names.CACHE: names.cache_of(out)}, **detailed())
    check_generated(second, turn, [short(eager, row, torch.cat([call["pixel_values"], new]))], eager)
    rows = prompts("unequal_images")
    call = inputs(rows)
    out = flashing.generate(**call, **detailed())
    check_generated(out, call, shorts(eager, rows, call["pixel_values"]), eager)


@torch.no_grad()
def test_flash_attention_takes_packed_samples_apart(flashing, eager):
    rows, call = packed_samples(1)
    check_samples(flashing(**call).logits, rows, call["pixel_values"], eager)


# Settings.


def test_settings(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="vtc")
    assert "positions=original" in str(vtc.status(loaded))
    call = inputs(prompts("one"))
    assert torch.equal(loaded(**call).logits, model(**call).logits)
    with pytest.raises(ValueError, match="positions must be one of 'packed', 'original', got 'kept'"):
        VTCConfig(positions="kept")


@pytest.mark.parametrize("value", ["packed", "original"])
def test_it_has_no_effect_inside_the_language_model(model, caplog, value):
    settings._NAMED.clear()
    call = inputs(prompts("one"))
    with vtc.compress(model, prune_layer=1, positions="packed" if value == "original" else "original"):
        expected = model.generate(**call, **detailed())
    caplog.clear()
    settings._NAMED.clear()
    with caplog.at_level(logging.WARNING, "vtc"), vtc.compress(model, prune_layer=1, positions=value):
        assert torch.equal(model.generate(**call, **detailed()).sequences, expected.sequences)
    assert f"positions={value} has no effect" in caplog.text


@pytest.mark.parametrize("positions_", ["packed", "original"])
def test_the_full_length_counts_towards_the_limit(model, caplog, positions_):
    positions.warn_of_length.cache_clear()
    vtc.configure(model, positions=positions_)
    row = ids(2, "image", 3)
    model.model.language_model.config.max_position_embeddings = len(row) - 1
    with caplog.at_level(logging.WARNING, "vtc"):
        model.generate(**inputs([row]), max_new_tokens=1)
        model.generate(**inputs([row]), max_new_tokens=1)
    says = f"it has {len(row)} tokens, and the language model has {len(row) - 1} positions"
    assert caplog.text.count(says) == (positions_ == "original")
    caplog.clear()
    model.generate(**inputs([row[:-1]]), max_new_tokens=1)
    assert not caplog.text


@pytest.mark.parametrize("method", ["vtc-cls", "pool"])
@torch.no_grad()
def test_compiled_and_exported(model, method):
    torch._dynamo.reset()
    vtc.configure(model, method=method)
    call = inputs([ids(3, "image", 5), ids(2, "image", 4)])  # left-padded
    exported = torch.export.export(Logits(model), (), call, strict=False).module()
    golden.close(exported(**call)[call["attention_mask"].bool()], model(**call).logits[call["attention_mask"].bool()])
    call = inputs(prompts("one"))
    expected = model.generate(**call, **detailed())
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    out = model.generate(**call, **detailed(cache_implementation="static"))
    assert torch.equal(out.sequences, expected.sequences)
