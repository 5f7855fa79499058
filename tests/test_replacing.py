"""Files are written beside their place, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtc.files import replacing, require_writable


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_file_takes_the_place_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".txt")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("old", ["old", None])
def test_an_error_changes_nothing(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "a.txt"
    if old is not None:
        path.write_text(old)

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ([] if old is None else ["a.txt"])
    assert old is None or path.read_text() == old


def test_a_link_is_followed(tmp_path: Path) -> None:
    """The link stays a link, and the file that it leads to is replaced, in its own folder."""
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    with replacing(link) as temporary:
        assert temporary.parent == real.parent
        temporary.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_permissions_are_those_of_the_old_file_or_of_any_new_one(tmp_path: Path) -> None:
    old, new, ordinary = tmp_path / "old", tmp_path / "new", tmp_path / "ordinary"
    old.write_text("")
    old.chmod(0o640)
    ordinary.write_text("")
    for path in (old, new):
        with replacing(path):
            pass
    assert old.stat().st_mode & 0o777 == 0o640
    assert new.stat().st_mode == ordinary.stat().st_mode


def test_the_umask_of_the_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share it: even for a moment, another one's files would be open to everybody."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("changed"))
    with replacing(tmp_path / "new"):
        pass


WRITER = """
import sys, time
from vtc.files import replacing
with replacing(sys.argv[1]) as file, file.open("w") as out:
    out.write("new" * 1000)
    out.flush()
    print("begun", flush=True)
    while True:
        time.sleep(1)
"""


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    left = [name for name in names(tmp_path) if name != "a.txt"]
    assert len(left) == 1
    assert left[0].startswith(".vtc-")


def test_a_file_that_can_be_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    assert require_writable(path) == path
    assert require_writable(tmp_path / "new.png", [path]) == tmp_path / "new.png"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.png"]


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    given, link, hard = tmp_path / "in.png", tmp_path / "link.png", tmp_path / "hard.png"
    given.write_text("photograph")
    link.symlink_to(given)
    os.link(given, hard)
    (tmp_path / "folder").mkdir()
    for path in (given, link, hard, tmp_path / "folder" / ".." / "in.png"):
        with pytest.raises(ValueError, match=r"is the input .*in\.png itself, which would be lost"):
            require_writable(path, [given])
    with pytest.raises(ValueError, match="is the input"):  # it would come into being between the check and the reading
        require_writable(tmp_path / "later.png", [tmp_path / "later.png"])


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    for path, why in (
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "a.png", "does not exist; create it first"),
        (tmp_path / "fifo.png", "may not be overwritten"),
        (tmp_path / ("x" * 300 + ".png"), r"cannot be written \(File name too long\)"),
    ):
        with pytest.raises(ValueError, match=why):
            require_writable(path)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_that_takes_no_files_is_said_before() -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        require_writable(Path("/proc/a.png"))


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder, while the process may do there only what is permitted to everybody."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(user)
            os.chmod(name, 0o777)


def test_permissions_are_tried(nobody: Path) -> None:
    path = nobody / "a.png"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(ValueError, match="may not be overwritten"):
        require_writable(path)
    path.unlink()
    (nobody / "closed").mkdir()
    (nobody / "closed").chmod(0o555)
    with pytest.raises(ValueError, match="cannot be written"):
        require_writable(nobody / "closed" / "a.png")
