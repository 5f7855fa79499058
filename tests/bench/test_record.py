"""Records hold their provenance and survive a writer that was killed; tables show every one of them."""

import dataclasses
import re
import subprocess

import pytest
import torch
from support.bench import make_record

from bench import (
    record,
    table,
)


def test_a_record_holds_its_provenance(tmp_path):
    one = make_record()
    assert set(record.FIELDS) == set(dataclasses.asdict(one))
    assert (one.ms_20, one.ms_50, one.ms_80) == (1.0, 2.0, 4.0)
    assert one.gb_per_s == pytest.approx(0.5)  # 1e6 bytes in 2 ms
    assert one.copy_share == pytest.approx(0.05)
    assert one.torch == torch.__version__
    assert one.device == "cpu"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", one.date)
    record.append(tmp_path / "micro.jsonl", [one])
    record.append(tmp_path / "micro.jsonl", [one])
    assert record.read(tmp_path / "micro.jsonl") == [one, one]


def test_the_revision_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.delenv("VTC_REVISION", raising=False)
    assert record.git_state(tmp_path) == (None, None)
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "1")
    assert record.git_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "another").touch()
    assert record.git_state(tmp_path) == (git("rev-parse", "HEAD"), True)
    monkeypatch.setenv("VTC_REVISION", "c27cee3")  # files copied over an older .git, or without one
    assert record.git_state(tmp_path) == ("c27cee3", None)


def test_speed_ups_are_against_every_other_and_losses_stay():
    fast, slow = make_record(backend="fast"), make_record(backend="slow", host=(2.0, 8.0, 9.0))
    text = table.tables([fast, slow])
    assert re.search(r"\| fast +\| 1000.0 +\| 2000.0 +\| 4000.0 +\|.*\| +\| 4.00 +\|$", text, re.MULTILINE)
    assert re.search(r"\| slow +\| 2000.0 +\| 8000.0 +\| 9000.0 +\|.*\| 0.25", text)


def test_speed_ups_are_the_devices_where_there_is_a_device_time():
    fast = make_record(backend="fast", host=(9.0, 9.0, 9.0), device_ms=(1.0, 2.0, 3.0))
    slow = make_record(backend="slow", host=(9.0, 9.0, 9.0), device_ms=(1.0, 3.0, 3.0), sdpa="cudnn")
    text = table.tables([fast, slow])
    assert re.search(r"\| fast .*\| 9000.0 +\| 9000.0 +\| 1000.0 +\| 2000.0 +\| 3000.0 +\|.*\| 1.50 +\|$", text, re.M)
    assert "| slow (cudnn) |" in text
    assert fast.gb_per_s == pytest.approx(0.5)  # 1e6 bytes in the device's 2 ms


def test_variants_with_fewer_visual_tokens_stand_beside_the_stock_model():
    stock = make_record(suite="e2e", op="prefill", backend="sdpa", shape={"B": 4, "visual": 576, "text": 40})
    other = make_record(suite="e2e", op="prefill", backend="vtc 64", shape={"B": 4, "visual": 64, "text": 40})
    larger = make_record(suite="e2e", op="prefill", backend="sdpa", shape={"B": 16, "visual": 576, "text": 40})
    assert table.case(stock) == table.case(other) != table.case(larger)


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    """A writer may be killed within its line, and another one goes on in the same file."""
    path = tmp_path / "micro.jsonl"
    one = make_record()
    record.append(path, [one])
    path.write_text(path.read_text() + path.read_text()[:70])
    record.append(path, [{"job": "topk", "failed": "killed"}])
    record.append(path, [one])
    assert record.read(path) == [one, one]
    assert record.failures(path) == {"topk": "killed"}
    assert record.read(tmp_path / "none.jsonl") == []
