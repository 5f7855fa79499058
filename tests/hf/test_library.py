"""The ways people use a LLaVA of transformers, and what they get wrong."""

import copy

import pytest
import torch
from support import models
from support.golden import llava as golden
from support.models import GRID, IMAGE, TOKENS, ids
from support.prompts import LAYERS, STEPS, detailed, inputs, prompts, spliced
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    pipeline,
)

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


@pytest.mark.supported("Loading", "`AutoModelForImageTextToText`")
def test_auto_model(saved, eager, call):
    model = AutoModelForImageTextToText.from_pretrained(saved, attn_implementation="vtc")
    vtc.configure(model, keep=KEEP)
    check(model, eager, call)


@pytest.mark.supported("Switching and blocks", "`set_attn_implementation`")
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


@pytest.mark.supported("Prompts", "chat templates")
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


@pytest.mark.supported("Loading", '`pipeline("image-text-to-text")`')
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


@pytest.mark.supported("Prompts", "`inputs_embeds` without an image")
def test_inputs_embeds_without_an_image(stock):
    """Nothing to shorten, so exactly the stock model."""
    embeds = stock.get_input_embeddings()(models.batch([ids(9)])["input_ids"]).detach()
    theirs = stock.generate(inputs_embeds=embeds, **detailed())
    vtc.configure(stock, keep=KEEP)
    stock.set_attn_implementation("vtc")
    ours = stock.generate(inputs_embeds=embeds, **detailed())
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))


def test_moved(stock, call):
    vtc.enable(stock, keep=KEEP)
    expected = stock.generate(**call, max_new_tokens=STEPS, do_sample=False)
    stock.to(torch.float64)
    out = stock.generate(
        **call | {"pixel_values": call["pixel_values"].double()}, max_new_tokens=STEPS, do_sample=False
    )
    assert torch.equal(out, expected)


@pytest.mark.supported("Loading", "`device_map`, also with offloading to disk")
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


@pytest.mark.supported("Loading", "LoRA from peft")
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


@pytest.mark.supported("Loading", "quantised linear layers")
def test_quantised_linear_layers(stock, call):
    for module in [*stock.model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Int8Linear(child))
    eager = golden.eager(stock)
    vtc.enable(stock, keep=KEEP)
    check(stock, eager, call)


@pytest.mark.supported("Loading", "4 bits with bitsandbytes")
def test_bitsandbytes(saved, call):
    """All linear layers but the head are quantised, those of the vision tower too."""
    pytest.importorskip("bitsandbytes")
    model = LlavaForConditionalGeneration.from_pretrained(
        saved,
        attn_implementation="vtc",
        device_map="cpu",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {"Linear4bit", "Linear"}
    vtc.configure(model, keep=KEEP)
    check(model, golden.eager(model), call)


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


@pytest.mark.refused("`keep` together with `ratio`", instead="one of them")
def test_keep_and_ratio(stock):
    with pytest.raises(ValueError, match=r"got both keep=9 and ratio=0\.5; give one of them"):
        vtc.enable(stock, keep=9, ratio=0.5)


@pytest.mark.refused('`backend="triton"` without a GPU', instead='`"auto"` or `"torch"`')
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
