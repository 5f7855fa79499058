"""The files of the benchmarks: where they may lie, and how they are read."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A file of a benchmark is missing, malformed, or of another version. The message says what to download."""


@dataclass(frozen=True)
class DataFile:
    """A file or a folder of a benchmark.

    Attributes
    ----------
    name : str
        What it is to the task, "questions" for instance.
    paths : tuple of str
        Where it may lie below the data folder: LLaVA's layout, the VTC-CLS authors', and flat.
    source : str
        What to download, one clause.
    """

    name: str
    paths: tuple[str, ...]
    source: str

    def find(self, data: Path) -> Path:
        """The first of `paths` that exists below `data`.

        Raises
        ------
        DataError
            If none does.
        """
        for path in self.paths:
            if (data / path).exists():
                return data / path
        tried = ", ".join(str(data / path) for path in self.paths)
        raise DataError(f"found no {self.name} at {tried}; {self.source}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises
    ------
    DataError
        If it is malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{path} is not JSON ({error}); download it again") from error


def read_jsonl(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line, empty lines left out.

    Raises
    ------
    DataError
        If a line is malformed or lacks one of `fields`.
    """
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise DataError(f"line {number} of {path} is not JSON ({error}); download the file again") from error
            require_fields(entry, fields, f"line {number} of {path}")
            found.append(entry)
    if not found:
        raise DataError(f"{path} is empty; download it again")
    return found


def read_tsv(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a tab-separated file with a header and quoted fields, everything as text.

    Cells may hold line breaks and images of megabytes in base64.

    Raises
    ------
    DataError
        If a column of `fields` is missing, or a row has another number of cells.
    """
    with path.open(encoding="utf-8", newline="") as file, _any_field_size():
        reader = csv.DictReader(file, delimiter="\t", strict=True)
        try:
            columns = list(reader.fieldnames or ())
            if missing := [name for name in fields if name not in columns]:
                has = ", ".join(columns) or "none"
                raise DataError(
                    f"{path} lacks the column(s) {', '.join(missing)}, it has {has}; is this the right file?"
                )
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path} is malformed near line {reader.line_num} ({error}); download it again") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"row {number} of {path} has not {len(columns)} cells; the file was cut: download it again")
    if not rows:
        raise DataError(f"{path} has no rows; download it again")
    return rows


@contextlib.contextmanager
def _any_field_size() -> Iterator[None]:
    """The csv module's limit is for the whole process, so it is put back."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def require_fields(entry: Any, fields: Sequence[str], where: str) -> None:
    """Raise DataError unless `entry` is an object with all of `fields`."""
    if not isinstance(entry, dict):
        raise DataError(f"{where} is no JSON object, got {type(entry).__name__}; is this the right file?")
    if missing := [name for name in fields if name not in entry]:
        raise DataError(f"{where} lacks {', '.join(missing)}; is this the right file?")
