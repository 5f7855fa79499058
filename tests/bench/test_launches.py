"""`bench launches`: what a call costs the host, and that it does not grow."""

import json

import pytest
import torch

from bench import __main__ as command
from bench import launches, record
from bench.checkout import ROOT
from vtc.hf import generate
from vtc.ops.compact_kv import compact_kv

RESULTS = ROOT / "bench/results/launches"


def excess(found):
    """By variant and stage: launches and calls; kernels and reads beyond the stock model's, which others may change."""
    stock = {each.stage: each for each in found if each.variant == "stock"}
    return {
        (each.variant, each.stage, name): getattr(each, name) - (getattr(stock[each.stage], name) if shared else 0)
        for each in found
        for name, shared in (("kernels", True), ("reads", True), ("launches", False), ("calls", False))
    }


def grown(found, known):
    now, then = excess(found), excess(known)
    return {key: (then[key], count) for key, count in now.items() if count > then[key] + 1e-6}


@pytest.fixture(scope="module")
def known():
    return record.read(RESULTS / launches.FILE, launches.Launches)


def test_no_count_grows(known):
    """After a change that is worth more: python -m bench launches --out bench/results/launches."""
    assert [(each.variant, each.stage) for each in known] == [
        (v, s) for v in launches.VARIANTS for s in launches.STAGES
    ]
    assert grown(list(launches.measure(time_them=False)), known) == {}


def test_a_longer_way_is_noticed(known, monkeypatch):
    monkeypatch.setattr(generate.LoneImage, "read", lambda *_: None)
    found = grown(list(launches.measure(("stock", "enable"), time_them=False)), known)
    assert {("enable", "prompt", "kernels"), ("enable", "first token", "kernels")} <= found.keys()
    assert not any(stage in ("image", "step") for _, stage, _ in found)


def test_the_earlier_record_is_of_the_same_stages(known):
    before = record.read(RESULTS / launches.BEFORE, launches.Launches)
    assert [(each.variant, each.stage) for each in before] == [(each.variant, each.stage) for each in known]
    assert {each.revision for each in before} == {before[0].revision}
    assert grown(known, before) == {}
    assert grown(before, known)


def test_what_is_counted():
    x, cache, indices = torch.randn(3, 4), torch.randn(1, 2, 9, 4), torch.tensor([[1, 3, 5]])
    count = launches.counts
    assert count(lambda: x.transpose(0, 1)[1:].expand(2, 3, 3)) == {"kernels": 0, "launches": 0, "reads": 0, "calls": 0}
    assert count(lambda: (x + 1).sum())["kernels"] == 2
    assert count(lambda: torch.empty(3).view(1, 3))["kernels"] == 0
    reads = {
        "tolist": lambda: x[0].tolist(),
        "item": lambda: x[0, 0].item(),
        "truth": lambda: bool(x[0, 0] > 2),
        "equal": lambda: torch.equal(x, x),
        "nonzero": x.nonzero,
    }
    for name, read in reads.items():
        assert count(read)["reads"] == 1, name
    found = count(lambda: compact_kv([cache] * 4, [cache] * 4, indices))
    assert (found["kernels"], found["launches"], found["reads"]) == (1, 1, 0)  # the table of addresses is copied
    assert found["calls"] > 5


def test_counting_leaves_nothing_behind():
    x = torch.arange(3)
    launches.counts(lambda: None)
    assert x.tolist() == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        launches.counts(lambda: 1 / 0)
    assert torch.Tensor.tolist.__name__ == "tolist"


def test_the_command_writes_one_record(tmp_path, monkeypatch, capsys):
    made = launches.Launches(
        model="bundled", stage="step", variant="stock", keep=64, kernels=175.0, launches=0.0, reads=1.0, calls=2.0,
        us=1.0, **record.provenance(torch.device("cpu")),
    )  # fmt: skip
    monkeypatch.setattr(launches, "measure", lambda: iter([made]))
    for _ in range(2):
        assert command.main(["launches", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "| step | stock | 175 | 0 | 1 | 2 |" in out
    (line,) = (tmp_path / "new" / launches.FILE).read_text().splitlines()
    assert json.loads(line)["kernels"] == 175


def test_a_table_shows_what_changed():
    now, old = (
        launches.Launches(
            model="bundled", stage="image", variant="block", keep=64, kernels=2.0, launches=count, reads=0.0,
            calls=5.0, us=1.0, **record.provenance(torch.device("cpu")),
        )
        for count in (2.0, 8.0)
    )  # fmt: skip
    assert launches.table([now], [old]).splitlines()[-1] == "| image | block | 2 | 2 (8) | 0 | 5 |"
