"""What the command prints: tables, JSON and notes; and the names of the files that it writes.

stdout carries the result only: a table (aligned text when it is not a terminal) or, with `--json`, one JSON document.
Notes, warnings and errors go to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from vtc.eval import BUNDLED
from vtc.files import require_writable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def image_file(name: str, inputs: Iterable[str] = ()) -> Path:
    """The path of an image file that can be written; ValueError if it cannot be one, or is one of the inputs."""
    if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{name!r} is no image file name; end it in one of {', '.join(IMAGE_SUFFIXES)}")
    return require_writable(name, inputs)


def quieten(model: str) -> None:
    """Silence transformers' warnings and progress bars; but a model that may be downloaded shows its progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if model == BUNDLED or Path(model).is_dir() or not sys.stderr.isatty():
        logging.disable_progress_bar()


def note(text: str) -> None:
    """A line on stderr."""
    typer.echo(text, err=True)


def progress(text: str) -> None:
    """A line on stderr, if that is a terminal."""
    if sys.stderr.isatty():
        note(text)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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
