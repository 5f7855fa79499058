"""The distribution `vtc` of another project: beside ours it is warned of, and over ours the command says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vtc
from vtc import distribution

PACKAGE = Path(vtc.__file__).parent


@pytest.fixture
def site(tmp_path):
    """A folder like site-packages with this package and vtc-cls in it."""
    folder = tmp_path / "site"
    (folder / "vtc").mkdir(parents=True)
    for part in PACKAGE.iterdir():
        if part.is_dir():
            os.symlink(part, folder / "vtc" / part.name)
        else:
            shutil.copy(part, folder / "vtc")
    (folder / "vtc_cls-0.1.0.dist-info").mkdir()
    return folder


def run(site, code):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=site, check=False
    )


HELP = "import sys; from vtc.cli.__main__ import main; sys.argv[1:] = ['--help']; main()"


def test_the_other_distribution_in_the_same_folder_is_warned_of(site):
    assert run(site, "import vtc").stderr == ""
    (site / "vtc-0.1.0.dist-info").mkdir()
    done = run(site, "import vtc; print(vtc.__version__)")
    assert (done.returncode, done.stdout) == (0, f"{vtc.__version__}\n")
    assert done.stderr == (
        f"vtc-0.1.0, a distribution of another project, is installed into {site} beside vtc-cls; both have a package "
        "named vtc and overwrite each other's files: run `pip uninstall vtc vtc-cls`, then install vtc-cls again\n"
    )


def test_the_command_says_that_the_package_was_overwritten_or_removed(site):
    file = site / "vtc/__init__.py"
    done = run(site, HELP)
    assert (done.returncode, done.stderr) == (0, "")
    file.write_text("class Timecode: pass\n")  # as the installation of the other one does
    done = run(site, HELP)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"vtc: {file} is of another project, whose distribution is named vtc; this project's is named vtc-cls: run "
        "`pip uninstall vtc vtc-cls`, then install vtc-cls again\n"
    )
    file.unlink()  # as its removal does
    done = run(site, HELP)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vtc: vtc/__init__.py is missing; this project's is named vtc-cls: run `pip")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("vtc-0.1.0.dist-info", "vtc-0.1.0"),
        ("vtc-0.2-py3.11.egg-info", "vtc-0.2-py3.11"),
        ("vtc_cls-0.1.0.dist-info", None),
        ("vtc-cls.egg", None),
        ("vtcx-1.dist-info", None),
    ],
)
def test_metadata_is_told_by_its_name(tmp_path, name, found):
    (tmp_path / name).mkdir()
    assert distribution.other(str(tmp_path)) == found
    assert distribution.other(str(tmp_path / "archive.zip")) is None
