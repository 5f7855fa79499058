"""The tasks: one benchmark, one file."""

from __future__ import annotations

from vtc.eval.task import Task
from vtc.eval.tasks.mmbench import MMBench, MMBenchCN
from vtc.eval.tasks.mmvet import MMVet
from vtc.eval.tasks.scenes import Scenes
from vtc.eval.tasks.seed import SEED

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        MMBench,
        MMBenchCN,
        SEED,
        MMVet,
        Scenes,
    )
}  # fmt: skip
BENCHMARKS = tuple(name for name in TASKS if name != Scenes.name)  # what `--all` runs
