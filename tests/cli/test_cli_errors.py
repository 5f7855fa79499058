"""Bad input is one line and exit code 2; a full disk or GPU is exit code 1."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.cli import QUESTION, call, python, refused, succeed

from vtc.cli import methods
from vtc.cli import run as asking
from vtc.cli.options import in_words_of_the_command
from vtc.eval import ask


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.png", QUESTION), ["nowhere.png does not exist"]),
        ((".", QUESTION), ["is a directory"]),
        ((__file__, QUESTION), ["is not an image"]),
        (("https://example.org/a.png", QUESTION), ["URL"]),
        (("{picture}", QUESTION, "--keep", 0), ["keep", "0"]),
        (("{picture}", QUESTION, "--keep", 577), ["--keep 577", "576", "--keep 144"]),
        (("{picture}", QUESTION, "--ratio", 1.5), ["ratio", "1.5"]),
        (("{picture}", QUESTION, "--keep", 64, "--ratio", 0.5), ["--keep 64", "--ratio 0.5"]),
        (("{picture}", QUESTION, "--method", "tome"), ["method", "'prumerge+'", "got 'tome'"]),
        (("{picture}", QUESTION, "--method", "visionzip", "--keep", 1), ["visionzip", "--keep 1", "--keep 2 or more"]),
        (
            ("{picture}", QUESTION, "--method", "random", "--start-layer", 2),
            ["--start-layer is an option of 'vtc-cls'", "use --method vtc-cls --start-layer 2"],
        ),
        (
            ("{picture}", QUESTION, "--method", "pool", "--overlay", "out.png"),
            ["'pool' selects no patches", "'vtc-cls'"],
        ),
        (
            ("{picture}", QUESTION, "--method", "fastv", "--prune-layer", 0),
            ["fastv", "--prune-layer 0", "use --prune-layer 2"],
        ),
        (("{picture}", QUESTION, "--method", "random", "--prune-layer", 2), ["random", "--prune-layer 2", "'fastv'"]),
        (("{picture}", QUESTION, "--prune-layer", 4), ["--prune-layer 4", "has 4; use 1 to 3"]),
        (("{picture}", QUESTION, "--kv", "short"), ["kv", "'compact'", "'full'"]),
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
    (tmp_path / "config.json").write_text('{"model_type": "llava_next"}')  # `vtc eval` runs it
    assert "'llava_next'; this command runs 'llava'" in refused("run", picture, QUESTION, "--model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')  # transformers says several lines
    assert "nonsense" in refused("run", picture, QUESTION, "--model", tmp_path)
    for file in Path(model_dir).iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:1000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    assert "cannot be loaded" in refused("run", picture, QUESTION, "--model", tmp_path)


def test_a_full_gpu_exits_with_1(model_dir, picture, monkeypatch):
    def full_gpu(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(asking, "compare", full_gpu)
    result = call("run", picture, QUESTION, "--model", model_dir)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("vtc: out of memory; try --dtype float16")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("as_json", [False, True], ids=("text", "JSON"))
def test_a_full_disk_takes_the_picture_and_not_the_answer(model_dir, picture, tmp_path, monkeypatch, as_json):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    out = tmp_path / "a.png"
    out.write_text("old")
    arguments = ("run", picture, QUESTION, "--model", model_dir, "--max-new-tokens", 1)
    answer = succeed(*arguments).stdout.strip()
    monkeypatch.setattr(Image.Image, "save", full_disk)
    result = call(*arguments, "--overlay", out, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "vtc: No space left on device"
    if as_json:
        found = json.loads(result.stdout)
        assert (found["compressed"]["answer"], found["overlay"]) == (answer, None)
    else:
        assert result.stdout.strip() == answer
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("kind", ["--overlay", "--heatmap"])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_loaded(picture, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(ask, "load", None)
    link = tmp_path / "link.png"
    link.symlink_to(picture)
    before = Path(picture).read_bytes()
    for out, says in (
        (picture, "is the input"),
        (link, "is the input"),
        (tmp_path, "is no image file name"),
        ("/proc/a.png", "cannot be written"),
        (tmp_path / ("x" * 300 + ".png"), "File name too long"),
    ):
        assert says in refused("run", picture, QUESTION, kind, out)
    assert "same file" in refused("run", picture, QUESTION, "--overlay", "a.png", "--heatmap", "./a.png")
    assert Path(picture).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run",), "issing argument 'IMAGE"),
        (("run", "a.png"), "issing argument 'IMAGE"),
        (("run", "a.png", "what ?", "--keep", "many"), "Invalid value for '--keep': "),
        (("run", "a.png", "what ?", "--kep", 3), "o such option: --kep"),
        (("run", "a.png", "what ?", "--max-new-tokens", 0), "Invalid value for '--max-new-tokens': "),
        (("run", "a.png", "what ?", "--option", "depth=3"), "--option takes name=value with a name among"),
        (("run", "a.png", "what ?", "--seed", 1, "--option", "seed=2"), "seed is given twice"),
        (("run", "a.png", __file__), "is a file; add a question"),
        (("run", "-", "-", "what ?"), "got it 2 times"),
        (("run", "x" * 300, "what ?"), "ile name too long"),
        (("demo", "--questions", 1), "Invalid value for '--questions': "),
        (("nonsense",), "o such command 'nonsense'"),
        (("--nonsense",), "o such option: --nonsense"),
    ],
)
def test_arguments_that_are_wrong_are_one_line(arguments, says):
    assert says in refused(*arguments)


@pytest.mark.parametrize("command", [("run", "a.png", "what ?"), ("eval", "scenes"), ("ui",), ("env",)])
def test_an_empty_model_is_refused(command):
    assert "Invalid value for '--model': it is empty" in refused(*command, "--model", "")


def test_where_help_is_found():
    assert refused("run", "a.png", "what ?", "--kep", 3).endswith("; see vtc run --help\n")


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.ENAMETOOLONG, 2), (errno.ENOSPC, 1)])
def test_errors_of_the_system(monkeypatch, number, code):
    def failing(*args):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(methods, "listing", failing)
    result = call("methods", "--json")
    assert (result.exit_code, result.stderr) == (code, f"vtc: some/file: {os.strerror(number)}\n")


@pytest.mark.parametrize("how", ["neither", "before", "after", "environment"])
def test_a_bug_is_one_line_and_a_traceback_with_debug(monkeypatch, how):
    def failing(*args):
        raise KeyError("a\nb")

    monkeypatch.setattr(methods, "listing", failing)
    monkeypatch.setenv("VTC_DEBUG", "1" if how == "environment" else "0")
    result = call(
        *(["--debug"] if how == "before" else []), "methods", "--json", *(["--debug"] if how == "after" else [])
    )
    assert result.exit_code == 1
    *trace, line = result.stderr.splitlines()
    assert line == r"vtc: internal error: KeyError: 'a\nb'; run it again with --debug and report what it prints"
    assert trace[:1] == ([] if how == "neither" else ["Traceback (most recent call last):"])


@pytest.mark.parametrize("cause", [None, RuntimeError("no\noperator")])
def test_a_package_that_cannot_be_imported_is_no_bug(monkeypatch, cause):
    def failing(*args):
        try:
            raise ImportError("outer") from cause
        except ImportError as error:
            raise ModuleNotFoundError("no AutoProcessor") from (error if cause else None)

    monkeypatch.setattr(methods, "listing", failing)
    result = call("methods", "--json")
    because = ", because of RuntimeError: no operator" if cause else ""
    assert (result.exit_code, result.stderr) == (
        1,
        f"vtc: ModuleNotFoundError: no AutoProcessor{because}; a package is missing or broken in this environment of "
        "Python\n",
    )


def test_an_interrupt_is_quiet(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "listing", interrupted)
    result = call("methods", "--json")
    assert (result.exit_code, result.output) == (130, "")


UNTOUCHED = (  # names of files and of models
    "keep=64.png does not exist",
    "method=vtc-cls.tar.gz does not exist",
    "vtc-eval/scenes/seed=3/run.json is broken",
    "prune_layer.png does not exist",
    "start_layer/a.png does not exist",
    "model 'my/method=fastv' is no directory",
    "model 'a keep=3' is no directory",
    'the file "its prune_layer" is no image',
)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("set keep to at most 9, e.g. vtc.configure(model, keep=4), or use ratio", "at most 9, e.g. --keep 4, or use"),
        ("use vtc.configure(model, method='random', seed=3)", "use --method random --seed 3"),
        (
            'got kv="compact"; use kv="full" or reselect=False',
            "got --kv compact; use --kv full or --option reselect=False",
        ),
        ("got prune_layer=2.", "got --prune-layer 2."),
        ("use ensemble_layers 1 to 4", "use --ensemble-layers 1 to 4"),
        ("method='prumerge+', keep=1", "--method prumerge+, --keep 1"),
        ("--sweep takes keep=256,128,64", "--sweep takes keep=256,128,64"),
        ("got --option seed=1", "got --option seed=1"),
        ("got 'keep=a'", "got 'keep=a'"),
        ("keep must be 1 or more", "--keep must be 1 or more"),
        ("what to keep and use", "what to keep and use"),
        ("a-keep=3.png and keep=3x", "a-keep=3.png and --keep 3x"),
        ("got ratio=0.25, keep=4.", "got --ratio 0.25, --keep 4."),
        *((text, text) for text in UNTOUCHED),
    ],
)
def test_messages_are_in_the_words_of_the_command_line(message, words):
    assert words in in_words_of_the_command(message)


def test_warnings_are_a_line_in_the_same_words(monkeypatch):
    monkeypatch.setattr(methods, "listing", lambda: logging.getLogger("vtc").warning("keep=%d\nis ignored", 5) or [])
    assert succeed("methods", "--json").stderr == "vtc: --keep 5 is ignored\n"
    assert not logging.getLogger("vtc").handlers


def test_a_logged_exception_comes_with_its_traceback(monkeypatch):
    def listing():
        try:
            raise KeyError("a")
        except KeyError:
            logging.getLogger("vtc").exception("a request failed")
        return []

    monkeypatch.setattr(methods, "listing", listing)
    lines = succeed("methods", "--json").stderr.splitlines()
    assert (lines[:2], lines[-1]) == (["vtc: a request failed", "Traceback (most recent call last):"], "KeyError: 'a'")


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
    assert json.loads(done.stdout)["compressed"]["visual_tokens"] == 128
