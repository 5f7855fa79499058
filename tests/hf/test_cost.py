"""What compression costs and saves: graphs, memory, the real configurations, a model that did not ask."""

import contextlib
import copy
import functools
import gc
import inspect
import sys
from pathlib import Path

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.prompts import STEPS, inputs, prompts, spliced
from transformers import (
    CLIPVisionConfig,
    CompileConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)
from transformers.models.llava import modeling_llava

import vtc
from vtc.hf.settings import Settings
from vtc.hf.views import plan_of

KEEP = 9


@pytest.fixture
def stock():
    return models.build()


@pytest.fixture(scope="module")
def eager():
    return golden.eager(models.build())


@pytest.fixture(scope="module")
def call():
    return inputs(prompts("left_padded"))


@pytest.fixture
def no_recompiles():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.supported("Compiling", "image encoding in one graph")
@pytest.mark.parametrize("scoped", [False, True])
def test_image_encoding_compiles_into_one_graph(stock, no_recompiles, scoped):
    vtc.enable(stock, keep=KEEP)
    pixels = models.images(2)
    with torch.no_grad(), vtc.compress(stock, keep=5) if scoped else contextlib.nullcontext():
        expected = stock.get_image_features(pixels).pooler_output
        compiled = torch.compile(stock.get_image_features, fullgraph=True, backend="eager")
        for _ in range(2):
            assert torch.equal(torch.stack(compiled(pixels).pooler_output), torch.stack(expected))


@pytest.mark.supported("Compiling", "decoding with a static cache, compiled once")
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


@pytest.mark.supported("Compiling", "a compiled `forward()` that decodes")
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
    assert (plan.num_tokens, plan.num_kept, plan.feature_layers, plan.scored) == (576, 64, (23,), range(20, 23))
    embed = model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, args: (args[0].to("meta"),))  # the ids are real, for they are read
    prompt = torch.tensor([[1] + [32000] * 576 + [5] * 40])
    with torch.no_grad(), vtc.compress(model) as run:
        out = model(input_ids=prompt, pixel_values=torch.empty(1, 3, 336, 336, device="meta"))
    width, layers, heads = (VICUNA[size][k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    assert out.logits.shape == (1, 1 + 576 + 40, 32064)
    assert models.image_features(out).shape == (64, width)
    cached = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    assert [t.shape for t in cached] == [(1, heads, 105, width // heads)] * 2 * layers
    assert (run.tokens_before, run.tokens_after, run.prompt_before, run.prompt_after) == (576, 64, 617, 105)
    assert run.kv_bytes_after == sum(t.nbytes for t in cached) == 105 * 2 * layers * width * 2
    assert run.kv_bytes_before == 617 * 2 * layers * width * 2
    assert all(p.is_meta for p in model.parameters())


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


@pytest.mark.parametrize("name", ["forward", "generate", "get_image_features"])
def test_the_signature_of_a_guard_is_made_once(stock, name):
    """generate() asks for those of forward() and get_image_features() six times a call."""
    owner = type(stock.model if name == "get_image_features" else stock)
    guard = getattr(owner, name)
    assert inspect.signature(guard) is inspect.signature(guard)
    assert inspect.signature(guard) == inspect.signature(inspect.unwrap(guard))
    bound = getattr(stock.model if name == "get_image_features" else stock, name)
    wrapped = functools.update_wrapper(functools.partial(guard, stock), bound)  # as accelerate's hooks do
    for each in (bound, wrapped):
        assert "self" not in inspect.signature(each).parameters
        assert "kwargs" in inspect.signature(each).parameters


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
