"""`vtc eval`: tasks by settings, one run after the other, and the tables."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vtc.config import DEFAULT_KEEP
from vtc.eval import report
from vtc.eval.answers_file import read_answers
from vtc.eval.engine import Engine
from vtc.eval.local import LocalEngine
from vtc.eval.memory import is_out_of_memory
from vtc.eval.model import ModelSpec, pick_device, pick_dtype
from vtc.eval.processes import Processes, current
from vtc.eval.result import Result, Timing, environment, read
from vtc.eval.rows import identity
from vtc.eval.run import Options, Run
from vtc.eval.setting import FLOOR, NONE, Setting, ignores_keep, sweep
from vtc.eval.task import Task
from vtc.eval.tasks import BENCHMARKS, TASKS, Scenes
from vtc.methods import METHODS

_log = logging.getLogger("vtc")
ENGINES = ("local", "ray")


def tasks_of(names: Sequence[str], everything: bool, data: Path | None) -> list[Task]:
    """The tasks by their names, with their files checked.

    Raises
    ------
    ValueError
        For an unknown name, or without names, or without a folder that a task needs.
    """
    if everything == bool(names):
        raise ValueError(f"give tasks, or --all for the eight; there are {', '.join(TASKS)}")
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"unknown task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    chosen = BENCHMARKS if everything else list(dict.fromkeys(names))
    if data is None and set(chosen) != {Scenes.name}:
        raise ValueError("give --data DIR, the folder with the files of the benchmarks (LLaVA's playground/data/eval)")
    if data is not None and not data.is_dir():
        raise ValueError(f"the data folder {data} does not exist")
    return [TASKS[name](data or Path()) for name in chosen]


def settings_of(
    method: str,
    methods: str | None,
    all_methods: bool,
    swept: str | None,
    baselines: bool,
    keep: int | None,
    options: Mapping[str, Any],
) -> list[Setting]:
    """The settings of a command: one, or a table's.

    Raises
    ------
    ValueError
        For an unknown method, an option that is not accepted, a sweep of something else than `keep`, or if nothing is
        left to run.
    """
    if methods is None and not all_methods and swept is None:
        fixed = ignores_keep(method, options) or "ratio" in options or "schedule" in options
        chosen = keep if fixed or keep is not None else DEFAULT_KEEP
        return [Setting(method, {"keep": chosen, **options})]
    if keep is not None and swept is not None:
        raise ValueError(f"got both --keep {keep} and --sweep {swept}; give one of them")
    if all_methods and methods is not None:
        raise ValueError(f"got both --all-methods and --methods {methods}; give one of them")
    names = list(METHODS) if all_methods else list(dict.fromkeys((methods or method).split(",")))
    compared = [name for name in names if name not in (NONE, FLOOR)]
    if not compared and not baselines:
        raise ValueError("nothing is left to run: --no-baselines leaves none and floor out of tables; use --method")
    keeps: list[int | None] = [keep]
    if swept is not None:
        keeps = [*_keeps(swept)]
    elif keep is None and "ratio" not in options and "schedule" not in options:
        keeps = [DEFAULT_KEEP]
    return sweep([NONE, *compared, FLOOR] if baselines else compared, keeps, **options)


def _keeps(swept: str) -> list[int]:
    name, _, values = swept.partition("=")
    if name != "keep" or not all(value.isdigit() for value in values.split(",")):
        raise ValueError(f"--sweep takes numbers of tokens, such as keep=256,128,64, got {swept!r}")
    return list(dict.fromkeys(int(value) for value in values.split(",")))


@dataclasses.dataclass(frozen=True)
class Machine:
    """Which model, and where it runs, as on the command line."""

    model: str
    revision: str | None
    device: str | None
    dtype: str
    engine: str
    actors: int
    processes: Processes = dataclasses.field(default_factory=current)

    def spec(self) -> ModelSpec:
        """The model as it runs in this process, or in actors on other machines, which may have what this one lacks.

        Raises
        ------
        ValueError
            If the device or the dtype cannot be used.
        """
        if self.engine == "ray" and self.device is not None:
            where = torch.device(self.device)
        else:
            where = pick_device(self.processes.device(self.device))
        dtype = str(pick_dtype(self.dtype, where)).removeprefix("torch.")
        return ModelSpec(self.model, str(where), dtype, self.revision)

    def build_engine(self) -> Engine:
        """The engine by its name.

        Raises
        ------
        ValueError
            If it is unknown, cannot be used here, or does not go together with several processes.
        """
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}; there are {', '.join(ENGINES)}")
        if self.engine == "local":
            return LocalEngine()
        if self.processes.world > 1:
            raise ValueError("--engine ray starts its own processes; run it without accelerate launch or torchrun")
        from vtc.eval.ray_engine import RayEngine

        return RayEngine(self.actors)


def evaluate(
    tasks: Sequence[Task], settings: Sequence[Setting], machine: Machine, options: Options, plots: bool
) -> tuple[list[Result], list[str]]:
    """Run everything, and write the report after each run. Returns what `run_all` returns."""

    report.require_folder(options.out, [path for task in tasks for path in getattr(task, "found", {}).values()])
    before = read(options.out / "results.jsonl") if (options.out / "results.jsonl").exists() else []

    def write(results: list[Result]) -> None:
        """Draw and write what there is, with the results of earlier commands: this one may be interrupted."""
        new = {(result.task, identity(result)) for result in results}
        every = [result for result in before if (result.task, identity(result)) not in new] + results
        drawable = plots and any(result.main and result.main.value is not None for result in every)
        report.write(every, options.out, draw(every, options.out) if drawable else ())

    if plots:
        from vtc.eval.plots import draw, require_matplotlib

        require_matplotlib()
    return run_all(tasks, settings, machine.spec(), options, machine.build_engine(), machine.processes, write)


def run_all(
    tasks: Sequence[Task],
    settings: Sequence[Setting],
    spec: ModelSpec,
    options: Options,
    engine: Engine | None = None,
    processes: Processes | None = None,
    done: Callable[[list[Result]], None] = lambda results: None,
) -> tuple[list[Result], list[str]]:
    """Every task with every setting.

    A run that fails does not stop the others, unless there are none, or several processes, which have to stay in step.

    Parameters
    ----------
    done : callable
        Gets the results so far after each run.

    Returns
    -------
    list of Result
        Empty in all processes but the main one.
    list of str
        What failed, a line each.
    """
    engine, processes = engine or LocalEngine(), processes or Processes()
    results: list[Result] = []
    failures: list[str] = []
    for task in tasks:
        for setting in settings:
            try:
                result = Run(task, setting, spec, options, engine, processes).run()
            except (ValueError, RuntimeError) as error:
                # The system kills workers when the machine's memory is full.
                expected = isinstance(error, ValueError) or is_out_of_memory(error) or "DataLoader worker" in str(error)
                if processes.world > 1 or not expected or len(tasks) * len(settings) == 1:
                    raise
                failures.append(f"{task.name} {setting.label}: {' '.join(str(error).split())}")
                _log.warning("%s", failures[-1])
                continue
            if result is not None:
                results.append(result)
                done(results)
    return results, failures


def score_file(task: Task, path: Path, partial: bool) -> Result:
    """The result of a file of answers that LLaVA's programs have written."""
    answers = read_answers(task, path, partial)
    score = task.score(answers)
    return Result(
        task=task.name,
        title=task.title,
        model=path.name,
        method="answers",
        label=path.stem,
        options={},
        figures=score.figures,
        complete=len(answers) == len(task.questions),
        questions=len(task.questions),
        answered=len(answers),
        skipped=0,
        limit=None,
        visual_tokens=None,
        notes=score.notes,
        timing=Timing(len(answers), 0.0, 0.0, 0.0),
        fingerprint={"files": task.fingerprint()},
        environment=environment("cpu"),
    )


def document(results: Sequence[Result], failures: Sequence[str]) -> dict[str, Any]:
    """The JSON document."""
    return {"results": [dataclasses.asdict(result) for result in results], "failures": list(failures)}
