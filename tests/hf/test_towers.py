"""The vision tower runs as a whole, whatever it is: swapped, hooked, offloaded, compiled, with any attention."""

import copy
import threading

import pytest
import torch
from support import models
from support.models import TOKENS
from support.prompts import inputs, prompts
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaModel

import vtc
from vtc.hf.encode import run_tower
from vtc.hf.settings import Settings
from vtc.hf.views import plan_of

KEEP = 9


@pytest.fixture
def stock():
    return models.build()


@pytest.fixture(scope="module")
def call():
    return inputs(prompts("one"))


def answer(model, call):
    return model.generate(**call, max_new_tokens=6, do_sample=False)[0, call["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def expected(call):
    model = models.build()
    full = answer(model, call)
    vtc.enable(model, keep=KEEP)
    assert answer(model, call) != full
    return {"short": answer(model, call), "full": full}


def swapped(model, how):
    tower = model.model.vision_tower
    if how == "another CLIP":
        own = CLIPVisionModel(copy.deepcopy(tower.config)).eval()
        own.load_state_dict(tower.state_dict())
    else:
        own = copy.deepcopy(tower)
    model.model.vision_tower = own
    return model


@pytest.mark.supported("Loading", "a vision tower that was replaced or copied, with a config of its own")
@pytest.mark.parametrize("how", ["another CLIP", "a copy"])
def test_a_tower_with_a_config_of_its_own(stock, call, expected, how):
    model = swapped(stock, how)
    with vtc.compress(model, keep=KEEP):
        assert answer(model, call) == expected["short"]
    assert answer(model, call) == expected["full"]
    vtc.enable(model, keep=KEEP)
    assert vtc.is_enabled(model)
    with vtc.compress(model):
        pass
    assert answer(model, call) == expected["short"]
    vtc.disable(model)
    assert answer(model, call) == expected["full"]


def test_sizes_are_those_of_the_tower_itself(stock):
    tower = copy.deepcopy(stock.model.vision_tower.config)
    tower.num_hidden_layers, tower.image_size = 4, 14 * 4
    stock.model.vision_tower = CLIPVisionModel(tower).eval()
    with vtc.compress(stock, keep=4):
        plan = plan_of(Settings.of(stock))
    assert (plan.num_tokens, plan.feature_layers, plan.scored) == (16, (3,), range(3))


@pytest.mark.supported("Switching and blocks", 'a block on a model whose tower has any attention, such as "eager"')
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", models.TOWERS)
@pytest.mark.parametrize("method", ["vtc-cls", "visionzip", "prumerge", "scope", "divprune", "hiprune", "random"])
def test_a_block_gives_the_same_as_enable_with_any_attention(tower, attention, method):
    strategy = "full" if tower == "siglip_vision_model" else "default"
    model = models.build(tower=tower, vision_feature_select_strategy=strategy)
    pixels = models.images(2)
    try:
        vtc.enable(model, method=method, keep=KEEP)
    except ValueError as refused:
        pytest.skip(str(refused))
    wanted = model.get_image_features(pixels).pooler_output
    vtc.disable(model)
    model.model.vision_tower.set_attn_implementation(attention)
    with vtc.compress(model, method=method, keep=KEEP):
        got = model.get_image_features(pixels).pooler_output
    for own, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tower", models.TOWERS)
def test_features_are_the_hidden_states_of_the_stock_tower(tower):
    strategy = "full" if tower == "siglip_vision_model" else "default"
    model = models.build(tower=tower, vision_feature_select_strategy=strategy)
    pixels = models.images(2)
    with torch.no_grad(), vtc.compress(model, keep=KEEP, method="none" if strategy == "full" else "vtc-cls"):
        settings = Settings.of(model)
        vision, _ = run_tower(settings, pixels, plan_of(settings))
        assert torch.equal(vision.hidden, model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2])


def test_a_tower_of_another_dtype_gets_the_pixels_as_in_the_stock_model(stock, call):
    stock.bfloat16()
    full = answer(stock, call)
    with vtc.compress(stock, keep=TOKENS):
        assert answer(stock, call) == full


@pytest.mark.supported("Loading", "hooks on the vision tower")
@pytest.mark.parametrize("way", ["enable", "block"])
def test_hooks_on_the_tower_act(stock, call, expected, way):
    if way == "enable":
        vtc.enable(stock, keep=KEEP)
    tower, seen = stock.model.vision_tower, []

    def run():
        with vtc.compress(stock, keep=KEEP):
            return answer(stock, call)

    handle = tower.register_forward_hook(lambda *_: seen.append(1))
    assert run() == expected["short"]
    assert seen == [1]
    handle.remove()
    handle = tower.register_forward_pre_hook(lambda _, args: (args[0] * 0.1,))
    assert run() != expected["short"]
    handle.remove()
    assert run() == expected["short"]


@pytest.mark.supported("Loading", "a vision tower that is offloaded as one block")
@pytest.mark.parametrize("way", ["enable", "block"])
def test_a_tower_that_is_offloaded_as_one_block(stock, call, expected, way):
    hooks = pytest.importorskip("accelerate.hooks")
    if way == "enable":
        vtc.enable(stock, keep=KEEP)
    place = hooks.AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True)
    hooks.add_hook_to_module(stock.model.vision_tower, place)
    assert {str(each.device) for each in stock.model.vision_tower.parameters()} == {"meta"}
    with vtc.compress(stock, keep=KEEP):
        assert answer(stock, call) == expected["short"]


def test_concurrent_passes_read_their_own_layers(stock):
    """One thread's pass runs inside the other's: between two of its layers."""
    first, second = models.images(2).split(1)
    nested = []

    def run(pixels):
        return vtc.select(stock, pixels, keep=KEEP).scores

    wanted = [run(first), run(second)]
    layer = stock.model.vision_tower.encoder.layers[3].self_attn.k_proj

    def interrupt(*_):
        if not nested:
            nested.append(None)
            thread = threading.Thread(target=lambda: nested.append(run(second)))
            thread.start()
            thread.join()

    handle = layer.register_forward_pre_hook(interrupt)
    assert torch.equal(run(first), wanted[0])
    handle.remove()
    assert torch.equal(nested[1], wanted[1])
    assert not layer._forward_hooks


@pytest.mark.refused('`fused=True` in a block, on a tower whose attention is not "vtc"', instead="`vtc.enable`")
def test_fused_needs_the_attention(stock, call):
    with vtc.compress(stock, keep=KEEP, fused=True), pytest.raises(ValueError, match=r"has 'sdpa'; use vtc\.enable"):
        answer(stock, call)


@pytest.mark.refused("a compiled vision tower in a block", instead="`vtc.enable`")
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_compiled_tower_needs_enable(stock, call, expected, how):
    torch._dynamo.reset()
    answer(stock, call)
    tower = stock.model.vision_tower
    if how == "in place":
        tower.compile(backend="eager")
    else:
        stock.model.vision_tower = torch.compile(tower, backend="eager")
    assert answer(stock, call) == expected["full"]
    with vtc.compress(stock, keep=KEEP), pytest.raises(ValueError, match=r"tower is compiled.*use vtc\.enable"):
        answer(stock, call)
    vtc.enable(stock, keep=KEEP)
    assert answer(stock, call) == expected["short"]
    torch._dynamo.reset()


def test_a_compiled_tower_whose_attention_gets_no_arguments():
    """Hooks read SigLIP's queries and keys, so a compiled one needs a method without attention."""
    torch._dynamo.reset()
    model = models.build(tower="siglip_vision_model", vision_feature_select_strategy="full")
    vtc.enable(model, keep=KEEP, method="scope")
    pixels = models.images(2)
    with torch.no_grad():
        model.get_image_features(pixels)
        model.model.vision_tower.compile(backend="eager")
        with pytest.raises(ValueError, match=r"tower is compiled.*use method 'coverage' with SigLIP"):
            model.get_image_features(pixels)
        vtc.configure(model, method="coverage")
        model.get_image_features(pixels)
    torch._dynamo.reset()


class Own(torch.nn.Module):
    """A tower that returns no hidden states."""

    def __init__(self, tower):
        super().__init__()
        self.tower, self.config, self.encoder = tower, tower.config, tower.encoder

    def forward(self, pixel_values, **kwargs):
        return self.tower(pixel_values)


def test_a_tower_without_hidden_states_is_refused(stock, call):
    stock.model.vision_tower = Own(stock.model.vision_tower)
    with vtc.compress(stock, keep=KEEP), pytest.raises(ValueError, match=r"Own, did not return hidden_states\[5\]"):
        answer(stock, call)


def test_a_tower_with_other_layers_is_refused(stock):
    del stock.model.vision_tower.encoder.layers[2].self_attn.q_proj
    for switch in (vtc.enable, lambda model, **options: vtc.compress(model, **options).__enter__()):
        with pytest.raises(ValueError, match="whose layers VTC does not find"):
            switch(stock, keep=KEEP)
    assert not vtc.is_enabled(stock)


@pytest.mark.refused(
    "a subclass with its own `get_image_features`, `pack_image_features` or `get_placeholder_mask`",
    instead="`vtc.disable`",
)
@pytest.mark.parametrize("name", ["get_image_features", "get_placeholder_mask"])
@pytest.mark.parametrize("where", ["class", "instance"])
def test_methods_that_vtc_would_bypass_are_refused(stock, call, name, where):
    def own(self, *args, **kwargs):
        return getattr(LlavaModel, name)(self, *args, **kwargs)

    if where == "class":
        stock.model.__class__ = type("Own", (LlavaModel,), {name: own})
    else:
        setattr(stock.model, name, own.__get__(stock.model))
    says = rf"has a {name}\(\) of its own"
    for switch in (vtc.enable, lambda model, **options: vtc.compress(model, **options).__enter__()):
        with pytest.raises(ValueError, match=says):
            switch(stock, keep=KEEP)
    stock.set_attn_implementation("vtc")
    with pytest.raises(ValueError, match=says):
        answer(stock, call)


def test_a_forward_that_calls_the_one_of_transformers_is_accepted(stock, call, expected):
    class Base(LlavaModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Head(LlavaForConditionalGeneration):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    stock.__class__, stock.model.__class__ = Head, Base
    with vtc.compress(stock, keep=KEEP):
        assert answer(stock, call) == expected["short"]
