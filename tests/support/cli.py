"""What the tests of the `vtc` command share: how they call it, and sizes of their model."""

import subprocess
import sys

from typer.testing import CliRunner

from vtc.cli import __main__ as cli

LAYERS, WIDTH, BYTES = 4, 192, 4  # of the models below: language model layers, keys of all heads, float32
QUESTION = "what shape is the red object ?"


def call(*arguments, stdin=None):
    if arguments[:1] in (("run",), ("demo",)) and "--device" not in arguments:
        arguments += ("--device", "cpu")
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)


def succeed(*arguments, stdin=None):
    result = call(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("vtc: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
