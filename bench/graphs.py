"""Captured CUDA graphs, which time the device without the host, and their replacement on a CPU."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vtc.hf.graphs.strict import Strict


def capture(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """The replay of a CUDA graph of `calls`, one after the other. Results are dropped, as replays overwrite them."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries initialise for each stream, which must not be captured
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer block puts the stream back even if the capture fails. During a capture, transformers makes an explicit
    # mask, with which SDPA would run another implementation than in a normal call.
    with torch.cuda.stream(stream), uncaptured(), torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all captures: libraries keep memory for each stream."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def uncaptured() -> Iterator[None]:
    """Inside, transformers behaves as without a capture, if it is imported and checks for captures."""
    import_utils: Any = sys.modules.get("transformers.utils.import_utils")
    checks = getattr(import_utils, "is_cuda_stream_capturing", None)
    if checks is None:
        yield
        return
    import_utils.is_cuda_stream_capturing = lambda: False
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = checks


def play(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """A loop in place of `capture`. Raises RuntimeError for operations that a capture refuses."""
    with Strict():
        calls[0]()

    def replay() -> None:
        for call in calls:
            call()

    return replay
