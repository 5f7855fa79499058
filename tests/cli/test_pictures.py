"""`vtc run` and `vtc demo` write files: what is in them, and that a kill never leaves half of one."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from support.cli import QUESTION, call, succeed

import vtc
from vtc.eval import ask
from vtc.tiny.scenes import Scene

SIDE = 672


@pytest.fixture(scope="module")
def loaded(model_dir):
    return ask.load(model_dir, "cpu", "float32")


@pytest.mark.parametrize("method", ["vtc-cls", "fastv"])
@pytest.mark.parametrize("kind", ["overlay", "heatmap"])
def test_two_images_are_drawn_side_by_side(loaded, model_dir, tmp_path, method, kind):
    images = [Scene("test", number).image for number in (3, 4)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    out = tmp_path / "out.png"
    arguments = (tmp_path / "0.png", tmp_path / "1.png", QUESTION, "--model", model_dir, "--max-new-tokens", 1)
    result = succeed("run", *arguments, "--keep", 10, "--method", method, f"--{kind}", out)
    assert f"{kind} in {out}" in result.stderr
    model, processor = loaded
    selection = vtc.select(model, ask.prepare(model, processor, images, QUESTION), keep=10, method=method)
    want = [getattr(vtc, kind)(image, selection, index=number) for number, image in enumerate(images)]
    drawn = Image.open(out)
    assert drawn.size == (2 * SIDE, SIDE)
    for number, image in enumerate(want):
        assert drawn.crop((number * SIDE, 0, (number + 1) * SIDE, SIDE)).tobytes() == image.tobytes()


def test_the_answer_about_two_images_is_that_of_both(loaded, model_dir, tmp_path):
    images = [Scene("test", number).image for number in (3, 4)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    arguments = ("--model", model_dir, "--max-new-tokens", 4, "--keep", 20, "--json")
    found = json.loads(succeed("run", tmp_path / "0.png", tmp_path / "1.png", QUESTION, *arguments).stdout)
    model, processor = loaded
    inputs = ask.prepare(model, processor, images, QUESTION)
    assert inputs["pixel_values"].shape[0] == 2
    with torch.no_grad(), vtc.compress(model, keep=20):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert found["compressed"] == {"visual_tokens": 20, "answer": answer}


def test_an_image_on_standard_input(model_dir, picture):
    data = io.BytesIO()
    Image.open(picture).save(data, "PNG")
    arguments = (QUESTION, "--model", model_dir, "--max-new-tokens", 3)
    assert succeed("run", "-", *arguments, stdin=data.getvalue()).stdout == succeed("run", picture, *arguments).stdout
    result = call("run", "-", *arguments, stdin=b"no image")
    assert (result.exit_code, result.stdout) == (2, "")
    assert " is not an image" in result.stderr


WRITERS = """
# What `vtc run` and `vtc demo` do once they have answered, with a picture that takes a while. A child writes it again
# and again until it is killed; then comes the next one.
import os, sys
from pathlib import Path
from PIL import Image
import vtc
from vtc.cli import demo, run

big = Image.effect_noise((900, 900), 90).convert("RGB")
vtc.select = lambda *args, **options: None
vtc.overlay = lambda image, selection, index: big
demo.Demo.record, demo.Demo.footnotes, demo.print_table = lambda self: {}, lambda self: [], lambda *args: None
found = demo.Demo([], [], {}, "cpu", 1)
demo.print_json = lambda document: None
for command, out in (("run", Path(sys.argv[1])), ("demo", Path(sys.argv[2]))) * int(sys.argv[3]):
    pid = os.fork()
    while pid == 0:
        if command == "run":
            list(run._draw({"overlay": out}, [None], None, None, {}))
        else:
            demo.show(found, lambda found: big, out, 0.0, True)
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    kills = 12
    files = [tmp_path / "run.png", tmp_path / "demo.png"]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    rng = random.Random(0)
    command = [sys.executable, "-c", WRITERS, *map(str, files), str(kills)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for number in range(2 * kills):
            child = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
            with Image.open(files[number % 2]) as image:
                image.load()  # whole
                assert image.size in ((8, 8), (900, 900))
    assert process.returncode == 0
    names = {path.name for path in tmp_path.iterdir()} - {"run.png", "demo.png"}
    assert names  # some kills came while it wrote
    assert all(name.startswith(".vtc-") for name in names)
