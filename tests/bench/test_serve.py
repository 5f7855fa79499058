"""`bench serve`: the load, what is checked before it is timed, and what is recorded. A stand-in takes vLLM's place.

tests/serving/test_vllm_bench.py runs the command with vLLM.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import itertools
import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

import vtc
from bench import __main__ as command
from bench import readme, record, serve, served_models, serving
from bench.serve import Options, Serving
from bench.serving import Answer, Load, Request, Served
from vtc import tiny
from vtc.tiny.scenes import Scene
from vtc.vllm import settings

SUPPORT = Path(__file__).parent.parent / "support"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A stand-in for vLLM in the engines' processes; returns a function that reads what it was asked."""
    (tmp_path / "fake/vllm").mkdir(parents=True)
    shutil.copy(SUPPORT / "fake_vllm.py", tmp_path / "fake/vllm/__init__.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setattr(serving, "require_vllm", lambda: None)
    monkeypatch.setattr(serve, "PAUSE", 0.0)

    def journal():
        return [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]

    return journal


def options(**given):
    return Options.of(**{"models": ["7b"], "keeps": [64], "concurrencies": [2], "rounds": 1, **given})


# Options.


def test_defaults():
    on_cpu, on_gpu = Options.of(), Options.of(on_gpu=True)
    assert (on_cpu.models, on_cpu.rounds) == (("bundled", "scaled"), 3)
    assert (on_gpu.models, on_gpu.rounds) == (("7b",), 7)
    assert on_cpu.variants == {"vllm": None, "vtc 128": 128, "vtc 64": 64}
    assert {c: on_cpu.count(c) for c in on_cpu.concurrencies} == {1: 8, 4: 8, 16: 32}
    given = Options.of(["scaled"] * 2, [32, 32], [2, 2], 5, 1)
    assert given == Options(("scaled",), (32,), (2,), 5, 1, False)
    assert given.count(2) == 5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "GPT"], "unknown model GPT; there are bundled, scaled, 7b"),
        (["--keep", "64", "576"], "--keep must be below the 576 visual tokens of an image, got 576"),
        (["--requests", "15"], "--requests must be at least the largest --concurrency, 16, got 15"),
    ],
)
def test_wrong_options_are_explained(given, says, capsys):
    assert command.main(["serve", *given]) == 2
    assert says in capsys.readouterr().err


def test_without_vllm_the_command_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["serve", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m bench serve: bench serve needs vLLM, which ")
    assert "pip install '.[vllm]'" in error
    assert not (tmp_path / "out").exists()


def test_engines_have_no_caches_and_the_same_kv_cache(tmp_path):
    subject, chosen = served_models.SUBJECTS["scaled"], Options.of(concurrencies=[2, 16])
    stock, ours = (serve.arguments(subject, tmp_path, keep, chosen, 100) for keep in (None, 64))
    assert stock["enable_prefix_caching"] is False
    assert stock["mm_processor_cache_gb"] == 0
    assert (stock["max_num_seqs"], stock["kv_cache_memory_bytes"]) == (16, 16 * 1024 * 100)
    assert (stock["dtype"], stock["enforce_eager"], stock["load_format"]) == ("float32", True, "auto")
    assert (stock["hf_overrides"], ours["hf_overrides"]) == ({}, {"vtc": {"keep": 64}})
    assert {name: value for name, value in ours.items() if stock[name] != value} == {
        "hf_overrides": {"vtc": {"keep": 64}}
    }


def test_engines_share_a_gpu(tmp_path):
    chosen = Options.of(on_gpu=True)
    found = serve.arguments(served_models.SUBJECTS["7b"], tmp_path, None, chosen, 2**19)
    assert (found["dtype"], found["load_format"], found["gpu_memory_utilization"]) == ("bfloat16", "dummy", 0.3)
    assert found["kv_cache_memory_bytes"] == 2**33
    assert "enforce_eager" not in found


# The load.


def test_as_many_requests_as_wished_are_in_flight():
    flying, seen, most = [], [], []

    async def ask(number):
        flying.append(number)
        seen.append(number)
        most.append(len(flying))
        for _ in range(1 + 3 * (number % 3)):  # later ones end before earlier ones
            await asyncio.sleep(0)
        flying.remove(number)
        return -number

    answers = asyncio.run(serving.closed_loop(ask, range(10), 3))
    assert answers == [-number for number in range(10)]
    assert seen == list(range(10))
    assert most == [1, 2, *[3] * 8]
    assert asyncio.run(serving.closed_loop(ask, range(1), 3)) == [0]


def test_a_request_that_fails_ends_the_load():
    async def ask(number):
        return 1 // number

    with pytest.raises(ZeroDivisionError):
        asyncio.run(serving.closed_loop(ask, [1, 0, 1], 2))


def output(tokens, prompt=5, cached=None):
    return types.SimpleNamespace(
        outputs=[types.SimpleNamespace(token_ids=tokens)], prompt_token_ids=[0] * prompt, num_cached_tokens=cached
    )


async def stream(outputs):
    for each in outputs:
        yield each


def test_the_first_token_is_timed(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(serving.time, "perf_counter", lambda: now[0])

    async def slow():
        for made in ([], [3], [3, 4], [3, 4, 5]):
            now[0] += 0.25
            yield output(made)

    assert asyncio.run(serving.read(slow())) == Answer([3, 4, 5], 5, 0, 500.0)
    assert asyncio.run(serving.read(stream([output([3], cached=2)]))).cached == 2


def test_a_request_without_a_token_is_an_error():
    with pytest.raises(RuntimeError, match="ended without a token"):
        asyncio.run(serving.read(stream([output([])])))


def test_the_peak_is_remembered():
    watch = serving.Watch()
    assert watch.usage is None
    for usage, preempted in ((0.25, 0), (0.5, 2), (0.125, 1)):
        watch.record(
            types.SimpleNamespace(kv_cache_usage=usage),
            types.SimpleNamespace(num_preempted_reqs=preempted),
            engine_idx=0,
        )
    watch.record(None, None)
    assert (watch.usage, watch.preempted) == (0.5, 3)
    watch.clear()
    assert (watch.usage, watch.preempted) == (None, 0)


# Whole runs, with the stand-in.


def test_engines_take_turns_and_see_each_image_once(fake, tmp_path, capsys):
    arguments = ["--model", "7b", "--keep", "128", "64", "--concurrency", "1", "3", "--requests", "4", "--rounds", "2"]
    for _ in range(2):  # the second run replaces the records of the first
        assert command.main(["serve", *arguments, "--out", str(tmp_path / "out")]) == 0
    records = record.read(tmp_path / "out/serve.jsonl", Serving)
    names = ["vllm", "vtc 128", "vtc 64"]
    assert [(r.concurrency, r.backend, r.keep) for r in records] == [
        (c, name, keep) for c in (1, 3) for name, keep in zip(names, (None, 128, 64), strict=True)
    ]
    assert serve.tables(records) in capsys.readouterr().out
    asked = fake()
    asked = asked[len(asked) // 2 :]  # of the second run
    assert all(
        (each["plugins"], each["vtc"]) in [("", None), ("vtc", {"keep": 128}), ("vtc", {"keep": 64})]
        for each in asked
        if "plugins" in each
    )
    assert sum("shutdown" in each for each in asked) == 3
    timed = [each for each in asked if each.get("max_tokens") == serve.NEW_TOKENS]
    assert all(each["ignore_eos"] and each["temperature"] == 0 for each in timed)
    loads = [
        key for key, _ in itertools.groupby((each["max_tokens"], str(each["vtc"])) for each in asked if "vtc" in each)
    ]
    order = [variant for new_tokens, variant in loads if new_tokens == serve.NEW_TOKENS]
    stock, more, less = "None", "{'keep': 128}", "{'keep': 64}"
    assert order == [stock, more, less, more, less, stock] * 2  # two rounds at each concurrency
    images = {
        name: [each["image"] for each in asked if str(each.get("vtc")) == name and "image" in each]
        for name in set(order)
    }
    assert images[stock] == images[more] == images[less]
    assert len(set(images[stock])) == len(images[stock]) == serve.CHECKED + 2 * (serve.WARM + 2 * 4)
    for c, first in ((1, 0), (3, len(timed) // 2)):
        assert max(each["flying"] for each in timed[first : first + len(timed) // 2]) == c


def test_a_record_has_what_was_measured(fake, tmp_path):
    assert serve.run(options(requests=6), tmp_path) == 0
    stock, ours = record.read(tmp_path / "serve.jsonl", Serving)
    assert (stock.prompt_tokens, ours.prompt_tokens) == (616, 104)
    assert (stock.kv_tokens, ours.kv_tokens) == (2 * 4 * 16, 2 * 16)  # two in flight, 4 blocks or 1
    assert (stock.requests, stock.rounds, stock.kv_capacity, stock.vllm) == (6, 1, 1600, "0.0")
    assert (stock.kv_token_bytes, stock.dtype, stock.checked) == (2**19, "bfloat16", "their lengths only")
    assert stock.requests_per_s_50 == pytest.approx(stock.tokens_per_s_50 / serve.NEW_TOKENS)
    assert stock.ttft_ratio_50 is None
    assert ours.ttft_ratio_50 == pytest.approx(stock.ttft_ms_50 / ours.ttft_ms_50)
    assert ours.rate_ratio_50 == pytest.approx(ours.tokens_per_s_50 / stock.tokens_per_s_50)
    assert stock.threads == torch.get_num_threads()
    assert stock.processor
    assert stock.date


def test_a_peak_that_vllm_does_not_tell_has_a_reason(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "no statistics")
    assert serve.run(options(), tmp_path) == 0
    found = record.read(tmp_path / "serve.jsonl", Serving)
    assert {(r.kv_tokens, r.no_kv_tokens) for r in found} == {(None, "vLLM gave no statistics of its scheduler")}
    assert "| vLLM gave no statistics of its scheduler |" in serve.tables(found)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (
            "keeps all",
            "WrongResult: vtc 64: prompt tokens, new tokens and cached tokens must be (104, 8, 0), got (616, 8, 0); "
            "is VTC installed in this environment?",
        ),
        (
            "caches",
            "WrongResult: vllm: prompt tokens, new tokens and cached tokens must be (616, 8, 0), got (616, 8, 16)",
        ),
        ("start", "RuntimeError: the engine failed: ValueError: planted: no such model"),
    ],
)
def test_an_engine_that_is_wrong_gets_no_number(fault, why, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", fault)
    said = []
    assert serve.run(options(concurrencies=[1, 2]), tmp_path, said.append) == 1
    failed = record.failures(tmp_path / "serve.jsonl")
    assert list(failed) == ["7b 1 in flight", "7b 2 in flight"]
    assert all(reason.startswith(why) for reason in failed.values())
    assert [line.startswith(f"NO NUMBER: {name}: {why}") for line, name in zip(said, failed, strict=True)] == [
        True,
        True,
    ]
    assert not record.read(tmp_path / "serve.jsonl", Serving)


def test_an_engine_that_dies_costs_only_later_numbers(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "dies")
    assert serve.run(options(concurrencies=[1, 4]), tmp_path, lambda line: None) == 1
    assert {r.concurrency for r in record.read(tmp_path / "serve.jsonl", Serving)} == {1}
    (why,) = record.failures(tmp_path / "serve.jsonl").values()
    assert why == "RuntimeError: the engine failed: its process has ended with status 3"


def test_other_tokens_than_the_transcriptions_get_no_number(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(serve.SUBJECTS, "7b", served_models.SUBJECTS["7b"]._replace(has_weights=True))
    answers = {"vllm": [[7] * 8] * 3, "vtc 64": [[7] * 8] * 3}
    monkeypatch.setattr(serve.Fleet, "expected", lambda self, folder: answers)
    assert serve.run(options(), tmp_path) == 0
    assert record.read(tmp_path / "serve.jsonl", Serving)[0].checked == "plain PyTorch"
    answers["vtc 64"] = [*[[7] * 8] * 2, [*[7] * 7, 8]]
    assert serve.run(options(), tmp_path) == 1
    (why,) = record.failures(tmp_path / "serve.jsonl").values()
    assert why == "WrongResult: vtc 64: other tokens than those of the transcription in plain PyTorch"


def test_engines_end(fake, tmp_path):
    engine = serving.Engine({"hf_overrides": {}}, "", tmp_path / "log")
    served = engine.serve(Load([Request([1, 4], 0)], 1, 2))
    assert (served.answers[0].tokens, served.answers[0].prompt_tokens, served.kv_tokens) == ([7, 7], 577, 64)
    assert engine.cpu_seconds() > 0
    assert engine.status() is None
    engine.close()
    assert engine.status() == 0
    assert engine.cpu_seconds() == 0


# Numbers and tables.


def served(ttfts, seconds, tokens=32):
    return Served([Answer([0] * tokens, 1, 0, ms) for ms in ttfts], seconds, 10, 0)


def test_ratios_are_those_of_one_round():
    rounds = [
        {"vllm": served([10.0, 20.0, 90.0], 2.0), "vtc 64": served([5.0, 10.0, 10.0], 1.0)},
        {"vllm": served([100.0] * 3, 20.0), "vtc 64": served([400.0] * 3, 40.0)},
    ]
    assert serve.samples(rounds, "vllm") == {
        "ttft_ms": [10.0, 20.0, 90.0, 100.0, 100.0, 100.0],
        "tokens_per_s": [48.0, 4.8],
        "requests_per_s": [1.5, 0.15],
    }
    ours = serve.samples(rounds, "vtc 64")
    assert (ours["ttft_ratio"], ours["rate_ratio"]) == ([2.0, 0.25], [2.0, 0.5])
    assert serve.quantiles({"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}) == {"a_20": 2.0, "a_50": 3.5, "a_80": 5.0}


def test_the_bytes_of_a_token():
    config = types.SimpleNamespace(
        num_key_value_heads=2, head_dim=None, hidden_size=64, num_attention_heads=4, num_hidden_layers=3
    )
    assert serve.token_bytes(config, "float32") == 2 * 3 * 2 * 16 * 4
    config.head_dim = 32
    assert serve.token_bytes(config, "bfloat16") == 2 * 3 * 2 * 32 * 2


def a_record(**given):
    names = [f"{name}_{percent}" for name in ("ttft_ms", "tokens_per_s", "requests_per_s") for percent in (20, 50, 80)]
    facts = {field.name: None for field in dataclasses.fields(record.Provenance)}
    facts |= dict.fromkeys(names, 1.0) | {"revision": "0123456789abcdef", "dirty": False, "date": "today"}
    facts |= {
        "suite": "serve", "model": "bundled model", "dtype": "float32", "backend": "vllm", "keep": None,
        "concurrency": 4, "requests": 8, "rounds": 3, "prompt_tokens": 587, "new_tokens": 32,
        "checked": "plain PyTorch", "kv_tokens": 640, "no_kv_tokens": None, "kv_capacity": 4096, "kv_token_bytes": 2,
        "preempted": 0,
        "others_busy": 0.012, "vllm": "1", "threads": 1, "processor": "CPU",
    }  # fmt: skip
    return Serving(**{**facts, **given})


def test_the_table_shows_gains_and_losses():
    ours = {"backend": "vtc 64", "keep": 64, "prompt_tokens": 75, "kv_tokens": 128, "ttft_ms_50": 1234.0}
    ours |= {"ttft_ratio_20": 0.5, "ttft_ratio_50": 0.75, "ttft_ratio_80": 2.0}
    ours |= {"rate_ratio_20": 0.9, "rate_ratio_50": 1.25, "rate_ratio_80": 1.5}
    text = serve.tables([a_record(), a_record(**ours), a_record(model="other", concurrency=16, requests=32)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 4 ")]
    assert rows[0] == ["4", "vllm", "1 (1-1)", "1.0 (1.0-1.0)", "1.00 (1.00-1.00)", "587", "640", "", ""]
    assert rows[1][2] == "1234 (1-1)"
    assert rows[1][5:] == ["75", "128", "0.75 (0.50-2.00)", "1.25 (0.90-1.50)"]
    assert "bundled model, float32, 32 tokens a request; requests of a round: 8 with 4 in flight; 3 rounds" in text
    assert "other, float32, 32 tokens a request; requests of a round: 32 with 16 in flight" in text
    assert "the others together took at most 1 % of a processor" in text
    assert "too small" not in text
    assert "The KV cache was too small 2 times" in serve.tables([a_record(preempted=2)])


def test_a_page_without_records_says_so(tmp_path):
    assert readme.serving(tmp_path / "README.md").startswith("Not measured yet")


# The models.


def test_the_folder_of_7b(tmp_path):
    """LLaVA-1.5-7B's sizes, no weights, and a tokenizer that knows the image placeholder of the config."""
    served_models.write_7b(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["LlavaForConditionalGeneration"]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    assert sum(each.numel() for each in model.parameters()) == 7_063_427_072
    assert serve.token_bytes(config.text_config, "bfloat16") == 2**19
    assert config.vision_config.hidden_size == 1024
    assert not list(tmp_path.glob("*.safetensors"))
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(images=Scene("test", 0).image, text=tiny.prompt("how many ?"), return_tensors="pt")
    assert (inputs["input_ids"] == config.image_token_id).sum() == serve.NUM_TOKENS
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    config.vtc = {"keep": 64}
    plan = settings.plan_of(config)
    assert (plan.num_tokens, plan.num_outputs) == (serve.NUM_TOKENS, 64)


@pytest.mark.parametrize("name", served_models.SUBJECTS)
def test_prompts_have_one_image_each_and_known_words(name):
    subject, tokenizer = served_models.SUBJECTS[name], AutoTokenizer.from_pretrained(tiny.CHECKPOINT)
    found = served_models.requests(subject, 5, 3)
    assert [each.scene for each in found] == [5, 6, 7]
    for each in found:
        assert each.ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 1
        assert max(each.ids) < len(tokenizer)
    if name != "bundled":
        assert len(found[0].ids) == 41
        assert found[0].ids != found[1].ids


def test_the_scaled_model_has_77_million_parameters():
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(served_models.scaled_config())
    assert round(sum(each.numel() for each in model.parameters()) / 1e6) == 77
    assert model.config.image_seq_length == serve.NUM_TOKENS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The bundled model, and a narrow one with random weights."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("bundled", "scaled")}
    served_models.write_bundled(found["bundled"])
    served_models.write_scaled(found["scaled"], served_models.scaled_config((64, 64), 2, 100))
    return found


@pytest.mark.parametrize("name", ["bundled", "scaled"])
def test_weights_have_the_names_of_the_hub(name, folders):
    """Stock vLLM knows the names of LLaVA-1.5's checkpoints, and transformers knows both."""
    names = load_file(folders[name] / served_models.WEIGHTS)
    assert any(each.startswith("vision_tower.vision_model.encoder.") for each in names)
    assert not any(each.startswith("vision_tower.encoder.") for each in names)
    assert any(each.startswith("language_model.model.layers.") for each in names)
    _, loaded = LlavaForConditionalGeneration.from_pretrained(folders[name], output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]


def test_the_bundled_weights_are_unchanged(folders):
    before, after = (
        load_file(tiny.CHECKPOINT / served_models.WEIGHTS),
        load_file(folders["bundled"] / "model.safetensors"),
    )
    assert len(before) == len(after)
    for name, tensor in before.items():
        renamed = name.replace("vision_tower.", "vision_tower.vision_model.")
        assert torch.equal(after[renamed], tensor)


@pytest.mark.parametrize("keep", [None, 64, 128])
def test_the_transcription_answers_like_transformers(keep, folders):
    """With all tokens as the stock model, with fewer as VTC."""
    asked = served_models.requests(served_models.SUBJECTS["bundled"], 0, 3)
    found = served_models.Transcription(folders["bundled"]).answers(asked, keep, 6)
    model, processor = tiny.load()
    model.generation_config.eos_token_id = None
    if keep:
        vtc.enable(model, keep=keep)
    text = tiny.prompt(served_models.QUESTION)
    for request, tokens in zip(asked, found, strict=True):
        inputs = processor(images=Scene("test", request.scene).image, text=text, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == tokens


def test_the_figures_of_the_page_are_those_of_the_record():
    root = Path(__file__).parents[2]
    records = record.read(root / "bench/results/serve" / serve.FILE, Serving)
    own = [each for each in records if (each.model, each.keep) == ("77 M LLaVA", 64)]
    assert [each.concurrency for each in own] == [1, 4, 16]
    page = " ".join((root / "vtc/vllm/README.md").read_text(encoding="utf-8").split())
    for name, rest in (("ttft", "times as early"), ("rate", "times as many tokens a second")):
        first, second, third = (f"{getattr(each, f'{name}_ratio_50'):.2f}" for each in own)
        assert f"{first}, {second} and {third} {rest}" in page
