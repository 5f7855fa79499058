"""One run: a task with a setting, from its questions to its result. It goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtc.eval.engine import Cost, Engine, Job, batches_of
from vtc.eval.files import DataError
from vtc.eval.fingerprint import fingerprint
from vtc.eval.journal import Journal
from vtc.eval.local import LocalEngine
from vtc.eval.model import ModelSpec
from vtc.eval.processes import Processes
from vtc.eval.progress import Progress
from vtc.eval.protocol import PROTOCOLS
from vtc.eval.question import Answer, ImageFile, Question
from vtc.eval.result import Result, Timing, environment
from vtc.eval.setting import Setting
from vtc.eval.task import Task


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is done.

    Attributes
    ----------
    out : Path
        The folder of all runs. One run is in `TASK/LABEL` below it.
    batch_size : int
        Questions answered at once. 1 is the reference: in 16 bits a larger batch may change a few answers.
    limit : int, optional
        Ask only a sample, evenly spread over the file; questions that are scored together count as one.
    protocol : str, optional
        A name in `PROTOCOLS`; by default the task's.
    skip_bad : bool
        Score without the questions whose images cannot be read.
    partial : bool
        Ask nothing; score the answers that are there.
    workers : int, optional
        Processes that prepare inputs, for each model. By default LLaVA's four on a GPU, and none on a CPU, which has no
        time for them.
    max_new_tokens : int, optional
        The longest answer in tokens, for a quick try; by default the task's.
    check_batch : bool
        Also answer with batch size 1, and count the answers that differ.
    quiet : bool
        Show no progress.

    Raises
    ------
    ValueError
        If a number is too small, the protocol unknown, or `check_batch` has nothing to compare.
    """

    out: Path
    batch_size: int = 1
    limit: int | None = None
    protocol: str | None = None
    skip_bad: bool = False
    partial: bool = False
    workers: int | None = None
    max_new_tokens: int | None = None
    check_batch: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("limit", 1), ("workers", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {self.protocol!r}; there are {', '.join(PROTOCOLS)}")
        if self.check_batch and (self.batch_size == 1 or self.partial):
            raise ValueError("check_batch compares batches with single questions; give a batch_size, and not partial")


class Run:
    """One task with one setting.

    Parameters
    ----------
    task, setting, spec, options
    engine : Engine, optional
        By default one model in this process.
    processes : Processes, optional
        By default this one alone.
    """

    def __init__(
        self,
        task: Task,
        setting: Setting,
        spec: ModelSpec,
        options: Options,
        engine: Engine | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.task, self.setting, self.spec, self.options = task, setting, spec, options
        self.engine, self.processes = engine or LocalEngine(), processes or Processes()
        workers = (4 if spec.device.startswith("cuda") else 0) if options.workers is None else options.workers
        longest = options.max_new_tokens or task.max_new_tokens
        self.job = Job(spec, options.protocol or task.protocol, setting, longest, workers)
        self.questions = sample(task.questions, options.limit)
        self.limit = options.limit if len(self.questions) < len(task.questions) else None
        self.ids = {question.line: question.id for question in self.questions}
        self.folder = options.out / task.name / self.label
        self.fingerprint = fingerprint(task, self.job, options.batch_size, self.limit)

    @property
    def label(self) -> str:
        """The setting, with the protocol, batch size and sample where they are not the usual ones."""
        parts = [self.setting.label]
        if self.job.protocol != self.task.protocol:
            parts.append(self.job.protocol)
        if self.options.batch_size > 1:
            parts.append(f"batch{self.options.batch_size}")
        if self.limit:
            parts.append(f"limit{self.limit}")
        if self.job.max_new_tokens != self.task.max_new_tokens:
            parts.append(f"max{self.job.max_new_tokens}")
        return "-".join(parts)

    def run(self) -> Result | None:
        """Ask what has no answer yet, and score.

        Returns
        -------
        Result or None
            None in all processes but the main one.

        Raises
        ------
        ValueError
            If images cannot be read, or the folder holds another run, or another process writes there.
        """
        if self.options.partial:
            journal = Journal(self.folder, self.task.name, self.fingerprint)
            journal.read()
            return self._conclude(journal) if self.processes.is_main else None
        _require_images(self.questions, self.options.skip_bad)
        rank, world, gather = self.processes.rank, self.processes.world, self.processes.gather
        with Journal(self.folder, self.task.name, self.fingerprint, rank, world) as journal:
            journal.require_same(gather([journal.fingerprint]))
            journal.merge(gather(journal.entries(self.ids)), self.ids)  # folders of other machines have answers, too
            self._ask(journal)
            journal.merge(gather(journal.entries(self.ids)), self.ids)
            if not self.processes.is_main:
                result = None
            else:
                self._require_complete(journal)
                result = self._conclude(journal)
        if self.options.check_batch and self.options.batch_size > 1:
            return self._check_batch(result)
        return result

    def _ask(self, journal: Journal) -> None:
        """Ask the batches of this process in which an answer is missing."""
        mine = batches_of(self.questions, self.options.batch_size)[self.processes.rank :: self.processes.world]
        todo = [batch for batch in mine if not all(journal.is_done(question.line) for question in batch)]
        prompting = self.job.prompting()
        for batch in todo:
            for question in batch:
                prompting.require_text(question.text)
        total, left = sum(map(len, mine)), sum(map(len, todo))
        quiet = self.options.quiet or not self.processes.is_main
        cost, begun, count = Cost(), time.perf_counter(), 0
        try:
            with Progress(f"{self.task.title} {self.label}", total, total - left, quiet) as progress:
                for answers in self.engine.answers(self.job, todo, cost):
                    if not count:
                        self._note({"environment": environment(self.spec.device)})
                    new = sum(not answer.skipped and not journal.is_done(answer.line) for answer in answers)
                    journal.append(answers, self.ids)
                    count += new
                    progress.advance(len(answers))
        finally:  # an interrupted run has its time, too, but not one that was killed
            if count:
                whole = time.perf_counter() - begun - cost.load
                self._note({"answers": count, "whole": whole, **self._side_by_side(), **dataclasses.asdict(cost)})

    def _side_by_side(self) -> dict[str, int]:
        """What must be the same in all sessions whose times are added."""
        return {"world": self.processes.world, "models": self.engine.models, "workers": self.job.workers}

    def _note(self, entry: dict[str, Any]) -> None:
        """Append to the sessions of this process: where one runs, and what it took at its end."""
        with (self.folder / f"sessions-{self.processes.rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _require_complete(self, journal: Journal) -> None:
        """Raise ValueError unless every question has an answer, or may be left out."""
        skipped = [answer for answer in journal if answer.skipped]
        if skipped and not self.options.skip_bad:
            raise DataError(
                f"{len(skipped)} image(s) cannot be read, the first: {skipped[0].skipped}. Put them right and run this "
                "again, which asks only these questions, or score without them: --skip-bad"
            )
        if missing := [line for line in self.ids if line not in journal.answers]:
            raise ValueError(
                f"{len(missing)} of {len(self.ids)} questions have no answer, the first at line {missing[0]}: a "
                "process of this run has failed. Run it again, which asks only these, or see what is there: --partial"
            )

    def _conclude(self, journal: Journal) -> Result:
        """Score the answers, and write the files that servers and judges take if there are all of them."""
        answers = {answer.line: answer.text for answer in journal if not answer.skipped and answer.line in self.ids}
        if not answers:
            raise ValueError(f"{self.folder} holds no answers yet; run without --partial")
        score = self.task.score(answers)
        skipped = sum(bool(answer.skipped) for answer in journal)
        files = [self.folder]
        if len(answers) == len(self.task.questions):
            made = self.folder / "submission"
            made.mkdir(exist_ok=True)
            files += self.task.submission(answers, made, f"{Path(self.spec.model).name}-{self.setting.label}")
        sessions = self._sessions()
        kept = [answer.visual_tokens for answer in journal if answer.visual_tokens is not None]
        over_layers = [answer.token_layers for answer in journal if answer.token_layers is not None]
        notes = list(score.notes)
        if self.job.max_new_tokens != self.task.max_new_tokens:
            notes.append(f"answers end at {self.job.max_new_tokens} tokens, not at {self.task.max_new_tokens}")
        if smaller := self._smaller_batches(journal):
            notes.append(f"{smaller} answers come from smaller batches, because the memory was full")
        return Result(
            task=self.task.name,
            title=self.task.title,
            model=self.spec.model,
            method=self.setting.name,
            label=self.label,
            options=dict(self.setting.options),
            figures=score.figures,
            complete=len(answers) == len(self.ids),
            questions=len(self.ids),
            answered=len(answers),
            skipped=skipped,
            limit=self.limit,
            visual_tokens=round(statistics.fmean(kept), 2) if kept else None,
            notes=tuple(notes),
            timing=self._timing([answer for answer in journal if not answer.skipped], sessions),
            fingerprint=self.fingerprint,
            environment=self._environment(sessions),
            files=tuple(map(str, files)),
            token_layers=round(statistics.fmean(over_layers), 2) if over_layers else None,
        )

    def _smaller_batches(self, journal: Journal) -> int:
        """How many answers come from a smaller batch than planned. Skipped questions leave a batch smaller, too."""
        batches = batches_of(self.questions, self.options.batch_size)
        counts = 0
        for batch in batches:
            asked = [journal.answers[q.line] for q in batch if journal.is_done(q.line)]
            counts += sum(answer.batch < len(asked) for answer in asked)
        return counts

    def _sessions(self) -> list[list[dict[str, Any]]]:
        """What the processes noted, one list for each."""
        return [
            [session for line in file.read_bytes().split(b"\n") if (session := _session(line))]
            for file in sorted(self.folder.glob("sessions-*.jsonl"))
        ]

    def _environment(self, notes: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """Where the answers were made: the last environment, with the GPUs of all. This machine may be another one."""
        made = [note["environment"] for writer in notes for note in writer if "environment" in note]
        last = max(made, key=lambda each: str(each["date"]), default=environment(self.spec.device))
        gpus = dict.fromkeys(each["gpu"] for each in made if each["gpu"])
        return {**last, "gpu": " and ".join(gpus) or last["gpu"]}

    def _timing(self, answers: Sequence[Answer], notes: Sequence[Sequence[dict[str, Any]]]) -> Timing:
        lines = [ended for writer in notes if (ended := [note for note in writer if "answers" in note])]
        sessions = [session for writer in lines for session in writer]
        alike = len({tuple(session[name] for name in self._side_by_side()) for session in sessions}) == 1
        known = alike and sum(session["answers"] for session in sessions) == len(answers)
        return Timing(
            answers=len(answers),
            generate_seconds=statistics.fmean(answer.generate_seconds for answer in answers),
            prepare_seconds=statistics.fmean(answer.prepare_seconds for answer in answers),
            new_tokens=statistics.fmean(answer.new_tokens for answer in answers),
            whole_seconds=max(sum(s["whole"] for s in writer) for writer in lines) if known else None,
            wait_seconds=sum(s["wait"] for s in sessions) if known else None,
            load_seconds=max(sum(s["load"] for s in writer) for writer in lines) if known else None,
            processes=sum(max(s["models"] for s in writer) for writer in lines) if known else 1,
            workers=sessions[0]["workers"] if known else self.job.workers,
        )

    def _check_batch(self, result: Result | None) -> Result | None:
        """Answer one by one, too, and add to the result how many answers differ."""
        options = dataclasses.replace(self.options, batch_size=1, check_batch=False)
        alone = Run(self.task, self.setting, self.spec, options, self.engine, self.processes)
        alone.run()
        if result is None:
            return None
        here, reference = self._stored(), alone._stored()
        changed = sorted(line for line in here if here[line].text != reference[line].text)
        where = f", at lines {', '.join(map(str, changed[:20]))}{' …' if changed[20:] else ''}" if changed else ""
        note = f"{len(changed)} of {len(here)} answers differ from those with batch size 1{where}"
        return dataclasses.replace(result, notes=(*result.notes, note))

    def _stored(self) -> dict[int, Answer]:
        """The answers on the disk, by line."""
        journal = Journal(self.folder, self.task.name, self.fingerprint)
        journal.read()
        return journal.answers


def _session(line: bytes) -> dict[str, Any] | None:
    """What `_note` wrote; None if a full disk cut it. The time of the run is then unknown."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def sample(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """`limit` questions, evenly spread over all of them; questions of one unit are taken together and count as one."""
    units: dict[Any, list[Question]] = {}
    for question in questions:
        units.setdefault(("line", question.line) if question.unit is None else question.unit, []).append(question)
    if limit is None or limit >= len(units):
        return list(questions)
    names = list(units)
    taken = {name for i in range(limit) for name in [names[i * len(names) // limit]]}
    return sorted((q for name in taken for q in units[name]), key=lambda question: question.line)


def _require_images(questions: Sequence[Question], skip_bad: bool) -> None:
    """Raise DataError if image files are missing, before an hour is spent on the others."""
    files = {question.image.path for question in questions if isinstance(question.image, ImageFile)}
    missing = sorted(file for file in files if not file.is_file())
    if missing and not skip_bad:
        raise DataError(
            f"{len(missing)} of {len(files)} image files are missing, the first {missing[0]}; unpack them, or score "
            "without their questions: --skip-bad"
        )
