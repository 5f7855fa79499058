"""The answers of one run on disk: appended line by line, never lost, never doubled, whoever is killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from vtc.eval.question import Answer

_log = logging.getLogger("vtc")
LOCK_SECONDS = 10.0


class Journal:
    """The folder of one run.

    `run.json` holds the fingerprint: everything that can change an answer. Each writer appends to a file of its own,
    `answers-N.jsonl`, one line an answer, and holds a lock on it. All files together are the answers of the run.

    Parameters
    ----------
    folder : Path
        It is made if it does not exist.
    task : str
        Stands in every line.
    fingerprint : mapping
        What JSON can hold.
    writer : int
        The number of this process among those of the run.

    Raises
    ------
    ValueError
        If another process writes here, the folder belongs to a run with another fingerprint, a line is damaged, or two
        lines answer one question differently.
    """

    def __init__(self, folder: Path, task: str, fingerprint: Mapping[str, Any], writer: int = 0) -> None:
        self.folder, self.task = folder, task
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))  # as it will be read back
        self.digest = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:12]
        self.path = folder / f"answers-{writer}.jsonl"
        self.answers: dict[int, Answer] = {}
        self._lock = FileLock(folder / f"answers-{writer}.lock")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            # The workers of a killed process hold its lock until they see that it is gone, within seconds.
            self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise ValueError(
                f"another process writes to {self.path}; wait until it ends, or choose another --out"
            ) from None
        try:
            self._claim()
            self._drop_cut_line()
            self.read()
            self._file = self.path.open("ab")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def _claim(self) -> None:
        """Write `run.json`, or compare it."""
        file = self.folder / "run.json"
        if not file.exists():
            made = file.with_suffix(f".{os.getpid()}.tmp")
            made.write_text(json.dumps(self.fingerprint, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            made.replace(file)  # whole or not at all
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        names = [name for name in {**before, **self.fingerprint} if before.get(name) != self.fingerprint.get(name)]
        if names:
            changes = "; ".join(f"{n} was {before.get(n)!r}, is {self.fingerprint.get(n)!r}" for n in names)
            raise ValueError(
                f"{self.folder} holds answers that were made otherwise: {changes}. Choose another --out, or delete "
                "that folder"
            )

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
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # the last one may be cut
                self._add(self._parse(line, f"line {number} of {path}"), f"line {number} of {path}")

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

    def _add(self, answer: Answer, where: str) -> bool:
        """Keep an answer; False if it is there already. An answer replaces a skipped one."""
        before = self.answers.get(answer.line)
        if before is None or (before.skipped and not answer.skipped):
            self.answers[answer.line] = answer
            return True
        if before.text != answer.text and not answer.skipped:
            raise ValueError(
                f"{where} answers question {answer.line} with {answer.text!r}, another line with {before.text!r}; "
                "remove one of them"
            )
        return False

    def is_done(self, line: int) -> bool:
        """Whether the question has an answer. One that was skipped has none: its image may be there by now."""
        return line in self.answers and not self.answers[line].skipped

    def append(self, answers: Iterable[Answer], ids: Mapping[int, Any]) -> int:
        """Write the answers that are not there yet; they are on the disk when it returns. Returns how many.

        `ids` has the benchmark's id of each question.
        """
        if self._file is None:
            raise ValueError("the journal is closed; use it in a with block")
        new = [answer for answer in answers if self._add(answer, "this run")]
        self._file.write(b"".join(self._line(answer, ids[answer.line]) for answer in new))
        self._file.flush()
        os.fsync(self._file.fileno())
        return len(new)

    def merge(self, answers: Iterable[Answer], ids: Mapping[int, Any]) -> None:
        """Take in the answers of other processes; those that no file of this folder has are written."""
        self.read()
        self.append(answers, ids)

    def _line(self, answer: Answer, question_id: Any) -> bytes:
        entry = {"task": self.task, "id": question_id, **dataclasses.asdict(answer), "fingerprint": self.digest}
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"

    def __iter__(self) -> Iterator[Answer]:
        """The answers in the order of their questions."""
        return iter(self.answers[line] for line in sorted(self.answers))
