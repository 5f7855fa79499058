"""The tasks: one benchmark, one file."""

from __future__ import annotations

from vtc.eval.task import Task
from vtc.eval.tasks.scenes import Scenes

TASKS: dict[str, type[Task]] = {task.name: task for task in (Scenes,)}
BENCHMARKS = tuple(name for name in TASKS if name != Scenes.name)  # what `--all` runs
