"""Jobs in workers: each fault costs the number it befalls and no other."""

import time

from support.bench import WORKER

from bench import record, watch


def see_through(tmp_path, made, seconds=120.0, **options):
    with (tmp_path / "log").open("a") as log:
        arguments = ["-c", WORKER % made]
        return watch.watch(arguments, tmp_path / "out.jsonl", time.monotonic() + seconds, log, **options)


def test_each_fault_costs_the_number_it_befalls_and_no_other(tmp_path):
    outcome = see_through(tmp_path, "faults.plant(made)")
    assert outcome.names == [f"job {n}" for n in range(9)]
    assert outcome.failed == {
        "job 1": "WrongResult: planted: a kernel gave a wrong result",
        "job 2": "OutOfMemoryError: planted: out of memory",
        "job 3": "hung: nothing for 3 s",
        "job 4": "the worker died: signal SIGKILL",
        "job 5": "RuntimeError: planted: an illegal memory access broke the GPU context",
    }
    values = [line["value"] for line in record.lines(tmp_path / "out.jsonl") if "value" in line]
    assert values == [0, 6, 7, 8]
    assert (outcome.done, outcome.left, outcome.trouble) == (4, [], None)
    assert record.failures(tmp_path / "out.jsonl") == outcome.failed


def test_the_clock_ends_it_and_says_what_is_left(tmp_path):
    slow = "made[:2] + [jobs.Job(f'slow {n}', lambda: time.sleep(600), 900) for n in range(2)]"
    start = time.monotonic()
    outcome = see_through(tmp_path, slow, seconds=12.0)
    assert time.monotonic() - start < 20
    assert (outcome.done, outcome.failed, outcome.left) == (2, {}, ["slow 0", "slow 1"])


def test_workers_that_do_nothing_are_not_started_for_ever(tmp_path):
    outcome = see_through(tmp_path, "1 / 0")
    assert outcome.trouble == "a worker began no job: the worker died: exit status 1"
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    outcome = see_through(tmp_path, "time.sleep(600)", start_limit=3.0)
    assert outcome.trouble == "a worker began no job: hung: nothing for 3 s"
    outcome = see_through(tmp_path, "time.sleep(600)", seconds=1.0)
    assert outcome.trouble == "a worker began no job: the time is up"


def test_a_worker_that_does_not_end_is_not_waited_for(tmp_path):
    """Its jobs are done: a GPU context can hang when it is given up."""
    few = "[jobs.dataclasses.replace(job, limit=2) for job in made[:2]]"
    stuck = f"{few}, a.out, a.journal, a.skip); time.sleep(600); print(1"
    start = time.monotonic()
    outcome = see_through(tmp_path, stuck)
    assert time.monotonic() - start < 60
    assert (outcome.done, outcome.failed, outcome.left, outcome.trouble) == (2, {}, [], None)
