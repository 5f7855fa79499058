"""`bench micro`: every operation is timed, and what is wrong, broken or late gets no number."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from support.bench import CPU

from bench import (
    micro,
    record,
)
from bench.workloads import WORKLOADS
from bench.workloads.topk import TopK

QUICK = micro.Options(models=("small",), batches=(1,), keeps=(8,), rep_ms=1.0, providers=("reference", "sdpa+row"))


def test_micro_times_every_operation_on_a_cpu(tmp_path):
    said = []
    assert micro.run(QUICK, CPU, tmp_path / "micro.jsonl", said.append) == 0
    records = record.read(tmp_path / "micro.jsonl")
    assert {r.op for r in records} == set(WORKLOADS)
    assert {r.backend for r in records if r.op == "scored_layers"} == {"reference", "sdpa+row"}
    assert "no GPU: torch providers on small shapes; Triton timings need a GPU" in said
    assert all(r.ms_20 <= r.ms_50 <= r.ms_80 and r.bytes > 0 for r in records)


def test_a_wrong_or_broken_provider_gets_no_number(tmp_path, monkeypatch):
    def broken(scores, k):
        raise RuntimeError("out of memory")

    providers = {"reference": lambda scores, k: scores.sum(0).topk(k).indices, "broken": broken}
    monkeypatch.setattr(WORKLOADS["topk"], "providers", lambda: providers | {"torch.topk": right["torch.topk"]})
    right = TopK().providers()
    said = []
    options = micro.Options(ops=("topk",), models=("small",), batches=(1,), keeps=(8,), rep_ms=1.0)
    assert micro.run(options, CPU, tmp_path / "micro.jsonl", said.append) == 1
    assert [r.backend for r in record.read(tmp_path / "micro.jsonl")] == ["torch.topk"]
    assert "2 without a number" in said[-1]
    assert re.search(r"B=1 T=1 N=145 K=8 reference: WrongResult: indices", said[-1])
    assert "broken: RuntimeError: out of memory" in said[-1]
    assert list(record.failures(tmp_path / "micro.jsonl").values())[1] == "RuntimeError: out of memory"


def test_micro_leaves_out_what_it_has_no_time_for(tmp_path):
    said = []
    assert micro.run(dataclasses.replace(QUICK, budget=0.0), CPU, tmp_path / "micro.jsonl", said.append) == 1
    assert re.fullmatch(r"left out, the time is up: \d+ numbers", said[-1])
    assert not (tmp_path / "micro.jsonl").exists()


def test_micro_refuses_more_tokens_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="small has 144 patches, too few for K = 145; give a smaller --keep"):
        micro.run(dataclasses.replace(QUICK, ops=("topk",), keeps=(145,)), CPU, None)


def test_inputs_are_as_many_as_take_twice_the_cache(monkeypatch):
    about = SimpleNamespace(L2_cache_size=50 * 10**6, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    sets = {
        needed: micro.number_of_sets(needed, torch.device("cuda"))
        for needed in (10**4, 10**7, 10**9, 2 * 10**10, 10**11)
    }
    assert list(sets.values()) == [64, 10, 4, 1, 0]


def test_compiled_providers_are_timed_when_asked_for():
    def providers(options):
        return {job.name.split()[-1] for job in micro.jobs(options, CPU)}

    assert "compiled" not in providers(micro.Options())
    assert providers(micro.Options(providers=("compiled",))) == {"compiled"}
    assert micro.jobs(micro.Options(), CPU)[0].name.startswith("scored_layers small fp32")
