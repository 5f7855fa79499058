"""The tasks: one benchmark, one file."""

from __future__ import annotations

from vtc.eval.task import Task
from vtc.eval.tasks.gqa import GQA
from vtc.eval.tasks.mmbench import MMBench, MMBenchCN
from vtc.eval.tasks.mmvet import MMVet
from vtc.eval.tasks.pope import Pope
from vtc.eval.tasks.scenes import Scenes
from vtc.eval.tasks.seed import SEED
from vtc.eval.tasks.sqa import ScienceQA
from vtc.eval.tasks.textvqa import TextVQA

BENCHMARKS: dict[str, type[Task]] = {  # what `--all` runs, in the order of the published tables
    task.name: task for task in (ScienceQA, GQA, TextVQA, Pope, MMBench, MMBenchCN, MMVet, SEED)
}
TASKS = {**BENCHMARKS, Scenes.name: Scenes}
