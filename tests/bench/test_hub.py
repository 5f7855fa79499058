"""`bench hub`: the tree of a package that runs without VTC, whatever the loader calls it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from bench import __main__ as command
from bench import hub, readme
from vtc import ops

# Isolated: no PYTHONPATH and no working directory. What VTC and the tree must not share cannot be imported.
ALONE = """
import sys
sys.modules.update(dict.fromkeys(("bench", "support", "transformers", "vtc", "vtc_kernels")))
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", sys.argv[1], sys.argv[1] + "/tests"]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "tree"
    assert command.main(["hub", "--owner", "someone", "--out", str(out)]) == 0
    return out


def test_its_own_tests_pass_where_there_is_no_vtc(tree: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "VTC_"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(tree)], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{3 * len(ops.OPS) + 7} passed" in done.stdout, "a test was left out"


def test_the_configuration_is_that_of_a_package_without_compiled_code(tree: Path) -> None:
    build = tomllib.loads((tree / "build.toml").read_text())
    assert set(build) == {"general", "torch-noarch"}
    general = build["general"]
    assert general["hub"]["repo-id"] == f"someone/{general['name']}"
    assert (tree / "torch-ext" / general["name"].replace("-", "_") / "__init__.py").exists()
    assert (tree / "LICENSE").read_text() == (hub.ROOT / "LICENSE").read_text()
    _, front, text = (tree / "CARD.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == general["license"].lower()
    assert all(f"| `{op}` |" in text for op in ops.OPS)
    assert f'get_kernel("someone/{general["name"]}"' in text
    assert "{" not in (tree / "CARD.md").read_text() + (tree / "build.toml").read_text()


def test_the_kernels_are_those_of_vtc_to_the_byte(tree: Path) -> None:
    (package,) = (tree / "torch-ext").iterdir()
    for path in (hub.ROOT / "kernels").glob("*.py"):
        assert (package / "kernels" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("owner", "there", "says"),
    [
        ("me/vtc", False, "--owner must be the name of a user or an organisation of the Hub, got 'me/vtc'"),
        ("", False, "got ''"),
        ("me", True, "is there already; give --out a new folder"),
    ],
)
def test_what_cannot_be_written_is_explained(
    owner: str, there: bool, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if there:
        (tmp_path / "old.py").touch()
    assert command.main(["hub", "--owner", owner, "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old.py"] * there


@pytest.mark.parametrize("line", ["import numpy", "from vtc import plan", "from torchvision.ops import nms"])
def test_a_file_that_needs_more_is_refused(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "package", lambda: {"topk.py": f"import torch\nfrom .kernels import tuning\n{line}\n"})
    with pytest.raises(ValueError, match=r"topk\.py imports (numpy|vtc|torchvision\.ops); on the Hub there are torch"):
        hub.write("me", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_the_readme_names_the_package() -> None:
    assert f"`{hub.NAME}`" in (hub.ROOT / "bench/README.md").read_text(encoding="utf-8")
    assert readme.ROOT == hub.ROOT
