"""`CudaRecorder`, without a GPU: the order of what it asks of CUDA, and what it leaves behind if a capture fails.

PyTorch's own `torch.cuda.graph` runs; streams and graphs are stand-ins.
"""

import contextlib
from unittest import mock

import pytest
import torch

from vtc.hf.graphs import capture

DEVICE = torch.device("cuda:0")


class Entered:
    """In place of `torch.cuda.stream(...)`."""

    def __init__(self, cuda, stream):
        self.cuda, self.name = cuda, f"stream {stream.number}"

    def __enter__(self):
        self.before, self.cuda.current = self.cuda.current, self.name

    def __exit__(self, *_):
        self.cuda.current = self.before


class Cuda:
    """Notes what it is asked for. `current` is the stream of this thread."""

    def __init__(self):
        self.current, self.said, self.fails, self.pools = "default", [], False, 0

    def stream_named(self, number):
        return mock.Mock(wait_stream=lambda other: self.said.append(f"stream {number} waits"), number=number)

    def stream(self, stream):
        return Entered(self, stream)

    def graph(self):
        def end():
            self.said.append("capture ends")
            if self.fails:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        def begin(*args, **kwargs):
            self.said.append(f"capture begins on {self.current}")

        return mock.Mock(capture_begin=begin, capture_end=end, replay=lambda: self.said.append("replay"))

    def pool(self):
        self.pools += 1
        return self.pools


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    streams = iter(range(1, 9))
    replaced = {
        "Stream": lambda device: made.stream_named(next(streams)),
        "stream": made.stream,
        "CUDAGraph": made.graph,
        "graph_pool_handle": made.pool,
        "current_stream": lambda device=None: made.current if hasattr(made.current, "wait_stream") else mock.Mock(),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda *_: made.said.append("synchronise"),
        "empty_cache": lambda: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    ended = lambda *args: made.said.append(f"pool {args[1]} ends")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    return made


def test_a_function_is_warmed_up_on_another_stream_than_the_captures(cuda):
    recorder, seen = capture.CudaRecorder(DEVICE), []
    replay = recorder.record(lambda: seen.append(cuda.current), [], [])
    assert seen == ["stream 2", "stream 2", "stream 1"]
    assert cuda.said.count("capture begins on stream 1") == 1
    assert cuda.current == "default"
    replay()
    assert cuda.said[-1] == "replay"


def test_a_failed_capture_leaves_the_stream_and_takes_another_pool(cuda):
    recorder, calls = capture.CudaRecorder(DEVICE), []

    def function():
        calls.append(cuda.current)
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    cuda.fails = True
    with pytest.raises(RuntimeError):
        recorder.record(function, [], [])
    assert cuda.current == "default"
    assert cuda.said[-1] == "pool 1 ends"
    cuda.fails = False
    recorder.record(lambda: None, [], [])
    assert recorder._pool == 2


def test_what_a_capture_would_refuse_begins_none(cuda):
    with pytest.raises(RuntimeError, match=r"aten\._local_scalar_dense waits for the device"):
        capture.CudaRecorder(DEVICE).record(lambda: torch.ones(1).item(), [], [])
    assert not [text for text in cuda.said if "capture" in text]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.to("meta"), r"a tensor \[2\] is copied from cpu to meta"),
        (lambda x: torch.empty(2, device="meta").copy_(x), r"a tensor \[2\] is copied from cpu to meta"),
        (lambda x: x.allclose(x), "aten.allclose waits"),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2])), "aten.repeat_interleave waits"),
    ],
)
def test_copies_between_devices_are_refused(cuda, call, message):
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match=message):
        capture.CudaRecorder(DEVICE).record(lambda: call(x), [], [])
    allowed = lambda: (x.to(torch.float64), x.repeat_interleave(2), x.clone().copy_(x))  # noqa: E731
    capture.CudaRecorder(DEVICE).record(allowed, [], [])


def test_streams_wait_for_the_replays_before(cuda):
    recorder = capture.CudaRecorder(DEVICE)
    first, second = cuda.stream_named(7), cuda.stream_named(8)
    cuda.current = first
    recorder.begin()
    cuda.said.clear()
    recorder.begin()
    assert cuda.said == []
    cuda.current = second
    recorder.begin()
    recorder.begin()
    assert cuda.said == ["stream 8 waits"]
