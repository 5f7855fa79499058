"""vtc.ops: the choice of a backend."""

import importlib
import logging
import subprocess
import sys

import pytest
import torch
from support.kernels import DEVICE

from vtc import ops
from vtc.ops import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCORES, TOKENS, INDICES = torch.randn(2, 10), torch.randn(2, 10, 4), torch.tensor([[0, 9], [3, 4]])


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("VTC_BACKEND", raising=False)


@pytest.fixture
def compiled(monkeypatch):
    """As if the kernels had been imported without TRITON_INTERPRET=1."""
    monkeypatch.setattr(dispatch, "_triton", lambda: dispatch._Triton({}, False, ""))


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "vtc_kernels", None)
    dispatch._triton.cache_clear()
    yield
    dispatch._triton.cache_clear()


@pytest.mark.parametrize("op", ops.OPS)
def test_auto_is_triton_on_a_gpu_and_torch_elsewhere(op):
    assert ops.backend_for(op, CUDA) == ("triton", "tensors on cuda")
    choice, reason = ops.backend_for(op, CPU)
    assert choice == "torch"
    assert "tensors on cpu" in reason


def test_fused_attention_is_taken_where_it_was_measured(monkeypatch):
    module = importlib.import_module("vtc.ops.cls_attention")  # as an attribute of vtc.ops it is the function
    assert not ops.fused_is_faster(CUDA, torch.float16, 80) or module.FUSED
    monkeypatch.setattr(module, "FUSED", frozenset({((9, 0), torch.float16, 64)}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ops.fused_is_faster(CUDA, torch.float16, 64)
    assert not ops.fused_is_faster(CUDA, torch.float16, 80)
    assert not ops.fused_is_faster(CUDA, torch.bfloat16, 64)
    assert not ops.fused_is_faster(CUDA, torch.float16, 64, "torch")
    assert not ops.fused_is_faster(CPU, torch.float16, 64)
    with monkeypatch.context() as amd:
        amd.setattr(torch.version, "hip", "6.4")
        assert not ops.fused_is_faster(CUDA, torch.float16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not ops.fused_is_faster(CUDA, torch.float16, 64)


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
        ops.compact(TOKENS, INDICES, backend="triton")
    monkeypatch.setenv("VTC_BACKEND", "triton")
    with pytest.raises(ValueError, match="VTC_BACKEND=triton needs CUDA tensors"):
        ops.compact(TOKENS, INDICES)


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
    monkeypatch.setattr(dispatch, "_announced", set())
    with caplog.at_level(logging.INFO, logger="vtc"):
        for _ in range(2):
            ops.topk(SCORES, 2)
            ops.topk(SCORES.to(DEVICE), 2, backend="triton")
            ops.compact(TOKENS, INDICES)
    said = [record.getMessage() for record in caplog.records if record.name == "vtc"]
    assert len(said) == 3
    assert said[0] == "topk uses torch: tensors on cpu; the Triton kernels need a GPU"
    assert said[1].startswith("topk uses triton: backend='triton'")
    assert said[2].startswith("compact uses torch")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.backend_for("sort", CPU), f"op must be one of {', '.join(ops.OPS)}, got 'sort'"),
        (lambda: ops.topk(SCORES, 2, backend="cuda"), "backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError, match=message):
        call()
