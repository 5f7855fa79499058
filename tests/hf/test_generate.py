"""The drop-in against the golden path: same tokens, same logits, whatever `generate()` and `forward()` are asked."""

import copy

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.kernels import DEVICE
from support.models import IMAGE, TOKENS, VOCAB, ids
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    StoppingCriteria,
)

import vtc
from vtc.hf.attention import vtc_attention

LAYERS = (2, 3, 4)  # of 6; the feature layer is hidden_states[-2], the output of layer 4
STEPS = 7
KEEPS = (1, 9, TOKENS - 1, TOKENS)

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


@pytest.fixture(scope="module")
def stock():
    return models.build()


@pytest.fixture(scope="module")
def saved(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    stock.save_pretrained(path)
    return path


@pytest.fixture
def model(saved):
    return LlavaForConditionalGeneration.from_pretrained(saved, attn_implementation="vtc")


@pytest.fixture(scope="module")
def eager(stock):
    return golden.eager(stock)


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


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy(model, eager, name, keep):
    vtc.configure(model, keep=keep)
    rows = prompts(name)
    call = inputs(rows)
    check_generated(model.generate(**call, **detailed()), call, eager, rows, keep)


def test_golden_prompt_depends_on_selection_and_position(eager):
    """Guards the guards: if these did not differ, the tests above could not fail."""
    row, image = prompts("one")[0], models.images(1)[0]
    embeds, _ = spliced(eager, [row], image[None], 9)[0]
    new, logits = golden.decode(eager, embeds, STEPS)
    with torch.no_grad():
        hidden = eager.model.vision_tower(image[None], output_hidden_states=True).hidden_states
        patches = hidden[-2][0, 1:]
        other = sorted(set(range(TOKENS)) - set(golden.top(golden.scores(eager, image, LAYERS), 9)))[:9]
        wrong = embeds.clone()
        wrong[0, 4:13] = eager.model.multi_modal_projector(patches[other])
        positions = torch.arange(embeds.shape[1])[None]
        positions[0, -1] += TOKENS - 9  # the last token at its place in the full prompt
        moved = eager.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    assert golden.decode(eager, wrong, STEPS)[0] != new
    assert (eager.lm_head(moved)[0, -1] - logits[0]).abs().max() > 0.1


@pytest.mark.parametrize("mask", ["given", "absent"])
def test_unpadded_prompt_decodes_at_the_compressed_position(model, eager, mask):
    """generate() drops an all-ones mask, so nothing that hangs on the mask may be needed."""
    vtc.configure(model, keep=5)
    rows = prompts("one")
    call = inputs(rows)
    if mask == "absent":
        del call["attention_mask"]
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    check_generated(model.generate(**call, **detailed()), call, eager, rows, 5)
    hook.remove()
    length = len(rows[0]) - TOKENS + 5
    assert seen == [[list(range(length))]] + [[[length + i]] for i in range(STEPS - 1)]


@pytest.mark.parametrize("name", ["one", "unequal_images", "text_only_row"])
@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_other_caches(model, eager, name, cache):
    vtc.configure(model, keep=9)
    rows = prompts(name)
    call = inputs(rows)
    check_generated(model.generate(**call, **detailed(**cache)), call, eager, rows, 9)


def test_keep_all_is_bit_identical(model, stock):
    vtc.configure(model, keep=TOKENS)
    call = inputs(prompts("unequal_images"))
    ours, theirs = model.generate(**call, **detailed()), stock.generate(**call, **detailed())
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))
    with torch.no_grad():
        assert torch.equal(model(**call).logits, stock(**call).logits)


def test_text_only_batch_is_stock(model, stock):
    vtc.configure(model, keep=9)
    call = models.batch([ids(5), ids(9, seed=1)])
    ours, theirs = model.generate(**call, **detailed()), stock.generate(**call, **detailed())
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))


@pytest.mark.parametrize("seed", [0, 1])
def test_sampling(model, eager, seed):
    vtc.configure(model, keep=9)
    rows = prompts("one")
    call = inputs(rows)
    torch.manual_seed(seed)
    out = model.generate(**call, do_sample=True, top_k=0, max_new_tokens=STEPS)
    torch.manual_seed(seed)
    new, _ = golden.decode(eager, spliced(eager, rows, call["pixel_values"], 9)[0][0], STEPS, sample=True)
    assert out[0, len(rows[0]) :].tolist() == new


@pytest.mark.parametrize("copies", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["left_padded", "text_only_row", "unequal_images"])
def test_beams(model, eager, name, copies):
    """Golden: the stock beam search on the spliced embeddings of each row alone."""
    vtc.configure(model, keep=9)
    rows = prompts(name)
    call = inputs(rows)
    out = model.generate(**call, max_new_tokens=STEPS, do_sample=False, **copies)
    returned = copies.get("num_return_sequences", 1)
    length = call["input_ids"].shape[1]
    assert torch.equal(out[:, :length], call["input_ids"].repeat_interleave(returned, 0))
    for i, (embeds, _) in enumerate(spliced(eager, rows, call["pixel_values"], 9)):
        alone = eager.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=STEPS, **copies
        )
        assert torch.equal(out[i * returned : (i + 1) * returned, length:], alone)


def test_several_samples_of_one_prompt(model, eager):
    vtc.configure(model, keep=9)
    rows = prompts("one")
    call = inputs(rows)
    out = model.generate(**call, **{**detailed(num_return_sequences=3), "do_sample": True})
    embeds, _ = spliced(eager, rows, call["pixel_values"], 9)[0]
    for i, sequence in enumerate(out.sequences):
        assert torch.equal(sequence[: len(rows[0])], call["input_ids"][0])
        new = eager.get_input_embeddings()(sequence[len(rows[0]) :])[None]
        expected = golden.logits(eager, torch.cat([embeds, new], 1))[embeds.shape[1] - 1 : -1]
        golden.close(torch.stack(out.logits)[:, i], expected.detach())


# --- a second turn ---------------------------------------------------------------------------------------------------


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
    vtc.configure(model, keep=4)
    whole = models.batch([first.sequences[0].tolist() + ids("image", 2)])
    with pytest.raises(ValueError, match="keep=9"):
        model.generate(**whole, pixel_values=models.images(1), past_key_values=copy.deepcopy(cache), max_new_tokens=2)
    uncompressed = stock.generate(**call, **detailed()).past_key_values
    with pytest.raises(ValueError, match="not compressed"):
        model.generate(**whole, pixel_values=models.images(1), past_key_values=uncompressed, max_new_tokens=2)


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


# --- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_forward_logits(model, eager, name):
    vtc.configure(model, keep=9)
    rows = prompts(name)
    call = inputs(rows)
    with torch.no_grad():
        out = model(**call)
        last = model(**call, logits_to_keep=1)
    for i, (embeds, _) in enumerate(spliced(eager, rows, call["pixel_values"], 9)):
        expected = golden.logits(eager, embeds).detach()
        golden.close(out.logits[i, -embeds.shape[1] :], expected)
        golden.close(last.logits[i], expected[-1:])
    assert out.logits.shape[1] == max(len(row) - (TOKENS - 9) * count_images(row) for row in rows)


def test_rows_that_become_unequal_need_no_mask(model, eager):
    vtc.configure(model, keep=9)
    rows = prompts("unequal_same_length")
    call = inputs(rows)
    del call["attention_mask"]
    check_generated(model.generate(**call, **detailed()), call, eager, rows, 9)
    with torch.no_grad():
        logits = model(**call).logits
    for i, (embeds, _) in enumerate(spliced(eager, rows, call["pixel_values"], 9)):
        golden.close(logits[i, -embeds.shape[1] :], golden.logits(eager, embeds).detach())


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


@pytest.mark.parametrize("name", ["one", "left_padded"])
def test_manual_decoding_loop(model, eager, name):
    """forward() with the cache it returned, and no mask: right without padding; with a full mask: an error."""
    vtc.configure(model, keep=9)
    rows = prompts(name)
    call = inputs(rows)
    with torch.no_grad():
        out = model(**call)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        if name == "one":
            step = model(input_ids=token, past_key_values=copy.deepcopy(out.past_key_values))
            embeds, _ = spliced(eager, rows, call["pixel_values"], 9)[0]
            new, logits = golden.decode(eager, embeds, 2)
            assert token.tolist() == [[new[0]]]
            golden.close(step.logits[0, -1], logits[1])
        mask = torch.cat([call["attention_mask"], torch.ones(len(rows), 1, dtype=torch.long)], 1)
        with pytest.raises(ValueError, match=r"columns.*use generate\(\)"):
            model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
        with pytest.raises(ValueError, match="whole conversation"):
            model(**call, past_key_values=out.past_key_values)


def test_given_positions_close_up(model, eager):
    vtc.configure(model, keep=9)
    rows = prompts("several_images")
    call = inputs(rows)
    positions = torch.arange(len(rows[0]))[None]
    out = model.generate(**call, position_ids=positions, **detailed())
    check_generated(out, call, eager, rows, 9)


# --- what else generate() takes ---------------------------------------------------------------------------------------


class Recorder(LogitsProcessor, StoppingCriteria):
    def __init__(self, result):
        self.result, self.seen = result, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return self.result(input_ids, scores)


class Streamer:
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ended = True


def test_the_callers_callables_see_the_full_prompt(model):
    vtc.configure(model, keep=9)
    call = inputs(prompts("left_padded"))
    length = call["input_ids"].shape[1]
    processor = Recorder(lambda ids, scores: scores)
    stop = Recorder(lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= length + 4))
    out = model.generate(
        **call, do_sample=False, max_new_tokens=STEPS, logits_processor=[processor], stopping_criteria=[stop]
    )
    assert out.shape[1] == length + 4
    for i, seen in enumerate(processor.seen):
        assert torch.equal(seen, out[:, : length + i])
    for i, seen in enumerate(stop.seen):
        assert torch.equal(seen, out[:, : length + i + 1])


def test_streamer_and_prefix_function(model):
    vtc.configure(model, keep=9)
    call = inputs(prompts("one"))
    streamer, seen = Streamer(), []

    def allowed(row, sent):
        seen.append(sent.clone())
        return [7, 8]

    out = model.generate(**call, do_sample=False, max_new_tokens=3, streamer=streamer, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(streamer.values[0], call["input_ids"])
    assert torch.cat([value.flatten() for value in streamer.values]).tolist() == out[0].tolist()
    assert streamer.ended
    for i, sent in enumerate(seen):
        assert torch.equal(sent, out[0, : call["input_ids"].shape[1] + i])
    assert set(out[0, call["input_ids"].shape[1] :].tolist()) <= {7, 8}


@pytest.mark.parametrize("how", ["argument", "config", "model"])
def test_max_length_counts_the_full_prompt(model, how):
    vtc.configure(model, keep=9)
    call = inputs(prompts("left_padded"))
    length = call["input_ids"].shape[1]
    limits = {"max_length": length + 4, "min_length": length + 2}
    if how == "argument":
        out = model.generate(**call, do_sample=False, **limits)
    elif how == "config":
        out = model.generate(**call, generation_config=GenerationConfig(pad_token_id=0, **limits))
    else:
        for name, value in limits.items():
            setattr(model.generation_config, name, value)
        out = model.generate(**call, do_sample=False)
    assert out.shape[1] == length + 4


def test_inputs_may_be_positional(model):
    vtc.configure(model, keep=9)
    call = inputs(prompts("one"))
    expected = model.generate(**call, max_new_tokens=3, do_sample=False)
    prompt = call.pop("input_ids")
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(prompt, config, **call), expected)


def test_output_hidden_states_are_those_of_the_short_prompt(model):
    vtc.configure(model, keep=9)
    call = inputs(prompts("one"))
    out = model.generate(**call, **detailed(output_hidden_states=True))
    assert out.hidden_states[0][0].shape[1] == call["input_ids"].shape[1] - TOKENS + 9
    assert out.past_key_values.get_seq_length() == call["input_ids"].shape[1] - TOKENS + 9 + STEPS - 1


def test_chunked_prefill(model, eager):
    vtc.configure(model, keep=9)
    rows = prompts("several_images")
    call = inputs(rows)
    out = model.generate(**call, **detailed(prefill_chunk_size=8))
    check_generated(out, call, eager, rows, 9)


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_short_prompt_in_half_precision(model, dtype, device):
    """Same selection, then the same language model: compared with the stock half-precision model on that prompt."""
    vtc.configure(model, keep=9)
    model.to(device, dtype)
    call = {name: tensor.to(device) for name, tensor in inputs(prompts("one")).items()}
    with torch.no_grad():
        out = model(**call).logits[0]
        features = model.get_image_features(call["pixel_values"]).pooler_output[0]
        embeds = model.get_input_embeddings()(call["input_ids"])[0]
        embeds = torch.cat([embeds[:4], features, embeds[4 + TOKENS :]])[None]
        expected = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)[0]
    assert features.dtype == dtype
    torch.testing.assert_close(out, expected)


# --- the vision tower -------------------------------------------------------------------------------------------------


def test_layers_beyond_the_feature_layer_do_not_run(model, monkeypatch):
    vtc.configure(model, keep=9, ensemble_layers=2)
    ran, scored, projected = [], [], []
    for i, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: projected.append(args[0].shape))
    real = vtc.ops.row_scores
    monkeypatch.setattr(vtc.ops, "row_scores", lambda *a, **k: scored.append(len(ran)) or real(*a, **k))
    call = inputs(prompts("several_images"))
    model.generate(**call, max_new_tokens=3)
    assert ran == [0, 1, 2, 3, 4]
    assert scored == [3, 4]  # layers 0 to 2 and 0 to 3 had run before
    assert projected == [(3, 9, 64)]


def test_which_way_a_scored_layer_takes(model, monkeypatch):
    """The fused kernel where it is asked for or known to be faster, and never where it would cut a gradient."""
    calls = []
    for op in ("cls_attention", "row_scores"):
        real = getattr(vtc.ops, op)
        monkeypatch.setattr(vtc.ops, op, lambda *a, real=real, op=op, **k: calls.append(op) or real(*a, **k))
    pixels = models.images(1)
    vtc.configure(model, keep=9)

    def taken(grad=False, **options):
        calls.clear()
        with vtc.compress(model, **options), torch.set_grad_enabled(grad):
            model.get_image_features(pixels)
        assert len(calls) == 3
        return calls[0]

    assert taken() == "row_scores"
    assert taken(fused=True) == "cls_attention"
    assert taken(fused=True, grad=True) == "row_scores"
    asked = []
    monkeypatch.setattr(vtc.ops, "fused_is_faster", lambda *a: not asked.append(a))
    assert taken() == "cls_attention"
    assert asked[0] == (torch.device("cpu"), torch.float32, 16, "auto")
    assert taken(fused=False) == "row_scores"


def test_generate_records_no_graph(model):
    """Or every image would keep the activations of the whole vision tower alive."""
    vtc.configure(model, keep=9)
    grad = []
    model.model.multi_modal_projector.register_forward_hook(lambda *_: grad.append(torch.is_grad_enabled()))
    model.generate(**inputs(prompts("one")), max_new_tokens=2)
    assert grad == [False]


def test_no_square_attention_matrix(model):
    """The largest tensor that autograd would have to know about is the hidden states, not [B, H, N, N]."""
    vtc.configure(model, keep=9)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        model.model.requires_grad_(True).get_image_features(models.images(1))
    assert sizes
    assert not [s for s in sizes if s[-2:] == (TOKENS + 1, TOKENS + 1)]


@pytest.mark.parametrize(
    ("options", "layers", "combine"),
    [
        ({}, (2, 3, 4), sum),
        ({"ensemble_layers": 1}, (4,), sum),
        ({"ensemble_layers": 5}, (0, 1, 2, 3, 4), sum),
        ({"start_layer": 1}, (1, 2, 3, 4), sum),
        ({"ensemble": "mean"}, (2, 3, 4), lambda values: sum(values) / 3),
        ({"ensemble": "max"}, (2, 3, 4), max),
        ({"ensemble": "min"}, (2, 3, 4), min),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_select(stock, eager, options, layers, combine, fused):
    pixels = models.images(3)
    selection = vtc.select(stock, pixels, keep=9, fused=fused, **options)
    with torch.no_grad():
        expected = [golden.scores(eager, image, layers, combine) for image in pixels]
    assert selection.grid == (6, 6)
    assert selection.scores.dtype == torch.float32
    torch.testing.assert_close(selection.scores, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert selection.indices.tolist() == [golden.top(values, 9) for values in expected]


@pytest.mark.parametrize(
    ("feature_layer", "layers"), [(-1, (2, 3, 4)), (-3, (1, 2, 3)), (4, (1, 2, 3)), (6, (2, 3, 4))]
)
def test_scored_layers_end_at_the_feature_layer_but_never_at_the_last(feature_layer, layers):
    model = models.build(vision_feature_layer=feature_layer)
    eager = golden.eager(model)
    rows = prompts("one")
    call = inputs(rows)
    with torch.no_grad():
        embeds, _ = golden.splice(eager, rows[0], call["pixel_values"], 9, layers, TOKENS)
    vtc.enable(model, keep=9)
    out = model.generate(**call, max_new_tokens=STEPS, do_sample=False)
    assert out[0, len(rows[0]) :].tolist() == golden.decode(eager, embeds, STEPS)[0]


def test_an_image_does_not_depend_on_its_batch(stock):
    pixels = models.images(4)
    for options in ({}, {"method": "random"}):
        together = vtc.select(stock, pixels, keep=9, **options)
        for i in range(4):
            alone = vtc.select(stock, pixels[i : i + 1], keep=9, **options)
            assert torch.equal(alone.indices[0], together.indices[i])


def test_random_is_uniform_seeded_and_per_image(stock):
    pixels = models.images(64)
    first = vtc.select(stock, pixels, keep=9, method="random")
    again = vtc.select(stock, pixels, keep=9, method="random")
    other = vtc.select(stock, pixels, keep=9, method="random", seed=1)
    assert torch.equal(first.indices, again.indices)
    assert (first.indices != other.indices).any(1).all()
    assert len({tuple(row) for row in first.indices.tolist()}) == 64
    assert first.scores.min() >= 0
    assert first.scores.max() < 1
    assert abs(first.scores.mean() - 0.5) < 0.03  # 2304 uniform numbers: 5 standard errors
    assert abs(first.scores.std() - 12**-0.5) < 0.02
    counts = torch.bincount(first.indices.flatten(), minlength=TOKENS)  # 64 * 9 / 36 = 16 each, deviation 3.5
    assert counts.min() >= 2
    assert counts.max() <= 33


@pytest.mark.parametrize("fused", [False, True])
def test_triton_backend_gives_the_same(saved, fused):
    """Through the interpreter where there is no GPU."""
    model = LlavaForConditionalGeneration.from_pretrained(saved, attn_implementation="vtc").to(DEVICE)
    call = {name: tensor.to(DEVICE) for name, tensor in inputs(prompts("left_padded")).items()}
    vtc.configure(model, keep=9, backend="torch")
    expected = model.generate(**call, **detailed())
    with vtc.compress(model, backend="triton", fused=fused) as run:
        actual = model.generate(**call, **detailed())
    scored = "cls_attention" if fused else "row_scores"
    assert run.backend == {scored: "triton", "topk": "triton", "compact": "triton"}
    assert torch.equal(actual.sequences, expected.sequences)
    golden.close(torch.stack(actual.logits), torch.stack(expected.logits))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [1, 3])
def test_wrong_number_of_images(model, pixels):
    vtc.configure(model, keep=TOKENS // 2)  # 2 images then have as many kept tokens as 1 has placeholders
    call = inputs(prompts("image_first_and_last"))
    call["pixel_values"] = models.images(pixels)
    for run in (model.generate, model):
        with pytest.raises(ValueError, match="as many images as the prompts have"):
            run(**call)
    call = inputs(prompts("one"))
    call["pixel_values"] = models.images(2)
    for run in (model.generate, model):
        with pytest.raises(ValueError, match="as many images as the prompts have"):
            run(**call)


def test_part_of_an_image(model):
    vtc.configure(model, keep=9)
    half = [1, 5, *[IMAGE] * (TOKENS // 2)]
    with pytest.raises(ValueError, match="all in one row"):
        model.generate(**models.batch([half, half]), pixel_values=models.images(1))


def test_what_is_not_supported_says_so(model):
    vtc.configure(model, keep=9)
    call = inputs(prompts("one"))
    embeds = model.get_input_embeddings()(call["input_ids"])
    pixels = call["pixel_values"]
    for run in (model.generate, model):
        with pytest.raises(ValueError, match="input_ids"):
            run(inputs_embeds=embeds, pixel_values=pixels)
        with pytest.raises(ValueError, match="vision_feature_select_strategy"):
            run(**call, vision_feature_select_strategy="full")
        with pytest.raises(ValueError, match="vision_feature_layer"):
            run(**call, vision_feature_layer=[-2, -1])
        with pytest.raises(ValueError, match=r"\[images, 3, height, width\]"):
            run(input_ids=call["input_ids"], pixel_values=pixels[0])
    with pytest.raises(ValueError, match="mm_encoder_outputs"):
        model.generate(**call, mm_encoder_outputs={"image": model.get_image_features(pixels)})
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**call, logits_to_keep=torch.tensor([1]))
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=call["input_ids"], pixel_values=pixels, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="image_sizes"):
        model(**call, image_sizes=torch.tensor([[84, 84]]))


def test_attention_passes_the_scaling_on():
    """CLIP's and Llama's own scaling is also SDPA's default: no model above would notice."""
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    out, _ = vtc_attention(torch.nn.Module(), query, key, value, None, scaling=0.9, is_causal=False)
    expected = (query @ key.transpose(2, 3) * 0.9).softmax(-1) @ value
    golden.close(out, expected.transpose(1, 2))
