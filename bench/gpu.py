"""`python -m bench gpu --out DIR`: all that a GPU can tell, in minutes, with nothing lost.

The parts run one after the other, each in a process group of its own, each for its share of the time. Every number is
on disk before the next one is begun. An exception, a hang, a crash or too little memory costs one number. Whatever is
still running at the end of a part is ended, and the GPU is seen idle before the next part begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from bench import attention, checkout, e2e, faults, gate, jobs, micro, ncu, probe, processes, summary, timing
from bench.jobs import Job
from bench.summary import Ran


@dataclasses.dataclass(frozen=True)
class Part:
    seconds: float  # its share of the time: what it takes of nine minutes at the most
    file: str


# What matters most comes first, should the time run out: is it right, then whole models, then single operations.
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
IDLE_WAIT = 8.0  # seconds for the GPU to become idle
TESTS_AT_ONCE = 8  # each is a process with a GPU context of half a GiB
TEST_LIMIT = 100.0
REHEARSED = ("test_compact.py", "test_config.py")  # all of the first, and what the selection leaves of the other


@dataclasses.dataclass(frozen=True)
class Mode:
    """How to run the parts. `rehearse` plays them on a CPU, in miniature; `plant` puts faults into them."""

    rehearse: bool = False
    plant: bool = False

    @property
    def options(self) -> list[str]:
        return ["--rehearse"] * self.rehearse + ["--plant"] * self.plant

    @property
    def environment(self) -> dict[str, str | None]:
        """Variables for workers, tests and profiles; None unsets one."""
        variables = {"HF_HUB_OFFLINE": "1", "VTC_BACKEND": None, "TRITON_INTERPRET": None}
        if self.rehearse:  # one thread: several wait for one another where others use the processor
            variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return variables


def run(
    out: Path,
    minutes: float,
    parts: Sequence[str] = (),
    mode: Mode = Mode(),
    say: Callable[[str], None] = print,
    started: float | None = None,
) -> int:
    """Run `parts`, by default all, within `minutes`; at most 8 files in `out`, among them log.txt and summary.txt.

    The minutes count from `started` on the clock `time.monotonic`, by default from now.

    Returns the exit status: 1 if anything failed or was not reached. With faults planted: if anything else was lost.

    Raises
    ------
    ValueError
        For a part that does not exist, a folder that has results of these parts already, and without a GPU.
    """
    chosen = micro.chosen("part", tuple(parts), tuple(PARTS))
    if not mode.rehearse and not torch.cuda.is_available():
        raise ValueError(
            "bench gpu needs a GPU; without one: --rehearse plays it on a CPU, pytest runs the tests, and python -m "
            "bench micro times what a CPU can"
        )
    if old := sorted({PARTS[part].file for part in chosen if (out / PARTS[part].file).exists()}):
        raise ValueError(f"{out} has results already ({', '.join(old)}); give --out another folder")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    end = (started or time.monotonic()) + 60 * minutes - processes.GRACE  # for what ends last
    wait = IDLE_WAIT
    ran: dict[str, Ran] = {}
    with (out / "log.txt").open("a", encoding="utf-8") as log, _interruptible():
        try:
            for number, part in enumerate(chosen):
                share = PARTS[part].seconds / sum(PARTS[other].seconds for other in chosen[number:])
                try:
                    ran[part] = _run_part(part, out, share * (end - time.monotonic()), mode, log, wait)
                except Exception as error:  # a fault of this file costs one part
                    ran[part] = Ran(trouble=timing.reason(error))
                wait = 0.0 if "BUSY" in ran[part].idle else wait  # whoever stayed so long stays
                say(summary.line(part, ran[part]))
                _summarise(out, ran, chosen)
        except KeyboardInterrupt:
            say("interrupted: what there is stays")
    say(f"\n{_summarise(out, ran, chosen)}")
    if set(ran) != set(chosen):
        return 1
    if mode.plant:
        found = [f"{part}: {text}" for part, one in ran.items() for text in _beyond_the_faults(part, one, out)]
        say("\n".join(found) or "the faults cost what they befell, and nothing else")
        return 1 if found else 0
    return 0 if all(one.clean for one in ran.values()) else 1


def _summarise(out: Path, ran: dict[str, Ran], chosen: Sequence[str]) -> str:
    """Write the page. A fault in it costs the page, no part that is still to come; it becomes one of `ran`."""
    try:
        page = summary.page(out, ran, chosen)
    except Exception as error:
        ran["summary"] = Ran(trouble=timing.reason(error))
        page = "\n".join(summary.line(part, one) for part, one in ran.items())
    (out / "summary.txt").write_text(page + "\n", encoding="utf-8")
    return page


def _beyond_the_faults(part: str, ran: Ran, out: Path) -> list[str]:
    """What a part lost that no planted fault befell, or did not lose that one did."""
    if part == "tests":
        seen = summary.tests(out / PARTS[part].file)
        planted = {test for test in seen.failed if "::test_planted_gpu_" in test}
        expected, left = len(faults.FAULTS), seen.collected - seen.passed - seen.skipped - len(seen.failed)
        other = [f"lost {test}" for test in seen.failed if test not in planted]
    else:
        names = ran.outcome.names[1 : 1 + len(faults.FAULTS)] if ran.outcome else []
        planted, expected, left = set(ran.failed) & set(names), len(names), len(ran.left)
        other = [f"lost {name}" for name in ran.failed if name not in planted]
    other += [f"{len(planted)} of {expected} faults failed"] if len(planted) != expected else []
    other += [f"{left} not reached"] if left else []
    return other + ([ran.trouble] if ran.trouble else [])


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM as Ctrl-C: whoever ends this from outside, the parts are ended and the summary is written."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_part(part: str, out: Path, seconds: float, mode: Mode, log: IO[str], wait: float) -> Ran:
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
        ran.outcome = jobs.watch(worker, file, end, log, environment=mode.environment)
        ran.trouble, ran.failed = ran.outcome.trouble, ran.outcome.failed
    ran.seconds, ran.allowed = time.monotonic() - start, seconds
    return ran


def work(part: str, out: Path, journal: Path, skip: int, mode: Mode) -> None:
    """What a worker does: the jobs of a part from number `skip` on."""
    device = torch.device("cpu" if mode.rehearse else "cuda")
    made = part_jobs(part, device, mode.rehearse)
    if mode.rehearse:  # a CPU that others use, too, is no GPU
        made = [dataclasses.replace(job, limit=8 * job.limit) for job in made]
    jobs.work(faults.plant(made) if mode.plant else made, out, journal, skip)


def part_jobs(part: str, device: torch.device, played: bool) -> list[Job]:
    if part == "probe":
        return probe.jobs(device)
    if part == "gate":
        return gate.jobs(device, played)
    if part == "e2e":
        return e2e.jobs(device, (1,) if played else (1, 4, 16), rep_ms=1.0 if played else 60.0, played=played)
    if part == "attention":
        return attention.jobs(device, played, rep_ms=1.0 if played else 30.0)
    options = micro.Options(dtypes=("bf16",), rep_ms=40.0)  # fp16 moves the same bytes by the same instructions
    if played:
        options = micro.Options(models=("small, 2 tiles",), batches=(1,), keeps=(8,), rep_ms=1.0, played=True)
    return micro.jobs(options, device)


def _ncu(path: str, out: Path, end: float, mode: Mode, log: IO[str]) -> str | None:
    """Profile each kernel once; returns why not, if not."""
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
    """Run the tests that use the GPU; returns why there are no results of some, if so."""
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
