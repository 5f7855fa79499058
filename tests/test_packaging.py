"""What is shipped: the wheel holds `vtc` with its checkpoint and `vtc_kernels`, and no top-level `kernels`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is shipped is what git knows: no .git here")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from the files git knows, so that nothing left lying about helps."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = out.glob("vtc_cls-*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def wheel_names(wheel: zipfile.ZipFile) -> set[str]:
    return set(wheel.namelist())


@needs_git
def test_wheel_holds_everything(wheel_names: set[str]) -> None:
    modules = {f"vtc/{path.relative_to(ROOT / 'vtc')}" for path in (ROOT / "vtc").rglob("*.py")}
    modules |= {f"vtc_kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    checkpoint = {f"vtc/tiny/checkpoint/{path.name}" for path in (ROOT / "vtc/tiny/checkpoint").iterdir()}
    assert "vtc/tiny/checkpoint/model.safetensors" in checkpoint
    assert modules | checkpoint | {"vtc/py.typed"} <= wheel_names


@needs_git
def test_wheel_asks_for_transformers_old_and_new(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    asked = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    (transformers,) = (r for r in map(Requirement, asked) if r.name == "transformers")
    minors = [minor for minor in range(15, 30) if transformers.specifier.contains(f"5.{minor}.1")]
    assert minors == list(range(16, 30))


@needs_git
def test_the_promised_pythons_are_those_that_ci_resolves(wheel: zipfile.ZipFile) -> None:
    """In the wheel, in README, and in .ci/run."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(name).decode()
    promised = re.findall(r"^Classifier: Programming Language :: Python :: (.*)$", text, re.MULTILINE)
    assert f"\nRequires-Python: >={promised[0]}\n" in text
    assert f"Python {promised[0]} to {promised[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"for python in {' '.join(promised)}; do" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    major, minor = promised[0].split(".")
    assert f"resolve {major}.{int(minor) - 1} > " in (ROOT / ".ci/run").read_text(encoding="utf-8")


@needs_git
def test_wheel_has_no_other_top_level_package(wheel_names: set[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vtc", "vtc_kernels"}


@needs_git
def test_top_level_entries_of_the_repository() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\n")
    top = {name.split("/")[0] for name in names if name}
    allowed = {"kernels", "vtc", "bench", "tests", "setup.py", "README.md", "LICENSE", "pyproject.toml"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_checkpoint_is_small() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "vtc/tiny/checkpoint").iterdir())
    assert size <= 16 * 2**20


def test_every_folder_with_code_is_a_package_that_is_installed() -> None:
    (listed,) = re.findall(r"^PACKAGES = (\(.*\))$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    folders = {path.parent.relative_to(ROOT / "vtc") for path in (ROOT / "vtc").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} - {""} == set(ast.literal_eval(listed))
