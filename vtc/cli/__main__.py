"""The `vtc` command. Everything heavy is imported inside the commands, so that `vtc --help` answers at once.

stdout carries the result alone: a table (aligned text when it is not a terminal) or, with `--json`, one JSON document.
Notes and errors go to stderr. Exit codes: 0 done, 2 bad input (one line on stderr), 1 anything else.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import vtc

DEFAULT_KEEP = 64
PICTURES = (".png", ".jpg", ".jpeg", ".webp")

app = typer.Typer(
    help="Ask LLaVA models about pictures with fewer visual tokens.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="the first GPU, else cpu")]


def main() -> None:
    """Entry point of the `vtc` command."""
    app()


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"vtc {vtc.__version__}")
        raise typer.Exit


@app.command()
def run(
    image: Annotated[str, typer.Argument(help="Image file: JPEG, PNG, GIF, TIFF, WebP and what else Pillow reads.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a LLaVA model.", show_default="the bundled one")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Visual tokens to keep.", show_default=f"{DEFAULT_KEEP}")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep, instead of --keep.")] = None,
    method: Annotated[str, typer.Option(help="What chooses them; `vtc methods` lists the names.")] = "vtc-cls",
    prune_layer: Annotated[
        int | None,
        typer.Option(help="Drop them after this layer of the language model.", show_default="0: before; fastv: 2"),
    ] = None,
    kv: Annotated[
        str, typer.Option(help="With --prune-layer, the cache of the layers before: compact, or full as in FastV.")
    ] = "compact",
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    overlay: Annotated[str | None, typer.Option(help="Write the picture with its kept patches to this file.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer without compression, and measure.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a question about an image.

    Prints the answer. With --compare it prints a table that sets it beside the answer of the uncompressed model.
    """
    with _errors():
        from vtc.config import VTCConfig
        from vtc.images import load_image

        # Everything that can be wrong with the input is looked at before the slow part.
        picture = load_image(image)
        setting: dict[str, Any] = {"method": method, "ratio": ratio, "prune_layer": prune_layer, "kv": kv}
        setting["keep"] = DEFAULT_KEEP if keep is None and ratio is None else keep
        config = VTCConfig(**setting)
        out = _writable(overlay) if overlay else None
        _progress("loading …")
        _quieten(model)

        from vtc.api import must_choose
        from vtc.cli import ask

        if out:
            must_choose(method)
        where = ask.pick_device(device)
        net, processor = ask.load(model, where, ask.pick_dtype(dtype, where))
        inputs = ask.prepare(net, processor, picture, question)
        result = {
            "image": image,
            "question": question,
            "model": model or "bundled",
            "device": str(where),
            "dtype": str(net.dtype).removeprefix("torch."),
            "method": config.method,
            "prune_layer": config.prune_after,
            **ask.compare(net, processor, inputs, max_new_tokens, timed=compare, **setting),
            "overlay": str(out) if out else None,
        }
        if out:
            selection = vtc.select(net, inputs["pixel_values"], **setting)
            vtc.overlay(ask.as_seen(picture, processor, inputs["pixel_values"]), selection).save(out)
            _note(f"kept patches drawn in {out}")
        if words := ask.unknown_words(processor, question):
            _note(f"the model does not know: {' '.join(words)}")
        if model is None:
            _note("the bundled model knows the pictures of `vtc demo` only; for photographs give --model")
        if as_json:
            _print_json(result)
        elif compare:
            _print_comparison(result, ask.WARM_RUNS)
        else:
            typer.echo(result["compressed"]["answer"])
            _note(f"{result['compressed']['visual_tokens']} visual tokens")


def _print_comparison(result: dict[str, Any], runs: int) -> None:
    rows = [
        (
            name,
            str(side["visual_tokens"]),
            f"{side['time_to_first_token_ms']:.1f} ms",
            f"{side['kv_cache_bytes'] / 2**20:.2f} MiB",
            " ".join(side["answer"].split()),
        )
        for name, side in (("all tokens", result["uncompressed"]), (result["method"], result["compressed"]))
    ]
    _print_table(result["question"], ("", "visual tokens", "time to first token", "KV cache", "answer"), rows)
    typer.echo(
        f"Time to first token: median of {runs} warm runs on {result['device']}, {result['dtype']}, "
        "from pixels to token. KV cache: after the prompt."
    )


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=5, max=5000, help="How many held-out questions to ask.")] = 80,
    out: Annotated[str, typer.Option(help="Where the picture goes.")] = "demo.png",
    method: Annotated[
        str, typer.Option(help="With fewer and fewer tokens of this method; all: every method at 64 tokens.")
    ] = "vtc-cls",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the bundled model with fewer and fewer visual tokens, and draw what it kept."""
    start = time.perf_counter()
    with _errors():
        from vtc.config import VTCConfig

        if method != "all":
            VTCConfig(method=method)
        file = _writable(out)
        _progress("loading …")
        _quieten(None)

        from vtc.cli.demo import COLUMNS, draw, measure

        found = measure(questions, device, _progress, method)
        draw(found).save(file)
        seconds = time.perf_counter() - start
        if as_json:
            _print_json({**found.record(), "picture": str(file), "seconds": round(seconds, 1)})
            return
        title = f"{questions} held-out questions to the bundled model on {found.device}"
        _print_table(title, COLUMNS, [row.cells() for row in found.rows])
        typer.echo(found.footnote())
        typer.echo(f"Picture: {file} ({seconds:.0f} s in all)")


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods of compression: what each scores and needs, where it drops tokens, its paper."""
    with _errors():
        from vtc.methods import METHODS, table

        if as_json:
            _print_json(
                {
                    "methods": [
                        {
                            "name": method.name,
                            "scores": method.scores,
                            "needs_cls": method.needs_cls(),
                            "prunes": list(method.prunes),
                            "adaptive": method.adaptive,
                            "paper": method.paper or None,
                        }
                        for method in METHODS.values()
                    ]
                }
            )
            return
        _print_table("methods", ("name", "scores", "needs [CLS]", "prunes", "paper"), table())


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show versions, devices, and which backend each operation would use."""
    with _errors():
        _quieten(None)
        import importlib.util
        import platform

        import torch

        from vtc import ops
        from vtc.hf import attention

        versions: dict[str, str | None] = {"vtc": vtc.__version__, "python": platform.python_version()}
        versions["torch"] = str(torch.__version__)  # with the CUDA it was built for
        versions |= {name: _version(name) for name in ("triton", "transformers", "pillow")}
        devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            devices[f"cuda:{number}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
        backends = {device: {op: _backend(ops, op, torch.device(device)) for op in ops.OPS} for device in devices}
        plain = {device: _plain_attention(attention.plain_attention, torch.device(device)) for device in devices}
        flash = _version("flash-attn") if importlib.util.find_spec("flash_attn") else None
        if as_json:
            found = {"versions": versions, "devices": devices, "backends": backends}
            _print_json({**found, "attention": plain, "flash_attn": flash})
            return
        _print_table("versions", ("package", "version"), [(k, v or "not installed") for k, v in versions.items()])
        _print_table("devices", ("device", "what"), list(devices.items()))
        rows = [(device, op, b["backend"], b["why"]) for device, ops_ in backends.items() for op, b in ops_.items()]
        _print_table("backends", ("device", "operation", "backend", "why"), rows)
        rows = [(device, dtype, a["choice"], a["why"]) for device, of in plain.items() for dtype, a in of.items()]
        _print_table("attention of layers without scores", ("device", "dtype", "choice", "why"), rows)
        typer.echo(f"flash-attn: {flash or 'not installed'}")


def _backend(ops: Any, op: str, device: Any) -> dict[str, str]:
    try:
        choice, why = ops.backend_for(op, device)
    except ValueError as error:  # VTC_BACKEND asks for what this device cannot do: that is what env is there to show
        choice, why = "none", str(error)
    return {"backend": choice, "why": why}


def _plain_attention(choose: Any, device: Any) -> dict[str, dict[str, str]]:
    import torch

    choices = {str(dtype).removeprefix("torch."): choose(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {dtype: {"choice": choice, "why": why} for dtype, (choice, why) in choices.items()}


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# ---- input and output


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """A ValueError is bad input: exit 2. A full disk or GPU is not: exit 1. Both say so in one line."""
    try:
        yield
    except ValueError as error:
        _fail(error, 2)
    except OSError as error:
        _fail(error, 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(f"out of memory; try --dtype float16, a smaller --keep or --device cpu ({error})", 1)


def _fail(message: object, code: int) -> None:
    typer.echo("vtc: " + " ".join(str(message).split()), err=True)
    raise typer.Exit(code)


def _writable(name: str) -> Path:
    file = Path(name)
    if file.suffix.lower() not in PICTURES:
        raise ValueError(f"{name} is no picture file name; end it in one of {', '.join(PICTURES)}")
    if not file.parent.is_dir():
        raise ValueError(f"the directory {file.parent} of {name} does not exist; create it first")
    if file.is_dir():
        raise ValueError(f"{name} is a directory; give the name of a file")
    return file


def _quieten(model: str | None) -> None:
    """No progress bars and warnings of transformers; but a model that may have to be downloaded shows its progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if model is None or Path(model).is_dir() or not sys.stderr.isatty():
        logging.disable_progress_bar()


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _progress(text: str) -> None:
    """What is going on now, for someone who watches."""
    if sys.stderr.isatty():
        _note(text)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal; otherwise columns separated by at least two spaces, easy to cut and to read."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*map(Text, row))  # Text: an answer may contain what rich takes for markup
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    typer.echo(title)
    for row in (columns, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    typer.echo("")
