"""The answers of one run on disk: appended line by line, never lost, never doubled, whoever is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vtc.eval.question import Answer
from vtc.files import replacing

_log = logging.getLogger("vtc")
LOCK_SECONDS = 10.0


class Journal:
    """The folder of one run.

    `run.json` holds the fingerprint: everything that can change an answer. Each writer appends to a file of its own,
    `answers-N.jsonl`, one line an answer, and holds a lock on it. All files together are the answers of the run,
    whichever number of writers it had before. `read` needs no lock: a line that is being written is left out.

    Parameters
    ----------
    folder : Path
        It is made if it does not exist.
    task : str
        Stands in every line.
    fingerprint : mapping
        What JSON can hold.
    writer, writers : int
        The number of this process among those of the run, and how many there are.

    Raises
    ------
    ValueError
        If another process writes here, the folder belongs to a run with another fingerprint, a line is damaged, two
        lines answer one question differently, or the folder cannot be written to.
    """

    def __init__(
        self, folder: Path, task: str, fingerprint: Mapping[str, Any], writer: int = 0, writers: int = 1
    ) -> None:
        self.folder, self.task, self.writer, self.writers = folder, task, writer, writers
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))  # as it will be read back
        self.digest = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:12]
        self.path = folder / f"answers-{writer}.jsonl"
        self.answers: dict[int, Answer] = {}
        self._lock = FileLock(folder / f"answers-{writer}.lock")
        self._file: io.FileIO | None = None

    def __enter__(self) -> Journal:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _acquire(self._lock)
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            raise ValueError(f"cannot write to {self.folder} ({error}); choose another --out") from error
        try:
            if self.writer == 0:
                self._require_no_other_writers()
            self._claim()
            self._drop_cut_line()
            self.read()
            self._file = io.FileIO(self.path, "a")  # without a buffer: after an error nothing is left to be written
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        self._lock.release()

    def _require_no_other_writers(self) -> None:
        """Raise ValueError if a process of an earlier run with more writers is still alive."""
        for file in self.folder.glob("answers-*.lock"):
            if int(file.stem.removeprefix("answers-")) >= self.writers:
                lock = FileLock(file)
                _acquire(lock)
                lock.release()

    def _claim(self) -> None:
        """Write `run.json`, or compare it. One process at a time: of two runs that begin at once, one is refused."""
        file = self.folder / "run.json"
        with FileLock(self.folder / "run.lock"):
            if file.exists():
                self._compare()
                return
            with _writing(file), replacing(file) as made:
                made.write_text(json.dumps(self.fingerprint, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _compare(self) -> None:
        """Raise ValueError if `run.json` is there and holds another fingerprint."""
        file = self.folder / "run.json"
        if not file.exists():
            return
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}); delete it, it is written again, and answers of another run are "
                "recognised without it"
            ) from error
        if changes := self._changes(before):
            raise ValueError(
                f"{self.folder} holds answers that were made otherwise: {changes}. Choose another --out, or delete "
                "that folder"
            )

    def _changes(self, before: Mapping[str, Any]) -> str:
        """What differs between another fingerprint and this one, in words."""
        names = [name for name in {**before, **self.fingerprint} if before.get(name) != self.fingerprint.get(name)]
        return "; ".join(f"{n} was {before.get(n)!r}, is {self.fingerprint.get(n)!r}" for n in names)

    def require_same(self, others: Iterable[Mapping[str, Any]]) -> None:
        """Raise ValueError if another process has another fingerprint, as with other versions on its machine."""
        for number, other in enumerate(others):
            if changes := self._changes(other):
                raise ValueError(f"process {number} would answer otherwise than process {self.writer}: {changes}")

    def _drop_cut_line(self) -> None:
        """Remove what a killed writer left of its last line."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            _log.warning("dropped the last line of %s, which was cut; its question is asked again", self.path)
            os.truncate(self.path, whole)

    def read(self) -> None:
        """Read the answers of all writers."""
        self._compare()
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last end of line is cut, or being written
            for number, line in enumerate(lines, start=1):
                where = f"line {number} of {path}"
                self._add(self._parse(line, where), where)

    def _parse(self, line: bytes, where: str) -> Answer:
        try:
            entry = json.loads(line)
            task, digest = entry.pop("task"), entry.pop("fingerprint")
            entry.pop("id")
            answer = Answer(**entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where} is damaged ({error}); remove this line, and its question is asked again"
            ) from error
        if (task, digest) != (self.task, self.digest):
            raise ValueError(f"{where} is of another run ({task}, {digest}); move that line away")
        return answer

    def _add(self, answer: Answer, where: str) -> None:
        """Keep an answer. It replaces a skipped one."""
        before = self.answers.get(answer.line)
        if before is None or before.skipped:
            self.answers[answer.line] = answer
        elif before.text != answer.text and not answer.skipped:
            raise ValueError(
                f"{where} answers question {answer.line} with {answer.text!r}, another line with {before.text!r}; "
                "remove one of them"
            )

    def is_done(self, line: int) -> bool:
        """Whether the question has an answer. One that was skipped has none: its image may be there by now."""
        return line in self.answers and not self.answers[line].skipped

    def append(self, answers: Iterable[Answer], ids: Mapping[int, Any]) -> int:
        """Write the answers to questions that have none; they are on the disk when it returns. Returns how many.

        A question that has an answer keeps it: it is asked again if its batch had a gap, and in 16 bits a batch without
        the gap may answer otherwise.

        Parameters
        ----------
        answers : iterable of Answer
        ids : mapping
            The benchmark's id of each question.

        Raises
        ------
        OSError
            If the disk is full. The file is then as it was before.
        """
        new = [a for a in answers if not self.is_done(a.line) and self.answers.get(a.line) != a]
        self._write(b"".join(self._line(answer, ids[answer.line]) for answer in new))
        self.answers |= {answer.line: answer for answer in new}
        return len(new)

    def _write(self, lines: bytes) -> None:
        if self._file is None:
            raise ValueError("the journal is closed; use it in a with block")
        size = os.fstat(self._file.fileno()).st_size
        try:
            with _writing(self.path):
                left = memoryview(lines)
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise

    def entries(self, ids: Mapping[int, Any]) -> list[bytes]:
        """The answers as lines, for other processes."""
        return [self._line(answer, ids[answer.line]) for answer in self]

    def merge(self, entries: Iterable[bytes], ids: Mapping[int, Any]) -> None:
        """Take in the lines of other processes; answers that no file of this folder has are written.

        Raises
        ------
        ValueError
            If a line is of another run, or answers a question otherwise than another line.
        """
        self.read()
        stored = dict(self.answers)
        for entry in entries:
            self._add(self._parse(entry, "a line of another process"), "a line of another process")
        new = [answer for answer in self if answer != stored.get(answer.line)]
        self.answers = stored
        self.append(new, ids)

    def _line(self, answer: Answer, question_id: Any) -> bytes:
        entry = {"task": self.task, "id": question_id, **dataclasses.asdict(answer), "fingerprint": self.digest}
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"

    def __iter__(self) -> Iterator[Answer]:
        """The answers in the order of their questions."""
        return iter(self.answers[line] for line in sorted(self.answers))


def _acquire(lock: FileLock) -> None:
    """Wait for a lock. The workers of a killed process hold its lock until they see that it is gone, within seconds."""
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        path = Path(lock.lock_file).with_suffix(".jsonl")
        raise ValueError(f"another process writes to {path}; wait until it ends, or choose another --out") from None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An OSError in the block says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write to {path} ({error}); make room, and run this again, which goes on from there"
        ) from error
