"""`vtc run`: one question about one image or several, from the arguments to what is printed and drawn.

What can be wrong with the arguments is found before torch and transformers are imported, where that is possible.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vtc.cli.output import image_file, note, print_json, print_table, progress, quieten
from vtc.eval import BUNDLED
from vtc.files import replacing
from vtc.images import load_image

if TYPE_CHECKING:
    from PIL import Image

STDIN = "-"


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of the command.

    Attributes
    ----------
    options : dict
        Fields of `VTCConfig`, and options of the method.
    pictures : dict
        Files to write, by "overlay" and "heatmap"; those that are None are not asked for.
    """

    images: Sequence[str]
    question: str
    options: dict[str, Any]
    pictures: dict[str, str | None]
    model: str = BUNDLED
    revision: str | None = None
    device: str | None = None
    dtype: str = "auto"
    threads: int | None = None
    max_new_tokens: int = 64
    compare: bool = False
    as_json: bool = False


def run(request: Request) -> None:
    """Answer, print, draw.

    The answer is printed before pictures are drawn. A JSON document names the pictures that were written, so that it
    comes after them; it is printed, too, if drawing fails.

    Raises
    ------
    ValueError
        For bad input.
    OSError
        If a picture cannot be written after all.
    """
    if not request.images:
        raise ValueError(f"got only {request.question!r}; give one image or more, and the question last")
    if not request.question.strip():
        raise ValueError("the question is empty; ask something about the image")
    if os.path.isfile(request.question):  # unlike Path.is_file, never an error for a long text
        raise ValueError(f"the last argument is the question, and {request.question} is a file; add a question")
    files = _files(request)
    images = _load(request.images)

    from vtc.config import VTCConfig

    method = VTCConfig.of(**request.options).method
    progress("loading …")
    quieten(request.model)

    from vtc.api import require_selection
    from vtc.cli import ask

    if files:
        require_selection(method)
    threads = ask.use_threads(request.threads, request.model)
    net, processor = ask.load(request.model, request.device, request.dtype, request.revision)
    inputs = ask.prepare(net, processor, images, request.question)
    result = {
        "images": list(request.images),
        "question": request.question,
        "model": request.model,
        "device": str(net.device),
        "dtype": str(net.dtype).removeprefix("torch."),
        "cpu_threads": threads,
        "options": request.options,
        **ask.compare(
            net, processor, inputs, request.options, request.max_new_tokens, request.compare, request.as_json
        ),
        **dict.fromkeys(request.pictures),
    }
    if not request.as_json:
        _print(request, result)
    try:
        if files:
            seen = [ask.as_seen(image, processor, inputs["pixel_values"], i) for i, image in enumerate(images)]
            for kind in _draw(files, seen, net, inputs, request.options):
                result[kind] = str(files[kind])
                note(f"{kind} in {files[kind]}")
    finally:
        if request.as_json:
            print_json(result)
    if words := ask.unknown_words(processor, request.question):
        note(f"the model does not know: {' '.join(words)}")
    if request.model == BUNDLED:
        note("the bundled model knows the images of `vtc demo` only; for photographs give --model")


def _files(request: Request) -> dict[str, Path]:
    """The pictures to write, by kind. Raises ValueError if one cannot be written, or would replace an image."""
    inputs = [image for image in request.images if image != STDIN]
    files: dict[str, Path] = {}
    for kind, name in request.pictures.items():
        if name is not None:
            files[kind] = image_file(name, inputs)
    if len({file.resolve() for file in files.values()}) < len(files):
        raise ValueError(f"--overlay and --heatmap are the same file, {request.pictures['overlay']}; give two names")
    return files


def _load(names: Sequence[str]) -> list[Image.Image]:
    """The images; "-" is the one on standard input."""
    if names.count(STDIN) > 1:
        raise ValueError(f"{STDIN} is the image on standard input, got it {names.count(STDIN)} times; give it once")
    return [load_image(sys.stdin.buffer if name == STDIN else name) for name in names]


def _print(request: Request, result: dict[str, Any]) -> None:
    from vtc.cli import ask

    if request.compare:
        title, columns, rows = ask.comparison(result)
        print_table(title, columns, rows)
        for line in ask.footnotes(result):
            typer.echo(line)
    else:
        typer.echo(result["compressed"]["answer"])
        note(f"{result['compressed']['visual_tokens']:g} visual tokens")


def _draw(files: dict[str, Path], images: list[Image.Image], model: Any, inputs: Any, options: dict[str, Any]) -> Any:
    """Draw the pictures; yields the kind of each as soon as it is written. Several images stand side by side."""
    import vtc

    selection = vtc.select(model, inputs, **options)
    for kind, file in files.items():
        draw = vtc.overlay if kind == "overlay" else vtc.heatmap
        sheet = _side_by_side([draw(image, selection, index=i) for i, image in enumerate(images)])
        with replacing(file) as temporary:
            sheet.save(temporary)
        yield kind


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    from PIL import Image

    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet
