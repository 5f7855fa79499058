"""The gate of the GPU: every operation in every dtype, the same bits each time, errors with their bound."""

import pytest
import torch
from support.bench import CPU

from bench import gate
from bench.accuracy import WrongResult
from bench.workloads import WORKLOADS


def test_every_operation_is_gated_in_every_dtype():
    made = gate.jobs(torch.device("cuda"))
    first = made[0].name
    assert first.startswith("scored_layers LLaVA-1.5 bf16 B=2 T=1 N=577 H=16 D=64 K=64 triton")
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
