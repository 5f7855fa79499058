"""vtc.ops: the choice of a backend, and what is said about arguments that do not fit."""

import logging
import subprocess
import sys

import pytest
import torch
from kernel_helpers import DEVICE

from vtc import ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUERY, KEY = torch.randn(2, 3, 8), torch.randn(2, 3, 10, 8)
SCORES, ROWS, INDICES = torch.randn(2, 10), torch.randn(2, 10, 4), torch.tensor([[0, 9], [3, 4]])


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("VTC_BACKEND", raising=False)


@pytest.fixture
def compiled(monkeypatch):
    """As if the kernels had been imported without TRITON_INTERPRET=1."""
    monkeypatch.setattr(ops, "_triton", lambda: ops._Triton({}, False, ""))


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "vtc_kernels", None)
    ops._triton.cache_clear()
    yield
    ops._triton.cache_clear()


@pytest.mark.parametrize("op", ops.OPS)
def test_auto_is_triton_on_a_gpu_and_torch_elsewhere(op):
    assert ops.backend_for(op, CUDA) == ("triton", "tensors on cuda")
    choice, reason = ops.backend_for(op, CPU)
    assert choice == "torch"
    assert "tensors on cpu" in reason


def test_asking_for_a_backend():
    assert ops.backend_for("topk", CUDA, "torch") == ("torch", "backend='torch'")
    assert ops.backend_for("topk", CUDA, "triton") == ("triton", "backend='triton'")


def test_the_environment_replaces_auto_and_nothing_else(monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "torch")
    assert ops.backend_for("topk", CUDA) == ("torch", "VTC_BACKEND=torch")
    assert ops.backend_for("topk", CUDA, "triton")[0] == "triton"
    monkeypatch.setenv("VTC_BACKEND", "auto")
    assert ops.backend_for("topk", CUDA)[0] == "triton"
    monkeypatch.setenv("VTC_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"VTC_BACKEND must be one of auto, triton, torch, or unset; got 'cuda'"):
        ops.topk(SCORES, 2)
    assert ops.backend_for("topk", CPU, "torch")[0] == "torch"


@pytest.mark.usefixtures("compiled")
def test_triton_without_a_gpu_explains_itself(monkeypatch):
    with pytest.raises(
        ValueError, match=r"backend='triton' needs CUDA tensors, got tensors on cpu.*TRITON_INTERPRET=1"
    ):
        ops.compact(ROWS, INDICES, backend="triton")
    monkeypatch.setenv("VTC_BACKEND", "triton")
    with pytest.raises(ValueError, match="VTC_BACKEND=triton needs CUDA tensors"):
        ops.compact(ROWS, INDICES)


def test_triton_in_the_interpreter_says_so():
    if DEVICE.type == "cuda":
        pytest.skip("the kernels are compiled here")
    assert ops.backend_for("topk", CPU, "triton") == ("triton", "backend='triton', in Triton's interpreter")


@pytest.mark.usefixtures("without_triton")
def test_without_triton():
    choice, reason = ops.backend_for("topk", CUDA)
    assert choice == "torch"
    assert "cannot be imported" in reason
    assert torch.equal(ops.topk(SCORES, 10), torch.arange(10).expand(2, -1))
    with pytest.raises(ValueError, match=r"backend='triton' cannot run, .* cannot be imported .*Install triton"):
        ops.topk(SCORES, 10, backend="triton")


def test_the_reference_needs_no_triton():
    code = "import sys, torch, vtc.ops; vtc.ops.topk(torch.ones(1, 3), 2); sys.exit('vtc_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(ops, "_announced", set())
    with caplog.at_level(logging.INFO, logger="vtc"):
        for _ in range(2):
            ops.topk(SCORES, 2)
            ops.topk(SCORES.to(DEVICE), 2, backend="triton")
            ops.compact(ROWS, INDICES)
    said = [record.getMessage() for record in caplog.records if record.name == "vtc"]
    assert len(said) == 3
    assert said[0] == "topk uses torch: tensors on cpu; the Triton kernels need a GPU"
    assert said[1].startswith("topk uses triton: backend='triton'")
    assert said[2].startswith("compact uses torch")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.backend_for("sort", CPU), "op must be one of row_scores, topk, compact, got 'sort'"),
        (lambda: ops.topk(SCORES, 2, backend="cuda"), "backend must be one of auto, triton, torch, got 'cuda'"),
        (lambda: ops.row_scores(QUERY[0], KEY), r"same B, H and D, got \[3, 8\] and \[2, 3, 10, 8\]"),
        (lambda: ops.row_scores(QUERY, KEY[:, :1]), "grouped-query attention"),
        (lambda: ops.row_scores(QUERY.half(), KEY), "one floating-point dtype, got torch.float16 and torch.float32"),
        (lambda: ops.row_scores(QUERY.int(), KEY.int()), "one floating-point dtype, got torch.int32"),
        (lambda: ops.row_scores(QUERY[:, :0], KEY[:, :0]), "at least one head"),
        (lambda: ops.row_scores(QUERY, KEY, skip=10), "0 <= skip < N = 10, or no column is left; got 10"),
        (lambda: ops.row_scores(QUERY, KEY, skip=-1), "got -1"),
        (lambda: ops.row_scores(QUERY, KEY, skip=True), "got True"),
        (lambda: ops.row_scores(QUERY, KEY, scale=float("nan")), "finite number or None, got nan"),
        (lambda: ops.row_scores(QUERY, KEY, skip=1, out=SCORES), r"\[2, 9\], got torch.float32 \[2, 10\]"),
        (lambda: ops.row_scores(QUERY, KEY, out=SCORES.half()), "out must be float32"),
        (lambda: ops.row_scores(QUERY, KEY.to("meta")), "one device, got query on cpu, key on meta"),
        (lambda: ops.topk(SCORES[0], 2), r"floating-point \[B, N\], got torch.float32 \[10\]"),
        (lambda: ops.topk(SCORES.long(), 2), "got torch.int64"),
        (lambda: ops.topk(SCORES, 11), "1 <= k <= N = 10 .*got 11"),
        (lambda: ops.topk(SCORES, 0), "got 0"),
        (lambda: ops.topk(SCORES, 2.0), "got 2.0"),
        (lambda: ops.topk(SCORES, True), "got True"),
        (lambda: ops.compact(ROWS[0], INDICES), r"same B, got \[10, 4\] and \[2, 2\]"),
        (lambda: ops.compact(ROWS, INDICES[:1]), r"same B, got \[2, 10, 4\] and \[1, 2\]"),
        (lambda: ops.compact(ROWS, INDICES.int()), r"must be int64, got torch.int32. Use indices.long\(\)"),
        (lambda: ops.compact(ROWS, INDICES + 1), r"\[0, N\) = \[0, 10\), got values from 1 to 10"),
        (lambda: ops.compact(ROWS, INDICES - 1), "got values from -1 to 8"),
        (lambda: ops.compact(ROWS.to("meta"), INDICES), "one device, got x on meta, indices on cpu"),
    ],
)
@pytest.mark.parametrize("environment", [None, "triton"])
def test_bad_arguments_are_explained(call, message, environment, monkeypatch):
    if environment and DEVICE.type == "cpu":  # the checks come before the choice, so on both backends
        monkeypatch.setenv("VTC_BACKEND", environment)
    with pytest.raises(ValueError, match=message):
        call()
