"""`bench gpu`: it keeps to its minutes, and a fault of one part costs no other."""

import os
import re
import signal
import sys
import time

import pytest
import torch
from support.bench import CPU, SLOW, WORKER, play_ncu

from bench import __main__ as command
from bench import checkout, gpu, parts, processes, record, summary
from bench.summary import Ran
from bench.watch import Outcome


def test_no_pytest_is_no_clean_part(tmp_path, monkeypatch):
    """`python -m pytest` without pytest exits as if a test had failed."""
    monkeypatch.setattr(parts, "REHEARSED", ("no_such_file.py",))
    assert gpu.run(tmp_path, 2, ["tests"], gpu.Mode(rehearse=True), lambda line: None) == 1
    assert "pytest ended with exit status" in (tmp_path / "summary.txt").read_text()


def test_the_plan_takes_less_than_nine_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) < 9 * 60
    assert len({part.file for part in gpu.PARTS.values()} | {"log.txt", "summary.txt"}) <= 8
    assert list(gpu.PARTS) == ["probe", "gate", "e2e", "micro", "attention", "ncu", "tests"]


def test_what_matters_most_is_timed_first():
    names = [job.name for job in parts.part_jobs("micro", torch.device("cuda"), played=False)]
    assert names[0].startswith("scored_layers LLaVA-1.5 bf16 B=1 ")
    assert not any(name.endswith(" compiled") for name in names)
    later = [names.index(next(n for n in names if n.startswith(start))) for start in (
        "scored_layers LLaVA-1.5 bf16", "cls_probs LLaVA-1.5 bf16", "select LLaVA-1.5 bf16",
        "cls_attention LLaVA-1.5 bf16", "row_scores LLaVA-1.5 bf16", "topk LLaVA-1.5",
        "compact LLaVA-1.5 bf16", "scored_layers LLaVA-NeXT bf16",
    )]  # fmt: skip
    assert later == sorted(later)


def test_a_rehearsal_with_faults_loses_nothing_else(tmp_path, monkeypatch):
    """Two parts that are made of jobs, the profiles, and the tests."""
    play_ncu(tmp_path, monkeypatch)
    monkeypatch.setattr(parts, "REHEARSED", ("test_config.py",))
    said = []
    chosen = ["probe", "ncu", "tests"]
    mode = gpu.Mode(rehearse=True, plant=True)
    assert gpu.run(tmp_path / "out", 20, chosen, mode, said.append) == 0, said
    assert said[-1] == "each fault cost its own number, and nothing else"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"probe.jsonl", "ncu.csv", "tests.jsonl", "log.txt", "summary.txt"}
    names = [job.name for job in parts.part_jobs("probe", CPU, played=True)]
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


def test_minutes_are_honoured(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "WORKER", ("-c", SLOW))
    start = time.monotonic()
    assert gpu.run(tmp_path, 0.5, ["probe", "gate"], gpu.Mode(rehearse=True), lambda line: None) == 1
    assert time.monotonic() - start <= 30 + 20
    page = (tmp_path / "summary.txt").read_text()
    for part in ("probe", "gate"):
        assert f"{part}: 1 numbers, from slow to slow" in page
        assert re.search(rf"{part}: \d+ of \d+ s, 2 of 3 done, 1 not reached", page)


def test_minutes_count_from_the_start_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "WORKER", ("-c", SLOW))
    start = time.monotonic()
    mode = gpu.Mode(rehearse=True)
    assert gpu.run(tmp_path, 1, ["probe"], mode, lambda line: None, started=start - 45) == 1
    assert time.monotonic() - start <= 15 + 20


def test_whoever_stays_on_the_gpu_is_waited_for_once(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(parts, "WORKER", ("-c", WORKER % "made[:1]"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes, "wait_until_idle", lambda seconds: waits.append(seconds) or "BUSY: processes 7")
    gpu.run(tmp_path, 2, ["probe", "gate", "e2e"], say=lambda line: None)
    assert waits == [gpu.IDLE_WAIT, 0.0, 0.0]


def test_whoever_ends_it_from_outside_gets_the_summary(tmp_path):
    code = "import pathlib, sys\nfrom bench import gpu, parts\nparts.WORKER = ('-c', sys.argv[1])\n"
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
    monkeypatch.setattr(parts, "WORKER", ("-c", WORKER % "made[:2]"))
    monkeypatch.setattr(summary, "page", lambda *_: {}["missing"])
    assert gpu.run(tmp_path, 2, ["probe", "gate"], gpu.Mode(rehearse=True), lambda line: None) == 1
    assert len(record.lines(tmp_path / "gate.jsonl")) == 2
    page = (tmp_path / "summary.txt").read_text()
    assert re.fullmatch(r"probe: .*\nsummary: .*KeyError: 'missing'\ngate: .*\n", page)


def test_a_fault_of_one_part_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_ncu", lambda *_: {}["missing"])
    monkeypatch.setattr(parts.ncu, "path", lambda: "ncu")
    monkeypatch.setattr(parts, "_tests", lambda *_: None)
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
