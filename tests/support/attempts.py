"""Evaluations that are killed and resumed; `kill.py` is the command.

Each attempt is a process of its own, forked from a server that has imported everything. It is killed by SIGKILL at a
random moment, or one of its two ranks is, or an actor of Ray. When an attempt ends by itself, its run is complete: its
answers are compared with those of a run that nobody killed, and the next run begins.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama
import transformers.models.llava.modeling_llava  # noqa: F401  what an attempt would import

from vtc.eval import processes
from vtc.eval.local import LocalEngine
from vtc.eval.model import ModelSpec
from vtc.eval.run import Options, Run
from vtc.eval.setting import Setting
from vtc.eval.tasks.scenes import Scenes

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.support.attempts"])


@dataclass(frozen=True)
class Case:
    """What is run."""

    questions: int = 48
    batch_size: int = 1
    workers: int = 0
    processes: int = 1
    actors: int = 0  # of Ray; 0: the local engine
    address: str | None = None  # of Ray

    def run(self, out: Path) -> Run:
        """The run in this process, or rank."""
        engine: object = LocalEngine()
        if self.actors:
            import ray

            from vtc.eval.ray_engine import RayEngine

            ray.init(address=self.address)
            engine = RayEngine(self.actors)
        options = Options(out, batch_size=self.batch_size, workers=self.workers, quiet=True)
        task = Scenes(count=self.questions)
        return Run(task, Setting("vtc-cls", {"keep": 8}), ModelSpec(), options, engine, processes.current())


def attempt(case: Case, out: Path, rank_only: bool = False) -> None:
    """Run to the end in this process, or in the ranks that torchrun's launcher starts from it."""
    if case.processes == 1 or rank_only:
        case.run(out).run()
        return
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=case.processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(config, attempt)(case, out, True)


def start(case: Case, out: Path) -> multiprocessing.Process:
    """Start an attempt."""
    process = SERVER.Process(target=attempt, args=(case, out))
    process.start()
    return process


def lines(out: Path) -> Counter[int]:
    """How often each question is answered by the whole lines below `out`."""
    counts: Counter[int] = Counter()
    for file in out.rglob("answers-*.jsonl"):
        counts.update(json.loads(line)["line"] for line in file.read_bytes().split(b"\n")[:-1])
    return counts


def texts(out: Path) -> dict[int, str]:
    """The answers in whole lines below `out`, by question."""
    files = out.rglob("answers-*.jsonl")
    entries = [json.loads(line) for file in files for line in file.read_bytes().split(b"\n")[:-1]]
    return {entry["line"]: entry["text"] for entry in entries}


def victims(case: Case, process: multiprocessing.Process) -> list[psutil.Process]:
    """The processes of an attempt that may be killed: it, one of its ranks, or an actor of Ray."""
    me = psutil.Process(process.pid)
    if case.processes > 1:
        return me.children()
    if case.actors:
        everyone = psutil.process_iter(["name", "cmdline"])
        return [me, *(each for each in everyone if "ray::MapWorker" in " ".join(each.info["cmdline"] or []))]
    return [me]


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    of_drivers: int = 0
    before_an_answer: int = 0
    runs: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    missing: int = 0
    failed: int = 0

    @property
    def clean(self) -> bool:
        return self.runs > 0 and not (self.lost or self.doubled or self.changed or self.missing or self.failed)


def campaign(case: Case, kills: int, folder: Path, seed: int = 0, seconds: float | None = None) -> Tally:
    """Kill `kills` times, in as many runs as that takes; the last run ends by itself.

    `seconds` is the latest moment of a kill, by default the time of a whole run.
    """
    rng, tally = random.Random(seed), Tally()
    begun = time.perf_counter()
    plain = Case(case.questions, case.batch_size)
    process = start(plain, folder / "whole")
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the run that nobody killed ended with {process.exitcode}")
    if seconds is None:
        seconds = time.perf_counter() - begun
    expected = texts(folder / "whole")
    while tally.kills < kills or tally.runs == 0:
        out = folder / f"run{tally.runs}"
        before: Counter[int] = Counter()
        while True:
            process = start(case, out)
            process.join(rng.uniform(0, seconds) if tally.kills < kills else None)
            if process.exitcode is None:
                _kill(case, process, rng, tally)
                after = lines(out)
                tally.lost += sum((before - after).values())
                tally.before_an_answer += after == before
                before = after
            elif process.exitcode == 0:
                break
            else:
                tally.failed += 1
                break
        counts, found = lines(out), texts(out)
        tally.runs += 1
        tally.missing += len(expected.keys() - found.keys())
        tally.doubled += sum(counts.values()) - len(counts)
        tally.changed += sum(found[line] != expected.get(line) for line in found)
        if tally.failed:
            break
    return tally


def _kill(case: Case, process: multiprocessing.Process, rng: random.Random, tally: Tally) -> None:
    """SIGKILL one of the victims, and wait until the attempt has ended, if that ends it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        chosen = rng.choice(victims(case, process) or [psutil.Process(process.pid)])
        chosen.send_signal(signal.SIGKILL)
        tally.kills += 1
        tally.of_drivers += chosen.pid == process.pid
        if case.actors and chosen.pid != process.pid:
            return  # Ray starts another actor, and the attempt goes on
    process.join(60)
    if process.exitcode is None:
        raise RuntimeError("the attempt goes on a minute after the kill")
