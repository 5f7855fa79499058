"""Captured CUDA graphs, which time the device without the host, and their replacement on a CPU."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
    with _NoSync():
        calls[0]()

    def replay() -> None:
        for call in calls:
            call()

    return replay


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive")


def is_masked(name: str, args: Sequence[Any]) -> bool:
    """Whether an operation reads or writes where a mask is true, and so has to count."""
    return name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


class _NoSync(TorchDispatchMode):
    """Refuses operations that synchronise with the host: on a GPU, these end a capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or is_masked(name, args):
            raise RuntimeError(f"aten.{name} would wait for the GPU")
        return func(*args, **(kwargs or {}))
