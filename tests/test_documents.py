"""Every snippet and command of the README runs, and its figures are those of the model card."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
import test_methods_model as through_the_model
import torch
from packaging.requirements import Requirement
from PIL import Image
from support import models
from support.golden import llava as golden
from support.golden import methods as golden_methods

import vtc
from bench import gpu
from vtc import config, methods, tiny
from vtc.tiny.scenes import Scene

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HUB_ID = '"llava-hf/llava-1.5-7b-hf"'


BENCH_README = (ROOT / "bench/README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    """Those of the text; the ones inside a list are the example of a new method."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def marked(name: str, page: str = README) -> str:
    """What stands between the page's lines <!-- name --> and <!-- /name -->."""
    (shown,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page, re.DOTALL)
    return shown


PYTHON = blocks("python")
COMMANDS = [line for page in (README, BENCH_README) for block in blocks("bash", page) for line in block.splitlines()]


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
    short = ["--questions", "5"] if "all" in words else []  # many settings
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vtc")), *words[1:], *short], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "--overlay" in words:
        assert (tmp_path / words[words.index("--overlay") + 1]).stat().st_size > 10_000


BENCH = list(dict.fromkeys(c for c in COMMANDS if c.startswith("python -m bench ")))
# Appended: the last of two equal options counts, and these make a run short.
QUICK = {"e2e": ["--rep-ms", "1", "--device", "cpu"], "gpu": []}
SMALL = ["--rep-ms", "1", "--model", "small", "--batch", "1", "--provider", "reference", "--device", "cpu"]


@pytest.mark.parametrize("command", BENCH)
def test_benchmark(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    name = words[3]
    if name == "gpu" and torch.cuda.is_available():
        pytest.skip("it would run this test again")
    if name == "compare" and not (ROOT / ".git").exists():
        pytest.skip("no .git here")
    if "--out" in words:
        words[words.index("--out") + 1] = str(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, *words[1:], *QUICK.get(name, SMALL)], cwd=ROOT, capture_output=True, text=True
    )
    if "--rehearse" in words:
        assert done.returncode == 0, done.stderr + done.stdout
        assert "PARTS\n  probe: " in (tmp_path / "out/summary.txt").read_text()
    elif name == "gpu":
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


def test_the_plan_of_bench_gpu_is_the_command_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", marked("parts", BENCH_README), re.MULTILINE)
    assert rows == [(name, str(part.seconds)) for name, part in gpu.PARTS.items()]
    for file in {part.file for part in gpu.PARTS.values()} | {"summary.txt", "log.txt"}:
        assert f"`{file}`" in BENCH_README


def test_the_wheels_fit_the_machine() -> None:
    """The list against the versions there, by what the wheel itself asks for, where it is the one that is installed."""
    machine = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "bench/machine.txt").read_text(), re.MULTILINE))
    wheels = dict(re.findall(r"`([\w]+)-([\d.]+)-py3-none-any\.whl`", marked("wheels", BENCH_README)))
    assert wheels == {"transformers": "5.23.0"}
    assert f"carried=transformers=={wheels['transformers']}" in (ROOT / "bench/rehearse.sh").read_text()
    if metadata.version("transformers") != wheels["transformers"]:
        pytest.skip("another transformers is installed")
    machine = {name.replace("_", "-"): version for name, version in machine.items()}
    asked = [Requirement(one) for one in metadata.requires("transformers") if "extra ==" not in one]
    checked = [one for one in asked if one.name in machine]
    assert {one.name for one in checked} >= {"huggingface-hub", "numpy", "safetensors", "tokenizers"}
    assert all(one.specifier.contains(machine[one.name]) for one in checked), checked


def test_installing_without_a_network(tmp_path: Path) -> None:
    """The line for a bare machine, in a copy of the files and an environment that has nothing of the project."""
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("without isolation, setuptools 77 or newer has to be there")
    (line,) = [
        line for line in BENCH_README.splitlines() if line.startswith("python3 -m pip install") and "-e ." in line
    ]
    source = tmp_path / "source"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "vtc"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    there = tmp_path / "site"  # what the machine has of its own
    there.mkdir()
    for pattern in ("setuptools*", "_distutils_hack"):
        for found in Path(sysconfig.get_path("purelib")).glob(pattern):
            (there / found.name).symlink_to(found)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python3"
    environment = {**os.environ, "PYTHONPATH": str(there)}
    subprocess.run([python, *shlex.split(line)[1:]], cwd=source, check=True, env=environment)
    code = "from importlib.util import find_spec as find\n"
    code += "print(find('vtc').origin, *find('vtc_kernels').submodule_search_locations)"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, check=True, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[:2] == [str(source / "vtc/__init__.py"), str(source / "kernels")]
    assert (tmp_path / "venv/bin/vtc").exists()


def test_methods_are_the_registry_s() -> None:
    rows = [("method", "what it scores", "needs [CLS]", "prunes", "paper"), ("---",) * 5]
    for name, *about, paper in methods.table():
        link = (
            f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv ')})" if paper.startswith("arXiv") else paper
        )
        rows.append((f"`{name}`", *about, link))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (shown,) = re.findall(r"<!-- methods -->\n(.*?)<!-- /methods -->", README, re.DOTALL)
    assert shown.strip() == table, f"put there:\n{table}"


def test_every_setting_is_in_the_table() -> None:
    (table,) = re.findall(r"^\| setting \|.*?\n\n", README, re.MULTILINE | re.DOTALL)
    for field in dataclasses.fields(config.VTCConfig):
        assert f"{field.name}=" in table, field.name


def test_adding_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The section's three snippets as they stand: the file, its transcription, and the test's line, through a model."""
    section = README[README.index("### Adding a method") : README.index("## With your own model")]
    assert re.findall(r"^(\d)\. ", section, re.MULTILINE) == list("123456")
    found = re.findall(r"^   ```python\n(.*?)^   ```", section, re.MULTILINE | re.DOTALL)
    file, transcription, line = ("\n".join(row[3:] for row in block.splitlines()) for block in found)
    namespace = {"__name__": "vtc.methods.longest"}
    exec(compile(file, "longest.py", "exec"), namespace)
    monkeypatch.setitem(methods.METHODS, "longest", namespace["Longest"])
    assert "`Longest.name: Longest`" in section
    monkeypatch.setattr(config, "METHODS", (*config.METHODS, "longest"))
    own = dict(vars(golden_methods))
    exec(transcription, own)
    monkeypatch.setattr(golden_methods, "longest", own["longest"], raising=False)
    monkeypatch.setattr(through_the_model, "CASES", dict(through_the_model.CASES))
    exec(line, vars(through_the_model))

    model = models.build()
    eager, pixels = golden.eager(model), models.images(4)
    seen = [through_the_model.Seen(eager, image) for image in pixels]
    rows = [models.ids(*row, seed=i) for i, row in enumerate(through_the_model.ROWS)]
    call = {**models.batch(rows), "pixel_values": pixels}
    through_the_model.test_generate(model, eager, call, seen, "longest")
    vtc.configure(model, method="longest")
    through_the_model.test_select(model, call, seen, "longest")


def test_table_is_the_cards() -> None:
    card = (tiny.CHECKPOINT / "README.md").read_text()
    (table,) = re.findall(r"^\| visual tokens .*?\n\n", card, re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(r"<!-- accuracy -->\n(.*?)<!-- /accuracy -->", README, re.DOTALL)
    assert shown.strip() == table.strip()
