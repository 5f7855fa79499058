"""Processes that can be ended together with their children, and waiting for an idle GPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

GRACE = 5.0  # seconds to write results after an interrupt, before the kill


class Group:
    """A command in a process group of its own. Its output and that of its children go to `log`."""

    def __init__(self, command: list[str], log: IO[str], **options: Any) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_listen,
            **options,
        )

    def status(self) -> int | None:
        """The command's exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if the command still runs after `seconds`."""
        try:
            return self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None

    def end(self, grace: float = GRACE) -> None:
        """Interrupt the group (Ctrl-C), and kill the processes that are left after `grace` seconds.

        A command that has ended by itself may have left children behind: these are ended, too.
        """
        for sent, patience in ((signal.SIGINT, grace), (signal.SIGKILL, GRACE)):
            end = time.monotonic() + patience
            while self._alive():
                if sent:
                    os.killpg(self._process.pid, sent)
                    sent = 0  # once: a second Ctrl-C would interrupt the writing
                if time.monotonic() > end:
                    break
                time.sleep(0.05)

    def _alive(self) -> bool:
        self._process.poll()  # collects the command itself
        return any(group == self._process.pid for group in _running_groups())


def _listen() -> None:
    """Let a command hear Ctrl-C. What a script starts with `&` ignores it, and so would the processes it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _running_groups() -> set[int]:
    """The process groups that have a process other than a zombie."""
    groups = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # it has ended since
            continue
        if state != "Z":
            groups.add(int(group))
    return groups


def wait_until_idle(seconds: float, running: Callable[[], list[str] | None] | None = None, pause: float = 0.5) -> str:
    """Wait until no process but this one is on the GPU; returns "idle", or what else was found.

    `running` gives the process ids, or None where they cannot be known; by default it asks nvidia-smi.
    """
    ask = running or _on_gpu
    end = time.monotonic() + seconds
    while True:
        found = ask()
        if found is None:
            return "unknown: no nvidia-smi"
        if not found:
            return "idle"
        if time.monotonic() > end:
            return f"BUSY: processes {', '.join(found)}"
        time.sleep(pause)


def _on_gpu() -> list[str] | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [process for process in done.stdout.split() if process.isdigit() and int(process) != os.getpid()]
