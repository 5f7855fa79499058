"""How the command ends: one line for an error, and its exit code.

0: done. 2: bad input, which other arguments put right. 1: anything else, such as a full disk. 130: interrupted. With
`--debug` a traceback comes before the line.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from vtc.cli.options import in_words_of_the_command

UsageError: Any = typer.BadParameter.__base__  # typer has no public name for it
INPUT_ERRORS = {  # of the system: a path that is no good
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENODEV),
}


class Command(TyperGroup):
    """The `vtc` command."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Run a command, and exit with its code. `--debug` may stand anywhere."""
        arguments = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in arguments or os.environ.get("VTC_DEBUG", "0") not in ("", "0")
        arguments = [each for each in arguments if each != "--debug"]
        if not extra.pop("standalone_mode", True):
            return super().main(arguments, "vtc", standalone_mode=False, **extra)
        _open_streams()
        log = logging.getLogger("vtc")
        handler = _Warnings(logging.WARNING)
        log.addHandler(handler)
        try:
            sys.exit(self._status(arguments, debug, extra))
        finally:
            log.removeHandler(handler)

    def _status(self, arguments: list[str], debug: bool, extra: dict[str, Any]) -> int:
        try:
            status = super().main(arguments, "vtc", standalone_mode=False, **extra)
            return status if isinstance(status, int) else 0
        except Exception as error:
            line, code = explain(error)
            if debug:
                traceback.print_exc()
            typer.echo(f"vtc: {line}", err=True)
            return code


def explain(error: Exception) -> tuple[str, int]:
    """The line and the exit code of an error."""
    if isinstance(error, UsageError):
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "vtc"
        return f"{_line(error.format_message()).rstrip('.')}; see {where} --help", 2
    if isinstance(error, ValueError):
        return in_words_of_the_command(_line(error)), 2
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return where + (error.strerror or _line(error)), 2 if error.errno in INPUT_ERRORS else 1
    if _is_out_of_memory(error):
        return f"out of memory; try --dtype float16, a smaller --keep or --device cpu ({_line(error)})", 1
    if isinstance(error, typer.Abort):
        return "stopped, for the standard input has ended", 1
    what = _named(error)
    if isinstance(error, ImportError):
        why = _first_of(error)
        because = "" if why is error else f", because of {_named(why)}"
        return f"{what}{because}; a package is missing or broken in this environment of Python", 1
    return f"internal error: {what}; run it again with --debug and report what it prints", 1


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        from vtc.eval.memory import is_out_of_memory

        return is_out_of_memory(error)
    return isinstance(error, MemoryError)


def _first_of(error: BaseException) -> BaseException:
    """The error that an error comes from: transformers' own of an import does not name it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {_line(error)}".rstrip(": ")


def _line(message: object) -> str:
    return " ".join(str(message).split())


class _Warnings(logging.Handler):
    """The warnings of VTC, a line each, in the words of the command line; of a logged exception, the traceback, too."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"vtc: {in_words_of_the_command(_line(record.getMessage()))}", err=True)
        if record.exc_info:
            typer.echo(logging.Formatter().formatException(record.exc_info), err=True)


def _open_streams() -> None:
    """Make sure that printing cannot fail for a character, or because a stream was closed before the start."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
