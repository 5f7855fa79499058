"""Dropping tokens in stages, before the language model and inside it, against the golden path."""

import copy
import itertools

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.golden import prune as golden_prune
from support.models import IMAGE, TOKENS, ids
from test_prune import count_images, inputs
from transformers import StaticCache

import vtc
from vtc import ops
from vtc.config import VTCConfig
from vtc.hf import conversation

SCORED = (2, 3, 4)  # vision layers, of 6
LAYERS = 5  # of the language model
STEPS = 4
SCHEDULES = {
    "before and inside": [(0, 14), (2, 5)],
    "twice inside": [(1, 14), (3, 5)],
    "three": [(0, 20), (1, 14), (3, 5)],
    "three inside": [(1, 20), (2, 14), (3, 5)],
}
PROMPTS = {
    "one": [[3, "image", 5]],
    "left_padded": [[3, "image", 5], [2, "image", 11]],
    "unequal_images": [[2, "image", 3], [1, "image", "image", 6], [7]],
}
ORIGINAL = PROMPTS | {"ends_in_an_image": [[3, "image"], [1, "image"]]}  # for positions="original"
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
BOTH = [SCHEDULES["before and inside"], SCHEDULES["twice inside"]]


def prompts(name):
    return [ids(*parts, seed=i) for i, parts in enumerate(ORIGINAL[name])]


@pytest.fixture(scope="module")
def stock():
    return models.build(text_layers=LAYERS)


@pytest.fixture(scope="module")
def eager(stock):
    return golden.eager(stock)


@pytest.fixture
def model(stock):
    model = copy.deepcopy(stock)
    model.set_attn_implementation("vtc")
    return model


def goldens(eager, rows, pixels, schedule, kv, original=False):
    pixels, result = list(pixels), []
    for row in rows:
        own, pixels = pixels[: count_images(row)], pixels[count_images(row) :]
        result.append(golden_prune.scheduled(eager, row, own, SCORED, TOKENS, schedule, kv == "compact", original))
    return result


def check_generated(out, call, paths, before=()):
    length = call["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], call["input_ids"])
    for i, path in enumerate(paths):
        new, logits = path.decode(STEPS, before)
        assert out.sequences[i, length:].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


def detailed(**kwargs):
    return dict(max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True) | kwargs


def longest(rows, keep):
    return max(len(row) - count_images(row) * (TOKENS - keep) for row in rows)


def columns(rows, schedule, kv):
    """How many columns of the prompt each layer holds."""
    held = []
    for layer in range(LAYERS):
        keeps = [keep for start, keep in schedule if start <= layer] or [TOKENS]
        held.append(longest(rows, schedule[-1][1] if kv == "compact" else keeps[-1]))
    return held


@pytest.mark.supported("generate()", "`schedule`: tokens dropped before the language model and again inside it")
@schedules
@pytest.mark.parametrize("kv", ["full", "compact"])
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy(model, eager, name, schedule, kv):
    vtc.configure(model, schedule=schedule, kv=kv)
    rows = prompts(name)
    call = inputs(rows)
    out = model.generate(**call, **detailed())
    check_generated(out, call, goldens(eager, rows, call["pixel_values"], schedule, kv))
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [
        held + STEPS - 1 for held in columns(rows, schedule, kv)
    ]


originals = pytest.mark.parametrize("schedule", [SCHEDULES["before and inside"], SCHEDULES["three"]])


@pytest.mark.supported("generate()", '`positions="original"` with a `schedule`')
@originals
@pytest.mark.parametrize("kv", ["full", "compact"])
@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", ORIGINAL)
def test_original_positions(model, eager, name, schedule, kv, more):
    """Without a cache, transformers takes gaps for ends of samples, and generate() drops a mask of ones."""
    if more and (kv == "full") != ("use_cache" in more):
        pytest.skip('a call without a cache has nothing to shorten, and a static one is kv="compact"')
    vtc.configure(model, schedule=schedule, kv=kv, positions="original")
    rows = prompts(name)
    call = inputs(rows)
    paths = goldens(eager, rows, call["pixel_values"], schedule, kv, original=True)
    check_generated(model.generate(**call, **detailed(**more)), call, paths)


@originals
@pytest.mark.parametrize("kv", ["full", "compact"])
@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("name", ["unequal_images", "ends_in_an_image"])
@torch.no_grad()
def test_original_positions_by_hand(model, eager, name, how, kv, schedule):
    """Tokens by hand go on after the last position of the full prompt, whether its last token stays or not."""
    vtc.configure(model, schedule=schedule, kv=kv, positions="original")
    rows = prompts(name)
    call = inputs(rows)
    paths = goldens(eager, rows, call["pixel_values"], schedule, kv, original=True)
    out = model(**call) if how == "forward" else model.generate(**call, **detailed(max_new_tokens=1))
    new = torch.tensor([[11, 12]] * len(rows))
    mask = torch.cat([call["attention_mask"], torch.ones_like(new)], 1)
    logits = model(input_ids=new, attention_mask=mask, past_key_values=out.past_key_values).logits
    for i, path in enumerate(paths):
        if how == "forward":
            golden.close(out.logits[i, -1], path.logits(path.embeds)[-1])
        golden.close(logits[i], path.logits(path.after([11, 12]))[-2:])


def test_golden_prompt_depends_on_everything(eager):
    """Guards the guards: were these alike, the tests above could not fail."""
    (row,), pixels = prompts("one"), models.images(1)
    cases = list(itertools.product([*SCHEDULES.values(), [(2, 5)], [(0, 14), (3, 5)]], ("full", "compact")))
    logits = [goldens(eager, [row], pixels, *case)[0].decode(STEPS)[1] for case in cases]
    for a in range(len(logits)):
        for b in range(a):
            assert (logits[a] - logits[b]).abs().max() > 0.02, (cases[a], cases[b])


@pytest.mark.parametrize("kv", ["full", "compact"])
@pytest.mark.parametrize(("layer", "method"), [(0, "vtc-cls"), (2, "vtc-cls"), (2, "fastv"), (0, "pool")])
def test_one_pair_is_keep_and_prune_layer(model, layer, method, kv):
    call = inputs(prompts("unequal_images"))
    with vtc.compress(model, method=method, keep=9, prune_layer=layer, kv=kv) as run:
        expected = model.generate(**call, **detailed())
    with vtc.compress(model, method=method, schedule=[(layer, 9)], kv=kv) as same:
        out = model.generate(**call, **detailed())
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    assert same == run


@schedules
@pytest.mark.parametrize("method", ["vtc-cls", "random"])
def test_stages_are_nested(model, monkeypatch, method, schedule):
    """The tokens of each stage are those of the one before with the largest scores."""
    if method == "random" and schedule[0][0]:
        pytest.skip("random selects before the language model only")
    vtc.configure(model, method=method, schedule=schedule)
    call = inputs(prompts("one"))
    kept, positions = vtc.select(model, call["pixel_values"]), {}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, out, number=number: positions.update({number: kwargs["position_ids"][0].tolist()}),
            with_kwargs=True,
        )
        for number, layer in enumerate(model.model.language_model.layers)
    ]
    model(**call)
    for hook in hooks:
        hook.remove()
    assert kept.indices.shape[1] == schedule[0][1]
    patches = list(range(TOKENS)) if schedule[0][0] else kept.indices[0].tolist()
    last = 1 + 3  # the text before the image
    scores = kept.scores[0].tolist()
    for layer, keep in schedule:
        if layer:
            seen = [patches[at - last] for at in positions[layer] if last <= at < last + len(patches)]
            assert seen == sorted(sorted(range(TOKENS), key=lambda patch: (-scores[patch], patch))[:keep])


def test_ties_go_to_the_lower_index(model, monkeypatch):
    """Greedy methods score 1 - i/K, and 0 for the rest; here all are equal."""
    monkeypatch.setattr(
        vtc.methods.random, "random_scores", lambda pixels, tokens, seed: torch.ones(len(pixels), tokens)
    )
    vtc.configure(model, method="random", schedule=[(0, 14), (2, 5)])
    positions = []
    layer = model.model.language_model.layers[2]
    hook = layer.register_forward_hook(
        lambda _, args, kwargs, out: positions.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    rows = prompts("one")
    model(**inputs(rows))
    hook.remove()
    assert positions[0] == [*range(4 + 5), *range(4 + 14, 4 + 14 + 5)]


@pytest.mark.parametrize("schedule", BOTH)
@pytest.mark.parametrize("name", ["one", "unequal_images"])
def test_beams(model, eager, name, schedule):
    vtc.configure(model, schedule=schedule)
    rows = prompts(name)
    call = inputs(rows)
    options = dict(max_new_tokens=3, num_beams=3, num_return_sequences=3, do_sample=False)
    out = model.generate(**call, **options)[:, call["input_ids"].shape[1] :].view(len(rows), 3, 3)
    for own, path in zip(out, goldens(eager, rows, call["pixel_values"], schedule, "compact"), strict=True):
        assert own.tolist() == path.beams(3, 3)


@schedules
@pytest.mark.parametrize("name", PROMPTS)
def test_static_cache(model, eager, name, schedule):
    vtc.configure(model, schedule=schedule, kv="compact")
    rows = prompts(name)
    call = inputs(rows)
    paths = goldens(eager, rows, call["pixel_values"], schedule, "compact")
    check_generated(model.generate(**call, **detailed(cache_implementation="static")), call, paths)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=call["input_ids"].shape[1] + STEPS)
    for _ in range(2):
        check_generated(model.generate(**call, **detailed(past_key_values=cache)), call, paths)
        short = columns(rows, schedule, "compact")[0] + STEPS - 1
        assert [int(layer.cumulative_length) for layer in cache.layers] == [short] * LAYERS
        cache.reset()


@pytest.mark.parametrize("schedule", BOTH)
def test_no_cache(model, eager, schedule):
    vtc.configure(model, schedule=schedule, kv="full")
    rows = prompts("unequal_images")
    call = inputs(rows)
    paths = goldens(eager, rows, call["pixel_values"], schedule, "full")
    check_generated(model.generate(**call, **detailed(use_cache=False)), call, paths)
    with vtc.compress(model, kv="compact"), pytest.raises(ValueError, match=r"schedule=.*use_cache=True"):
        model.generate(**call, **detailed(use_cache=False))


@schedules
@pytest.mark.parametrize("kv", ["full", "compact"])
@pytest.mark.parametrize("name", ["one", "unequal_images", "ends_in_an_image"])
@torch.no_grad()
def test_forward_by_hand(model, eager, name, kv, schedule):
    """Masks have the caller's columns, and so have logits; several tokens may come at once."""
    vtc.configure(model, schedule=schedule, kv=kv)
    rows = prompts(name)
    call = inputs(rows)
    outputs = model(**call, position_ids=(call["attention_mask"].cumsum(1) - 1).clamp(min=0))
    paths = goldens(eager, rows, call["pixel_values"], schedule, kv)
    length = call["input_ids"].shape[1]
    assert outputs.logits.shape[1] == length
    first = outputs.logits[:, -1:].argmax(-1)
    new = torch.cat([first, torch.tensor([[11, 12]] * len(rows))], 1)
    cache, again = copy.deepcopy(outputs.past_key_values), copy.deepcopy(outputs.past_key_values)
    at_once = model(input_ids=new, past_key_values=cache).logits
    longer = torch.cat([call["attention_mask"], torch.ones(len(rows), 1)], 1)
    one = model(input_ids=first, attention_mask=longer, past_key_values=outputs.past_key_values).logits
    placed = model(
        input_ids=first,
        attention_mask=longer,
        position_ids=longer.long().sum(1, keepdim=True) - 1,
        past_key_values=again,
    ).logits
    for i, path in enumerate(paths):
        golden.close(outputs.logits[i, -1], path.logits(path.embeds)[-1])
        expected = path.logits(path.after(new[i].tolist()))[-3:]
        golden.close(at_once[i], expected)
        golden.close(one[i, 0], expected[0])
    assert torch.equal(placed, one)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(input_ids=first, attention_mask=longer, past_key_values=outputs.past_key_values)


@pytest.mark.parametrize("schedule", [[(0, TOKENS)], [(0, TOKENS), (2, 5)]])
@torch.no_grad()
def test_tokens_by_hand_after_all_of_an_image(model, stock, schedule):
    """A first stage that keeps everything is no stage: positions count padding, as the stock forward() does."""
    call = inputs(prompts("left_padded"))
    new = torch.tensor([[11], [12]])
    mask = torch.cat([call["attention_mask"], torch.ones_like(new)], 1)
    same, logits = copy.deepcopy(stock), []
    if len(schedule) > 1:
        vtc.enable(same, prune_layer=2, keep=5)
    vtc.configure(model, schedule=schedule)
    for each in (model, same):
        cache = each(**call).past_key_values
        logits.append(each(input_ids=new, attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*logits)


@schedules
@torch.no_grad()
def test_hidden_states_have_the_columns_of_the_prompt(model, eager, schedule):
    """A column that was dropped has the state of the last one before it that stays."""
    vtc.configure(model, schedule=schedule)
    rows = prompts("one")
    call = inputs(rows)
    states = model(**call, output_hidden_states=True).hidden_states
    scores = golden.scores(eager, call["pixel_values"][0], SCORED)
    for number, each in enumerate(states):
        assert each.shape[1] == len(rows[0])
        keep = ([keep for layer, keep in schedule if layer < number or not layer] or [TOKENS])[-1]
        kept = golden.top(scores, keep)
        for patch in range(TOKENS):
            assert torch.equal(each[0, 4 + patch], each[0, 4 + patch - 1]) == (patch not in kept)
    golden.close(
        model.lm_head(states[-1])[0, -1],
        goldens(eager, rows, call["pixel_values"], schedule, "compact")[0].decode(1)[1][0],
    )


@pytest.mark.supported("Caches", 'a further turn with a `schedule`, `kv="full"` and no new image')
@pytest.mark.parametrize(
    ("schedule", "name", "positions"),
    [
        (SCHEDULES["three"], "unequal_images", "packed"),
        (SCHEDULES["twice inside"], "unequal_images", "packed"),
        (SCHEDULES["three"], "unequal_images", "original"),
        (SCHEDULES["three"], "ends_in_an_image", "original"),
    ],
)
def test_a_further_turn(model, eager, schedule, name, positions):
    vtc.configure(model, schedule=schedule, kv="full", positions=positions)
    rows = prompts(name)
    call = inputs(rows)
    first = model.generate(**call, **detailed())
    question = torch.tensor([ids(3, seed=30 + i)[1:] for i in range(len(rows))])
    whole, length = torch.cat([first.sequences, question], 1), call["input_ids"].shape[1]
    mask = torch.ones_like(whole)
    mask[:, :length] = call["attention_mask"]
    cache = first.past_key_values
    paths = goldens(eager, rows, call["pixel_values"], schedule, "full", positions == "original")
    for turn in range(2):
        out = model.generate(input_ids=whole, attention_mask=mask, past_key_values=cache, **detailed())
        for i, path in enumerate(paths):
            new, logits = path.decode(STEPS, whole[i, length:].tolist())
            assert out.sequences[i, whole.shape[1] :].tolist() == new
            golden.close(torch.stack(out.logits)[:, i], logits)
        whole = torch.cat([out.sequences, question + turn + 1], 1)
        mask = torch.cat([mask, torch.ones(len(rows), whole.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
    with torch.no_grad():  # and by hand
        held = cache.get_seq_length() - conversation.read(cache).held
        rest = whole[:, length + held :]
        logits = model(input_ids=rest, attention_mask=mask, past_key_values=cache).logits
        for i, path in enumerate(paths):
            golden.close(logits[i, -1], path.logits(path.after(whole[i, length:].tolist()))[-1])


@pytest.mark.parametrize("schedule", BOTH)
def test_a_cache_follows_its_rows(model, eager, schedule):
    """Rows that were reordered, and a cropped answer."""
    vtc.configure(model, schedule=schedule, kv="full")
    rows = prompts("unequal_images")
    call = inputs(rows)
    first = model.generate(**call, **detailed())
    cache, order = first.past_key_values, torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    cache.crop(-1)
    whole, length = first.sequences[order][:, :-1], call["input_ids"].shape[1]
    whole = torch.cat([whole[:, :-1], torch.full((3, 2), 9)], 1)
    mask = torch.ones_like(whole)
    mask[:, :length] = call["attention_mask"][order]
    out = model.generate(input_ids=whole, attention_mask=mask, past_key_values=cache, **detailed())
    paths = goldens(eager, rows, call["pixel_values"], schedule, "full")
    for i, row in enumerate(order.tolist()):
        new, logits = paths[row].decode(STEPS, whole[i, length:].tolist())
        golden.close(torch.stack(out.logits)[:, i], logits)
        assert out.sequences[i, whole.shape[1] :].tolist() == new


@schedules
@pytest.mark.parametrize("kv", ["full", "compact"])
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_run_counts(model, schedule, kv, how):
    rows = prompts("one")
    call = inputs(rows)
    with vtc.compress(model, schedule=schedule, kv=kv) as run:
        cache = (
            model(**call) if how == "forward" else model.generate(**call, **detailed(max_new_tokens=1))
        ).past_key_values
    keeps = [([keep for start, keep in schedule if start <= layer] or [TOKENS])[-1] for layer in range(LAYERS)]
    assert (run.tokens_before, run.tokens_after, run.images, run.layers) == (TOKENS, schedule[-1][1], 1, LAYERS)
    assert run.token_layers == pytest.approx(sum(keeps) / LAYERS)
    assert f"{run.token_layers:.1f} on average over the 5 layers" in run.report()
    assert (run.prompt_before, run.prompt_after) == (len(rows[0]), longest(rows, schedule[-1][1]))
    assert run.kv_bytes_after == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert run.kv_bytes_before == LAYERS * len(rows[0]) * 2 * cache.layers[0].keys[:, :, 0].nbytes
    assert list(run.backend)[-1:] == (["compact_kv"] if kv == "compact" else list(run.backend)[-1:])


def test_one_launch_a_stage(model, monkeypatch):
    calls, moved = [], ops.compact_kv
    monkeypatch.setattr(
        ops, "compact_kv", lambda keys, *rest, **more: calls.append(len(keys)) or moved(keys, *rest, **more)
    )
    call = inputs(prompts("one"))
    for schedule, kv, expected in [
        ([(2, 5)], "compact", [2]),
        ([(0, 14), (2, 5)], "compact", [2]),
        ([(1, 14), (3, 5)], "compact", [2, 1]),
        ([(1, 14), (3, 5)], "full", []),
    ]:
        calls.clear()
        with vtc.compress(model, schedule=schedule, kv=kv):
            model.generate(**call, **detailed())
        assert calls == expected, schedule


@pytest.mark.refused("a `schedule` with tiles or videos", instead="`keep`")
@pytest.mark.parametrize("family", ["llava_next", "llava_next_video"])
def test_tiles_and_frames_are_refused(family):
    with pytest.raises(ValueError, match=r"schedule=\[\(0, 9\), \(1, 3\)\] needs models with one view per image"):
        vtc.enable(models.build(family=family), schedule=[(0, 9), (1, 3)])


@pytest.mark.refused(
    "a `schedule` with chunked prefill, assisted decoding, or further turns with images", instead="`keep`"
)
def test_what_cannot_be_done_says_so(model, stock):
    vtc.configure(model, schedule=[(0, 14), (2, 5)], kv="full")
    call = inputs(prompts("one"))
    for change, message in [
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup"),
        ({"assistant_model": stock}, "assistant_model"),
        ({"past_key_values": model.generate(**call, **detailed()).past_key_values}, "further turn"),
        ({"past_key_values": stock(**call).past_key_values}, "further turn"),
        ({"cache_implementation": "static"}, "static cache"),
        ({"inputs_embeds": torch.zeros(1, 9, 64)}, "no inputs_embeds"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(**call, **detailed(**change))
    with pytest.raises(ValueError, match="images on top of a cache"):
        model(**call, past_key_values=model(**call).past_key_values)
    with pytest.raises(ValueError, match=r"schedule=\[\(0, 14\), \(5, 3\)\] leaves no layer"):
        vtc.configure(model, schedule=[(0, 14), (LAYERS, 3)])
    with pytest.raises(ValueError, match="keeps 99 visual tokens at first, but an image of this model has only 36"):
        vtc.configure(model, schedule=[(0, 99), (2, 3)])
    vtc.configure(model, kv="compact")
    first = model.generate(**call, **detailed())
    with pytest.raises(ValueError, match='kv="full"'):
        model.generate(torch.cat([first.sequences, torch.tensor([[5]])], 1), past_key_values=first.past_key_values)
    out = model.generate(**call, **detailed(num_beams=2), num_return_sequences=2)
    with pytest.raises(ValueError, match="searched with beams"):
        model.generate(torch.cat([out.sequences, out.sequences[:, -1:]], 1), past_key_values=out.past_key_values)


def test_settings_come_back_from_a_saved_model(model, tmp_path):
    vtc.configure(model, schedule=[(0, 14), (2, 5)])
    assert model.config.vtc["schedule"] == [[0, 14], [2, 5]]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="vtc")
    call = inputs(prompts("one"))
    assert vtc.status(again).settings == {"schedule": [[0, 14], [2, 5]]}
    assert "36 -> 14, before the projector, then 5 after layer 2 of the language model" in str(vtc.status(again))
    assert torch.equal(again.generate(**call, max_new_tokens=2), model.generate(**call, max_new_tokens=2))
    model.config.vtc["schedule"] = [[0, 14.0], [2, 5]]  # the cache of settings must not take it for the other
    with pytest.raises(ValueError, match="pairs of integers"):
        model(**call)


def test_gradients_reach_the_projector(model):
    vtc.configure(model, schedule=[(0, 14), (2, 5)])
    call = inputs(prompts("left_padded"))
    labels = call["input_ids"].masked_fill(call["input_ids"] == IMAGE, -100)
    model(**call, labels=labels).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_the_default_cache_is_compact():
    assert VTCConfig(schedule=[(0, 14), (2, 5)]).kept_kv == "compact"
