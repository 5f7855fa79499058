"""`bench gpu`: whatever befalls one number, the others are there; what it says last is true."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_bench import make_record

from bench import __main__ as command
from bench import checkout, faults, gate, gpu, jobs, ncu, processes, record, summary, timing
from bench.accuracy import WrongResult
from bench.gate import Checked
from bench.jobs import Job, Outcome
from bench.summary import Ran
from bench.workloads import WORKLOADS

CPU = torch.device("cpu")
CHECKED = Checked("topk", "small", "fp32", {"B": 1}, "triton", {}, None, None)


# --- processes -------------------------------------------------------------------------------------------------------

# Writes when it is interrupted, and has a child that ignores that.
POLITE = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('child', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("written", flush=True)
"""


def started(code, path, line):
    """A group that runs `code`, once its output, in `path`, has `line`."""
    with path.open("w") as log:
        group = processes.Group([sys.executable, "-c", code], log)
    while line not in path.read_text():
        assert group.status() is None, path.read_text()
        time.sleep(0.02)
    return group


def test_a_group_may_write_before_it_is_ended_for_good(tmp_path):
    group = started(POLITE, tmp_path / "log", "child")
    start = time.monotonic()
    group.end(grace=2.0)
    assert 2.0 <= time.monotonic() - start < 6.0  # the child had its time, too
    assert "written" in (tmp_path / "log").read_text()
    assert not group._alive()


def test_a_group_that_listens_is_not_waited_for(tmp_path):
    group = started("import time; print('up', flush=True); time.sleep(600)", tmp_path / "log", "up")
    start = time.monotonic()
    group.end(grace=30.0)
    assert time.monotonic() - start < 10
    assert group.status() not in (None, 0)


def test_children_that_outlive_their_command_are_ended(tmp_path):
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    with (tmp_path / "log").open("w") as log:
        group = processes.Group([sys.executable, "-c", code], log)
    assert group.wait(30) == 0
    assert group._alive()
    group.end(grace=2.0)
    assert not group._alive()


def test_the_gpu_is_seen_idle():
    seen = [["12", "34"], ["34"], []]
    assert processes.wait_until_idle(5.0, lambda: seen.pop(0), pause=0.0) == "idle"
    assert processes.wait_until_idle(0.0, lambda: ["34"], pause=0.0) == "BUSY: processes 34"
    assert processes.wait_until_idle(0.0, lambda: None) == "unknown: no nvidia-smi"


# --- jobs in this process --------------------------------------------------------------------------------------------


def raising(error):
    def run():
        raise error

    return run


def test_an_exception_costs_one_number(tmp_path, capsys):
    made = [
        Job("first", lambda: [CHECKED]),
        Job("wrong", raising(WrongResult("rows: not equal\nand more"))),
        Job("memory", raising(torch.OutOfMemoryError("out of memory"))),
        Job("last", lambda: [CHECKED]),
    ]
    noted = []
    records, failed = jobs.run(made, tmp_path / "gate.jsonl", noted.append)
    assert records == [CHECKED, CHECKED] == record.read(tmp_path / "gate.jsonl", Checked)
    assert failed == {"wrong": "WrongResult: rows: not equal", "memory": "OutOfMemoryError: out of memory"}
    assert record.failures(tmp_path / "gate.jsonl") == failed
    assert noted == [{what: number} for number in range(4) for what in ("begun", "ended")]
    assert "NO NUMBER: wrong: WrongResult: rows: not equal" in capsys.readouterr().out


def test_a_record_is_on_disk_before_the_next_job_begins(tmp_path):
    seen = []
    made = [Job("one", lambda: [CHECKED]), Job("two", lambda: seen.extend(record.lines(tmp_path / "out.jsonl")) or [])]
    jobs.run(made, tmp_path / "out.jsonl")
    assert len(seen) == 1


def test_a_failure_holds_no_tensors():
    """Out of memory would be out of memory for all jobs after it."""
    import weakref

    held = []

    def run():
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("no more")

    jobs.run([Job("memory", run), Job("next", lambda: [])], None)
    assert held[0]() is None


def test_a_process_that_lost_its_gpu_ends(monkeypatch):
    monkeypatch.setattr(jobs, "works", lambda: False)
    done = []
    with pytest.raises(SystemExit) as ended:
        jobs.run(
            [Job("broken", raising(RuntimeError("illegal access"))), Job("next", lambda: done.append(1) or [])], None
        )
    assert ended.value.code == jobs.BROKEN
    assert not done


def test_a_process_whose_capture_failed_ends_with_its_record_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "spoiled", True)
    with pytest.raises(SystemExit) as ended:
        jobs.run([Job("first", lambda: [CHECKED]), Job("next", lambda: [CHECKED])], tmp_path / "gate.jsonl")
    assert ended.value.code == jobs.BROKEN
    assert record.read(tmp_path / "gate.jsonl", Checked) == [CHECKED]


def test_transformers_does_under_a_capture_as_without(monkeypatch):
    from transformers.utils import import_utils

    if not hasattr(import_utils, "is_cuda_stream_capturing"):
        pytest.skip("this transformers does not ask")
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    assert import_utils.is_tracing(torch.ones(1))
    with timing._uncaptured():
        assert not import_utils.is_tracing(torch.ones(1))


def test_a_relative_python_path_reaches_the_workers(tmp_path, monkeypatch):
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried/carried_module.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "carried")
    assert checkout.run(["-c", "import carried_module; print('found')"]) == (0, "found\n")


def test_no_pytest_is_no_clean_part(tmp_path, monkeypatch):
    """`python -m pytest` without pytest exits as if a test had failed."""
    monkeypatch.setattr(gpu, "REHEARSED", ("no_such_file.py",))
    assert gpu.run(tmp_path, 2, ["tests"], gpu.Mode(rehearse=True), lambda line: None) == 1
    assert "pytest ended with exit status" in (tmp_path / "summary.txt").read_text()


# --- jobs in workers -------------------------------------------------------------------------------------------------

# A worker of nine jobs that write their numbers; %s is what becomes of them.
WORKER = """
import argparse, os, pathlib, time
from bench import faults, jobs
parser = argparse.ArgumentParser()
for name in ("--out", "--journal"): parser.add_argument(name, type=pathlib.Path)
parser.add_argument("--skip", type=int)
a, _ = parser.parse_known_args()
made = [jobs.Job(f"job {n}", lambda n=n: [{"value": n, "process": os.getpid()}]) for n in range(9)]
jobs.work(%s, a.out, a.journal, a.skip)
"""


def watch(tmp_path, made, seconds=120.0, **options):
    with (tmp_path / "log").open("a") as log:
        arguments = ["-c", WORKER % made]
        return jobs.watch(arguments, tmp_path / "out.jsonl", time.monotonic() + seconds, log, **options)


def test_each_fault_costs_the_number_it_befalls_and_no_other(tmp_path):
    outcome = watch(tmp_path, "faults.plant(made)")
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
    outcome = watch(tmp_path, slow, seconds=12.0)
    assert time.monotonic() - start < 20
    assert (outcome.done, outcome.failed, outcome.left) == (2, {}, ["slow 0", "slow 1"])


def test_workers_that_do_nothing_are_not_started_for_ever(tmp_path):
    outcome = watch(tmp_path, "1 / 0")
    assert outcome.trouble == "a worker began no job: the worker died: exit status 1"
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    outcome = watch(tmp_path, "time.sleep(600)", start_limit=3.0)
    assert outcome.trouble == "a worker began no job: hung: nothing for 3 s"
    outcome = watch(tmp_path, "time.sleep(600)", seconds=1.0)
    assert outcome.trouble == "a worker began no job: the time is up"


def test_a_worker_that_does_not_end_is_not_waited_for(tmp_path):
    """Its jobs are done: a GPU context can hang when it is given up."""
    few = "[jobs.dataclasses.replace(job, limit=2) for job in made[:2]]"
    stuck = f"{few}, a.out, a.journal, a.skip); time.sleep(600); print(1"
    start = time.monotonic()
    outcome = watch(tmp_path, stuck)
    assert time.monotonic() - start < 60
    assert (outcome.done, outcome.failed, outcome.left, outcome.trouble) == (2, {}, [], None)


# --- tests -----------------------------------------------------------------------------------------------------------


def run_pytest(tmp_path, *options):
    arguments = ["-m", "pytest", "-q", "-p", "bench.pytest_log", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    arguments += ["--log-json", str(tmp_path / "log.jsonl"), *options, str(tmp_path)]
    return checkout.run(arguments)[1]


def test_each_fault_costs_the_test_it_befalls_and_no_other(tmp_path):
    (tmp_path / "test_planted.py").write_text(faults.TESTS)
    output = run_pytest(tmp_path, "-n", "2", "--test-limit", "4")
    found = summary.tests(tmp_path / "log.jsonl")
    names = {test.rpartition("::")[2]: why for test, why in found.failed.items()}
    assert set(names) == {f"test_planted_gpu_{fault}" for fault in ("wrong", "memory", "hangs", "killed", "broken")}, (
        output
    )
    assert (found.collected, found.passed) == (13, 8)
    assert names["test_planted_gpu_wrong"] == "AssertionError: planted"
    assert names["test_planted_gpu_memory"] == "torch.OutOfMemoryError: planted"
    assert names["test_planted_gpu_broken"] == "RuntimeError: planted"
    broken = [one for one in record.lines(tmp_path / "log.jsonl") if "gpu_broken" in one.get("test", "")]
    assert len(broken) == 2  # it failed, and then its worker ended
    for killed in ("test_planted_gpu_hangs", "test_planted_gpu_killed"):
        assert re.match(rf"worker 'gw\d+' crashed while running 'test_planted.py::{killed}'", names[killed])


def test_results_are_there_when_pytest_is_interrupted(tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_wrong(): assert False\ndef test_hangs(): time.sleep(600)\n"
    )
    path = tmp_path / "log.jsonl"
    arguments = ["-m", "pytest", "-q", "-p", "bench.pytest_log", "--log-json", str(path), str(tmp_path)]
    with checkout.packages() as options, (tmp_path / "log").open("w") as log:
        group = processes.Group([sys.executable, *arguments], log, **options)
        while "test_wrong" not in (path.read_text() if path.exists() else ""):
            time.sleep(0.05)
        group.end()
    found = summary.tests(path)
    assert found.collected == 2
    assert [test.rpartition("::")[2] for test in found.failed] == ["test_wrong"]


def test_a_file_that_cannot_be_collected_is_a_failure(tmp_path):
    (tmp_path / "test_bad.py").write_text("import no_such_module\n")
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    run_pytest(tmp_path, "--continue-on-collection-errors")
    found = summary.tests(tmp_path / "log.jsonl")
    assert found.passed == 1
    assert list(found.failed.values()) == ["ModuleNotFoundError: No module named 'no_such_module'"]


def test_tests_for_a_gpu_are_chosen_by_file_and_by_name(tmp_path):
    files = {
        "test_topk": ["test_ties"],
        "test_llava": ["test_beams", "test_triton_backend_gives_the_same", "test_half[cuda]"],
        "test_cli": ["test_help"],
    }
    (tmp_path / "tests").mkdir()
    for file, names in files.items():
        code = "".join(f"def {name.split('[')[0]}(): pass\n" for name in names)
        if "[" in names[-1]:
            code = "import pytest\n" + code.replace(
                "def test_half()", "@pytest.mark.parametrize('d', ['cpu', 'cuda'])\ndef test_half(d)"
            )
        (tmp_path / f"tests/{file}.py").write_text(code)
    run_pytest(tmp_path, "--gpu-tests")
    tests = [line["test"] for line in record.lines(tmp_path / "log.jsonl") if "test" in line]
    assert sorted(tests) == [
        "tests/hf/test_generate.py::test_half[cuda]",
        "tests/hf/test_generate.py::test_triton_backend_gives_the_same",
        "tests/ops/test_topk.py::test_ties",
    ]


# --- the gate --------------------------------------------------------------------------------------------------------


def test_every_operation_is_gated_in_every_dtype():
    made = gate.jobs(torch.device("cuda"))
    first = made[0].name
    assert first.startswith("select LLaVA-1.5 bf16 B=2 T=1 N=577 H=16 D=64 K=64 triton")
    for op in WORKLOADS:
        for dtype in ("bf16", "fp16", "fp32") if WORKLOADS[op].floats else ("fp32",):
            for model in ("LLaVA-1.5", "LLaVA-NeXT", "SigLIP-like"):
                assert any(job.name.startswith(f"{op} {model} {dtype} ") for job in made)


def test_what_moves_is_a_race():
    work = WORKLOADS["topk"]
    shape = {"B": 1, "T": 1, "N": 30, "K": 4}
    reference = work.providers()["reference"]
    names = {"dtype": "fp32", "op": "topk", "model": "small", "backend": "triton"}
    (checked,) = gate.check(work, shape, CPU, reference, **names)
    assert checked.shape == shape
    results = []

    def moves(scores, k):
        results.append(reference(scores, k) + len(results))
        return results[-1]

    with pytest.raises(WrongResult, match="not the same bits in every run"):
        gate.check(work, shape, CPU, moves, **names)


def test_errors_are_told_with_what_is_allowed():
    work = WORKLOADS["row_scores"]
    (checked,) = gate.check(
        work, {"B": 1, "T": 1, "N": 30, "H": 2, "D": 16}, CPU, work.providers()["sdpa+row"],
        dtype="fp16", op="row_scores", model="small", backend="triton",
    )  # fmt: skip
    error, allowed = checked.errors["scores"]
    assert 0 < error <= allowed < 1e-3


# --- profiles --------------------------------------------------------------------------------------------------------

# Plays ncu: notes its options, runs the command, writes a table as ncu does.
NCU = """#!{python}
import subprocess, sys
arguments = sys.argv[1:]
out = arguments[arguments.index("--log-file") + 1]
status = subprocess.run(arguments[arguments.index("--log-file") + 2 :]).returncode
metrics = arguments[arguments.index("--metrics") + 1].split(",")
with open(out, "w") as file:
    print("==PROF== Connected to process 1", file=file)
    print(*(f'"{{name}}"' for name in ("ID", "Kernel Name", *metrics)), sep=",", file=file)
    print(*(f'"{{unit}}"' for unit in ("", "", "us", "Mbyte", *[""] * (len(metrics) - 2))), sep=",", file=file)
    values = 0, "_topk_kernel", "4.25", "1,2", *range(len(metrics) - 2)
    print(*(f'"{{value}}"' for value in values), sep=",", file=file)
sys.exit(status)
"""


def play_ncu(folder, monkeypatch):
    (folder / "bin").mkdir()
    (folder / "bin" / "ncu").write_text(NCU.format(python=sys.executable))
    (folder / "bin" / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_profiles_are_read(tmp_path, monkeypatch):
    play_ncu(tmp_path, monkeypatch)
    made = ncu.command(ncu.path(), tmp_path / "ncu.csv", ["-c", "print('ran')"])
    assert made[1:3] == ["--clock-control", "none"]  # the clocks stay as they are
    assert subprocess.run(made, check=True, capture_output=True, text=True).stdout == "ran\n"
    (line,) = ncu.profiles(tmp_path / "ncu.csv")
    assert line.startswith("_topk_kernel: time 4.25 us, read 1,2 Mbyte, written 0")
    (tmp_path / "ncu.csv").write_text("==ERROR== no permission\n")
    with pytest.raises(ValueError, match=r"ncu.csv has no table of kernels: ==ERROR== no permission"):
        ncu.profiles(tmp_path / "ncu.csv")
    with pytest.raises(ValueError, match=r"ncu wrote no none.csv"):
        ncu.profiles(tmp_path / "none.csv")


# --- all of it -------------------------------------------------------------------------------------------------------


def test_the_plan_takes_less_than_nine_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) < 9 * 60
    assert len({part.file for part in gpu.PARTS.values()} | {"log.txt", "summary.txt"}) <= 8
    assert list(gpu.PARTS) == ["probe", "gate", "e2e", "micro", "attention", "ncu", "tests"]


def test_what_matters_most_is_timed_first():
    names = [job.name for job in gpu.part_jobs("micro", torch.device("cuda"), played=False)]
    assert names[0].startswith("select LLaVA-1.5 bf16 B=1 ")
    assert not any(name.endswith(" compiled") for name in names)
    later = [names.index(next(n for n in names if n.startswith(start))) for start in (
        "select LLaVA-1.5 bf16", "cls_attention LLaVA-1.5 bf16", "row_scores LLaVA-1.5 bf16", "topk LLaVA-1.5",
        "compact LLaVA-1.5 bf16", "select LLaVA-NeXT bf16",
    )]  # fmt: skip
    assert later == sorted(later)


def test_a_rehearsal_with_faults_loses_nothing_else(tmp_path, monkeypatch):
    """Two parts that are made of jobs, the profiles, and the tests."""
    play_ncu(tmp_path, monkeypatch)
    monkeypatch.setattr(gpu, "REHEARSED", ("test_config.py",))
    said = []
    parts = ["probe", "ncu", "tests"]
    mode = gpu.Mode(rehearse=True, plant=True)
    assert gpu.run(tmp_path / "out", 20, parts, mode, said.append) == 0, said
    assert said[-1] == "the faults cost what they befell, and nothing else"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"probe.jsonl", "ncu.csv", "tests.jsonl", "log.txt", "summary.txt"}
    names = [job.name for job in gpu.part_jobs("probe", CPU, played=True)]
    failed = record.failures(tmp_path / "out/probe.jsonl")
    assert list(failed) == names[1:6]
    assert [line["probe"] for line in record.lines(tmp_path / "out/probe.jsonl") if "probe" in line] == [
        names[0],
        *names[6:],
    ]
    seen = summary.tests(tmp_path / "out/tests.jsonl")
    assert len(seen.failed) == 5
    assert seen.collected == seen.passed + seen.skipped + 5 > 13
    page = (tmp_path / "out/summary.txt").read_text()
    assert page.strip() in said[-2]
    for line in (*(f"probe: {name}: {why}" for name, why in failed.items()), "_topk_kernel: time 4.25 us"):
        assert line in page
    assert re.search(r"tests: \S*::test_planted_gpu_wrong: 1 failed: AssertionError: planted", page)
    assert "NOT REACHED" not in page


def test_a_loss_beyond_the_faults_is_seen(tmp_path):
    names = [f"job {n}" for n in range(9)]
    planted = dict.fromkeys(names[1:6], "planted")
    whole = Ran(outcome=Outcome(names, planted), failed=planted)
    assert gpu._beyond_the_faults("gate", whole, tmp_path) == []
    more = {**planted, "job 8": "died"}
    assert gpu._beyond_the_faults("gate", Ran(outcome=Outcome(names, more), failed=more), tmp_path) == ["lost job 8"]
    cut = Ran(outcome=Outcome(names, {}, names[2:]))
    assert gpu._beyond_the_faults("gate", cut, tmp_path) == ["0 of 5 faults failed", "7 not reached"]
    record.append(tmp_path / "tests.jsonl", [{"collected": 2}, {"test": "test_x.py::a", "outcome": "failed"}])
    assert gpu._beyond_the_faults("tests", Ran(), tmp_path) == [
        "lost test_x.py::a",
        "0 of 5 faults failed",
        "1 not reached",
    ]


# Two numbers, and one that would take for ever.
SLOW = WORKER % "made[:2] + [jobs.Job('slow', lambda: time.sleep(600), 900)]"


def test_minutes_are_honoured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORKER", ("-c", SLOW))
    start = time.monotonic()
    assert gpu.run(tmp_path, 0.5, ["probe", "gate"], gpu.Mode(rehearse=True), lambda line: None) == 1
    assert time.monotonic() - start <= 30 + 20
    page = (tmp_path / "summary.txt").read_text()
    for part in ("probe", "gate"):
        assert f"{part}: 1 numbers, from slow to slow" in page
        assert re.search(rf"{part}: \d+ of \d+ s, 2 of 3 done, 1 not reached", page)


def test_minutes_count_from_the_start_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORKER", ("-c", SLOW))
    start = time.monotonic()
    mode = gpu.Mode(rehearse=True)
    assert gpu.run(tmp_path, 1, ["probe"], mode, lambda line: None, started=start - 45) == 1
    assert time.monotonic() - start <= 15 + 20


def test_whoever_stays_on_the_gpu_is_waited_for_once(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(gpu, "WORKER", ("-c", WORKER % "made[:1]"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes, "wait_until_idle", lambda seconds: waits.append(seconds) or "BUSY: processes 7")
    gpu.run(tmp_path, 2, ["probe", "gate", "e2e"], say=lambda line: None)
    assert waits == [gpu.IDLE_WAIT, 0.0, 0.0]


def test_a_profile_that_failed_says_why(tmp_path, monkeypatch):
    play_ncu(tmp_path, monkeypatch)
    script = tmp_path / "bin/ncu"
    script.write_text(
        script.read_text().replace("sys.exit(status)", "open(out, 'w').write('==ERROR== no counters\\n'); sys.exit(9)")
    )
    assert gpu.run(tmp_path / "out", 2, ["ncu"], gpu.Mode(rehearse=True), lambda line: None) == 1
    assert "ncu: exit status 9: ==ERROR== no counters" in (tmp_path / "out/summary.txt").read_text()


def test_whoever_ends_it_from_outside_gets_the_summary(tmp_path):
    code = "import pathlib, sys\nfrom bench import gpu\ngpu.WORKER = ('-c', sys.argv[1])\n"
    code += "sys.exit(gpu.run(pathlib.Path(sys.argv[2]), 9, ['probe', 'gate'], gpu.Mode(rehearse=True)))"
    with checkout.packages() as options, (tmp_path / "said").open("w") as said:
        group = processes.Group([sys.executable, "-c", code, SLOW, str(tmp_path / "out")], said, **options)
        while len(found := record.lines(tmp_path / "out/probe.jsonl")) < 2:
            assert group.status() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)
        os.kill(group._process.pid, signal.SIGTERM)
        assert group.wait(20) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(found[0]["process"], 0)  # the worker has ended, too
    page = (tmp_path / "out/summary.txt").read_text()
    assert "gate: all of it" in page
    assert "interrupted" in (tmp_path / "said").read_text()


def test_a_fault_in_the_summary_costs_no_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORKER", ("-c", WORKER % "made[:2]"))
    monkeypatch.setattr(summary, "page", lambda *_: {}["missing"])
    assert gpu.run(tmp_path, 2, ["probe", "gate"], gpu.Mode(rehearse=True), lambda line: None) == 1
    assert len(record.lines(tmp_path / "gate.jsonl")) == 2
    page = (tmp_path / "summary.txt").read_text()
    assert re.fullmatch(r"probe: .*\nsummary: .*KeyError: 'missing'\ngate: .*\n", page)


def test_a_fault_of_one_part_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_ncu", lambda *_: {}["missing"])
    monkeypatch.setattr(gpu.ncu, "path", lambda: "ncu")
    monkeypatch.setattr(gpu, "_tests", lambda *_: None)
    assert gpu.run(tmp_path, 2, ["ncu", "tests"], gpu.Mode(rehearse=True), lambda line: None) == 1
    assert "tests: 0 of " in (tmp_path / "summary.txt").read_text()
    assert "ncu: KeyError: 'missing'" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "speed"], "unknown part speed; there are probe, gate, e2e, micro, attention, ncu, tests"),
        (["--rehearse", "--parts", "micro", "gate"], "has results already (micro.jsonl); give --out another folder"),
    ],
)
def test_what_cannot_be_is_explained(arguments, message, tmp_path, capsys):
    (tmp_path / "micro.jsonl").touch()
    assert command.main(["gpu", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_run(tmp_path, capsys):
    assert command.main(["gpu", "--out", str(tmp_path)]) == 2
    assert "bench gpu needs a GPU; without one: --rehearse plays it on a CPU" in capsys.readouterr().err


# --- the page --------------------------------------------------------------------------------------------------------


def on_gpu(op, backend, ms, host_ms, shape=None, **changes):
    one = make_record(
        (host_ms,) * 3, device_ms=(ms,) * 3, op=op, backend=backend, shape=shape or {"B": 1, "K": 64}, **changes
    )
    one.device, one.gpu = "cuda", "NVIDIA H100"
    return one


def test_the_page_says_what_is_right_wrong_fast_and_slow(tmp_path):
    record.append(tmp_path / "probe.jsonl", [{"probe": "gpu", "value": {"name": "NVIDIA H100", "capability": "9.0"}}])
    checked = {**vars(CHECKED), "errors": {"scores": (9e-8, 1e-7), "attention": (1e-8, 1e-7)}}
    record.append(tmp_path / "gate.jsonl", [vars(CHECKED), checked])
    micro_records = [
        on_gpu("select", "triton", 0.05, 0.9), on_gpu("select", "sdpa+row", 0.1, 0.3),
        on_gpu("topk", "triton", 0.04, 0.1), on_gpu("topk", "torch.topk", 0.02, 0.1),
        on_gpu("cls_attention", "triton 64x64 w4 s2", 0.08, 0.2, {"B": 16}, suite="attention"),
        on_gpu("cls_attention", "triton", 0.12, 0.2, {"B": 16}, suite="attention"),
        on_gpu("cls_attention", "sdpa+row_scores", 0.09, 0.2, {"B": 16}, suite="attention"),
    ]  # fmt: skip
    record.append(tmp_path / "micro.jsonl", micro_records)
    stages = [
        on_gpu(stage, name, ms, ms + 10, {"B": 1, "visual": visual, "text": 40}, suite="e2e")
        for stage in ("vision", "projector", "prefill")
        for name, visual, ms in (("sdpa", 576, 4.0), ("vtc 64", 64, 2.0))
    ]
    for name, ms in (("sdpa", 30.0), ("vtc 64", 40.0)):
        shape = {"B": 1, "visual": 64, "text": 40}
        stages.append(make_record((ms,) * 3, op="generate", backend=name, shape=shape, suite="e2e"))
    record.append(tmp_path / "e2e.jsonl", stages)
    tests = [{"collected": 5}, {"test": "t.py::a[1]", "outcome": "failed", "reason": "E   AssertionError: error 3 > 2"}]
    tests += [{"test": "t.py::a[2]", "outcome": "failed", "reason": "x"}, {"test": "t.py::b", "outcome": "passed"}]
    record.append(tmp_path / "tests.jsonl", tests)
    gated = Outcome(names=["one", "two", "three", "four"], failed={"three": "WrongResult: x"}, left=["four"])
    ran = {
        "gate": Ran(outcome=gated, failed=gated.failed, seconds=9.6, allowed=20),
        "tests": Ran(failed=summary.tests(tmp_path / "tests.jsonl").failed, idle="BUSY: processes 7"),
    }
    page = summary.page(tmp_path, ran, ["gate", "ncu", "tests"])
    head, *parts = re.split(r"\n\n(?=[A-Z ]{4,})", page)
    assert head.startswith("name NVIDIA H100")
    sections = {part.split("\n")[0].split(" (")[0]: part for part in parts}
    assert list(sections) == ["RIGHT", "WRONG", "FAST", "SLOW", "NO DEVICE TIME", "NOT REACHED", "PARTS"]
    for section, line in {
        "RIGHT": "gate: 2 of 4 checks against float64 passed",
        "WRONG": "gate: three: WrongResult: x",
        "FAST": "select small fp32: B=1 2.00x (triton 50.0 us, sdpa+row 100.0; host 0.33x)",
        "SLOW": "topk small fp32: B=1 0.50x (triton 40.0 us, torch.topk 20.0; host 1.00x)",
        "NOT REACHED": "ncu: all of it",
        "PARTS": "gate: 10 of 20 s, 2 of 4 done, 1 failed, 1 not reached",
    }.items():
        assert line in sections[section], page
    assert "the largest error is 0.90 of what is allowed: scores of topk small fp32" in sections["RIGHT"]
    assert "tests: 1 of 5 passed, 0 skipped" in sections["RIGHT"]
    assert "tests: t.py::a: 2 failed: AssertionError: error 3 > 2" in sections["WRONG"]
    assert "best triton 64x64 w4 s2 80.0 us (triton 120.0, sdpa+row_scores 90.0)" in sections["FAST"]
    assert "vtc 64, vision + projector + prefill as graphs: B=1 12.00 -> 6.00 ms = 2.00x" in sections["FAST"]
    assert "vtc 64, prefill: B=1 4.00 -> 2.00 ms = 2.00x (host 1.17x)" in sections["FAST"]
    assert "vtc 64, generate: host: B=1 30.00 -> 40.00 ms = 0.75x" in sections["SLOW"]
    assert "tests: 2 of 5" in sections["NOT REACHED"]
    assert "gate: 1 numbers, from four to four" in sections["NOT REACHED"]
    assert "before it the GPU was BUSY: processes 7" in sections["PARTS"]
    without = summary.page(tmp_path, {"ncu": Ran(note="there is no ncu here")}, ["ncu"])
    assert "COUNTERS" not in without
    assert "ncu: 0 of 0 s, there is no ncu here" in without
