"""`vtc run` and `vtc demo` write files: what is in them, and that a kill never leaves half of one."""

import io
import json
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
from vtc.cli import ask
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
    assert result.stderr.startswith("vtc: <standard input> is not an image")


WRITERS = {  # the command as it is, with a model that takes no time and a picture that does
    "run": """
from PIL import Image
from vtc.cli import run
class Selection: pass
class Draw:
    api = vtc.overlay
big = Image.effect_noise((1500, 1500), 90).convert("RGB")
vtc.select = lambda *args, **options: None
vtc.overlay = lambda image, selection, index: big
def write():
    list(run._draw({"overlay": Path(out)}, [None], None, None, {}))
""",
    "demo": """
from PIL import Image
from vtc.cli import demo
big = Image.effect_noise((1500, 1500), 90).convert("RGB")
found = demo.Demo([], [], {}, "cpu", 1)
demo.Demo.record, demo.Demo.footnotes = (lambda self: {}), (lambda self: [])
demo.print_table = lambda *args: None
def write():
    demo.show(found, lambda found: big, Path(out), 0.0, True)
""",
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(command, tmp_path):
    """A process that writes the same picture again and again is killed at random moments."""
    out = tmp_path / "out.png"
    Image.new("RGB", (8, 8)).save(out)
    old = out.read_bytes()
    code = f"import sys, vtc\nfrom pathlib import Path\nout = sys.argv[1]\n{WRITERS[command]}"
    code += "print('ready', file=sys.stderr, flush=True)\nwhile True: write()\n"
    rng = random.Random(0)
    seen = set()
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        line = process.stderr.readline()
        assert line == "ready\n", line + process.stderr.read()
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        Image.open(out).load()  # whole
        seen.add(out.read_bytes() == old)
    left = {path.name[:5] for path in tmp_path.iterdir()} - {"out.p"}
    assert left <= {".vtc-"}
    assert False in seen or left  # the kills came while it wrote
