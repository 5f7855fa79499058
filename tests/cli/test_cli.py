"""The `vtc` command as a user meets it: what is on stdout, what on stderr, and the exit code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vtc
from vtc import tiny
from vtc.cli import __main__ as cli
from vtc.cli import ask, demo
from vtc.methods import METHODS
from vtc.tiny import evaluate
from vtc.tiny.scenes import Question, Scene, balanced_questions

LAYERS, WIDTH, BYTES = 4, 192, 4  # of the models below: language model layers, keys of all heads, float32
QUESTION = "what shape is the red object ?"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A LLaVA like the bundled one with random weights, large enough that the answer depends on every visual token."""
    from vtc.tiny.train import build_model, build_processor

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = build_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, (3.0 if "q_proj" in name or "k_proj" in name else 1.2) * weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["temperature"] = 0.7  # as in LLaVA-1.5; with greedy decoding transformers warns about it
    (folder / "generation_config.json").write_text(json.dumps(generation))
    build_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "scene.png"
    Scene("test", 3).image.save(file)
    return str(file)


@pytest.fixture(autouse=True)
def _restore_logging():
    """The command silences transformers for the whole process, here for one test only."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture
def few_runs(monkeypatch):
    """Times are not looked at here: measure once."""
    stock = ask.first_token
    monkeypatch.setattr(ask, "first_token", lambda model, inputs: stock(model, inputs, runs=1))


def call(*arguments):
    if arguments[0] in ("run", "demo") and "--device" not in arguments:
        arguments += ("--device", "cpu")
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def succeed(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("vtc: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


# ---- vtc


def test_help_imports_nothing_heavy():
    code = """
import sys
from vtc.cli.__main__ import app
app(["--help"], standalone_mode=False)
app(["run", "--help"], standalone_mode=False)
app(["methods", "--help"], standalone_mode=False)
app(["demo", "--help"], standalone_mode=False)
heavy = {"torch", "transformers", "triton", "numpy", "PIL", "rich"} & set(sys.modules)
print(sorted(heavy), file=sys.stderr)
"""
    done = python(code)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    for word in (
        "run",
        "demo",
        "methods",
        "env",
        "--method",
        "--version",
        "--overlay",
        "--compare",
        "--max-new-tokens",
        "--ratio",
        "--prune-layer",
        "--kv",
    ):
        assert word in done.stdout


def test_version():
    assert succeed("--version").stdout == f"vtc {vtc.__version__}\n"


def test_usage_errors_exit_with_2():
    assert call("run").exit_code == 2
    assert call("nonsense").exit_code == 2
    assert call("run", "a.png", "what ?", "--keep", "many").exit_code == 2


# ---- vtc run


@pytest.mark.parametrize(("options", "setting"), [((), {"keep": 64}), (("--keep", 9), {"keep": 9})])
def test_run_prints_the_answer_of_the_compressed_model(model_dir, picture, options, setting):
    result = succeed("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 5, *options)

    model, processor = ask.load(model_dir, torch.device("cpu"), torch.float32)
    inputs = processor(images=Image.open(picture), text=tiny.prompt(QUESTION), return_tensors="pt")
    with vtc.compress(model, **setting):
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    want = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    full = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert out.tolist() != full.tolist()  # or the test would not notice a model that is not compressed
    assert result.stdout == want.strip() + "\n"
    assert f"{setting['keep']} visual tokens" in result.stderr


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vtc-cls"])
def test_run_with_each_method(model_dir, picture, method):
    arguments = ("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 3, "--method", method, "--json")
    found = json.loads(succeed(*arguments).stdout)
    model, processor = ask.load(model_dir, torch.device("cpu"), torch.float32)
    inputs = processor(images=Image.open(picture), text=tiny.prompt(QUESTION), return_tensors="pt")
    with vtc.compress(model, method=method, keep=64) as run:
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
    arguments = ["--method", method, "--kv", kv, *(("--prune-layer", layer) if layer else ())]
    asked = ("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 3, "--compare", "--json", *arguments)
    found = json.loads(succeed(*asked).stdout)
    layer = layer or 2
    assert (found["method"], found["prune_layer"], found["compressed"]["visual_tokens"]) == (method, layer, 64)
    model, processor = ask.load(model_dir, torch.device("cpu"), torch.float32)
    inputs = processor(images=Image.open(picture), text=tiny.prompt(QUESTION), return_tensors="pt")
    with vtc.compress(model, method=method, keep=64, prune_layer=layer, kv=kv):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert found["compressed"]["answer"] == answer
    short = LAYERS if kv == "compact" else LAYERS - layer
    dropped = found["uncompressed"]["kv_cache_bytes"] - found["compressed"]["kv_cache_bytes"]
    assert dropped == 2 * short * WIDTH * BYTES * 512


def test_methods_is_the_registry():
    found = json.loads(succeed("methods", "--json").stdout)["methods"]
    assert [row["name"] for row in found] == list(METHODS)
    for row in found:
        about = METHODS[row["name"]]
        assert row == {
            "name": about.name,
            "scores": about.scores,
            "needs_cls": about.needs_cls(),
            "prunes": list(about.prunes),
            "adaptive": about.adaptive,
            "paper": about.paper or None,
        }
    table = succeed("methods").stdout
    assert "\x1b" not in table
    assert re.search(r"^name +scores +needs \[CLS\] +prunes +paper$", table, re.MULTILINE)
    assert re.search(r"^prumerge +.* yes +before the projector +arXiv 2403.15388$", table, re.MULTILINE)
    assert re.search(r"^none +nothing: all stay +no +nowhere +-$", table, re.MULTILINE)


def test_compare_json_holds_real_figures(model_dir, picture, few_runs):
    arguments = ("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 2, "--compare", "--json")
    result = succeed(*arguments)
    found = json.loads(result.stdout)
    assert result.stderr == ""
    short, full = found["compressed"], found["uncompressed"]
    assert (short["visual_tokens"], full["visual_tokens"]) == (64, 576)
    prompt = len(("<s>", "user", ":", *QUESTION.split(), "assistant", ":"))
    for side in (short, full):
        assert side["kv_cache_bytes"] == 2 * LAYERS * WIDTH * BYTES * (prompt + side["visual_tokens"])
        assert side["time_to_first_token_ms"] > 0
    assert short["answer"] != full["answer"]
    assert found["backend"] == {"row_scores": "torch", "topk": "torch", "compact": "torch"}
    assert (found["question"], found["image"], found["model"]) == (QUESTION, picture, model_dir)
    assert (found["device"], found["dtype"], found["method"]) == ("cpu", "float32", "vtc-cls")


def test_ratio_and_dtype(model_dir, picture):
    arguments = ("--model", model_dir, "--ratio", 0.11, "--dtype", "bfloat16", "--max-new-tokens", 1, "--json")
    found = json.loads(succeed("run", picture, QUESTION, *arguments).stdout)
    assert found["compressed"]["visual_tokens"] == 64  # ceil(0.11 * 576)
    assert found["dtype"] == "bfloat16"
    assert found["uncompressed"] is None


def test_compare_table_is_plain_text_when_not_a_terminal(model_dir, picture, few_runs):
    result = succeed("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 1, "--compare")
    assert result.stdout.isascii()
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert re.split(r"\s{2,}", lines[1].strip()) == ["visual tokens", "time to first token", "KV cache", "answer"]
    assert re.fullmatch(r"all tokens  576 +[\d.]+ ms +3\.\d\d MiB .*", lines[2])
    assert re.fullmatch(r"vtc-cls     64 +[\d.]+ ms +0\.\d\d MiB .*", lines[3])
    assert "median of" in result.stdout


def test_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli._print_table("title", ("name", "answer"), [("a", "[red]not markup[/red]")])
    printed = capsys.readouterr().out
    assert "[red]not markup[/red]" in printed
    assert "━" in printed


def test_overlay_shows_what_was_kept(model_dir, picture, tmp_path):
    out = tmp_path / "kept.png"
    arguments = ("--model", model_dir, "--keep", 10, "--max-new-tokens", 1, "--overlay", out)
    assert str(out) in succeed("run", picture, QUESTION, *arguments).stderr
    model, processor = ask.load(model_dir, torch.device("cpu"), torch.float32)
    pixels = processor.image_processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    want = vtc.overlay(Image.open(picture), vtc.select(model, pixels, keep=10))
    assert Image.open(out).tobytes() == want.tobytes()


def test_unknown_words_are_named(model_dir, picture):
    result = succeed("run", picture, "Is the red object left of a zebra?", "--model", model_dir, "--max-new-tokens", 1)
    assert "the model does not know: zebra\n" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.png", QUESTION), ["nowhere.png does not exist"]),
        ((".", QUESTION), ["is a directory"]),
        ((__file__, QUESTION), ["is not an image"]),
        (("https://example.org/a.png", QUESTION), ["URL"]),
        (("{picture}", QUESTION, "--keep", 0), ["keep", "0"]),
        (("{picture}", QUESTION, "--keep", 577), ["577", "576"]),
        (("{picture}", QUESTION, "--ratio", 1.5), ["ratio", "1.5"]),
        (("{picture}", QUESTION, "--keep", 64, "--ratio", 0.5), ["keep=64", "ratio=0.5"]),
        (("{picture}", QUESTION, "--method", "tome"), ["method", "'prumerge+'", "got 'tome'"]),
        (("{picture}", QUESTION, "--method", "visionzip", "--keep", 1), ["visionzip", "keep=1", "keep=2 or more"]),
        (
            ("{picture}", QUESTION, "--method", "pool", "--overlay", "out.png"),
            ["'pool' chooses no patches", "'vtc-cls'"],
        ),
        (
            ("{picture}", QUESTION, "--method", "fastv", "--prune-layer", 0),
            ["fastv", "prune_layer=0", "use prune_layer=2"],
        ),
        (("{picture}", QUESTION, "--method", "random", "--prune-layer", 2), ["random", "prune_layer=2", "'fastv'"]),
        (("{picture}", QUESTION, "--prune-layer", 4), ["prune_layer=4", "has 4; use 1 to 3"]),
        (("{picture}", QUESTION, "--kv", "short"), ["kv", "'compact'", "'full'"]),
        (
            ("{picture}", QUESTION, "--method", "fastv", "--overlay", "out.png"),
            ["'fastv' chooses inside the language model", "'vtc-cls'"],
        ),
        (("{picture}", QUESTION, "--overlay", "out.xyz"), ["out.xyz", ".png"]),
        (("{picture}", QUESTION, "--overlay", "no/such/dir/out.png"), ["directory no/such/dir", "create it"]),
        (("{picture}", QUESTION, "--device", "toaster"), ["toaster", "cpu"]),
        (("{picture}", QUESTION, "--device", "cuda:99"), ["cuda:99"]),
        (("{picture}", QUESTION, "--dtype", "int8"), ["int8", "float16"]),
        (("{picture}", QUESTION, "--model", "./no-such-model"), ["./no-such-model", "model directory"]),
        (("{picture}", QUESTION, "--model", "no-such/model"), ["no-such/model"]),
        (("{picture}", "  "), ["question is empty"]),
        (("{picture}", "what is in <image> ?"), ["<image>", "leave it out"]),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input(model_dir, picture, tmp_path, monkeypatch, arguments, words, as_json):
    monkeypatch.chdir(tmp_path)
    arguments = [picture if a == "{picture}" else a for a in arguments]
    arguments += [] if "--model" in arguments else ["--model", model_dir]
    message = refused("run", *arguments, *(["--json"] if as_json else []))
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_broken_models(picture, model_dir, tmp_path):
    assert "config.json" in refused("run", picture, QUESTION, "--model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "'bert'" in refused("run", picture, QUESTION, "--model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')  # transformers says several lines
    assert "nonsense" in refused("run", picture, QUESTION, "--model", tmp_path)
    for file in Path(model_dir).iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:1000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    assert "cannot be loaded" in refused("run", picture, QUESTION, "--model", tmp_path)


def test_a_full_disk_or_gpu_exits_with_1(model_dir, picture, tmp_path, monkeypatch):
    arguments = ("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 1, "--overlay", tmp_path / "a.png")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def full_gpu(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    for owner, name, failure, word in (
        (Image.Image, "save", full_disk, "No space left"),
        (ask, "compare", full_gpu, "out of memory; try"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failure)
            result = call(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert word in result.stderr.splitlines()[-1]


def test_a_real_process_prints_one_line_and_exits_with_2():
    done = python(
        "from vtc.cli.__main__ import main; import sys; sys.argv[1:] = ['run', 'nowhere.png', 'what ?']; main()"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vtc: nowhere.png does not exist; check the spelling and the current directory\n"


def test_a_real_process_prints_json_and_nothing_else(model_dir, picture):
    arguments = ["run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", "1", "--device", "cpu", "--json"]
    done = python(f"from vtc.cli.__main__ import main; import sys; sys.argv[1:] = {arguments}; main()")
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar, no warning of transformers either
    assert json.loads(done.stdout)["compressed"]["visual_tokens"] == 64


# ---- what `vtc run` is made of


def test_without_chat_template_the_prompt_is_that_of_llava(model_dir):
    model, processor = ask.load(model_dir, torch.device("cpu"), torch.float32)
    image = Scene("test", 3).image
    templated = ask.prepare(model, processor, image, QUESTION)
    processor.chat_template = None
    plain = ask.prepare(model, processor, image, QUESTION)
    assert plain["input_ids"].tolist() == templated["input_ids"].tolist()
    assert plain["pixel_values"].equal(templated["pixel_values"])
    reference = processor(images=image, text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")
    assert plain["input_ids"].tolist() == reference["input_ids"].tolist()


def test_a_processor_without_patch_size_is_completed(model_dir, tmp_path):
    for file in Path(model_dir).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        del settings[name]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    model, processor = ask.load(str(tmp_path), torch.device("cpu"), torch.float32)
    inputs = ask.prepare(model, processor, Scene("test", 3).image, QUESTION)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576


def test_the_picture_under_an_overlay_is_what_the_model_saw(model_dir):
    _, processor = ask.load(model_dir, torch.device("cpu"), torch.float32)
    wide = Scene("test", 3).image.resize((672, 336))
    assert ask.as_seen(wide, processor, None) is wide  # overlay crops as this processor does
    steps = processor.image_processor
    steps.do_center_crop, steps.size = False, {"height": 336, "width": 336}  # squeezes instead
    pixels = steps(wide, return_tensors="pt")["pixel_values"]
    difference = torch.tensor(list(ask.as_seen(wide, processor, pixels).tobytes())).float() - torch.tensor(
        list(wide.resize((336, 336), Image.Resampling.BICUBIC).tobytes())
    )
    assert difference.abs().max() <= 1


# ---- vtc env


def test_env(monkeypatch):
    found = json.loads(succeed("env", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["vtc"] == vtc.__version__
    assert set(found["backends"]["cpu"]) == set(vtc.ops.OPS)
    assert found["backends"]["cpu"]["topk"]["backend"] == "torch"
    assert "flash_attn" in found
    plain = succeed("env").stdout
    assert "\x1b" not in plain
    assert torch.__version__ in plain
    assert re.search(r"^cpu +row_scores +torch +", plain, re.MULTILINE)
    assert "flash-attn: " in plain


def test_env_shows_an_override_that_cannot_work(monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "cuda")
    found = json.loads(succeed("env", "--json").stdout)
    assert found["backends"]["cpu"]["topk"]["backend"] == "none"
    assert "VTC_BACKEND" in found["backends"]["cpu"]["topk"]["why"]


# ---- vtc demo


def test_demo_measures_each_setting(model_dir, tmp_path, monkeypatch, few_runs):
    monkeypatch.setattr(tiny, "CHECKPOINT", Path(model_dir))
    used = []
    stock = vtc.compress
    monkeypatch.setattr(vtc, "compress", lambda model, **options: used.append(options) or stock(model, **options))
    out = tmp_path / "demo.png"
    result = succeed("demo", "--questions", 6, "--out", out, "--json")
    found = json.loads(result.stdout)
    expected = [("vtc-cls", 192), ("vtc-cls", 128), ("vtc-cls", 64), ("vtc-cls", 32), ("random", 64)]
    assert used == [{"keep": keep, "method": name} for name, keep in expected for _ in ("one timed", "all asked")]
    assert [row["visual_tokens"] for row in found["rows"]] == [576, 192, 128, 64, 32, 64]
    assert found["questions"] == 6
    cache = [row["kv_cache_bytes"] for row in found["rows"]]
    assert [(cache[0] - size) // (2 * LAYERS * WIDTH * BYTES) for size in cache] == [0, 384, 448, 512, 544, 512]
    for row in found["rows"]:
        assert row["accuracy"] == pytest.approx(row["right"] / 6, abs=1e-4)
        assert row["time_to_first_token_ms"] > 0
        assert row["per_question_ms"] > 0
    assert Image.open(out).format == "PNG"
    assert found["picture"] == str(out)


def test_demo_of_all_methods(model_dir, tmp_path, monkeypatch, few_runs):
    """At 64 tokens each; those that keep another number say which."""
    monkeypatch.setattr(tiny, "CHECKPOINT", Path(model_dir))
    out = tmp_path / "demo.png"
    rows = json.loads(succeed("demo", "--questions", 5, "--method", "all", "--out", out, "--json").stdout)["rows"]
    assert [row["selection"] for row in rows] == ["all tokens", *(name for name in METHODS if name != "none")]
    tokens = {row["selection"]: row["visual_tokens"] for row in rows}
    assert tokens.pop("all tokens") == 576
    assert 0 < tokens.pop("prumerge") <= 145
    assert 33 < tokens.pop("prumerge+") <= 66
    assert set(tokens.values()) == {64}
    assert Image.open(out).format == "PNG"


def test_demo_of_a_method_that_chooses_no_patches(model_dir, tmp_path, monkeypatch, few_runs):
    monkeypatch.setattr(tiny, "CHECKPOINT", Path(model_dir))
    monkeypatch.setattr(demo, "FEWER", (30,))
    out = tmp_path / "demo.png"
    rows = json.loads(succeed("demo", "--questions", 5, "--method", "pool", "--out", out, "--json").stdout)["rows"]
    expected = [("all tokens", 576), ("pool", 25), ("random", 64)]
    assert [(row["selection"], row["visual_tokens"]) for row in rows] == expected
    assert Image.open(out).format == "PNG"


def test_what_demo_measures():
    assert demo.settings("vtc-cls") == demo.SETTINGS
    assert [row[:2] for row in demo.settings("random")] == [("all tokens", 576), ("random", 64)]
    assert [row[:2] for row in demo.settings("none")] == [("all tokens", 576), ("none", 576)]
    assert [row[:2] for row in demo.settings("visionzip")] == [
        ("all tokens", 576),
        *(("visionzip", tokens) for tokens in (192, 128, 64, 32)),
        ("random", 64),
    ]


def test_demo_labels_its_answers():
    rows = [demo.Row(name, tokens, [], [], 0.1, 0.1, 1) for name, tokens, _ in demo.SETTINGS]
    assert [demo._label(demo.Demo([], rows, {}, "cpu", 1), row) for row in rows] == [
        *("576", "192", "128", "64", "32"),
        "random 64",
    ]
    rows = [demo.Row(name, tokens, [], [], 0.1, 0.1, 1) for name, tokens, _ in demo.settings("all")]
    labels = [demo._label(demo.Demo([], rows, {}, "cpu", 1), row) for row in rows]
    assert labels[:3] == ["576", "vtc-cls 64", "fastervlm 64"]


def test_demo_prints_a_plain_table(model_dir, tmp_path, monkeypatch, few_runs):
    monkeypatch.setattr(tiny, "CHECKPOINT", Path(model_dir))
    monkeypatch.chdir(tmp_path)
    asked = [question.answer for _, question in balanced_questions("test", 5)]
    monkeypatch.setattr(ask, "answer", lambda model, processor, inputs, **_: [asked[0]] * len(inputs["input_ids"]))
    result = succeed("demo", "--questions", 5)
    assert (tmp_path / "demo.png").exists()
    assert "\x1b" not in result.stdout
    pattern = r"^(?:all tokens|vtc-cls|random) +(\d+) +(\d)/5 +([\d.]+) % +[\d.]+ ms"
    rows = re.findall(pattern, result.stdout, re.MULTILINE)
    assert [int(tokens) for tokens, _, _ in rows] == [576, 192, 128, 64, 32, 64]
    right = asked.count(asked[0])
    assert 0 < right < 5
    assert {(int(count), float(share)) for _, count, share in rows} == {(right, 20.0 * right)}


def test_demo_refuses_before_it_works(tmp_path):
    assert "create it" in refused("demo", "--out", tmp_path / "no" / "demo.png")
    assert call("demo", "--questions", 1).exit_code == 2
    assert "got 'tome'" in refused("demo", "--method", "tome")


def made_up_demo(right):
    asked = balanced_questions("test", 6)
    answers = [q.answer if ok else "nothing of the kind" for ok, (_, q) in zip(right, asked, strict=True)]
    rows = [demo.Row(name, tokens, answers, right, 0.1, 0.01, 2**20) for name, tokens, _ in demo.SETTINGS]
    pictures = {n: Image.new("RGB", (demo.PICTURE, demo.PICTURE)) for n in range(6)}
    return demo.Demo(asked, rows, pictures, "cpu", 2)


def test_demo_picture_colours_answers_by_whether_they_are_right():
    right = [True, False, True, True, True, False]
    sheet = demo.draw(made_up_demo(right))
    cells = [
        (column * (demo.CARD[0] + demo.MARGIN) + demo.MARGIN, row * (demo.CARD[1] + demo.MARGIN) + demo.HEAD)
        for row in range(3)
        for column in range(2)
    ]
    for ok, (x, y) in zip(right, cells, strict=True):
        chips = sheet.crop((x, y + demo.PICTURE, x + demo.CARD[0], y + demo.CARD[1]))
        count = dict((colour, n) for n, colour in chips.getcolors(1 << 20))
        assert (count.get(demo.RIGHT, 0) > 10_000) is ok
        assert (count.get(demo.WRONG, 0) > 10_000) is not ok


def test_demo_shows_one_question_of_each_family_and_a_disagreement():
    asked = [(None, Question(family, "", "yes")) for family in ("digit", "existence", *demo.FAMILIES, "digit")]
    answers = [["yes"] * 8, ["yes"] * 7 + ["no"]]
    rows = [demo.Row("vtc-cls", 64, given, [True] * 8, 0.1, 0.1, 1) for given in answers]
    assert demo._cards(asked, rows) == [1, 3, 4, 5, 0, 7]
    assert demo._cards(asked, rows[:1]) == [1, 3, 4, 5, 0, 2]


def test_bundled_model_answers_as_it_does_in_python(tmp_path):
    asked = balanced_questions("test", 5)
    model, processor = vtc.tiny.load()
    expected = evaluate.answer(model, processor, evaluate.batches(model, processor, asked, 1), keep=64).texts
    assert all(expected)
    for (scene, question), answer in zip(asked, expected, strict=True):
        scene.image.save(tmp_path / "scene.png")
        result = succeed("run", tmp_path / "scene.png", question.text, "--keep", 64, "--max-new-tokens", 3)
        assert result.stdout.strip() == answer
        assert "bundled model knows" in result.stderr
