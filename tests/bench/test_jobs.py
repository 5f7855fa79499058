"""Jobs in this process: an exception costs one number, and records are on disk at once."""

import pytest
import torch
from support.bench import CHECKED

from bench import jobs, record, timing
from bench.accuracy import WrongResult
from bench.gate import Checked
from bench.jobs import Job


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
