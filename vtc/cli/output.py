"""What the command prints: tables, JSON, notes, and errors with their exit codes.

stdout carries the result only: a table (aligned text when it is not a terminal) or, with `--json`, one JSON document.
Notes and errors go to stderr. Exit codes: 0 done, 2 bad input (one line on stderr), 1 anything else.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """A ValueError is bad input: exit 2. A full disk or GPU is not: exit 1. Both are reported in one line."""
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


def writable(name: str) -> Path:
    """The path of an image file to be written; ValueError if it cannot be one."""
    file = Path(name)
    if file.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{name} is no image file name; end it in one of {', '.join(IMAGE_SUFFIXES)}")
    if not file.parent.is_dir():
        raise ValueError(f"the directory {file.parent} of {name} does not exist; create it first")
    if file.is_dir():
        raise ValueError(f"{name} is a directory; give the name of a file")
    return file


def quieten(model: str | None) -> None:
    """Silence transformers' warnings and progress bars; but a model that may be downloaded shows its progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if model is None or Path(model).is_dir() or not sys.stderr.isatty():
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
