"""Run `bench` or the tests on the packages of any checkout, installed or not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def revision(name: str) -> Iterator[Path]:
    """The files of a git revision, in a folder of their own.

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


def run(arguments: list[str], root: Path = ROOT, timeout: float | None = None) -> tuple[int, str]:
    """Exit status and output of `python ARGUMENTS`; 124 if it took more than `timeout` seconds.

    `vtc` and `vtc_kernels` are those of the checkout `root`, `bench` always this one. The working directory holds links
    to the three and nothing else: it comes first on Python's path.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as file:
        for name, target in {"bench": ROOT / "bench", "vtc": root / "vtc", "vtc_kernels": root / "kernels"}.items():
            (Path(folder) / name).symlink_to(target.resolve(), target_is_directory=True)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        try:
            status = subprocess.run(
                [sys.executable, *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        file.seek(0)
        return status, file.read()
