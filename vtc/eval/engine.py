"""What every engine answers: a job, that is one model, one setting, one protocol."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vtc.eval import protocol as protocols
from vtc.eval.model import ModelSpec
from vtc.eval.question import Answer, Question
from vtc.eval.setting import FLOOR, Setting
from vtc.eval.task import Task


@dataclass(frozen=True)
class Job:
    """What a process needs to answer batches. It can be sent to another process.

    Attributes
    ----------
    spec : ModelSpec
    protocol : str
        A name in `PROTOCOLS`.
    setting : Setting
    max_new_tokens : int
    workers : int
        Processes that prepare inputs, for each model; 0: the one that answers does it.
    """

    spec: ModelSpec
    protocol: str
    setting: Setting
    max_new_tokens: int
    workers: int = 0

    def prompting(self) -> protocols.Protocol:
        """The protocol with the model's processor.

        Raises
        ------
        ValueError
            If the protocol does not fit the model.
        """
        processor, config = _processor(self.spec)
        return protocols.PROTOCOLS[self.protocol](processor, config, floor=self.setting.method == FLOOR)


@functools.cache
def _processor(spec: ModelSpec) -> tuple[Any, Any]:
    return spec.processor(), spec.config()


@dataclass
class Cost:
    """What a process spends besides what stands in the answers, in seconds.

    Attributes
    ----------
    load : float
        Loading the model, and on a GPU a first batch that starts its libraries.
    wait : float
        The model waited for prepared inputs.
    """

    load: float = 0.0
    wait: float = 0.0


class Engine(Protocol):
    """Where the models run.

    Attributes
    ----------
    models : int
        That answer side by side for this process.
    """

    models: int

    def answers(self, job: Job, batches: Sequence[Sequence[Question]], cost: Cost) -> Iterator[list[Answer]]:
        """The answers to each batch, skipped ones included, in any order. It adds to `cost` while it runs."""


def batches_of(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """The questions in batches of at most `size`, in their order, those with an image apart from those without.

    A batch depends on the questions and on `size` only, neither on the number of processes nor on what is answered
    already. So an answer that depends on its batch, as in 16 bits, is the same in every run.
    """
    groups: list[list[Question]] = [[], []]
    for question in questions:
        groups[question.image is None].append(question)
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def answer_all(
    engine: Engine,
    spec: ModelSpec,
    task: Task,
    setting: Setting,
    batch_size: int,
    protocol: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The answers to all questions of a task, in their order, without a journal: for short runs.

    `advance` gets the number of answers of each batch.
    """
    job = Job(spec, protocol or task.protocol, setting, task.max_new_tokens)
    batches = batches_of(task.questions, batch_size)
    found = []
    for answers in engine.answers(job, batches, Cost()):
        found += answers
        advance(len(answers))
    return sorted(found, key=lambda answer: answer.line)
