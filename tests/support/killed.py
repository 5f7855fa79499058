"""Kill a process while it writes a file."""

import signal
import subprocess
import time


def kill_while_it_writes(command, folder, after=None):
    """Run `command` until a temporary file of `vtc.files` lies in `folder`, kill it, and remove that file.

    With `after`, a file in `folder`, the first one that the process puts there counts as nothing: it is killed at
    the next one.
    """
    before = after and after.stat().st_ino
    with subprocess.Popen([str(each) for each in command]) as process:
        deadline = time.monotonic() + 120
        while not (left := _left(process, folder) if not after or after.stat().st_ino != before else []):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, "it writes nothing"
    for path in left:
        path.unlink()


def _left(process, folder):
    """The temporary files in `folder` while the process stands still; it is killed if there are any."""
    if not any(folder.glob(".vtc-*")):
        return []
    process.send_signal(signal.SIGSTOP)
    left = list(folder.glob(".vtc-*"))
    process.send_signal(signal.SIGKILL if left else signal.SIGCONT)
    return left
