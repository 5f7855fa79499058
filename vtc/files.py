"""Write files so that nothing is lost: each is written beside its place, and then takes that place at once."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

StrPath = str | os.PathLike[str]
EFFECTIVE = os.access in os.supports_effective_ids


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Give the name of a temporary file beside `path`, which takes the place of `path` if the block ends well.

    Whoever reads `path` meanwhile, or after a kill at any moment, finds the old file or the new one, whole. A kill may
    leave the temporary file, whose name begins with ".vtc-". If the block raises an error, `path` is as before.

    Parameters
    ----------
    path
        In a folder that exists. A link is followed: the file that it leads to is replaced. The new file has the
        permissions of the old one, or those of any new file.

    Yields
    ------
    Path
        An empty file with the suffix of `path`.

    Raises
    ------
    OSError
        If the folder or the disk does not take it.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".vtc-{secrets.token_hex(8)}{target.suffix}")
    # Not by tempfile, whose files are for their owner only: here the kernel applies the umask.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_writable(path: StrPath, inputs: Iterable[StrPath] = ()) -> Path:
    """`path`, once it is certain that `replacing` can write it and that it is none of the inputs.

    Raises
    ------
    ValueError
        If its folder does not exist or takes no files, if it is a folder, may not be written, or is one of `inputs`,
        also by another name or through a link.
    """
    target = Path(path)
    try:
        if not target.name or target.is_dir():
            raise ValueError(f"{path} is a directory; give the name of a file")
        if not target.parent.is_dir():
            raise ValueError(f"the directory {target.parent} of {path} does not exist; create it first")
        for given in inputs:
            if _is_same(target, given):
                raise ValueError(f"{path} is the input {given} itself, which would be lost; give another name")
        if target.exists() and not (target.is_file() and os.access(target, os.W_OK, effective_ids=EFFECTIVE)):
            raise ValueError(f"{path} may not be overwritten; give another name, or change its permissions")
        with tempfile.NamedTemporaryFile(prefix=".vtc-", dir=os.path.dirname(os.path.realpath(target))):
            return target
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); give another name") from error


def _is_same(one: StrPath, other: StrPath) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them does not exist
        return os.path.realpath(one) == os.path.realpath(other)
