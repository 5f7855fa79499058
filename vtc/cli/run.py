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
    drawings : dict
        Files to write, by "overlay" and "heatmap"; those that are None are not asked for.
    """

    images: Sequence[str]
    question: str
    options: dict[str, Any]
    drawings: dict[str, str | None]
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
    from vtc.eval import ask

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
        **compare(net, processor, inputs, request.options, request.max_new_tokens, request.compare, request.as_json),
        **dict.fromkeys(request.drawings),
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
    for kind, name in request.drawings.items():
        if name is not None:
            files[kind] = image_file(name, inputs)
    if len({os.path.realpath(file) for file in files.values()}) < len(files):
        raise ValueError(f"--overlay and --heatmap are the same file, {request.drawings['overlay']}; give two names")
    return files


def _load(names: Sequence[str]) -> list[Image.Image]:
    """The images; "-" is the one on standard input."""
    if names.count(STDIN) > 1:
        raise ValueError(f"{STDIN} is the image on standard input, got it {names.count(STDIN)} times; give it once")
    return [load_image(sys.stdin.buffer if name == STDIN else name) for name in names]


def compare(
    model: Any,
    processor: Any,
    inputs: Any,
    options: dict[str, Any],
    length: int,
    timed: bool = True,
    quiet: bool = True,
) -> dict[str, Any]:
    """The answer with compression and, if `timed`, the one without, with what both cost.

    Parameters
    ----------
    model, processor, inputs
        From `load` and `prepare` of `vtc.eval.ask`; the model is a stock one, before and afterwards.
    options : dict
        Fields of `VTCConfig`, and options of the method.
    length : int
        Longest answer in tokens.
    timed : bool
        Whether to measure, and to run the uncompressed model at all.
    quiet : bool
        Show no progress.

    Returns
    -------
    dict
        `method`; `prune_layer`; `compressed` and `uncompressed` (None if not `timed`), each with `visual_tokens` per
        image, `token_layers`, their mean over the layers of the language model, `answer` and, if `timed`,
        `time_to_first_token_ms` (median, min, max) and `kv_cache_bytes`; `backend`, by operation; `noisy`, a warning
        about the times or None.
    """
    import vtc
    from vtc.eval.answerer import Answerer
    from vtc.eval.measure import RUNS, first_tokens, noise
    from vtc.eval.progress import Progress
    from vtc.eval.setting import Setting

    answerer = Answerer(model, processor)
    config = vtc.VTCConfig.of(**options)
    own = {name: value for name, value in options.items() if name != "method"}
    settings = [Setting(config.method, own), Setting()]

    def answered(setting: Setting) -> dict[str, Any]:
        texts, _, budget = answerer.generate(inputs, setting, max_new_tokens=length)
        tokens, over_layers = budget or (0, 0)
        if not setting.compresses:  # then they are those of the prompt
            tokens = over_layers = int(tokens) // len(inputs["pixel_values"])
        return {"visual_tokens": tokens, "token_layers": round(over_layers, 2), "answer": texts[0]}

    short, full, warning = answered(settings[0]), None, None
    with vtc.compress(model, **options):
        backends = vtc.status(model).backends
    if timed:
        full = answered(settings[1])
        with Progress("timing", (RUNS + 1) * len(settings), quiet=quiet, unit="runs") as progress:
            found = first_tokens(answerer, inputs, settings, advance=progress.advance)
        for side, cost in zip((short, full), found, strict=True):
            side |= {"time_to_first_token_ms": cost.record(), "kv_cache_bytes": cost.kv_bytes}
        warning = noise({config.name: found[0], "all tokens": found[1]})
    return {
        "method": config.name,
        "prune_layer": config.prune_after,
        "compressed": short,
        "uncompressed": full,
        "backend": {operation: backend for operation, (backend, _) in backends.items()},
        "noisy": warning,
    }


def table_of(result: dict[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, columns and rows of the table of `vtc run --compare`, of its JSON document."""
    from vtc.eval.measure import cell

    columns = ("", "visual tokens", "time to first token", "KV cache", "answer")
    rows: list[tuple[str, ...]] = [
        (
            name,
            _tokens(side),
            cell(side["time_to_first_token_ms"]),
            f"{side['kv_cache_bytes'] / 2**20:.2f} MiB",
            " ".join(side["answer"].split()),
        )
        for name, side in (("all tokens", result["uncompressed"]), (result["method"], result["compressed"]))
    ]
    return result["question"], columns, rows


def _is_even(side: dict[str, Any]) -> bool:
    """Whether all layers of the language model have the same number of visual tokens."""
    return bool(side["token_layers"] == side["visual_tokens"])


def _tokens(side: dict[str, Any]) -> str:
    return f"{side['visual_tokens']:g}" + ("" if _is_even(side) else f"; {side['token_layers']:g} a layer")


def footnotes(result: dict[str, Any]) -> list[str]:
    """How the figures of the table were measured, and whether the times are noisy."""
    from vtc.eval.ask import counted
    from vtc.eval.measure import RUNS

    where = f"{result['device']}, {result['dtype']}"
    if result["device"] == "cpu":
        where += f", {counted(result['cpu_threads'], 'thread')}"
    tokens = "Visual tokens: of each image. " if len(result["images"]) > 1 else ""
    layers = "" if _is_even(result["compressed"]) else "A layer: on average over the layers of the language model. "
    return [
        f"{tokens}{layers}Time to first token: median (fastest-slowest) of {RUNS} warm runs, in turns, on {where}, "
        "from pixels to token. KV cache: after the prompt.",
        *([result["noisy"]] if result["noisy"] else []),
    ]


def _print(request: Request, result: dict[str, Any]) -> None:
    from vtc.eval.ask import counted

    if request.compare:
        title, columns, rows = table_of(result)
        print_table(title, columns, rows)
        for line in footnotes(result):
            typer.echo(line)
    else:
        typer.echo(result["compressed"]["answer"])
        side = result["compressed"]
        more = "" if _is_even(side) else f"; {side['token_layers']:g} on average over the layers of the language model"
        note(counted(side["visual_tokens"], "visual token") + more)


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
