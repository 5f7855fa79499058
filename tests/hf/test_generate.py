"""`generate()` against the golden path: same tokens, same logits, whatever it is asked."""

import copy

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.models import IMAGE, TOKENS, ids
from support.prompts import LAYERS, PROMPTS, STEPS, check_generated, detailed, inputs, prompts, spliced
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

import vtc
from vtc.hf.attention import vtc_attention

KEEPS = (1, 9, TOKENS - 1, TOKENS)


@pytest.mark.supported("Prompts", "one or several images in a row, left-padded batches, rows without an image")
@pytest.mark.supported("generate()", "greedy")
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


@pytest.mark.supported("Caches", "dynamic, static, or none (`use_cache=False`)")
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


@pytest.mark.supported("generate()", "sampling")
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


@pytest.mark.supported("generate()", "beams and `num_return_sequences`")
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


@pytest.mark.supported("generate()", "logits processors and stopping criteria, which see the full prompt")
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


@pytest.mark.supported("generate()", "streamers and `prefix_allowed_tokens_fn`")
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


@pytest.mark.supported("generate()", "`max_length` and `min_length`, which count the full prompt")
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


@pytest.mark.supported("generate()", "`prefill_chunk_size`")
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
        out = torch.cat([out[:4], out[4 + vtc.select(model, call["pixel_values"]).indices[0]], out[4 + TOKENS :]])
        features = model.get_image_features(call["pixel_values"]).pooler_output[0]
        embeds = model.get_input_embeddings()(call["input_ids"])[0]
        embeds = torch.cat([embeds[:4], features, embeds[4 + TOKENS :]])[None]
        expected = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)[0]
    assert features.dtype == dtype
    torch.testing.assert_close(out, expected)


@pytest.mark.refused("more or fewer images than the prompts have", instead="pass as many as the prompts have")
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


@pytest.mark.refused("an image in two rows", instead="pass `input_ids` as the processor makes them")
def test_part_of_an_image(model):
    vtc.configure(model, keep=9)
    half = [1, 5, *[IMAGE] * (TOKENS // 2)]
    with pytest.raises(ValueError, match="all in one row"):
        model.generate(**models.batch([half, half]), pixel_values=models.images(1))


@pytest.mark.refused("`inputs_embeds` together with an image", instead="pass `input_ids`")
@pytest.mark.refused(
    'a vision tower with a [CLS] token and `vision_feature_select_strategy="full"`', instead='`"default"`'
)
@pytest.mark.refused("`mm_encoder_outputs` from the caller", instead="pass `pixel_values`")
@pytest.mark.refused("`vision_feature_layer` other than the model's", instead="do not pass it")
def test_what_is_not_supported_says_so(model, stock):
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
    for run in (model.generate, model):
        with pytest.raises(ValueError, match="both pixels and mm_encoder_outputs"):
            run(**call, mm_encoder_outputs={"image": model.get_image_features(pixels)})
    features = stock.get_image_features(pixels)
    with pytest.raises(ValueError, match="VTC has to encode the images itself"):
        model.generate(input_ids=call["input_ids"], mm_encoder_outputs={"image": features})
    with pytest.raises(ValueError, match="both inputs and input_ids"):
        model.generate(torch.tensor([[1, 5]]), input_ids=torch.tensor([[1, 6]]))
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=call["input_ids"], pixel_values=pixels, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="image_sizes"):
        model(**call, image_sizes=torch.tensor([[84, 84]]))


@pytest.mark.parametrize("source", ["get_image_features", "forward"])
def test_outputs_of_another_prompt_are_counted(model, source):
    """Only a prompt that was shortened to its images is not counted again, and once."""
    vtc.configure(model, keep=9)
    call = inputs(prompts("one"))
    given = model(**call)
    if source == "get_image_features" or not hasattr(given, "image_outputs"):  # features alone before 5.24
        given = model.get_image_features(call["pixel_values"])
    else:
        given = given.image_outputs
    with pytest.raises(ValueError, match="do not match"):
        model(input_ids=call["input_ids"], mm_encoder_outputs={"image": given})


def test_attention_passes_the_scaling_on():
    """CLIP's and Llama's own scaling is also SDPA's default: no model above would notice."""
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    out, _ = vtc_attention(torch.nn.Module(), query, key, value, None, scaling=0.9, is_causal=False)
    expected = (query @ key.transpose(2, 3) * 0.9).softmax(-1) @ value
    golden.close(out, expected.transpose(1, 2))


@pytest.mark.supported("generate()", "assisted decoding; the assistant may be a model that compresses, too")
@pytest.mark.parametrize("assistant", ["compresses", "stock"])
def test_an_assistant_changes_no_answer(model, assistant):
    vtc.configure(model, keep=9)
    draft = models.build(seed=1)
    if assistant == "compresses":
        vtc.enable(draft, keep=9)
    call = inputs(prompts("one"))
    asked = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=[IMAGE])
    assert torch.equal(model.generate(**call, **asked, assistant_model=draft), model.generate(**call, **asked))


def test_a_generation_config_takes_the_rest_from_the_model(model, stock):
    """As in transformers: what the caller's own leaves open is that of the model."""
    vtc.configure(model, keep=9)
    call = inputs(prompts("left_padded"))
    length = call["input_ids"].shape[1]
    own = GenerationConfig(do_sample=False)
    for each in (model, stock):
        each = copy.deepcopy(each)
        each.generation_config.max_length = length + 4
        assert each.generate(**call, generation_config=own).shape[1] == length + 4
    unmasked = {name: value for name, value in call.items() if name != "attention_mask"}
    expected = model.generate(**call, max_new_tokens=STEPS, do_sample=False)
    config = GenerationConfig(do_sample=False, max_new_tokens=STEPS)
    assert torch.equal(model.generate(**unmasked, generation_config=config), expected)  # padding: the model's token
    model.generation_config.num_beams = 2
    first = model.generate(**call, generation_config=config, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="searched with beams"):
        model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=1)


def test_images_that_others_encoded_are_refused(model, stock):
    vtc.configure(model, keep=9)
    call = inputs(prompts("one"))
    given = {"mm_encoder_outputs": {"image": stock.get_image_features(call["pixel_values"])}}
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="VTC has to encode the images itself"):
            run(input_ids=call["input_ids"], **given)
    vtc.configure(model, method="none")
    expected = stock(**call).logits
    del call["pixel_values"]
    assert torch.equal(model(**call, **given).logits, expected)


def test_a_stock_model_may_have_an_assistant_that_compresses(stock):
    draft = models.build(seed=1)
    vtc.enable(draft, keep=9)
    call = inputs(prompts("one"))
    asked = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=[IMAGE])
    assert torch.equal(stock.generate(**call, **asked, assistant_model=draft), stock.generate(**call, **asked))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_features_come_without_the_tower_s_other_outputs(model, name):
    vtc.configure(model, keep=9)
    with pytest.raises(ValueError, match=r"call model\.base_model\.vision_tower"):
        model.get_image_features(models.images(1), **{name: True})


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_lists_are_refused(model, name):
    vtc.configure(model, keep=9)
    call = inputs(prompts("one"))
    for run in (model, model.generate):
        with pytest.raises(ValueError, match=rf"{name} must be a tensor \[B, L\], got a list"):
            run(**call | {name: call[name].tolist()})
