"""The parts of `bench gpu`: how long each may take, what it runs, and the worker's side of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import torch

from bench import attention, checkout, e2e, faults, gate, jobs, micro, ncu, probe, processes, summary, watch
from bench.jobs import Job
from bench.summary import Ran


@dataclasses.dataclass(frozen=True)
class Part:
    seconds: float  # its share of the time: the most that it takes of nine minutes
    file: str


# The most important parts come first, in case the time runs out: correctness, whole models, single operations.
PARTS = {
    "probe": Part(30, "probe.jsonl"),
    "gate": Part(55, "gate.jsonl"),
    "e2e": Part(165, "e2e.jsonl"),
    "micro": Part(110, "micro.jsonl"),
    "attention": Part(35, "micro.jsonl"),
    "ncu": Part(25, "ncu.csv"),
    "tests": Part(105, "tests.jsonl"),
}
WORKER = ("-m", "bench", "worker")  # what Python runs for a part
TESTS_AT_ONCE = 8  # each is a process with a GPU context of half a GiB
TEST_LIMIT = 100.0
REHEARSED = ("ops/test_compact.py", "test_config.py")  # the GPU tests in these


@dataclasses.dataclass(frozen=True)
class Mode:
    """How to run the parts. `rehearse` runs them on a CPU, in miniature; `plant` puts faults into them."""

    rehearse: bool = False
    plant: bool = False

    @property
    def options(self) -> list[str]:
        return ["--rehearse"] * self.rehearse + ["--plant"] * self.plant

    @property
    def environment(self) -> dict[str, str | None]:
        """Variables for workers, tests and profiles; None unsets one."""
        variables = {"HF_HUB_OFFLINE": "1", "VTC_BACKEND": None, "TRITON_INTERPRET": None}
        if self.rehearse:  # several threads would wait for one another on a busy processor
            variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return variables


def run_part(part: str, out: Path, seconds: float, mode: Mode, log: IO[str], wait: float) -> Ran:
    start = time.monotonic()
    idle = "rehearsed" if mode.rehearse else processes.wait_until_idle(min(wait, seconds))
    print(f"\n=== {part}, {seconds:.0f} s, GPU {idle}", file=log, flush=True)
    ran = Ran(idle=idle)
    end = start + seconds
    if part == "tests":
        ran.trouble = _tests(out, end, mode, log)
        ran.failed = summary.tests(out / PARTS[part].file).failed
    elif part == "ncu":
        path = ncu.path()
        ran.note = None if path else "there is no ncu here"
        ran.trouble = _ncu(path, out / PARTS[part].file, end, mode, log) if path else None
    else:
        file = out / PARTS[part].file
        worker = [*WORKER, part, *mode.options]
        ran.outcome = watch.watch(worker, file, end, log, environment=mode.environment)
        ran.trouble, ran.failed = ran.outcome.trouble, ran.outcome.failed
    ran.seconds, ran.allowed = time.monotonic() - start, seconds
    return ran


def work(part: str, out: Path, journal: Path, skip: int, mode: Mode) -> None:
    """The worker's side: the jobs of a part from number `skip` on."""
    device = torch.device("cpu" if mode.rehearse else "cuda")
    made = part_jobs(part, device, mode.rehearse)
    if mode.rehearse:  # a CPU is slower, and others may use it
        made = [dataclasses.replace(job, limit=8 * job.limit) for job in made]
    jobs.work(faults.plant(made) if mode.plant else made, out, journal, skip)


def part_jobs(part: str, device: torch.device, played: bool) -> list[Job]:
    if part == "probe":
        return probe.jobs(device)
    if part == "gate":
        return gate.jobs(device, played)
    if part == "e2e":
        options = e2e.Options(("LLaVA-1.5-7B",), (1, 4, 16), (128, 64), rep_ms=60.0)
        if played:
            options = e2e.Options(("small LLaVA",), (1,), (64,), rep_ms=1.0, image_size=168, played=True)
        return e2e.jobs(device, options)
    if part == "attention":
        return attention.jobs(device, played, rep_ms=1.0 if played else 30.0)
    options = micro.Options(dtypes=("bf16",), rep_ms=40.0)  # fp16 moves the same bytes by the same instructions
    if played:
        options = micro.Options(models=("small, 2 tiles",), batches=(1,), keeps=(8,), rep_ms=1.0, played=True)
    return micro.jobs(options, device)


def _ncu(path: str, out: Path, end: float, mode: Mode, log: IO[str]) -> str | None:
    """Profile each kernel once; returns the reason if that failed, else None."""
    with checkout.packages(environment=mode.environment) as options:
        command = ncu.command(path, out, ["-m", "bench.ncu", *mode.options])
        process = processes.Group(command, log, **options)
        try:
            status = process.wait(end - time.monotonic())
        finally:
            process.end()
    if status is None:
        return "its time was up"
    return None if status == 0 else f"exit status {status}: {ncu.error(out) or 'see log.txt'}"


def _tests(out: Path, end: float, mode: Mode, log: IO[str]) -> str | None:
    """Run the tests that use the GPU; returns the reason if some have no results, else None."""
    many = ["-n", str(2 if mode.rehearse else TESTS_AT_ONCE), "--max-worker-restart", "10000"]  # one for each bad test
    many = many if importlib.util.find_spec("xdist") else []
    arguments = ["-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.pytest_log"]
    arguments += ["--continue-on-collection-errors", *many, "--rootdir", str(checkout.ROOT), "--gpu-tests"]
    arguments += [
        "--log-json",
        str(out / PARTS["tests"].file),
        "--test-limit",
        str(30.0 if mode.plant else TEST_LIMIT),
    ]
    with tempfile.TemporaryDirectory() as folder, checkout.packages(environment=mode.environment) as options:
        where = [checkout.ROOT / "tests" / name for name in (REHEARSED if mode.rehearse else ("",))]
        if mode.plant:
            where.append(Path(folder) / "test_planted.py")
            where[-1].write_text(faults.TESTS)
        process = processes.Group([sys.executable, *arguments, *map(str, where)], log, **options)
        try:
            status = process.wait(end - time.monotonic())
        finally:
            process.end(grace=10.0)
    if status is None:
        return "its time was up"
    if status not in (0, 1) or not summary.tests(out / PARTS["tests"].file).collected:
        return f"pytest ended with exit status {status}"
    return None
