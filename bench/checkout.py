"""Run `bench` or the tests on the packages of any checkout, installed or not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def revision(name: str) -> Iterator[Path]:
    """The files of a git revision, in a temporary folder.

    Raises
    ------
    ValueError
        If there is no such revision.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        command = ["git", "-C", str(ROOT), "worktree"]
        made = subprocess.run([*command, "add", "--detach", "--quiet", str(root), name], capture_output=True, text=True)
        if made.returncode:
            raise ValueError(f"cannot check out {name!r}: {made.stderr.strip()}")
        try:
            yield root
        finally:
            subprocess.run([*command, "remove", "--force", str(root)], check=True)


@contextlib.contextmanager
def packages(root: Path = ROOT, environment: Mapping[str, str | None] | None = None) -> Iterator[dict[str, Any]]:
    """Options for `subprocess` with which Python imports `vtc` and `vtc_kernels` from the checkout `root`.

    `bench` is always that of this checkout. The working directory has links to the three packages and nothing else, and
    comes first on Python's path. `environment` has further variables; None unsets one.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, target in {"bench": ROOT / "bench", "vtc": root / "vtc", "vtc_kernels": root / "kernels"}.items():
            (Path(folder) / name).symlink_to(target.resolve(), target_is_directory=True)
        # Absolute, because the working directory changes.
        given = [os.path.abspath(one) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
        path = os.pathsep.join([folder, *given])
        variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(environment or {})}
        yield {"cwd": folder, "env": {name: value for name, value in variables.items() if value is not None}}


def run(arguments: list[str], root: Path = ROOT) -> tuple[int, str]:
    """Exit status and output of `python ARGUMENTS` on the packages of a checkout."""
    with packages(root) as options:
        done = subprocess.run(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )
    return done.returncode, done.stdout
