"""`vtc run` and `vtc demo` write files: what is in them, and that a kill never leaves half of one."""

import io
import json
import sys

import pytest
import torch
from PIL import Image
from support.cli import QUESTION, call, succeed
from support.killed import kill_while_it_writes

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
    assert found["compressed"] == {"visual_tokens": 20, "token_layers": 20, "answer": answer}


def test_an_image_on_standard_input(model_dir, picture):
    data = io.BytesIO()
    Image.open(picture).save(data, "PNG")
    arguments = (QUESTION, "--model", model_dir, "--max-new-tokens", 3)
    assert succeed("run", "-", *arguments, stdin=data.getvalue()).stdout == succeed("run", picture, *arguments).stdout
    result = call("run", "-", *arguments, stdin=b"no image")
    assert (result.exit_code, result.stdout) == (2, "")
    assert " is not an image" in result.stderr


WRITER = """
# What `vtc run` and `vtc demo` do once they have answered, again and again.
import sys
from pathlib import Path
from PIL import Image
import vtc
from vtc.cli import demo, run

command, out = sys.argv[1], Path(sys.argv[2])
big = Image.effect_noise((900, 900), 90).convert("RGB")  # takes a while to write
vtc.select = lambda *args, **options: None
vtc.overlay = lambda image, selection, index: big
demo.Demo.record, demo.Demo.footnotes, demo.print_table = lambda self: {}, lambda self: [], lambda *args: None
demo.print_json = lambda document: None
while True:
    if command == "run":
        list(run._draw({"overlay": out}, [None], None, None, {}))
    else:
        demo.show(demo.Demo([], [], {}, "cpu", 1), lambda found: big, out, 0.0, True)
"""


@pytest.mark.parametrize("command", ["run", "demo"])
def test_a_kill_while_a_picture_is_written_leaves_a_whole_one(tmp_path, command):
    out = tmp_path / "out.png"
    Image.new("RGB", (8, 8)).save(out)
    kill_while_it_writes([sys.executable, "-c", WRITER, command, out], tmp_path)
    with Image.open(out) as image:
        image.load()  # whole
        assert image.size in ((8, 8), (900, 900))
    assert list(tmp_path.iterdir()) == [out]
