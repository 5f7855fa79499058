"""`vtc`, `vtc methods` and `vtc env` as a user meets them: stdout, stderr, and the exit code."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from support.cli import call, python, refused, succeed

import vtc
from vtc.cli import output
from vtc.methods import METHODS


def test_help_imports_nothing_heavy():
    code = """
import sys
from vtc.cli.__main__ import app
app(["--help"], standalone_mode=False)
app(["run", "--help"], standalone_mode=False)
app(["methods", "--help"], standalone_mode=False)
app(["demo", "--help"], standalone_mode=False)
heavy = {"torch", "transformers", "triton", "numpy", "PIL", "rich"} & set(sys.modules)
print(sorted(heavy), file=sys.stderr)
"""
    done = python(code)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    for word in (
        "run",
        "demo",
        "methods",
        "env",
        "--method",
        "--version",
        "--overlay",
        "--compare",
        "--max-new-tokens",
        "--ratio",
        "--prune-layer",
        "--kv",
    ):
        assert word in done.stdout


def test_eval_keeps_128_tokens_of_any_model():
    run, evaluate = (" ".join(succeed(command, "--help").stdout.split()) for command in ("run", "eval"))
    begin = "--keep <int> Visual tokens to keep of an image. [default: (128"
    assert f"{begin}, or a quarter of at most 128)]" in run
    assert f"{begin})]" in evaluate


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag):
    assert succeed(flag).stdout == f"vtc {vtc.__version__}\n"


@pytest.mark.parametrize("command", [(), ("run",), ("demo",), ("eval",), ("methods",), ("env",)])
def test_h_is_help(command):
    shown = succeed(*command, "-h").stdout
    assert shown.startswith(" ".join(("Usage: vtc", *command)))
    assert shown == succeed(*command, "--help").stdout


def test_no_command_is_help():
    assert call().stdout == succeed("--help").stdout


def test_a_pipe_that_is_closed_early_is_quiet():
    code = "from vtc.cli.__main__ import main; import sys; sys.argv[1:] = ['methods']; main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_shell_completes_commands():
    words = {"_VTC_COMPLETE": "complete_bash", "COMP_WORDS": "vtc me", "COMP_CWORD": "1"}
    code = "from vtc.cli.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | words, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["methods"]


def test_methods_is_the_registry():
    found = json.loads(succeed("methods", "--json").stdout)["methods"]
    assert [row["name"] for row in found] == list(METHODS)
    for row in found:
        about = METHODS[row["name"]]
        assert row == {
            "name": about.name,
            "scores": about.scores,
            "needs_cls": about.needs_cls(),
            "prunes": list(about.prunes),
            "adaptive": about.adaptive,
            "paper": about.paper or None,
        }
    table = succeed("methods").stdout
    assert "\x1b" not in table
    assert re.search(r"^name +scores +needs \[CLS\] +prunes +paper$", table, re.MULTILINE)
    assert re.search(r"^prumerge +.* yes +before the projector +arXiv 2403.15388$", table, re.MULTILINE)
    assert re.search(r"^none +nothing: all stay +no +nowhere +-$", table, re.MULTILINE)


@pytest.mark.parametrize("name", METHODS)
def test_one_method_is_its_docstring_and_its_options(name):
    method = METHODS[name]
    options = {field.name: field.default for field in dataclasses.fields(method) if field.name != "backend"}
    found = json.loads(succeed("methods", name, "--json").stdout)
    assert found["name"] == name
    assert found["description"] == inspect.getdoc(method)
    assert {option["name"]: option["default"] for option in found["options"]} == json.loads(json.dumps(options))
    text = succeed("methods", name).stdout
    assert inspect.getdoc(method) in text
    for option, default in options.items():
        assert re.search(rf"^{option} +.* {re.escape(repr(default))}$", text, re.MULTILINE)


@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=("text", "JSON"))
def test_an_unknown_method_is_one_line_with_the_names(as_json):
    message = refused("methods", "tome", *as_json)
    assert "unknown method 'tome'" in message
    for name in METHODS:
        assert name in message


def test_the_command_is_a_module():
    for module in ("vtc", "vtc.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"vtc {vtc.__version__}\n"


def test_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.print_table("title", ("name", "answer"), [("a", "[red]not markup[/red]")])
    printed = capsys.readouterr().out
    assert "[red]not markup[/red]" in printed
    assert "━" in printed


def test_env(monkeypatch):
    found = json.loads(succeed("env", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["vtc"] == vtc.__version__
    assert set(found["backends"]["cpu"]) == set(vtc.ops.OPS)
    assert found["backends"]["cpu"]["topk"]["backend"] == "torch"
    assert "flash_attn" in found
    assert found["graphs"]["cpu"]["available"] is False
    assert "where graphs gain nothing" in found["graphs"]["cpu"]["why"]
    plain = succeed("env").stdout
    assert "\x1b" not in plain
    assert torch.__version__ in plain
    assert re.search(r"^cpu +row_scores +torch +", plain, re.MULTILINE)
    assert "flash-attn: " in plain
    assert re.search(r"^cpu +no +the model is on a CPU, where graphs", plain, re.MULTILINE)


def test_env_shows_what_a_model_does(model_dir):
    arguments = ("--model", model_dir, "--device", "cpu")
    found = json.loads(succeed("env", *arguments, "--json").stdout)["model"]
    assert (found["type"], found["compresses"], found["tokens"], found["kept"]) == ("llava", True, 576, 128)
    assert found["backends"]["select"] == json.loads(succeed("env", "--json").stdout)["backends"]["cpu"]["select"]
    assert found["way"] == 'attn_implementation="vtc"'
    assert found["text"] in succeed("env", *arguments).stdout


def test_env_shows_an_override_that_cannot_work(monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "cuda")
    found = json.loads(succeed("env", "--json").stdout)
    assert found["backends"]["cpu"]["topk"]["backend"] == "none"
    assert "VTC_BACKEND" in found["backends"]["cpu"]["topk"]["why"]
