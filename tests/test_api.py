"""The public functions: what `import vtc` does and does not do, switching on and off, and the state of a model."""

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support import models
from support.golden import llava as golden
from support.models import TOKENS, ids
from transformers import (
    BatchFeature,
    LlavaForConditionalGeneration,
    LlavaModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

import vtc
from vtc import config

STEPS = 5


def python(code, *arguments):
    """Run code in a fresh interpreter and return its last line of output, decoded from JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def stock():
    return models.build()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    models.build().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def call():
    rows = [ids(3, "image", 5), ids(2, "image", "image", 4, seed=1)]
    return {**models.batch(rows), "pixel_values": models.images(3)}


def answer(model, call):
    return model.generate(**call, max_new_tokens=STEPS, do_sample=False).tolist()


@pytest.fixture(scope="module")
def expected(call):
    """What the stock model answers, and what it answers with 9 tokens per image."""
    model = models.build()
    full = answer(model, call)
    vtc.enable(model, keep=9)
    short = answer(model, call)
    assert short != full
    return {"full": full, "short": short}


def state(model):
    """Everything that switching on may have changed."""
    return (
        [(type(m), set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [c._attn_implementation for c in (model.config, model.config.vision_config, model.config.text_config)],
        model.config.to_dict(),
    )


def test_import_is_cheap_and_complete():
    loaded, names = python(
        "import json, sys, vtc\n"
        "loaded = [m for m in ('torch', 'transformers', 'triton', 'numpy') if m in sys.modules]\n"
        "names = [n for n in vtc.__all__ if n != 'tiny' and getattr(vtc, n) is None]\n"
        "print(json.dumps([loaded, names]))"
    )
    assert loaded == []
    assert names == []
    with pytest.raises(AttributeError, match="no attribute 'enabled'"):
        vtc.enabled  # noqa: B018
    assert set(vtc.__all__) <= set(dir(vtc))


@pytest.mark.parametrize(
    "imports",
    [
        "import vtc; from transformers import LlavaForConditionalGeneration as Model",
        "from transformers import LlavaForConditionalGeneration as Model; import vtc",
        "import vtc; from transformers import AutoModelForImageTextToText as Model",
        "import vtc; vtc.enable; from transformers import LlavaForConditionalGeneration as Model",
        "import vtc.hf.patch; from transformers import LlavaForConditionalGeneration as Model",
    ],
)
def test_import_alone_registers_in_any_order(saved, imports):
    seen = python(
        f"import json, sys; {imports}\n"
        "model = Model.from_pretrained(sys.argv[1], attn_implementation='vtc')\n"
        "import torch\n"
        "from transformers.models.llava import modeling_llava as m\n"
        "vtc.configure(model, keep=9)\n"
        "features = model.get_image_features(torch.zeros(2, 3, 84, 84)).pooler_output\n"
        "forward = m.LlavaModel.forward\n"
        "files = [f.__code__.co_filename for f in (forward, forward.__wrapped__.__wrapped__)]\n"
        "print(json.dumps([len(features), list(features[0].shape), *['/vtc/hf/' in f for f in files]]))",
        saved,
    )
    assert seen == [2, [9, 64], True, False]  # guarded, and only once


@pytest.mark.supported("Switching and blocks", '`attn_implementation="vtc"`')
def test_string_alone_compresses(saved, call, expected, caplog):
    model = LlavaForConditionalGeneration.from_pretrained(saved, attn_implementation="vtc")
    config._say_default.cache_clear()
    for _ in range(2):
        assert answer(model, call) == expected["short"]  # the default: a quarter of 36 patches
    (said,) = [record.getMessage() for record in caplog.records if record.name == "vtc"]
    assert "an image has only 36 visual tokens: ratio=0.25" in said
    assert vtc.configure(model).keep is None
    assert answer(model, call) == expected["short"]
    assert type(model.config.vtc) is dict
    with pytest.raises(ValueError, match="keep=37, but an image of this model has only 36"):
        vtc.configure(model, keep=37)
    vtc.configure(model, keep=9)
    assert answer(model, call) == expected["short"]
    model.set_attn_implementation("sdpa")
    assert answer(model, call) == expected["full"]
    model.set_attn_implementation("vtc")
    assert answer(model, call) == expected["short"]


@pytest.mark.supported("Switching and blocks", 'a dict of `attn_implementation` with "vtc" for the vision tower')
def test_vision_tower_alone(saved, call, expected):
    model = LlavaForConditionalGeneration.from_pretrained(
        saved, attn_implementation={"vision_config": "vtc", "text_config": "sdpa"}
    )
    vtc.configure(model, keep=9)
    assert answer(model, call) == expected["short"]
    model = LlavaForConditionalGeneration.from_pretrained(
        saved, attn_implementation={"vision_config": "sdpa", "text_config": "vtc"}
    )
    assert answer(model, call) == expected["full"]


def test_stock_model_is_untouched(saved, tmp_path):
    """Same outputs, bit for bit, same hooks, classes and attributes in processes with and without `import vtc`."""
    code = """
import json, sys
sys.path.insert(0, sys.argv[2])
if sys.argv[3] == "vtc":
    import vtc
import torch
from support import models
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
rows = [models.ids(3, "image", 5), models.ids(2, "image", "image", 4, seed=1)]
call = {**models.batch(rows), "pixel_values": models.images(3)}
out = model.generate(**call, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
labels = call["input_ids"].clone()
loss = model(**call, labels=labels).loss
loss.backward()
about = [[type(m).__module__ + "." + type(m).__name__, sorted(m.__dict__), len(m._forward_hooks),
          len(m._forward_pre_hooks), len(m._backward_hooks)] for m in model.modules()]
grads = [p.grad.double().sum().item() for p in model.parameters() if p.grad is not None]
print(json.dumps([torch.stack(out.logits).tolist(), out.sequences.tolist(), loss.item(), grads, about,
                  ("vtc" in sys.modules)]))
"""
    tests = models.__file__.rsplit("/", 2)[0]
    *with_vtc, imported = python(code, saved, tests, "vtc")
    *without, absent = python(code, saved, tests, "none")
    assert imported
    assert not absent
    assert with_vtc == without


def test_enabling_one_model_leaves_another_alone(call, expected):
    one, other = models.build(), models.build()
    answer(other, call)  # transformers installs hooks of its own at first use
    before = state(other)
    vtc.enable(one, keep=9)
    assert answer(other, call) == expected["full"]
    assert answer(one, call) == expected["short"]
    assert state(other) == before


@pytest.mark.supported("Switching and blocks", "`vtc.enable` and `vtc.disable`")
def test_enable_is_idempotent_and_disable_restores(stock, call, expected):
    answer(stock, call)
    before = state(stock)
    vtc.enable(stock, keep=9)
    once = state(stock)
    vtc.enable(stock, keep=9)
    vtc.enable(stock)
    assert state(stock) == once
    assert answer(stock, call) == expected["short"]
    vtc.disable(stock)
    assert state(stock) == before
    assert answer(stock, call) == expected["full"]
    vtc.disable(stock)
    assert state(stock) == before


@pytest.mark.parametrize("implementation", ["eager", {"vision_config": "eager", "text_config": "sdpa"}])
def test_disable_restores_what_was_there(stock, implementation):
    stock.set_attn_implementation(implementation)
    before = state(stock)
    vtc.enable(stock, keep=9)
    assert stock.config.text_config._attn_implementation == before[1][2]
    vtc.disable(stock)
    assert state(stock) == before


def test_disable_after_loading_as_vtc(saved, call, expected):
    model = LlavaForConditionalGeneration.from_pretrained(saved, attn_implementation="vtc")
    vtc.disable(model)
    assert state(model)[1] == ["sdpa"] * 3
    assert answer(model, call) == expected["full"]


@pytest.mark.supported("Switching and blocks", "`vtc.compress` blocks, also nested")
def test_compress_is_scoped(stock, call, expected):
    answer(stock, call)
    before = state(stock)
    with vtc.compress(stock, keep=9):
        assert answer(stock, call) == expected["short"]
    assert state(stock) == before
    with pytest.raises(KeyError), vtc.compress(stock, keep=9):
        raise KeyError
    assert state(stock) == before
    with pytest.raises(ValueError, match="only 36"), vtc.compress(stock, keep=37):
        pass
    assert state(stock) == before
    vtc.enable(stock, keep=9)
    enabled = state(stock)
    with vtc.compress(stock, keep=4) as outer:
        with vtc.compress(stock, ratio=1.0) as inner:
            assert answer(stock, call) == expected["full"]
        answer(stock, call)
    assert (inner.tokens_after, outer.tokens_after) == (TOKENS, 4)
    assert state(stock) == enabled
    assert answer(stock, call) == expected["short"]
    vtc.disable(stock)
    assert state(stock) == before


def test_a_block_keeps_its_settings_whatever_happens_to_the_model(stock, call, expected):
    """And what happens to the model inside a block stays when the block ends."""
    with vtc.compress(stock, keep=4):
        with vtc.compress(stock, keep=9):
            vtc.disable(stock)
            stock.set_attn_implementation("eager")
            assert answer(stock, call) == expected["short"]
            vtc.enable(stock, keep=7)
            assert answer(stock, call) == expected["short"]
        assert vtc.configure(stock, ensemble_layers=1) == vtc.VTCConfig.of(keep=4, ensemble_layers=1)
    assert vtc.is_enabled(stock)
    assert vtc.configure(stock).keep == 7
    vtc.disable(stock)
    assert [each._attn_implementation for each in (stock.config, stock.config.vision_config)] == ["eager"] * 2
    assert answer(stock, call) == expected["full"]


def test_run_counts(stock, call):
    with vtc.compress(stock, keep=9, backend="torch") as run:
        assert run.report() == "no image was encoded"
        out = stock.generate(**call, max_new_tokens=1, return_dict_in_generate=True)
    cache = out.past_key_values
    nbytes = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    length = call["input_ids"].shape[1]
    short = length - 2 * (TOKENS - 9)
    assert (run.images, run.tokens_before, run.tokens_after) == (3, TOKENS, 9)
    assert (run.prompt_before, run.prompt_after) == (length, short)
    assert cache.get_seq_length() == short
    assert run.kv_bytes_after == nbytes
    assert run.kv_bytes_before == nbytes // short * length
    assert run.backend == {"cls_probs": "torch", "select": "torch"}
    assert "36 -> 9 visual tokens per image, 3 image(s)" in run.report()
    assert f"{length} -> {short} tokens" in run.report()
    with vtc.compress(stock, keep=9) as run, torch.no_grad():
        stock(**call)
    assert run.kv_bytes_after == nbytes


def test_configure(saved, call, expected):
    model = LlavaForConditionalGeneration.from_pretrained(saved, attn_implementation="vtc")
    assert vtc.configure(model, ratio=0.25) == vtc.VTCConfig(ratio=0.25)
    assert answer(model, call) == expected["short"]
    assert vtc.configure(model, keep=4, ensemble_layers=2) == vtc.VTCConfig.of(keep=4, ensemble_layers=2)
    assert vtc.configure(model, keep=9, ensemble_layers=3) == vtc.VTCConfig.of(keep=9, ensemble_layers=3)
    assert answer(model, call) == expected["short"]


def test_inner_model(stock, call):
    """LlavaModel without a head, on its own."""
    inner = stock.model
    assert isinstance(inner, LlavaModel)
    vtc.enable(inner, keep=9)
    with torch.no_grad():
        hidden = inner(**call).last_hidden_state
        golden.close(stock.lm_head(hidden), stock(**call).logits)
    assert hidden.shape[:2] == call["input_ids"].shape


def test_wrapped_model(stock, call, expected):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    with vtc.compress(Wrapper(stock), keep=9):
        assert answer(stock, call) == expected["short"]


@pytest.mark.supported("Loading", "`copy.deepcopy`")
def test_deepcopy(stock, call, expected):
    vtc.enable(stock, keep=9)
    other = copy.deepcopy(stock)
    vtc.disable(stock)
    assert answer(other, call) == expected["short"]
    assert answer(stock, call) == expected["full"]
    assert pickle.loads(pickle.dumps(other.config)).vtc == other.config.vtc
    vtc.disable(other)
    assert answer(other, call) == expected["full"]


@pytest.mark.supported("Loading", "`save_pretrained` and `from_pretrained`")
def test_saved_model_is_stock_without_vtc_and_remembers_its_settings_with_it(stock, call, expected, tmp_path):
    vtc.enable(stock, keep=9)
    stock.save_pretrained(tmp_path)
    answers = python(
        "import json, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from support import models\n"
        "from transformers import LlavaForConditionalGeneration\n"
        "model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])\n"
        "rows = [models.ids(3, 'image', 5), models.ids(2, 'image', 'image', 4, seed=1)]\n"
        "call = {**models.batch(rows), 'pixel_values': models.images(3)}\n"
        "assert 'vtc' not in sys.modules\n"
        "print(json.dumps(model.generate(**call, max_new_tokens=5, do_sample=False).tolist()))",
        tmp_path,
        models.__file__.rsplit("/", 2)[0],
    )
    assert answers == expected["full"]
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert answer(again, call) == expected["full"]
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="vtc")
    assert answer(again, call) == expected["short"]


def test_nothing_is_saved_that_was_not_set(saved):
    model = LlavaForConditionalGeneration.from_pretrained(saved, attn_implementation="vtc")
    assert "vtc" not in json.dumps(json.loads(model.config.to_json_string()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 37}, "keep=37, but an image of this model has only 36 visual tokens"),
        ({"ensemble_layers": 6}, "ensemble_layers 1 to 5 or start_layer 0 to 4"),
        ({"start_layer": 5}, "start_layer 0 to 4.*got ensemble_layers=3, start_layer=5"),
        ({"keeps": 9}, "unknown option.*keeps"),
    ],
)
def test_what_does_not_fit_the_model_fails_at_once(stock, options, says):
    before = state(stock)
    for function in (vtc.enable, vtc.configure):
        with pytest.raises(ValueError, match=says):
            function(stock, **{"keep": 9, **options})
        assert state(stock) == before
    with pytest.raises(ValueError, match=says):
        vtc.select(stock, models.images(1), **{"keep": 9, **options})
    assert state(stock) == before


def test_a_known_model_that_is_not_supported_is_named_with_the_reason():
    config = SmolVLMConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    )
    with torch.device("meta"):
        other = SmolVLMForConditionalGeneration(config)
    for call in (vtc.enable, vtc.disable, vtc.is_enabled, vtc.status):
        with pytest.raises(
            ValueError, match=r"is of type 'smolvlm' \(SmolVLM\), which is not supported: .* no \[CLS\] token"
        ):
            call(other)


def test_other_models():
    with pytest.raises(ValueError, match="Linear holds no LLaVA model"):
        vtc.enable(torch.nn.Linear(2, 2))
    model = models.build()
    model.config.vision_config.model_type = "a_tower_of_tomorrow"
    says = "'a_tower_of_tomorrow' is not supported; VTC knows clip_vision_model, dinov2"
    with pytest.raises(ValueError, match=says):
        vtc.enable(model, keep=9)
    model.set_attn_implementation("vtc")
    with pytest.raises(ValueError, match=says):
        model.get_image_features(models.images(1))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("llava-hf/llava-1.5-7b-hf", r"got 'llava-hf/llava-1.5-7b-hf', which is no model; .*\.from_pretrained\("),
        (None, "got NoneType, which is no model; pass the model itself"),
        (object(), "got object, which is no model"),
    ],
)
def test_what_is_no_model_is_refused_by_name(given, says):
    for function in (vtc.enable, vtc.configure, vtc.disable, lambda model: vtc.select(model, models.images(1))):
        with pytest.raises(ValueError, match=says):
            function(given)
    with pytest.raises(ValueError, match=says), vtc.compress(given):
        pass


def test_configuring_a_model_that_does_not_compress_is_said(stock, caplog):
    says = "this model does not compress; vtc.enable(model) switches it on"
    vtc.configure(stock, keep=9)
    assert says in caplog.text
    caplog.clear()
    with vtc.compress(stock, keep=9):
        vtc.configure(stock, keep=8)
    vtc.enable(stock, keep=9)
    vtc.configure(stock, keep=8)
    vtc.select(stock, models.images(1), keep=7)
    assert caplog.text == ""


@pytest.mark.parametrize("number", [np.int64(9), np.uint8(9), np.array(9), torch.tensor(9)])
def test_numbers_of_numpy_and_torch_reach_the_model(stock, call, expected, number):
    vtc.enable(stock, keep=number)
    assert type(stock.config.vtc["keep"]) is int
    json.dumps(stock.config.vtc)
    assert answer(stock, call) == expected["short"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda pixels: BatchFeature({"pixels": pixels}),
            "the inputs have no pixel_values, only pixels; pass",
        ),
        (lambda pixels: {"pixel_values": pixels.numpy()}, r"got a ndarray; .*return_tensors='pt'"),
        (lambda pixels: pixels.numpy(), r"got a ndarray; .*return_tensors='pt'"),
        (lambda pixels: list(pixels), "got a list"),
        (lambda pixels: Image.new("RGB", (84, 84)), "got a Image; pass the tensor that the processor returns"),
        (lambda pixels: None, "got a NoneType"),
        (lambda pixels: pixels[0], r"\[images, 3, height, width\], got shape \(3, 84, 84\)"),
        (lambda pixels: pixels[None], r"got shape \(1, 2, 3, 84, 84\); .*pixel_values\.flatten\(0, 1\)"),
        (lambda pixels: pixels[:0], r"\(0, 3, 84, 84\) holds no image"),
        (lambda pixels: pixels.movedim(1, -1), r"got shape \(2, 84, 84, 3\)"),
    ],
)
def test_select_says_what_it_takes(stock, make, says):
    with pytest.raises(ValueError, match=says):
        vtc.select(stock, make(models.images(2)), keep=9)


def test_select_refuses_pixels_and_scores_that_are_no_numbers(stock):
    pixels = models.images(2)
    pixels[1, 0, 3, 3] = float("inf")
    with pytest.raises(ValueError, match="pixel_values are NaN or infinite in places"):
        vtc.select(stock, pixels, keep=9)
    with torch.no_grad():
        stock.base_model.vision_tower.encoder.layers[2].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the scores of an image are all NaN; the model's weights are damaged"):
        vtc.select(stock, models.images(2), keep=9)
    assert vtc.select(stock, models.images(2), keep=9, method="random").indices.shape == (2, 9)


def test_full_features_are_not_supported():
    with pytest.raises(ValueError, match="'full' is not supported; VTC accepts 'default', which drops"):
        vtc.enable(models.build(vision_feature_select_strategy="full"), keep=9)


def test_select_has_no_side_effects(stock):
    pixels = models.images(2)
    stock.get_image_features(pixels)  # transformers puts its hooks on the tower with the first image
    before = state(stock)
    selection = vtc.select(stock, pixels, keep=9)
    assert selection.indices.shape == (2, 9)
    assert selection.scores.shape == (2, TOKENS)
    assert not selection.scores.requires_grad
    assert state(stock) == before
    with pytest.raises(ValueError, match=r"\[images, 3, height, width\], got shape \(3, 84, 84\)"):
        vtc.select(stock, pixels[0], keep=9)


def test_settings_that_are_not_valid_can_be_removed(stock, call):
    vtc.enable(stock, keep=9)
    stock.config.vtc = {"method": "vtc-cls", "keep": 9, "neighbors": 4}
    for run in (lambda: answer(stock, call), lambda: vtc.configure(stock, keep=4)):
        with pytest.raises(
            ValueError, match=r"model\.config\.vtc are not valid: .*neighbors.*vtc\.disable removes them"
        ):
            run()
    vtc.disable(stock)
    vtc.enable(stock, keep=9)
    answer(stock, call)


def test_a_reloaded_module_is_guarded_again(saved):
    seen = python(
        "import importlib, json, sys, torch, vtc\n"
        "from transformers.models.llava import modeling_llava\n"
        "importlib.reload(modeling_llava)\n"
        "model = modeling_llava.LlavaForConditionalGeneration.from_pretrained(sys.argv[1])\n"
        "vtc.enable(model, keep=9)\n"
        "print(json.dumps(len(model.get_image_features(torch.zeros(1, 3, 84, 84)).pooler_output[0])))",
        saved,
    )
    assert seen == 9


def test_a_class_is_no_model():
    with pytest.raises(
        ValueError, match="got the class LlavaForConditionalGeneration, which is no model; pass the model"
    ):
        vtc.status(LlavaForConditionalGeneration)
