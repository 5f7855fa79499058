"""Around the model: how people load, wrap, move, train, compile and share it; the real configurations; memory."""

import contextlib
import copy
import gc
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.models import GRID, IMAGE, TOKENS, ids
from test_generate import LAYERS, STEPS, detailed, inputs, prompts, spliced
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CompileConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
    pipeline,
)
from transformers.models.llava import modeling_llava

import vtc
from vtc import tiny
from vtc.hf.settings import Settings
from vtc.hf.views import plan_of
from vtc.ops import dispatch

KEEP = 9


@pytest.fixture
def stock():
    return models.build()


@pytest.fixture(scope="module")
def eager():
    return golden.eager(models.build())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    models.build().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def call():
    return inputs(prompts("left_padded"))


def check(model, eager, call, keep=KEEP):
    """generate() gives the golden tokens and logits."""
    rows = prompts("left_padded")
    out = model.generate(**call, **detailed())
    for i, (embeds, _) in enumerate(spliced(eager, rows, call["pixel_values"], keep)):
        new, logits = golden.decode(eager, embeds, STEPS)
        assert out.sequences[i, call["input_ids"].shape[1] :].tolist() == new
        golden.close(torch.stack(out.logits)[:, i], logits)


# --- the ways people call it ------------------------------------------------------------------------------------------


def test_auto_model(saved, eager, call):
    model = AutoModelForImageTextToText.from_pretrained(saved, attn_implementation="vtc")
    vtc.configure(model, keep=KEEP)
    check(model, eager, call)


def test_set_attn_implementation_back_and_forth(stock, eager, call):
    expected = stock.generate(**call, **detailed())
    vtc.configure(stock, keep=KEEP)
    for implementation in ("vtc", {"vision_config": "vtc", "text_config": "sdpa"}, {"vision_config": "vtc"}):
        stock.set_attn_implementation(implementation)
        check(stock, eager, call)
        stock.set_attn_implementation("sdpa")
        out = stock.generate(**call, **detailed())
        assert torch.equal(out.sequences, expected.sequences)
        assert all(map(torch.equal, out.logits, expected.logits))


@pytest.fixture(scope="module")
def question():
    """The bundled model's answer with 64 tokens, through its processor and `generate()`."""
    model, processor = tiny.load()
    scene = tiny.scenes.Scene("test", 0)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": scene.image},
                {"type": "text", "text": "how many objects are there ?"},
            ],
        }
    ]
    call = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return model, processor, messages, call


def test_chat_template(question):
    """What the template makes is what VTC takes: the short prompt by hand gives the same answer."""
    model, _, _, call = question
    with vtc.compress(model, keep=64) as run:
        out = model.generate(**call, max_new_tokens=3, do_sample=False)
    before = int((call["input_ids"] == model.config.image_token_id).sum())
    assert (run.tokens_before, run.tokens_after, run.prompt_before - run.prompt_after) == (before, 64, before - 64)
    kept = vtc.select(model, call["pixel_values"], keep=64).indices[0]
    with torch.no_grad():
        features = model.get_image_features(call["pixel_values"]).pooler_output[0][kept]
        embeds = golden.splice_features(model, call["input_ids"][0].tolist(), [(before, features)])
    answer = out[0, call["input_ids"].shape[1] :].tolist()  # ends after </s>, the golden one goes on
    assert answer == golden.decode(model, embeds, 3)[0][: len(answer)]
    assert len(answer) == 3 or answer[-1] == model.generation_config.eos_token_id


def test_pipeline(question):
    model, processor, messages, call = question
    pipe = pipeline("image-text-to-text", model=str(tiny.CHECKPOINT), model_kwargs={"attn_implementation": "vtc"})
    vtc.configure(pipe.model, keep=64)
    answer = pipe(text=copy.deepcopy(messages), max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    with vtc.compress(model, keep=64):
        out = model.generate(**call, max_new_tokens=3)
    assert answer.split() == processor.decode(out[0, call["input_ids"].shape[1] :], skip_special_tokens=True).split()
    with vtc.compress(pipe.model) as run:
        pipe(text=copy.deepcopy(messages), max_new_tokens=1)
    assert run.report().startswith("576 -> 64 visual tokens")


def test_inputs_embeds_without_an_image(stock):
    """Nothing to shorten, so exactly the stock model."""
    embeds = stock.get_input_embeddings()(models.batch([ids(9)])["input_ids"]).detach()
    theirs = stock.generate(inputs_embeds=embeds, **detailed())
    vtc.configure(stock, keep=KEEP)
    stock.set_attn_implementation("vtc")
    ours = stock.generate(inputs_embeds=embeds, **detailed())
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))


# --- state ------------------------------------------------------------------------------------------------------------


def test_moved(stock, call):
    vtc.enable(stock, keep=KEEP)
    expected = stock.generate(**call, max_new_tokens=STEPS, do_sample=False)
    stock.to(torch.float64)
    out = stock.generate(
        **call | {"pixel_values": call["pixel_values"].double()}, max_new_tokens=STEPS, do_sample=False
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("where", ["disk", "cuda"])
def test_device_map(saved, eager, call, tmp_path, where):
    """Parts of the model elsewhere: accelerate's hooks bring them, or move what passes between them."""
    pytest.importorskip("accelerate")
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    elsewhere = "disk" if where == "disk" else 0
    places = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model": elsewhere,
        "lm_head": "cpu",
    }
    model = LlavaForConditionalGeneration.from_pretrained(
        saved, attn_implementation="vtc", device_map=places, offload_folder=tmp_path
    )
    assert {str(p.device) for p in model.model.language_model.parameters()} == {"meta" if where == "disk" else "cuda:0"}
    vtc.configure(model, keep=KEEP)
    check(model, eager, call)


def test_lora(stock, call):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(stock, config).eval()
    eager = golden.eager(model.get_base_model())
    assert not torch.equal(eager(**call).logits, models.build()(**call).logits)
    vtc.enable(model, keep=KEEP)
    check(model, eager, call)
    labels = call["input_ids"].masked_fill((call["input_ids"] == IMAGE) | (call["attention_mask"] == 0), -100)
    model(**call, labels=labels).loss.backward()
    trained = {name.split("model.")[-1].split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained >= {"layers"}
    assert all("lora" in name for name, p in model.named_parameters() if p.grad is not None)
    vision = [p.grad for name, p in model.named_parameters() if "vision_tower" in name and p.grad is not None]
    assert any(grad.abs().max() > 0 for grad in vision)
    vtc.disable(model)
    assert model.get_base_model().config.vision_config._attn_implementation == "sdpa"


class Int8Linear(torch.nn.Module):
    """As bitsandbytes': the weight is no floating-point tensor, and only forward knows what it means."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_quantised_linear_layers(stock, call):
    for module in [*stock.model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Int8Linear(child))
    eager = golden.eager(stock)
    vtc.enable(stock, keep=KEEP)
    check(stock, eager, call)


# --- training ---------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing(stock, call):
    """The same loss and gradients as without; those are compared with the golden ones in test_generate."""
    vtc.enable(stock, keep=KEEP)
    labels = call["input_ids"].masked_fill((call["input_ids"] == IMAGE) | (call["attention_mask"] == 0), -100)
    stock.train()

    def step():
        stock.zero_grad()
        loss = stock(**call, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in stock.named_parameters() if p.grad is not None}

    loss, grads = step()
    runs = []
    stock.model.vision_tower.encoder.layers[3].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    stock.gradient_checkpointing_enable()
    again, checkpointed = step()
    assert len(runs) == 2  # once more in the backward pass
    assert again == pytest.approx(loss, rel=1e-6)
    assert checkpointed.keys() == grads.keys()
    for name in grads:
        golden.close(checkpointed[name], grads[name])
    assert {name.split(".")[1] for name in grads if grads[name].abs().max() > 0} >= {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }


def test_frozen_parts_get_no_gradient(stock, call):
    vtc.enable(stock, keep=KEEP)
    stock.model.vision_tower.requires_grad_(False)
    stock(**call, labels=call["input_ids"]).loss.backward()
    assert all(p.grad is None for p in stock.model.vision_tower.parameters())
    assert all(p.grad is not None for p in stock.model.multi_modal_projector.parameters())


# --- threads ----------------------------------------------------------------------------------------------------------


def together(*functions):
    """Run in threads at the same time; return their results, or raise the first error."""
    results = [None] * len(functions)

    def run(i, function):
        try:
            results[i] = function()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i, function)) for i, function in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def alone(model, call, keep):
    with vtc.compress(model, keep=keep):
        return model.generate(**call, max_new_tokens=STEPS, do_sample=False)


def test_two_models_in_two_threads(call):
    one, other = models.build(), models.build(seed=1)
    expected = [alone(one, call, 3), alone(other, call, 20)]
    vtc.enable(one, keep=3)
    vtc.enable(other, keep=20)
    for _ in range(3):
        out = together(
            lambda: one.generate(**call, max_new_tokens=STEPS, do_sample=False),
            lambda: other.generate(**call, max_new_tokens=STEPS, do_sample=False),
        )
        assert all(map(torch.equal, out, expected))


def test_one_model_in_two_threads(stock, call):
    """Each thread has its own scope open while the other's is; the model is stock again when the last one closes."""
    expected = {keep: alone(stock, call, keep) for keep in (3, 20)}
    full = stock.generate(**call, max_new_tokens=STEPS, do_sample=False)
    both_open, both_done = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def answer(keep):
        with vtc.compress(stock, keep=keep) as run:
            both_open.wait()
            outs = [stock.generate(**call, max_new_tokens=STEPS, do_sample=False) for _ in range(3)]
            assert vtc.configure(stock, ensemble="mean").keep == keep
            both_done.wait()
        return outs, run

    for keep, (outs, run) in zip((3, 20), together(lambda: answer(3), lambda: answer(20)), strict=True):
        assert all(torch.equal(out, expected[keep]) for out in outs)
        assert (run.tokens_after, run.images) == (keep, 3 * len(call["pixel_values"]))
    assert torch.equal(stock.generate(**call, max_new_tokens=STEPS, do_sample=False), full)
    assert not [name for name in stock.model.__dict__ if name.startswith("_vtc")]
    assert not hasattr(stock.config, "vtc")


def test_a_thread_without_a_scope_is_in_the_latest(stock, call):
    """As for a streamer, where generate() runs in a thread of its own."""
    expected = alone(stock, call, 3)
    with vtc.compress(stock, keep=20), vtc.compress(stock, keep=3):
        (out,) = together(lambda: stock.generate(**call, max_new_tokens=STEPS, do_sample=False))
    assert torch.equal(out, expected)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_recompiles():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scoped", [False, True])
def test_image_encoding_compiles_into_one_graph(stock, no_recompiles, scoped):
    vtc.enable(stock, keep=KEEP)
    pixels = models.images(2)
    with torch.no_grad(), vtc.compress(stock, keep=5) if scoped else contextlib.nullcontext():
        expected = stock.get_image_features(pixels).pooler_output
        compiled = torch.compile(stock.get_image_features, fullgraph=True, backend="eager")
        for _ in range(2):
            assert torch.equal(torch.stack(compiled(pixels).pooler_output), torch.stack(expected))


def test_generate_with_a_static_cache_compiles_decoding_once(stock, no_recompiles, call):
    """transformers compiles the decoding step by itself where there is a GPU; here it is told to."""
    vtc.enable(stock, keep=KEEP)
    stock.set_attn_implementation("vtc")
    static = dict(max_new_tokens=STEPS, do_sample=False, cache_implementation="static")
    expected = stock.generate(**call, **static)
    config = CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    out = stock.generate(**call, **static, compile_config=config)
    assert torch.equal(out, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_forward_decodes_without_recompiling(stock, no_recompiles, eager):
    vtc.enable(stock, keep=KEEP)
    stock.set_attn_implementation("vtc")
    rows = prompts("one")
    call = inputs(rows)
    del call["attention_mask"]
    decode = torch.compile(stock.forward, fullgraph=True, backend="eager", dynamic=False)
    embeds, short = spliced(eager, rows, call["pixel_values"], KEEP)[0]
    new, _ = golden.decode(eager, embeds, STEPS)
    cache = StaticCache(config=stock.config, max_cache_len=64)
    with torch.no_grad():
        token = stock(**call, past_key_values=cache).logits[:, -1:].argmax(-1)
        for step in range(STEPS - 1):
            assert token.item() == new[step]
            position = torch.tensor([[len(short) + step]])
            token = decode(input_ids=token, past_key_values=cache, position_ids=position).logits[:, -1:].argmax(-1)
    assert token.item() == new[-1]


# --- the real configurations ------------------------------------------------------------------------------------------

VICUNA = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}


@pytest.mark.parametrize("size", VICUNA)
def test_real_configuration_on_the_meta_device(size):
    """From pixels to the first logits with the true shapes, without a byte of weights."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096, pad_token_id=32001, **VICUNA[size]),
        image_token_id=32000,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(
            config, dtype=torch.float16, attn_implementation="vtc"
        ).eval()
    assert model.num_parameters() == {"7b": 7_063_427_072, "13b": 13_351_494_656}[size]
    vtc.configure(model, keep=64)
    plan = plan_of(Settings.of(model))
    assert (plan.num_tokens, plan.num_kept, plan.num_layers, plan.scored) == (576, 64, 23, range(20, 23))
    embed = model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, args: (args[0].to("meta"),))  # the ids are real, for they are read
    prompt = torch.tensor([[1] + [32000] * 576 + [5] * 40])
    with torch.no_grad(), vtc.compress(model) as run:
        out = model(input_ids=prompt, pixel_values=torch.empty(1, 3, 336, 336, device="meta"))
    width, layers, heads = (VICUNA[size][k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    assert out.logits.shape == (1, 1 + 64 + 40, 32064)
    assert models.image_features(out).shape == (64, width)
    cached = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    assert [t.shape for t in cached] == [(1, heads, 105, width // heads)] * 2 * layers
    assert (run.tokens_before, run.tokens_after, run.prompt_before, run.prompt_after) == (576, 64, 617, 105)
    assert run.kv_bytes_after == sum(t.nbytes for t in cached) == 105 * 2 * layers * width * 2
    assert run.kv_bytes_before == 617 * 2 * layers * width * 2
    assert all(p.is_meta for p in model.parameters())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "unequal_images", "text_only_row"])
def test_the_cache_holds_the_short_prompt_and_nothing_else(stock, eager, name):
    rows = prompts(name)
    call = inputs(rows)
    vtc.enable(stock, keep=KEEP)
    cache = stock.generate(**call, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    longest = max(len(short) for _, short in spliced(eager, rows, call["pixel_values"], KEEP))
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    config = stock.config.text_config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert held == len(rows) * longest * per_token


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any tensor had which an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("fused", [False, True])
def test_vision_activations_are_linear_in_the_tokens(fused):
    """At 1024 tokens an N x N matrix of any one head would already be larger than everything else."""
    grid, width = 32, 64
    model = models.build(layers=4)
    model.config.vision_config.image_size = 14 * grid
    tower = type(model.model.vision_tower)(model.config.vision_config).eval()
    model.model.vision_tower = tower
    vtc.enable(model, keep=KEEP, fused=fused)
    pixels = torch.nn.functional.interpolate(models.images(1), size=(14 * grid, 14 * grid))
    with Largest() as largest, torch.no_grad():
        model.get_image_features(pixels)
    assert grid**2 * width < largest.elements < grid**4 // 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the allocator of a GPU")
def test_peak_memory_of_the_vision_tower_on_a_gpu():
    """Doubling the tokens costs twice the memory, not four times."""
    peaks = []
    for grid in (24, 48):
        model = models.build(layers=4)
        model.config.vision_config.image_size = 14 * grid
        model.model.vision_tower = type(model.model.vision_tower)(model.config.vision_config).eval()
        model.to("cuda", torch.bfloat16)
        vtc.enable(model, keep=KEEP)
        pixels = torch.randn(8, 3, 14 * grid, 14 * grid, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            model.get_image_features(pixels)
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.get_image_features(pixels)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 5 * peaks[0]  # four times the tokens


# --- off --------------------------------------------------------------------------------------------------------------


def test_a_stock_model_pays_two_calls_per_hook(stock, call):
    """All that VTC does in a stock model's forward and generate(): ask whether it is on. Counted, for a time would
    depend on the machine."""
    home, seen = str(Path(vtc.__file__).parent), []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(home):
            seen.append(frame.f_code.co_name)

    def during(run):
        seen.clear()
        sys.setprofile(profile)
        try:
            with torch.no_grad():
                run()
        finally:
            sys.setprofile(None)
        return sorted(seen)

    hooks = 3  # LlavaForConditionalGeneration.forward, LlavaModel.forward and get_image_features
    assert during(lambda: stock(**call)) == ["guarded"] * hooks + ["is_on"] * hooks
    vtc.enable(stock, keep=KEEP)
    assert len(during(lambda: stock(**call))) > 20
    vtc.disable(stock)
    assert during(lambda: stock(**call)) == ["guarded"] * hooks + ["is_on"] * hooks


def test_nothing_is_kept_in_modules(stock, call):
    """Using a model changes no variable of VTC's modules."""

    def variables():
        return {
            (name, key): copy.copy(value) if isinstance(value, (dict, list, set)) else id(value)
            for name, module in sys.modules.items()
            if name.startswith("vtc.") and not name.startswith("vtc.tiny")
            for key, value in vars(module).items()
            if not key.startswith("__") and key != "_announced"  # what has been logged
        }

    vtc.enable(stock, keep=KEEP)
    stock.generate(**call, max_new_tokens=1)
    before = variables()
    with vtc.compress(stock, keep=4):
        stock.generate(**call, max_new_tokens=2)
        stock(**call, labels=call["input_ids"]).loss.backward()
    assert variables() == before
    assert modeling_llava.LlavaModel.forward._vtc_guard


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (9, "vision_feature_layer=9 does not exist; the tower has 6 layers"),
        (-8, "vision_feature_layer=-8 does not exist; the tower has 6 layers"),
        (0, "vision_feature_layer=0 does not exist"),
        ([-2, -3], r"vision_feature_layer=\[-2, -3\], but the model's projector was made for -2; do not pass it"),
    ],
)
def test_a_feature_layer_that_does_not_exist(stock, call, layer, says):
    vtc.enable(stock, keep=KEEP)
    for run in (stock.generate, stock):
        with pytest.raises(ValueError, match=says):
            run(**call, vision_feature_layer=layer)


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "64"])
def test_a_keep_that_is_no_count(stock, keep):
    for function in (vtc.enable, vtc.configure):
        with pytest.raises(ValueError, match=f"keep must be an integer of at least 1, got {keep!r}"):
            function(stock, keep=keep)


def test_keep_and_ratio(stock):
    with pytest.raises(ValueError, match=r"got both keep=9 and ratio=0\.5; give one of them"):
        vtc.enable(stock, keep=9, ratio=0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu(stock, call, monkeypatch):
    from vtc_kernels import tuning

    monkeypatch.setattr(tuning, "INTERPRETED", False)
    dispatch._triton.cache_clear()
    try:
        vtc.enable(stock, keep=KEEP, backend="triton")
        with pytest.raises(ValueError, match=r"needs CUDA tensors, got tensors on cpu.*use backend='auto' or 'torch'"):
            stock.generate(**call, max_new_tokens=1)
    finally:
        monkeypatch.undo()
        dispatch._triton.cache_clear()


def test_output_attentions(stock):
    """SDPA, and flash-attn, have none to give: transformers says so for stock SDPA, and the same for VTC."""
    vtc.enable(stock, keep=KEEP)
    call = inputs(prompts("one"))
    stock.set_attn_implementation({"vision_config": "vtc", "text_config": "eager"})
    out = stock.generate(**call, **detailed(output_attentions=True))
    length = call["input_ids"].shape[1] - TOKENS + KEEP
    assert out.attentions[0][0].shape == (1, 4, length, length)


def test_constants():
    """The golden scores above are those of the default layers of a tower of six."""
    settings = Settings.of(models.build())._replace(config=vtc.VTCConfig(keep=1))
    assert tuple(plan_of(settings).scored) == LAYERS
    assert len(ids("image")) == 1 + GRID * GRID
