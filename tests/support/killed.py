"""Kill a process while it writes a file."""

import subprocess
import time


def kill_while_it_writes(command, folder):
    """Run `command`, kill it while a temporary file of `vtc.files` lies in `folder`, and remove that file."""
    with subprocess.Popen([str(each) for each in command]) as process:
        deadline = time.monotonic() + 120
        while not (left := list(folder.glob(".vtc-*"))):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, "it writes nothing"
            time.sleep(0.001)
        process.kill()
    for path in left:
        path.unlink(missing_ok=True)
    for path in folder.glob(".vtc-*"):
        path.unlink()
