"""A checkpoint that is incomplete, damaged or brings code is refused in one line; one that is whole is not."""

import json
import os
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.cli import call, refused
from transformers import LlavaForConditionalGeneration

from vtc import tiny
from vtc.eval import ask
from vtc.eval import model as loading
from vtc.eval import protocol as protocols
from vtc.eval.answerer import Answerer
from vtc.eval.model import ModelSpec, pick_device
from vtc.eval.protocol import HFProtocol, Prompt
from vtc.eval.setting import Setting
from vtc.hf import unsupported
from vtc.hf.families import FAMILIES, type_refusal

WEIGHTS = tiny.CHECKPOINT / "model.safetensors"
CODE = "open({ran!r}, 'w')\n"


@pytest.fixture
def copy(tmp_path):
    """Make a copy of the bundled checkpoint: `without` some files, with other `files`, `config` and `weights`."""

    def make(*, without=(), files=None, config=None, weights=None):
        folder = tmp_path / "model"
        folder.mkdir()
        for file in tiny.CHECKPOINT.iterdir():
            if file.name not in without:
                os.symlink(file, folder / file.name)
        files = dict(files or {})
        if config:
            files["config.json"] = json.dumps(json.loads((folder / "config.json").read_text()) | config)
        for name, text in files.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        if weights:
            (folder / "model.safetensors").unlink()
            save_file(weights(load_file(WEIGHTS)), folder / "model.safetensors", metadata={"format": "pt"})
        return ModelSpec(str(folder))

    return make


def refusal(call, spec):
    """The message of the ValueError: one line that names the model."""
    with pytest.raises(ValueError, match=r"\S") as error:
        call()
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)
    assert spec.model in str(error.value)
    return str(error.value)


def without_a_layer(weights):
    return {name: each for name, each in weights.items() if not ("vision" in name and ".layers.1." in name)}


def cut(weights):
    name = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    return weights | {name: weights[name][:5].clone()}


def one_infinite(weights):
    weights["language_model.model.embed_tokens.weight"][3, 2] = float("inf")
    return weights


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (without_a_layer, ["16 missing (model.vision_tower.encoder.layers.1.layer_norm1.bias, ", ", ...)", "config"]),
        (
            lambda w: {f"x.{name}": each for name, each in w.items()},
            ["146 missing (lm_head.weight", "145 unexpected (x."],
        ),
        (lambda w: w | {"language_model.extra": torch.zeros(3)}, ["1 unexpected (model.language_model.extra)"]),
        (cut, ["1 of another shape (", "q_proj.weight [5, 192] instead of [192, 192])", "download it again"]),
        (lambda w: {name: each * float("nan") for name, each in w.items()}, ["145 of the weights", "NaN or infinite"]),
        (one_infinite, ["1 of the weights", "infinite values (model.language_model.embed_tokens.weight); they are"]),
    ],
)
def test_weights_that_are_missing_unexpected_of_another_shape_or_not_finite(copy, weights, says):
    spec = copy(weights=weights)
    message = refusal(spec.load, spec)
    for words in says:
        assert words in message
    assert len(message) < 600


def test_weights_that_overflow_in_float16_say_so(copy):
    spec = copy(weights=lambda w: w | {"language_model.model.norm.weight": torch.full((192,), 1e5)})
    spec.load()
    half = ModelSpec(spec.model, dtype="float16")
    assert "(model.language_model.norm.weight); they are damaged, or too large for float16" in refusal(half.load, spec)
    ModelSpec(spec.model, dtype="bfloat16").load()


def embeddings(weights):
    return weights["language_model.model.embed_tokens.weight"].clone()


@pytest.mark.parametrize(
    "weights",
    [
        lambda w: w,  # the head is tied to the embeddings, and is not in the file
        lambda w: w | {"language_model.lm_head.weight": embeddings(w)},
        lambda w: w | {"lm_head.weight": embeddings(w)},
        lambda w: w | {"vision_tower.vision_model.embeddings.position_ids": torch.arange(577)[None]},  # a buffer once
        lambda w: w | {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(24)},
        lambda w: {name: each.half() for name, each in w.items()},
    ],
)
def test_weights_that_transformers_ties_or_ignores_are_accepted(copy, weights):
    assert not copy(weights=weights).load().training


def test_a_checkpoint_in_pieces_is_accepted(tmp_path):
    model, processor = tiny.load()
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    spec = ModelSpec(str(tmp_path))
    assert torch.equal(spec.load().lm_head.weight, model.lm_head.weight)
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    assert "00002-of" in refusal(spec.load, spec)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_checkpoint_saved_by_bitsandbytes_is_accepted(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model, processor = tiny.load(quantization_config=BitsAndBytesConfig(**{bits: True}), device_map="cpu")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    kinds = {type(module).__name__ for module in ModelSpec(str(tmp_path)).load().modules()}
    assert {"Linear4bit", "Linear8bitLt"} & kinds


@pytest.mark.parametrize(
    ("changes", "part", "says"),
    [
        ({"files": {"model.safetensors": WEIGHTS.read_bytes()[:100_000]}}, "load", ["weights of", "incomplete"]),
        ({"files": {"model.safetensors": b""}}, "load", ["weights of", "header too small"]),
        ({"files": {"model.safetensors": b"version https://git-lfs"}}, "load", ["weights of", "header"]),
        ({"without": ["model.safetensors"]}, "load", ["weights of", "no file named model.safetensors"]),
        ({"without": ["model.safetensors"], "files": {"model.safetensors.index.json": "{]"}}, "load", ["JSON file"]),
        ({"files": {"generation_config.json": '{"max_new_tokens": "x"}'}}, "load", ["cannot be loaded", "TypeError"]),
        ({"without": ["tokenizer.json"]}, "processor", ["without a tokenizer; add its tokenizer.json"]),
        ({"files": {"tokenizer.json": "{]"}}, "processor", ["processor of", "a JSON file of it is damaged"]),
        ({"files": {"tokenizer.json": "{}"}}, "processor", ["processor of", "KeyError: 'added_tokens'"]),
        ({"without": ["processor_config.json"]}, "processor", ["without an image processor; add its preprocessor_"]),
        ({"files": {"processor_config.json": "[]"}}, "processor", ["processor of", "AttributeError"]),
        ({"files": {"config.json": "{]"}}, "config", ["config of", "not a valid JSON file"]),
        ({"files": {"config.json": "{}"}}, "config", ["names no model_type"]),
        ({"files": {"config.json": "[]"}}, "config", ["names no model_type"]),
        ({"config": {"vision_config": "x"}}, "config", ["config of", "'vision_config'"]),
        ({"config": {"text_config": {"model_type": "llama", "num_hidden_layers": "four"}}}, "config", ["'four'"]),
        ({"config": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}}, "load", ["bits"]),
    ],
)
def test_damaged_files(copy, changes, part, says):
    spec = copy(**changes)
    message = refusal(getattr(spec, part), spec)
    for words in says:
        assert words in message
    assert len(message) < 600


def test_pickled_weights_are_refused_unread(copy, tmp_path):
    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    spec = copy(without=["model.safetensors"])
    torch.save({"a": Code()}, tmp_path / "model/pytorch_model.bin")
    message = refusal(spec.load, spec)
    assert "it has no safetensors, and pickled weights (pytorch_model.bin) can run code" in message
    assert "convert them with from_pretrained and save_pretrained" in message
    assert not (tmp_path / "ran").exists()


def test_code_of_a_checkpoint_is_never_run_and_never_asked_for(copy, tmp_path, monkeypatch, caplog):
    def ask(*_):
        raise AssertionError("transformers asks whether to run code")

    monkeypatch.setattr("builtins.input", ask)
    ran = tmp_path / "ran"
    code = {"evil.py": CODE.format(ran=str(ran))}
    classes = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    spec = copy(config={"auto_map": classes}, files=code)
    assert type(spec.load()).__module__.startswith("transformers.")
    assert "brings code of its own. It is not run; transformers' own class is used" in caplog.text
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    assert "'evil', which is not supported" in (message := refusal(spec.load, spec))
    assert message.endswith("; it brings code of its own, which VTC never runs")
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"_attn_implementation": "evil/kernels"}))
    assert "the attention 'evil/kernels', whose code would be downloaded" in refusal(spec.load, spec)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("file", "given"),
    [
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.P"}, "processor_class": "EvilProcessor"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "Evil"}),
        ("custom_generate/generate.py", None),
    ],
)
def test_code_of_a_processor_tokenizer_or_generate_is_never_run(copy, tmp_path, monkeypatch, file, given):
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    code = CODE.format(ran=str(tmp_path / "ran"))
    spec = copy(files={"evil.py": code})
    path = tmp_path / "model" / file
    path.parent.mkdir(exist_ok=True)
    text = code if given is None else json.dumps(json.loads(path.read_text()) | given)
    path.unlink(missing_ok=True)
    path.write_text(text)
    spec.load()
    if file.startswith("processor"):
        assert "it brings code of its own, which VTC never runs" in refusal(spec.processor, spec)
    else:
        spec.processor()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "config", "converted"),
    [
        ("liuhaotian/llava-v1.5-7b", {"model_type": "llava", "mm_vision_tower": "openai/clip"}, "llava-1.5-7b-hf"),
        ("/models/LLaVA-v1.5-13B/", {"model_type": "llava", "mm_vision_tower": "openai/clip"}, "llava-1.5-13b-hf"),
        ("x", {"model_type": "llava_llama", "_name_or_path": "./llava-v1.5-7b"}, "llava-1.5-7b-hf"),
        ("liuhaotian/llava-v1.6-mistral-7b", {"model_type": "llava_mistral"}, "llava-v1.6-mistral-7b-hf"),
        ("liuhaotian/llava-v1.6-vicuna-13b", {"architectures": ["LlavaLlamaForCausalLM"]}, "llava-v1.6-vicuna-13b-hf"),
        ("liuhaotian/llava-v1.6-34b", {"architectures": ["LlavaLlamaForCausalLM"]}, "llava-v1.6-34b-hf"),
        ("my/finetuned", {"architectures": ["LlavaMistralForCausalLM"]}, "llava-1.5-7b-hf, or convert its weights"),
    ],
)
def test_the_converted_repository_of_a_llava_in_its_authors_format_is_named(source, config, converted):
    message = unsupported.format_refusal(source, config)
    assert "is in the format of LLaVA's authors" in message
    assert f"llava-hf/{converted}" in message


@pytest.mark.parametrize("kind", ["llava", "llava_next", "vipllava"])
def test_a_converted_model_is_not_taken_for_one_in_its_authors_format(kind):
    config = {"model_type": kind, "architectures": [FAMILIES[kind].classes[1]], "_name_or_path": "llava-v1.5-7b"}
    assert unsupported.format_refusal("llava-hf/llava-1.5-7b-hf", config) is None


def test_a_llava_in_its_authors_format_is_recognised_without_its_weights(copy):
    names = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "architectures": ["LlavaLlamaForCausalLM"]}
    spec = copy(config=names, without=["model.safetensors"])
    assert "llava-hf/llava-1.5-7b-hf" in refusal(spec.load, spec)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("qwen2_5_vl", "(Qwen2.5-VL), which is not supported: its vision tower has no [CLS] token, and 2 x 2 patches"),
        ("internvl_chat", "(InternVL), which is not supported: pixel shuffle"),
        ("llava_onevision", "(LLaVA-OneVision), which is not supported: its vision tower has no [CLS] token;"),
        ("bert", "'bert', which is not supported; VTC supports llava (LLaVA-1.5), vipllava (VipLLaVA), llava_next"),
    ],
)
def test_a_model_that_is_not_supported_is_named_with_the_reason(copy, kind, says):
    spec = copy(config={"model_type": kind, "auto_map": {"AutoConfig": "x.y"}})
    assert says in refusal(spec.config, spec)


def test_what_is_not_supported_is_known_to_transformers_and_not_supported():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert not set(unsupported.UNSUPPORTED) & set(FAMILIES)
    assert set(unsupported.UNSUPPORTED) - set(CONFIG_MAPPING_NAMES) == {"internvl_chat"}
    assert [type_refusal(kind) for kind in FAMILIES] == [None] * len(FAMILIES)


@pytest.mark.parametrize("name", ["meta", "toaster", "cuda:99", "", "hpu", "mps"])
def test_a_device_that_is_refused_is_not_offered(name):
    with pytest.raises(ValueError, match=f"^device '{name}' cannot be used here; use cpu") as error:
        pick_device(name)
    offered = str(error.value).partition("; use ")[2].split(" or ")
    assert name not in offered
    assert all(pick_device(each).type == each.split(":")[0] for each in offered)


def test_the_command_refuses_weights_that_are_nan_in_one_line(copy, tmp_path):
    tiny.scenes.Scene("test", 0).image.save(tmp_path / "a.png")
    spec = copy(weights=lambda w: {name: each * float("nan") for name, each in w.items()})
    message = refused("run", tmp_path / "a.png", "what is there ?", "--model", spec.model)
    assert "145 of the weights of model" in message


FULL = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize("place", ["from_pretrained", "to"])
def test_a_full_memory_is_not_the_fault_of_the_checkpoint(copy, tmp_path, monkeypatch, place):
    def full(*args, **kwargs):
        raise RuntimeError(FULL)

    owner = loading.AutoModelForImageTextToText if place == "from_pretrained" else LlavaForConditionalGeneration
    monkeypatch.setattr(owner, place, full)
    spec = copy()
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        spec.load()
    tiny.scenes.Scene("test", 0).image.save(tmp_path / "a.png")
    result = call("run", tmp_path / "a.png", "what is there ?", "--model", spec.model)
    assert result.exit_code == 1
    assert result.stderr.startswith("vtc: out of memory; try --dtype float16")


def test_a_device_that_fails_is_one_line(copy, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with")

    monkeypatch.setattr(LlavaForConditionalGeneration, "to", broken)
    with pytest.raises(
        ValueError, match="cannot be loaded: RuntimeError: CUDA error: an illegal memory access Compile"
    ):
        copy().load()


def eights(weights):
    return {name: each.to(torch.int8) if "q_proj" in name else each for name, each in weights.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": eights}, "16 of the weights of model "),
        ({"files": {"generation_config.json": '{"a": '}}, "the generation_config.json of model "),
        ({"files": {"generation_config.json": "[1]"}}, "holds no JSON object; download it again"),
        ({"files": {"generation_config.json": '{"eos_token_id": "x"}'}}, "has eos_token_id='x'; it must be an integer"),
    ],
)
def test_what_transformers_loads_all_the_same(copy, change, says):
    """Weights that are numbers of another kind, and a generation config that is ignored or fails at the first token."""
    spec = copy(**change)
    assert says in refusal(spec.load, spec)


def test_the_configs_of_other_things(copy):
    vision = json.loads((tiny.CHECKPOINT / "config.json").read_text())["vision_config"]
    spec = copy(config={"vision_config": vision | {"patch_size": 0}})
    assert "patch_size is 0, image_size 336" in refusal(spec.config, spec)


def test_what_is_no_id_and_a_revision_of_a_folder():
    spec = ModelSpec("https://huggingface.co/llava-hf/llava-1.5-7b-hf")
    assert "is a URL; pass its id alone" in refusal(spec.config, spec)
    spec = ModelSpec(str(tiny.CHECKPOINT), revision="main")
    assert "is a folder, which has none" in refusal(spec.config, spec)


def test_the_processor_of_another_model(copy):
    own = json.loads((tiny.CHECKPOINT / "processor_config.json").read_text())
    spec = copy(files={"processor_config.json": json.dumps(own | {"processor_class": "BlipProcessor"})})
    assert "is a BlipProcessor, not a LLaVA's" in refusal(spec.processor, spec)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages.__class__.__mro__ }}", "cannot be used (SecurityError: "),
        ("{% for m in messages %}", "cannot be used (TemplateSyntaxError: "),
        ("no image", "makes 0 <image> for 1 image(s); use the chat_template.jinja of its authors"),
    ],
)
def test_a_chat_template_that_cannot_be_used(copy, template, says):
    spec = copy(files={"chat_template.jinja": template})
    with pytest.raises(ValueError, match=re.escape(says)):
        HFProtocol(spec.processor(), spec.config()).prepare([Prompt("what ?", [Image.new("RGB", (9, 9))])])


def test_prompts_without_a_template_are_named(copy, caplog):
    spec = copy(without=["chat_template.jinja"])
    protocol = HFProtocol(spec.processor(), spec.config())
    protocols._say_no_template.cache_clear()
    assert protocol.text(Prompt("what ?", [Image.new("RGB", (9, 9))])) == "USER: <image>\nwhat ? ASSISTANT:"
    assert "the model has no chat template: prompts are LLaVA-1.5's" in caplog.text


def test_ids_beyond_the_embeddings(copy):
    spec = copy()
    answerer = Answerer(spec.load(), spec.processor())
    ids = torch.tensor([[1, 72]])
    with pytest.raises(ValueError, match="gives the id 72, and the model has 72 embeddings; take both from one"):
        answerer.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, Setting(), max_new_tokens=1)


def test_more_threads_than_cores_can_take_are_refused():
    before = torch.get_num_threads()
    for count in (0, -1, 100000):
        with pytest.raises(ValueError, match=f"threads must be from 1 to .*, got {count}"):
            ask.use_threads(count)
    assert torch.get_num_threads() == before
