"""Pruning inside the language model against its golden path, through `generate()` and `forward()`."""

import copy
import threading

import pytest
import torch
import transformers as t
from support import models
from support.golden import llava as golden
from support.golden import prune as golden_prune
from support.models import IMAGE, TOKENS, ids
from transformers import CompileConfig, DynamicCache, StaticCache

import vtc
from vtc import ops
from vtc.config import VTCConfig
from vtc.hf import conversation, prune_layers

SCORED = (2, 3, 4)  # vision layers, of 6
LAYERS = 4  # of the language model
STEPS = 5
KEEP = 9
PROMPTS = {
    "one": [[3, "image", 5]],
    "left_padded": [[3, "image", 5], [2, "image", 11]],
    "unequal_images": [[2, "image", 3], [1, "image", "image", 6], [7]],
    "image_last": [[2, "image", 3, "image"], [3 + 2 * TOKENS + 4]],
}
CASES = [
    (method, layer, kv) for method in ("vtc-cls", "fastv", "dart") for layer in (1, 2, 3) for kv in ("full", "compact")
] + [("coverage", 2, "compact"), ("scope", 1, "full")]
BOTH = [("vtc-cls", 2, "full"), ("fastv", 2, "compact"), ("dart", 1, "full")]
pruned = pytest.mark.parametrize(("method", "layer", "kv"), CASES)
some = pytest.mark.parametrize(("method", "layer", "kv"), BOTH)


def prompts(name):
    return [ids(*parts, seed=i) for i, parts in enumerate(PROMPTS[name])]


def count_images(row):
    return row.count(IMAGE) // TOKENS


def inputs(rows):
    return {**models.batch(rows), "pixel_values": models.images(sum(map(count_images, rows)))}


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


def goldens(eager, rows, pixels, method, layer, kv, keep=KEEP, fastv=golden_prune.Pruned):
    """The golden path of each row."""
    pixels, result = list(pixels), []
    for row in rows:
        own, pixels = pixels[: count_images(row)], pixels[count_images(row) :]
        args = (keep, SCORED, TOKENS, method, layer, kv == "compact", fastv)
        result.append(golden_prune.prompt(eager, row, own, *args))
    return result


def check_generated(out, call, paths, before=()):
    length = call["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], call["input_ids"])
    for i, path in enumerate(paths):
        new, logits = path.decode(STEPS, before)
        assert out.sequences[i, length:].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


def detailed(**kwargs):
    return dict(max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs)


def lengths(cache):
    return [layer.keys.shape[2] for layer in cache.layers]


@pruned
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy(model, eager, name, method, layer, kv):
    vtc.configure(model, keep=KEEP, method=method, prune_layer=layer, kv=kv)
    rows = prompts(name)
    call = inputs(rows)
    out = model.generate(**call, **detailed())
    check_generated(out, call, goldens(eager, rows, call["pixel_values"], method, layer, kv))
    full = call["input_ids"].shape[1] + STEPS - 1
    short = max(len(row) - count_images(row) * (TOKENS - KEEP) for row in rows) + STEPS - 1
    assert lengths(out.past_key_values) == [full if kv == "full" else short] * layer + [short] * (LAYERS - layer)


def test_golden_prompt_depends_on_everything(eager):
    """Guards the guards: were these alike, the tests above could not fail."""
    row, pixels = prompts("one")[0], models.images(1)
    paths = [
        goldens(eager, [row], pixels, method, layer, kv)[0]
        for method, layer, kv in [*CASES[:4], ("fastv", 2, "full"), ("fastv", 1, "full")]
    ]
    logits = [path.decode(STEPS)[1] for path in paths]
    assert len({tuple(path.kept) for path in paths}) >= 3
    for a in range(len(paths)):
        for b in range(a):
            assert (logits[a] - logits[b]).abs().max() > 0.05, (a, b)
    path = paths[2]
    path.logits(path.embeds)
    moved = golden_prune.Pruned(eager, path.embeds[:, path.kept], None, LAYERS, True, kept=list(range(len(path.kept))))
    with torch.no_grad():  # packed positions, and nothing dropped seen before: far from it
        assert (moved.logits(moved.embeds)[-1] - logits[2][0]).abs().max() > 0.05


@some
@pytest.mark.parametrize("mask", ["given", "absent"])
def test_new_tokens_go_on_at_the_original_position(model, eager, mask, method, layer, kv):
    vtc.configure(model, keep=KEEP, method=method, prune_layer=layer, kv=kv)
    rows = prompts("one")
    call = inputs(rows)
    if mask == "absent":
        del call["attention_mask"]
    seen = []
    hook = model.model.language_model.layers[-1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    paths = goldens(eager, rows, call["pixel_values"], method, layer, kv)
    check_generated(model.generate(**call, **detailed()), call, paths)
    hook.remove()
    assert seen[1:] == [[len(rows[0]) + i] for i in range(STEPS - 1)]


@some
@pytest.mark.parametrize("language", ["sdpa", "eager"])
def test_any_attention_of_the_language_model(stock, eager, language, method, layer, kv):
    model = copy.deepcopy(stock)
    model.set_attn_implementation({"text_config": language, "vision_config": "vtc"})
    vtc.configure(model, keep=KEEP, method=method, prune_layer=layer, kv=kv)
    rows = prompts("unequal_images")
    call = inputs(rows)
    paths = goldens(eager, rows, call["pixel_values"], method, layer, kv)
    check_generated(model.generate(**call, **detailed()), call, paths)


@pytest.mark.refused("`prune_layer` > 0 with a sliding window", instead="`prune_layer=0`")
@pytest.mark.parametrize("text", [t.MistralConfig, t.Qwen2Config])
def test_other_language_models(text):
    stock = models.build(text=text, text_layers=3)
    if text is t.MistralConfig:
        model = copy.deepcopy(stock)
        model.set_attn_implementation("vtc")
        with pytest.raises(ValueError, match="sliding_window"):
            vtc.configure(model, method="fastv", prune_layer=1)
        stock.config.text_config.sliding_window = stock.model.language_model.config.sliding_window = None
    model = copy.deepcopy(stock)
    model.set_attn_implementation("vtc")
    vtc.configure(model, keep=KEEP, method="fastv", prune_layer=2, kv="full")
    rows = prompts("left_padded")
    call = inputs(rows)
    paths = goldens(golden.eager(stock), rows, call["pixel_values"], "fastv", 2, "full")
    check_generated(model.generate(**call, **detailed()), call, paths)


def test_vipllava():
    stock = models.build(family="vipllava", text_layers=3)
    model = copy.deepcopy(stock)
    model.set_attn_implementation("vtc")
    vtc.configure(model, keep=KEEP, prune_layer=1)
    call = inputs(prompts("left_padded"))
    out = model.generate(**call, **detailed())
    assert lengths(out.past_key_values) == [1 + 2 + 11 + KEEP + STEPS - 1] * 3
    vtc.configure(model, keep=TOKENS)
    assert torch.equal(model(**call).logits, stock(**call).logits)


def test_the_prompt_needs_no_cls_token():
    model = models.build(tower="siglip_vision_model", text_layers=LAYERS, vision_feature_select_strategy="full")
    eager, rows = golden.eager(model), prompts("one")
    call, is_image = inputs(rows), [token == IMAGE for token in rows[0]]
    with torch.no_grad():
        features = eager.get_image_features(call["pixel_values"]).pooler_output
    embeds = golden.splice_features(eager, rows[0], [(TOKENS, features[0])])
    path = golden_prune.Pruned(eager, embeds, is_image, 2, True, keep=KEEP)
    vtc.enable(model, keep=KEEP, method="fastv", kv="compact")
    check_generated(model.generate(**call, **detailed()), call, [path])


@pytest.mark.refused("`prune_layer` > 0 with tiles or videos", instead="`prune_layer=0`")
@pytest.mark.parametrize("family", ["llava_next", "llava_next_video"])
def test_tiles_and_frames_are_refused(family):
    model = models.build(family=family)
    with pytest.raises(ValueError, match="one view per image"):
        vtc.enable(model, prune_layer=1)
    with pytest.raises(ValueError, match=r"'fastv' prunes inside the language model.*work with it: 'vtc-cls'"):
        vtc.enable(model, method="fastv")


@some
@pytest.mark.parametrize("name", PROMPTS)
def test_keeping_all_is_the_stock_model(model, stock, name, method, layer, kv):
    vtc.configure(model, keep=TOKENS, method=method, prune_layer=layer, kv=kv)
    model.set_attn_implementation({"text_config": "sdpa"})
    call = inputs(prompts(name))
    out, expected = model.generate(**call, **detailed()), stock.generate(**call, **detailed())
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    assert conversation.read(out.past_key_values) is None


@pytest.mark.supported("generate()", "beams with `prune_layer` > 0")
@some
@pytest.mark.parametrize("name", ["one", "unequal_images"])
def test_beams(model, eager, name, method, layer, kv):
    vtc.configure(model, keep=KEEP, method=method, prune_layer=layer, kv=kv)
    rows = prompts(name)
    call = inputs(rows)
    options = dict(max_new_tokens=3, num_beams=3, num_return_sequences=3, do_sample=False)
    out = model.generate(**call, **options)[:, call["input_ids"].shape[1] :].view(len(rows), 3, 3)
    for own, path in zip(out, goldens(eager, rows, call["pixel_values"], method, layer, kv), strict=True):
        assert own.tolist() == path.beams(3, 3)


@pytest.mark.supported("Caches", "a static cache with `prune_layer` > 0")
@pytest.mark.parametrize("method", ["vtc-cls", "fastv", "dart"])
@pytest.mark.parametrize("name", PROMPTS)
def test_static_cache(model, eager, name, method):
    vtc.configure(model, keep=KEEP, method=method, prune_layer=2, kv="compact")
    rows = prompts(name)
    call = inputs(rows)
    paths = goldens(eager, rows, call["pixel_values"], method, 2, "compact")
    out = model.generate(**call, **detailed(cache_implementation="static"))
    check_generated(out, call, paths)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=call["input_ids"].shape[1] + STEPS)
    for _ in range(2):  # and once more in the same, after it was reset
        again = model.generate(**call, **detailed(past_key_values=cache))
        assert torch.equal(again.sequences, out.sequences)
        short = max(len(row) - count_images(row) * (TOKENS - KEEP) for row in rows) + STEPS - 1
        assert [int(layer.cumulative_length) for layer in cache.layers] == [short] * LAYERS
        cache.reset()
    text = models.batch([ids(4, seed=9)] * len(rows))
    expected = model.generate(**text, **detailed())
    again = model.generate(**text, **detailed(past_key_values=cache))
    assert torch.equal(again.sequences, expected.sequences)


def test_decoding_with_a_static_cache_compiles_once(model):
    """transformers compiles the decoding step by itself where there is a GPU; here it is told to."""
    torch._dynamo.reset()  # else what other tests have compiled counts
    vtc.configure(model, keep=KEEP, method="fastv", prune_layer=2, kv="compact")
    call = inputs(prompts("left_padded"))
    static = dict(max_new_tokens=STEPS, do_sample=False, cache_implementation="static")
    expected = model.generate(**call, **static)
    config = CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = model.generate(**call, **static, compile_config=config)
    torch._dynamo.reset()
    assert torch.equal(out, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("prune_layer", [0, 2])
def test_a_decoding_step_does_not_ask_a_static_cache_for_its_length(model, monkeypatch, prune_layer):
    """That would synchronise with the GPU at every step."""
    vtc.configure(model, keep=KEEP, prune_layer=prune_layer)
    lengths, stock = [], conversation.length_of
    monkeypatch.setattr(conversation, "length_of", lambda cache: lengths.append(cache) or stock(cache))
    counts = []
    for steps in (2, 6):
        model.generate(
            **inputs(prompts("one")), cache_implementation="static", min_new_tokens=steps, max_new_tokens=steps
        )
        counts.append(len(lengths))
        lengths.clear()
    assert counts[0] == counts[1]


@torch.no_grad()
def test_a_cache_that_was_reset_forgets(model):
    vtc.configure(model, keep=KEEP, prune_layer=2)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=64)
    text, one = torch.tensor([ids(4, seed=9)]), torch.tensor([[7]])
    for read in (
        lambda: model(text, past_key_values=cache).logits,
        lambda: model.generate(one, past_key_values=cache, max_new_tokens=4),
    ):
        expected = read()
        cache.reset()
        model(**inputs(prompts("one")), past_key_values=cache)
        cache.reset()
        assert torch.equal(read(), expected)
        cache.reset()


@pytest.mark.parametrize("options", [{"kv": "full"}, {"method": "fastv"}, {"method": "fastv", "reselect": True}])
def test_a_static_cache_has_one_length(model, options):
    vtc.configure(model, keep=KEEP, prune_layer=2, **options)
    with pytest.raises(ValueError, match=r'static cache does not support; use .*kv="compact"'):
        model.generate(**inputs(prompts("one")), **detailed(cache_implementation="static"))


def test_no_cache(model, eager):
    vtc.configure(model, keep=KEEP, prune_layer=2, kv="full")
    rows = prompts("unequal_images")
    call = inputs(rows)
    paths = goldens(eager, rows, call["pixel_values"], "vtc-cls", 2, "full")
    check_generated(model.generate(**call, **detailed(use_cache=False)), call, paths)
    for options in ({"kv": "compact"}, {"kv": None}, {"method": "fastv", "kv": "compact"}):
        with vtc.compress(model, **options), pytest.raises(ValueError, match="use_cache=True"):
            model.generate(**call, **detailed(use_cache=False))


# How FastV selects at every step, and the golden path.
RESELECT = {
    "without a cache": ({}, {"use_cache": False}, golden_prune.Reselected),
    "by a mask": ({"reselect": True}, {}, golden_prune.Masked),
    "by a mask, without a cache": ({"reselect": True}, {"use_cache": False}, golden_prune.MaskedAtOnce),
}


@pytest.mark.supported(
    "generate()", '`"fastv"` that selects again at every step: `use_cache=False`, or `reselect=True`'
)
@pytest.mark.parametrize("how", RESELECT)
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("name", PROMPTS)
def test_fastv_that_selects_again_at_every_step(model, eager, name, layer, how):
    options, given, path = RESELECT[how]
    vtc.configure(model, keep=KEEP, method="fastv", prune_layer=layer, **options)
    rows = prompts(name)
    call = inputs(rows)
    paths = goldens(eager, rows, call["pixel_values"], "fastv", layer, "full", fastv=path)
    out = model.generate(**call, **detailed(**given))
    check_generated(out, call, paths)
    if not given:
        assert lengths(out.past_key_values) == [call["input_ids"].shape[1] + STEPS - 1] * LAYERS


def test_the_variants_of_fastv_differ(eager):
    """Guards the guards: from the second new token on, three variants give three answers, and all select again."""
    row, pixels = prompts("one")[0], models.images(1)
    variants = (golden_prune.Pruned, golden_prune.Reselected, golden_prune.Masked)
    paths = [goldens(eager, [row], pixels, "fastv", 2, "full", fastv=each)[0] for each in variants]
    tokens = paths[0].decode(STEPS)[0]
    with torch.no_grad():
        for number in range(STEPS):
            last = [path.logits(path.after(tokens[:number]))[-1] for path in paths]
            for a in range(3):
                for b in range(a):
                    assert ((last[a] - last[b]).abs().max() > 0.05) == (number > 0), (number, a, b)


@pytest.mark.parametrize("name", ["one", "unequal_images"])
def test_beams_that_select_again(model, eager, name):
    vtc.configure(model, keep=KEEP, method="fastv", reselect=True)
    rows = prompts(name)
    call = inputs(rows)
    options = dict(max_new_tokens=3, num_beams=3, num_return_sequences=3, do_sample=False)
    out = model.generate(**call, **options)[:, call["input_ids"].shape[1] :].view(len(rows), 3, 3)
    paths = goldens(eager, rows, call["pixel_values"], "fastv", 2, "full", fastv=golden_prune.Masked)
    for own, path in zip(out, paths, strict=True):
        assert own.tolist() == path.beams(3, 3)


def test_a_further_turn_selects_again(model, eager):
    """The question's last token selects for all of the question."""
    vtc.configure(model, keep=KEEP, method="fastv", reselect=True)
    rows = prompts("unequal_images")
    call = inputs(rows)
    first = model.generate(**call, **detailed())
    question = torch.tensor([ids(3, seed=30 + i)[1:] for i in range(len(rows))])
    whole, length = torch.cat([first.sequences, question], 1), call["input_ids"].shape[1]
    mask = torch.ones_like(whole)
    mask[:, :length] = call["attention_mask"]
    out = model.generate(whole, attention_mask=mask, past_key_values=first.past_key_values, **detailed())
    paths = goldens(eager, rows, call["pixel_values"], "fastv", 2, "full", fastv=golden_prune.Masked)
    for i, path in enumerate(paths):
        said, own = whole[i, length:].tolist(), len(rows[i])
        path.ends = [*range(own, own + STEPS), own + len(said)]
        new, logits = path.decode(STEPS, said)
        assert out.sequences[i, whole.shape[1] :].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


def test_a_masked_prompt_counts_as_whole(model):
    call = inputs(prompts("one"))
    with vtc.compress(model, keep=KEEP, method="fastv", reselect=True) as run:
        outputs = model(**call)
    assert (run.tokens_before, run.tokens_after, run.token_layers) == (TOKENS, KEEP, TOKENS)
    assert run.prompt_before == run.prompt_after == call["input_ids"].shape[1]
    assert run.kv_bytes_before == run.kv_bytes_after
    assert run.kv_bytes_after == sum(x.nbytes for own in outputs.past_key_values.layers for x in (own.keys, own.values))


@pytest.mark.supported("Caches", 'a further turn with `prune_layer` > 0, `kv="full"` and no new image')
@pytest.mark.parametrize("method", ["vtc-cls", "fastv", "dart"])
def test_a_further_turn(model, eager, method):
    vtc.configure(model, keep=KEEP, method=method, prune_layer=2, kv="full")
    rows = prompts("unequal_images")
    call = inputs(rows)
    first = model.generate(**call, **detailed())
    question = torch.tensor([ids(3, seed=30 + i)[1:] for i in range(len(rows))])
    conversation = torch.cat([first.sequences, question], 1)
    mask = torch.ones_like(conversation)
    mask[:, : call["input_ids"].shape[1]] = call["attention_mask"]
    cache = first.past_key_values
    out = model.generate(input_ids=conversation, attention_mask=mask, past_key_values=cache, **detailed())
    for i, path in enumerate(goldens(eager, rows, call["pixel_values"], method, 2, "full")):
        new, logits = path.decode(STEPS, conversation[i, call["input_ids"].shape[1] :].tolist())
        assert out.sequences[i, conversation.shape[1] :].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)
    with pytest.raises(ValueError, match="further turn"):
        model.generate(input_ids=conversation, past_key_values=cache, pixel_values=call["pixel_values"], **detailed())
    vtc.configure(model, kv="compact")
    first = model.generate(**call, **detailed())
    with pytest.raises(ValueError, match='kv="full"'):
        model.generate(input_ids=conversation, past_key_values=first.past_key_values, **detailed())


@pytest.mark.parametrize("method", ["vtc-cls", "fastv", "dart"])
@pytest.mark.parametrize("kv", ["full", "compact"])
@pytest.mark.parametrize("name", ["one", "unequal_images"])
@torch.no_grad()
def test_forward_by_hand(model, eager, name, kv, method):
    """No generate(): positions are counted from the cache's note, and several tokens may come at once."""
    vtc.configure(model, keep=KEEP, method=method, prune_layer=2, kv=kv)
    rows = prompts(name)
    call = inputs(rows)
    positions = (call["attention_mask"].cumsum(1) - 1).clamp(min=0)
    outputs = model(**call, position_ids=positions)
    paths = goldens(eager, rows, call["pixel_values"], method, 2, kv)
    first = outputs.logits[:, -1:].argmax(-1)
    new = torch.cat([first, torch.tensor([[11, 12]] * len(rows))], 1)
    cache = copy.deepcopy(outputs.past_key_values)
    at_once = model(input_ids=new, past_key_values=cache).logits
    longer = torch.cat([call["attention_mask"], torch.ones(len(rows), 1)], 1)
    one = model(input_ids=first, attention_mask=longer, past_key_values=outputs.past_key_values).logits
    for i, path in enumerate(paths):
        last = path.logits(path.embeds)[-1]
        golden.close(outputs.logits[i, -1], last)
        expected = path.logits(path.after(new[i].tolist()))[-3:]
        golden.close(at_once[i], expected)
        golden.close(one[i, 0], expected[0])
        golden.close(outputs.logits[i, -len(rows[i]) :], spread(path, len(rows[i])))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(input_ids=first, attention_mask=longer, past_key_values=outputs.past_key_values)
    with pytest.raises(ValueError, match=r"got \d+ row"):
        model(input_ids=first.repeat(2, 1), past_key_values=outputs.past_key_values)


@pytest.mark.parametrize("method", ["fastv", "dart"])
@torch.no_grad()
def test_forward_without_a_cache_and_right_padding(model, eager, method):
    """The prompt's last token is the last that is not padding, wherever it is; padding is no pivot."""
    keep = 20  # enough for every pivot to count
    vtc.configure(model, keep=keep, method=method, prune_layer=2)
    rows = prompts("left_padded")
    length = max(map(len, rows))
    call = {
        "input_ids": torch.tensor([row + ids(length, seed=7)[1 : 1 + length - len(row)] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "pixel_values": models.images(2),
    }
    logits = model(**call, use_cache=False).logits
    for i, path in enumerate(goldens(eager, rows, call["pixel_values"], method, 2, "full", keep)):
        golden.close(logits[i, : len(rows[i])], spread(path, len(rows[i])))


@some
@torch.no_grad()
def test_hidden_states_have_the_columns_of_the_prompt(model, eager, method, layer, kv):
    """Up to the layer that prunes all differ; after it, a column that was dropped has the state of the one before."""
    vtc.configure(model, keep=KEEP, method=method, prune_layer=layer, kv=kv)
    rows = prompts("one")
    call = inputs(rows)
    states = model(**call, output_hidden_states=True).hidden_states
    (path,) = goldens(eager, rows, call["pixel_values"], method, layer, kv)
    golden.close(model.lm_head(states[-1])[0], spread(path, len(rows[0])))
    for number, each in enumerate(states):
        assert each.shape[1] == len(rows[0])
        equal = [torch.equal(each[0, j], each[0, j - 1]) for j in range(1, len(rows[0]))]
        assert equal == [number > layer and j not in path.kept for j in range(1, len(rows[0]))]


def test_gradients_reach_the_projector(model):
    vtc.configure(model, keep=KEEP, method="fastv", prune_layer=2)
    model(**inputs(prompts("left_padded"))).logits[:, -1].sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


@torch.no_grad()
def spread(path, length):
    """The logits `[L, V]` of a prompt's columns."""
    return golden.spread(path.logits(path.embeds), path.kept, length)


def record(monkeypatch, *names):
    """The calls of these operations from now on: name, positional arguments, result."""
    calls = []
    for name in names:
        stock = getattr(ops, name)

        def recorded(*args, name=name, stock=stock, **kwargs):
            result = stock(*args, **kwargs)
            calls.append((name, args, result))
            return result

        monkeypatch.setattr(ops, name, recorded)
    return calls


def test_one_score_and_one_launch_a_prompt(model, eager, monkeypatch):
    """FastV's scores are those of eager attention, whatever is padded; both operations run once, in the prefill."""
    vtc.configure(model, keep=KEEP, method="fastv", prune_layer=2, kv="compact")
    calls = record(monkeypatch, "row_scores", "compact_kv")
    rows = prompts("unequal_images")
    call = inputs(rows)
    model.generate(**call, **detailed())
    (score, _, scores), (move, (keys, values, _), _) = calls
    assert (score, move, len(keys), len(values)) == ("row_scores", "compact_kv", 2, 2)
    for i, path in enumerate(goldens(eager, rows, call["pixel_values"], "fastv", 2, "compact")):
        with torch.no_grad():
            path.logits(path.embeds)
        golden.close(scores[i, -len(rows[i]) :], path.scores)


def test_full_kv_is_not_moved(model, monkeypatch):
    vtc.configure(model, keep=KEEP, method="fastv", prune_layer=2, kv="full")
    calls = record(monkeypatch, "row_scores", "compact_kv")
    model.generate(**inputs(prompts("left_padded")), **detailed())
    assert [name for name, *_ in calls] == ["row_scores"]


def test_nothing_stays_behind(model, stock):
    vtc.configure(model, keep=KEEP, method="fastv", prune_layer=2)
    call = inputs(prompts("one"))
    model.generate(**call, **detailed())
    with pytest.raises(ValueError, match="StaticCache"):
        model(**call, past_key_values=DynamicCache(config=t.MistralConfig(num_hidden_layers=LAYERS, sliding_window=8)))
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**call).logits, stock(**call).logits)


def test_text_alone_is_the_stock_model(model, stock):
    vtc.configure(model, keep=KEEP, method="fastv", prune_layer=2)
    model.set_attn_implementation({"text_config": "sdpa"})
    call = models.batch([ids(5), ids(8, seed=1)])
    out, expected = model.generate(**call, **detailed()), stock.generate(**call, **detailed())
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


@torch.no_grad()
def test_a_hook_half_put_there_leaves_other_calls_alone(model):
    """Torch notes that a hook takes keyword arguments after the hook itself; another thread may run in between."""
    language_model = model.model.language_model
    embeds = torch.randn(1, 5, language_model.config.hidden_size)
    expected = language_model(inputs_embeds=embeds).last_hidden_state
    with prune_layers.hooked(language_model.layers, object()):
        for layer in language_model.layers:
            layer._forward_pre_hooks_with_kwargs.clear()
        assert torch.equal(language_model(inputs_embeds=embeds).last_hidden_state, expected)


def test_threads_prune_one_model_in_their_own_ways(model):
    call = inputs(prompts("left_padded"))
    alone, together = {}, {}

    def run(to, layer):
        with vtc.compress(model, keep=layer + 3, method="fastv", prune_layer=layer):
            for _ in range(3):
                to[layer] = model.generate(**call, **detailed()).logits

    with vtc.compress(model, keep=KEEP):
        for layer in (1, 2, 3):
            run(alone, layer)
        threads = [threading.Thread(target=run, args=(together, layer)) for layer in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for layer in (1, 2, 3):
        assert torch.equal(torch.stack(alone[layer]), torch.stack(together[layer]))


@pytest.mark.parametrize("kv", ["full", "compact"])
def test_run_counts(model, kv):
    call = inputs(prompts("one"))
    with vtc.compress(model, keep=KEEP, method="fastv", prune_layer=1, kv=kv) as run:
        cache = model(**call).past_key_values
    length, short = call["input_ids"].shape[1], call["input_ids"].shape[1] - TOKENS + KEEP
    assert (run.tokens_before, run.tokens_after, run.images) == (TOKENS, KEEP, 1)
    assert list(run.backend) == ["row_scores", "compact", "compact_kv"][: 2 if kv == "full" else 3]
    assert (run.prompt_before, run.prompt_after) == (length, short)
    assert run.kv_bytes_after == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert run.kv_bytes_before == 2 * LAYERS * length * cache.layers[0].keys[:, :, 0].nbytes


@pytest.mark.refused(
    "`prune_layer` > 0 with chunked prefill, assisted or prompt-lookup decoding, gradient checkpointing",
    instead="`prune_layer=0`, or unset the option",
)
def test_what_cannot_be_done_says_so(model, stock):
    vtc.configure(model, keep=KEEP, prune_layer=2)
    call = inputs(prompts("one"))
    length = call["input_ids"].shape[1]
    for change, message in [
        ({"attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool)}, "cannot be shortened"),
        ({"input_ids": call["input_ids"][:, :-7], "attention_mask": None}, "each image takes 36"),
        ({"pixel_values": models.images(2)}, "image"),
        ({"past_key_values": model(**call).past_key_values}, "on top of a cache"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, length, 64)}, "input_ids"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**call | change)
    for change, message in [
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup"),
        ({"assistant_model": stock}, "assistant_model"),
        ({"past_key_values": model(**call).past_key_values}, "further turn"),
        ({"past_key_values": stock(**call).past_key_values}, "further turn"),
        ({"inputs_embeds": torch.zeros(1, length, 64)}, "no inputs_embeds"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(**call, **detailed(**change))
    with pytest.raises(ValueError, match="input_ids"):
        vtc.select(model, call["pixel_values"], method="fastv")
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(**call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_layer": -1}, "prune_layer must be an integer of at least 0"),
        ({"prune_layer": True}, "prune_layer must be an integer"),
        ({"prune_layer": 2, "method": "random"}, "does not prune inside the language model"),
        ({"method": "fastv", "prune_layer": 0}, "use prune_layer=2"),
        ({"kv": "short"}, "kv must be one of 'compact', 'full'"),
        ({"method": "fastv", "kv": "compact", "options": {"reselect": True}}, 'reselect=True needs .*use kv="full"'),
        ({"method": "fastv", "options": {"reselect": 1}}, "reselect must be True or False, got 1"),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        VTCConfig(**options)


def test_where_a_method_prunes_by_default():
    """A layer that was not asked for does not outlive its method."""
    fastv = VTCConfig(method="fastv")
    assert (VTCConfig().prune_after, fastv.prune_after, fastv.updated(method="vtc-cls").prune_after) == (0, 2, 0)
    assert fastv.updated(prune_layer=3).updated(method="vtc-cls").prune_after == 3


def test_what_the_cache_keeps_by_default():
    """FastV's layers before the one that prunes keep everything, as its authors' do."""
    fastv = VTCConfig(method="fastv")
    assert (VTCConfig(prune_layer=2).kept_kv, fastv.kept_kv, fastv.updated(kv="compact").kept_kv) == (
        "compact",
        "full",
        "compact",
    )
    assert fastv.updated(method="vtc-cls").kept_kv == "compact"


@pytest.mark.parametrize("layer", [LAYERS, LAYERS + 1])
def test_a_layer_that_does_not_exist(model, layer):
    with pytest.raises(ValueError, match=f"use 1 to {LAYERS - 1}"):
        vtc.configure(model, prune_layer=layer)


@pytest.mark.refused(
    "`prune_layer` > 0 with a language model other than Llama, Mistral or Qwen2",
    instead="`prune_layer=0`",
)
def test_a_language_model_of_another_kind(model):
    model.model.language_model.config.model_type = "gemma"
    with pytest.raises(ValueError, match="llama, mistral, qwen2"):
        vtc.configure(model, prune_layer=1)


@pytest.mark.parametrize("kv", ["full", "compact"])
def test_the_cache_of_a_beam_search_is_not_continued(model, kv):
    vtc.configure(model, keep=KEEP, prune_layer=1, kv=kv)
    first = model.generate(**inputs(prompts("one")), **detailed(num_beams=2, num_return_sequences=2))
    whole = torch.cat([first.sequences, torch.full((2, 2), 9)], 1)
    with pytest.raises(ValueError, match="searched with beams"):
        model.generate(whole, past_key_values=first.past_key_values, max_new_tokens=1)
    with pytest.raises(ValueError, match="searched with beams"):
        model(whole[:, -1:], past_key_values=first.past_key_values)
