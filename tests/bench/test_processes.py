"""Process groups: ended for good, with time to write; and an idle GPU is recognised."""

import signal
import sys
import time

import pytest

from bench import processes

# Writes when it is interrupted, and has a child that ignores that.
POLITE = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('child', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("written", flush=True)
"""


def started(code, path, line):
    """A group that runs `code`, once its output, in `path`, has `line`."""
    with path.open("w") as log:
        group = processes.Group([sys.executable, "-c", code], log)
    while line not in path.read_text():
        assert group.status() is None, path.read_text()
        time.sleep(0.02)
    return group


def test_a_group_may_write_before_it_is_ended_for_good(tmp_path):
    group = started(POLITE, tmp_path / "log", "child")
    start = time.monotonic()
    group.end(grace=2.0)
    assert 2.0 <= time.monotonic() - start < 6.0  # the child had its time, too
    assert "written" in (tmp_path / "log").read_text()
    assert not group._alive()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_group_that_listens_is_not_waited_for(in_background, tmp_path):
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    try:
        group = started("import time; print('up', flush=True); time.sleep(600)", tmp_path / "log", "up")
    finally:
        signal.signal(signal.SIGINT, handler)
    start = time.monotonic()
    group.end(grace=30.0)
    assert time.monotonic() - start < 10
    assert group.status() not in (None, 0)


def test_children_that_outlive_their_command_are_ended(tmp_path):
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    with (tmp_path / "log").open("w") as log:
        group = processes.Group([sys.executable, "-c", code], log)
    assert group.wait(30) == 0
    assert group._alive()
    group.end(grace=2.0)
    assert not group._alive()


def test_the_gpu_is_seen_idle():
    seen = [["12", "34"], ["34"], []]
    assert processes.wait_until_idle(5.0, lambda: seen.pop(0), pause=0.0) == "idle"
    assert processes.wait_until_idle(0.0, lambda: ["34"], pause=0.0) == "BUSY: processes 34"
    assert processes.wait_until_idle(0.0, lambda: None) == "unknown: no nvidia-smi"
