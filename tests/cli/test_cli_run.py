"""`vtc run`: the answer, what it costs, and the parts it is made of."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.cli import BYTES, LAYERS, QUESTION, WIDTH, refused, succeed
from transformers import BloomConfig

import vtc
from vtc import tiny
from vtc.eval import ask
from vtc.eval.engine import answer_all
from vtc.eval.local import LocalEngine
from vtc.eval.model import ModelSpec
from vtc.eval.setting import Setting, ignores_keep
from vtc.eval.tasks.scenes import Scenes
from vtc.methods import METHODS
from vtc.tiny.scenes import Scene


@pytest.mark.parametrize(
    ("options", "setting"), [((), {"keep": 128}), (("--keep", 9), {"keep": 9}), (("--keep", 1), {"keep": 1})]
)
def test_run_prints_the_answer_of_the_compressed_model(model_dir, picture, options, setting):
    result = succeed("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 5, *options)

    model, processor = ask.load(model_dir, "cpu", "float32")
    inputs = processor(images=Image.open(picture), text=tiny.prompt(QUESTION), return_tensors="pt")
    with vtc.compress(model, **setting):
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    want = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    full = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert out.tolist() != full.tolist()  # or the test would not notice a model that is not compressed
    assert result.stdout == want.strip() + "\n"
    assert f"{ask.counted(setting['keep'], 'visual token')}\n" in result.stderr


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vtc-cls"])
def test_run_with_each_method(model_dir, picture, method):
    arguments = ("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 3, "--method", method, "--json")
    options = {} if ignores_keep(method, {}) else {"keep": 64}
    arguments += ("--keep", 64) if options else ()
    found = json.loads(succeed(*arguments).stdout)
    model, processor = ask.load(model_dir, "cpu", "float32")
    inputs = processor(images=Image.open(picture), text=tiny.prompt(QUESTION), return_tensors="pt")
    with vtc.compress(model, method=method, **options) as run:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert found["method"] == method
    assert (found["compressed"]["answer"], found["compressed"]["visual_tokens"]) == (answer, run.tokens_after)
    if not METHODS[method].adaptive:
        assert run.tokens_after == (576 if method == "none" else 64)


@pytest.mark.parametrize(
    ("method", "layer", "kv"), [("fastv", 1, "compact"), ("vtc-cls", 2, "full"), ("fastv", None, "full")]
)
def test_run_inside_the_language_model(model_dir, picture, few_runs, method, layer, kv):
    arguments = ["--keep", 64, "--method", method, "--kv", kv, *(("--prune-layer", layer) if layer else ())]
    asked = ("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 3, "--compare", "--json", *arguments)
    found = json.loads(succeed(*asked).stdout)
    layer = layer or 2
    assert (found["method"], found["prune_layer"], found["compressed"]["visual_tokens"]) == (method, layer, 64)
    model, processor = ask.load(model_dir, "cpu", "float32")
    inputs = processor(images=Image.open(picture), text=tiny.prompt(QUESTION), return_tensors="pt")
    with vtc.compress(model, method=method, keep=64, prune_layer=layer, kv=kv):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert found["compressed"]["answer"] == answer
    short = LAYERS if kv == "compact" else LAYERS - layer
    dropped = found["uncompressed"]["kv_cache_bytes"] - found["compressed"]["kv_cache_bytes"]
    assert dropped == 2 * short * WIDTH * BYTES * 512


def test_compare_json_holds_real_figures(model_dir, picture, few_runs):
    arguments = ("run", picture, QUESTION, "--model", model_dir, "--keep", 64, "--max-new-tokens", 2)
    arguments += ("--compare", "--json")
    result = succeed(*arguments)
    found = json.loads(result.stdout)
    assert result.stderr == ""
    short, full = found["compressed"], found["uncompressed"]
    assert (short["visual_tokens"], full["visual_tokens"]) == (64, 576)
    prompt = len(("<s>", "user", ":", *QUESTION.split(), "assistant", ":"))
    for side in (short, full):
        assert side["kv_cache_bytes"] == 2 * LAYERS * WIDTH * BYTES * (prompt + side["visual_tokens"])
        times = side["time_to_first_token_ms"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
    assert short["answer"] != full["answer"]
    assert found["backend"] == {"cls_probs": "torch", "select": "torch"}
    assert (found["question"], found["images"], found["model"]) == (QUESTION, [picture], model_dir)
    assert found["options"] == {"method": "vtc-cls", "keep": 64}
    assert (found["device"], found["dtype"], found["method"]) == ("cpu", "float32", "vtc-cls")


def test_ratio_and_dtype(model_dir, picture):
    arguments = ("--model", model_dir, "--ratio", 0.11, "--dtype", "bfloat16", "--max-new-tokens", 1, "--json")
    found = json.loads(succeed("run", picture, QUESTION, *arguments).stdout)
    assert found["compressed"]["visual_tokens"] == 64  # ceil(0.11 * 576)
    assert found["dtype"] == "bfloat16"
    assert found["uncompressed"] is None


def test_compare_table_is_plain_text_when_not_a_terminal(model_dir, picture, few_runs):
    arguments = ("--keep", 64, "--max-new-tokens", 1, "--compare", "--threads", 1)
    result = succeed("run", picture, QUESTION, "--model", model_dir, *arguments)
    assert result.stdout.isascii()
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert re.split(r"\s{2,}", lines[1].strip()) == ["visual tokens", "time to first token", "KV cache", "answer"]
    assert re.fullmatch(r"all tokens  576 +[\d.]+ \([\d.]+-[\d.]+\) ms +3\.\d\d MiB .*", lines[2])
    assert re.fullmatch(r"vtc-cls     64 +[\d.]+ \([\d.]+-[\d.]+\) ms +0\.\d\d MiB .*", lines[3])
    assert "median (fastest-slowest) of 5 warm runs, in turns, on cpu, float32, 1 thread" in result.stdout


def test_overlay_shows_what_was_kept(model_dir, picture, tmp_path):
    out = tmp_path / "kept.png"
    arguments = ("--model", model_dir, "--keep", 10, "--max-new-tokens", 1, "--overlay", out)
    assert str(out) in succeed("run", picture, QUESTION, *arguments).stderr
    model, processor = ask.load(model_dir, "cpu", "float32")
    pixels = processor.image_processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    want = vtc.overlay(Image.open(picture), vtc.select(model, pixels, keep=10))
    assert Image.open(out).tobytes() == want.tobytes()


def test_things_are_counted():
    assert [ask.counted(count, "visual token") for count in (0, 1, 1.5, 2, 576)] == [
        *("0 visual tokens", "1 visual token", "1.5 visual tokens", "2 visual tokens", "576 visual tokens")
    ]


def test_a_prompt_fits_the_positions_of_the_model(model_dir, picture):
    model, processor = ask.load(model_dir, "cpu", "float32")
    positions = model.config.text_config.max_position_embeddings
    words = positions - ask.prepare(model, processor, Image.open(picture), "")["input_ids"].shape[1]
    longest = " ".join(["red"] * words)
    assert ask.prepare(model, processor, Image.open(picture), longest)["input_ids"].shape[1] == positions
    error = refused("run", picture, f"{longest} red", "--model", model_dir)
    assert f"the prompt has {positions + 1} tokens, with 1 image, and the model has {positions} positions" in error
    model.config.text_config = BloomConfig()  # its model adds a bias to the attention and has no limit
    assert ask.prepare(model, processor, Image.open(picture), f"{longest} red")["input_ids"].shape[1] == positions + 1


def test_unknown_words_are_named(model_dir, picture):
    result = succeed("run", picture, "Is the red object left of a zebra?", "--model", model_dir, "--max-new-tokens", 1)
    assert "the model does not know: zebra\n" in result.stderr


def test_without_chat_template_the_prompt_is_that_of_llava(model_dir):
    model, processor = ask.load(model_dir, "cpu", "float32")
    image = Scene("test", 3).image
    templated = ask.prepare(model, processor, image, QUESTION)
    processor.chat_template = None
    plain = ask.prepare(model, processor, image, QUESTION)
    assert plain["input_ids"].tolist() == templated["input_ids"].tolist()
    assert plain["pixel_values"].equal(templated["pixel_values"])
    reference = processor(images=image, text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")
    assert plain["input_ids"].tolist() == reference["input_ids"].tolist()


def test_a_chat_template_that_begins_with_the_first_token_does_not_double_it(model_dir):
    model, processor = ask.load(model_dir, "cpu", "float32")
    image = Scene("test", 3).image
    want = ask.prepare(model, processor, image, QUESTION)["input_ids"]
    processor.chat_template = processor.tokenizer.bos_token + processor.chat_template
    assert ask.prepare(model, processor, image, QUESTION)["input_ids"].equal(want)


def test_a_processor_without_patch_size_is_completed(model_dir, tmp_path):
    for file in Path(model_dir).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        del settings[name]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    model, processor = ask.load(str(tmp_path), "cpu", "float32")
    inputs = ask.prepare(model, processor, Scene("test", 3).image, QUESTION)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576


def test_the_image_under_an_overlay_is_what_the_model_saw(model_dir):
    _, processor = ask.load(model_dir, "cpu", "float32")
    wide = Scene("test", 3).image.resize((672, 336))
    assert ask.as_seen(wide, processor, None) is wide  # overlay crops as this processor does
    steps = processor.image_processor
    steps.do_center_crop, steps.size = False, {"height": 336, "width": 336}  # squeezes instead
    pixels = steps(wide, return_tensors="pt")["pixel_values"]
    difference = torch.tensor(list(ask.as_seen(wide, processor, pixels).tobytes())).float() - torch.tensor(
        list(wide.resize((336, 336), Image.Resampling.BICUBIC).tobytes())
    )
    assert difference.abs().max() <= 1


def test_bundled_model_answers_as_it_does_in_python(tmp_path):
    task = Scenes(count=5)
    expected = answer_all(LocalEngine(), ModelSpec(), task, Setting("vtc-cls", {"keep": 64}), 1)
    assert all(answer.text for answer in expected)
    for (scene, question), answer in zip(task.asked, expected, strict=True):
        scene.image.save(tmp_path / "scene.png")
        result = succeed("run", tmp_path / "scene.png", question.text, "--keep", 64, "--max-new-tokens", 3)
        assert result.stdout.strip() == answer.text
        assert "bundled model knows" in result.stderr


@pytest.mark.parametrize(("given", "threads"), [((), 1), (("--threads", 2), 2)])
def test_the_bundled_model_runs_with_one_thread_unless_told_otherwise(picture, given, threads):
    found = json.loads(succeed("run", picture, QUESTION, "--max-new-tokens", 1, "--json", *given).stdout)
    assert (found["model"], found["cpu_threads"]) == ("bundled", threads)
    assert torch.get_num_threads() == threads


def test_another_model_runs_with_no_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert ask.use_threads(None, "some/model") == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert ask.use_threads(None, "some/model") == 2
    with pytest.raises(ValueError, match=r"^threads must be from 1 to 12, for 3 cores, got 0"):
        ask.use_threads(0, None)


def test_options_of_a_method_are_flags_or_name_and_value(model_dir, picture):
    arguments = ("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 1, "--json")
    flags = ("--ensemble-layers", 2, "--backend", "torch", "--option", "ensemble=max")
    found = json.loads(succeed(*arguments, *flags).stdout)
    assert found["options"] == {"method": "vtc-cls", "ensemble_layers": 2, "backend": "torch", "ensemble": "max"}
    found = json.loads(succeed(*arguments, "--method", "random", "--seed", 3).stdout)
    assert found["options"] == {"method": "random", "seed": 3}
