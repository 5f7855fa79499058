"""Bad input is one line and exit code 2; a full disk or GPU is exit code 1."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.cli import QUESTION, call, python, refused

from vtc.cli import ask


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
            ["'pool' selects no patches", "'vtc-cls'"],
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
            ["'fastv' selects inside the language model", "'vtc-cls'"],
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
    (tmp_path / "config.json").write_text('{"model_type": "llava_next"}')  # `vtc eval` runs it
    assert "'llava_next'; this command runs 'llava'" in refused("run", picture, QUESTION, "--model", tmp_path)
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
