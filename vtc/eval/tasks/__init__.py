"""The tasks: one benchmark, one file."""

from __future__ import annotations

from vtc.eval.task import Task
from vtc.eval.tasks.gqa import GQA
from vtc.eval.tasks.pope import Pope
from vtc.eval.tasks.scenes import Scenes
from vtc.eval.tasks.sqa import ScienceQA
from vtc.eval.tasks.textvqa import TextVQA

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        GQA,
        ScienceQA,
        TextVQA,
        Pope,
        Scenes,
    )
}  # fmt: skip
BENCHMARKS = tuple(name for name in TASKS if name != Scenes.name)  # what `--all` runs
