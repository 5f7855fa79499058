"""Every snippet and command of the README runs, and its figures are those of the model card."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vtc import tiny
from vtc.tiny.scenes import Scene

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HUB_ID = '"llava-hf/llava-1.5-7b-hf"'


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


PYTHON = blocks("python")
COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_snippet(code: str, tmp_path: Path) -> None:
    """With the bundled model where the snippet names one on a hub."""
    code = code.replace(HUB_ID, repr(str(tiny.CHECKPOINT)))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if "print" in code:
        assert done.stdout.splitlines()[0].strip()
        assert "576 -> 64" in done.stdout
        assert "torch.Size([1, 64]) torch.Size([1, 576]) (24, 24)" in done.stdout
        assert Image.open(tmp_path / "kept.png").size[0] >= 336


def test_first_snippet_comes_early() -> None:
    assert README.splitlines().index("```python") < 20


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("vtc ")])
def test_command(command: str, tmp_path: Path) -> None:
    Scene("test", 0).image.save(tmp_path / "photo.jpg")
    words = shlex.split(command)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vtc")), *words[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "--overlay" in words:
        assert (tmp_path / words[words.index("--overlay") + 1]).stat().st_size > 10_000


BENCH = [c for c in COMMANDS if c.startswith("python -m bench ")]
# Appended: the last of two equal options counts, and these make a run short.
QUICK = {"e2e": ["--rep-ms", "1"], "gpu": []}
SMALL = ["--rep-ms", "1", "--model", "small", "--batch", "1", "--keep", "8", "--provider", "reference"]


@pytest.mark.parametrize("command", BENCH)
def test_benchmark(command: str) -> None:
    words = shlex.split(command)
    name = words[3]
    if name == "gpu" and torch.cuda.is_available():
        pytest.skip("it would run this test again")
    done = subprocess.run(
        [sys.executable, *words[1:], *QUICK.get(name, SMALL)], cwd=ROOT, capture_output=True, text=True
    )
    if name == "gpu":
        assert (done.returncode, done.stderr.split(";")[0]) == (2, "bench gpu needs a GPU")
    else:
        assert done.returncode == 0, done.stderr
        assert re.search(r"^\| .* \| (reference|sdpa) +\| [\d.]+ ", done.stdout, re.MULTILINE)
        assert (name == "compare") == ("old / new" in done.stdout)


def test_every_command_is_run_somewhere() -> None:
    """`vtc …` and `python -m bench …` above; the two that install, word for word, by `.ci/run`."""
    install = [command for command in COMMANDS if not command.startswith("vtc ") and command not in BENCH]
    assert len(install) == 2
    script = (ROOT / ".ci/run").read_text()
    patterns = re.findall(r"grep -m1 '(.*)' README\.md", script)
    assert [re.match(pattern, command) is not None for pattern, command in zip(patterns, install, strict=True)] == [
        True,
        True,
    ]


def test_table_is_the_cards() -> None:
    card = (tiny.CHECKPOINT / "README.md").read_text()
    (table,) = re.findall(r"^\| visual tokens .*?\n\n", card, re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(r"<!-- accuracy -->\n(.*?)<!-- /accuracy -->", README, re.DOTALL)
    assert shown.strip() == table.strip()
